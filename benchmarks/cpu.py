"""The growing layer's ops on a CPU: the default against the plain reference, time and memory.

    python benchmarks/cpu.py [--rows 100000] [--json benchmarks/results/ops_cpu.json]

r = 400; hidden layer (400 columns) and read-out (10 columns), batches of 8 and 80, float32 and float16 rows. Time is the
best of runs that take turns until ``AGREEING`` come within 5 % of it: where other processes run, a lucky time is rare and
more rounds wait for it. Memory is what the process grew by at its peak beyond rows and inputs, each in a process of its own
(Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from pizoo import ops
from pizoo.functional import unit

RANK, COLUMNS, BATCHES = 400, {"hidden": 400, "readout": 10}, (8, 80)
AGREEING, MOST_ROUNDS = 5, 100
DTYPES = (torch.float32, torch.float16)
IMPLEMENTATIONS = {"default": None, "reference": "reference"}


def layer(M: int, columns: int, b: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """gbar, A, B, amult and delta; rows are made in place, so that the process has not been larger than it is."""
    torch.manual_seed(0)
    A, B = torch.empty(M, columns, dtype=dtype).normal_(), torch.empty(M, RANK, dtype=dtype).normal_(0, RANK**-0.5)
    return unit(torch.randn(b, RANK))[0], A, B, torch.randn(M), torch.randn(b, columns)


def run(op: str, implementation: str, gbar, A, B, amult, delta) -> None:
    with ops.use(IMPLEMENTATIONS[implementation]):
        if op == "forward":
            ops.growing_forward(gbar, A, B, amult)
        else:
            ops.growing_backward(gbar, A, B, amult, delta)


def seconds(op: str, inputs: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Best time of each implementation, in turns, until several of each agree with its best (or there is no hope of it)."""
    times = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(MOST_ROUNDS):
        for name, taken in times.items():
            begin = time.perf_counter()
            run(op, name, *inputs)
            taken.append(time.perf_counter() - begin)
        if all(sum(t < 1.05 * min(taken) for t in taken) >= AGREEING for taken in times.values()):
            break
    return {name: min(taken) for name, taken in times.items()}


def grown_bytes(op: str, implementation: str, M: int, columns: int, b: int, dtype: torch.dtype) -> int:
    """What a process grows by at its peak while it runs an op once."""
    call = f"cpu.peak({op!r}, {implementation!r}, {M}, {columns}, {b}, {dtype})"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return int(subprocess.check_output([sys.executable, "-c", f"import cpu, torch; {call}"], env=environment))


def peak(op: str, implementation: str, M: int, columns: int, b: int, dtype: torch.dtype) -> None:
    """Print what this process grows by at its peak; for a process of its own."""
    run(op, implementation, *layer(100, columns, b, dtype))  # libraries make room for themselves when first used
    inputs = layer(M, columns, b, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    run(op, implementation, *inputs)
    print(_status("VmHWM") - before)


def _status(field: str) -> int:
    """Bytes this process holds (VmRSS), or has held at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    for name, columns in COLUMNS.items():
        for b in BATCHES:
            for dtype in DTYPES:
                inputs = layer(args.rows, columns, b, dtype)
                for op in ("forward", "backward"):
                    times = seconds(op, inputs)
                    grown = {i: grown_bytes(op, i, args.rows, columns, b, dtype) for i in IMPLEMENTATIONS}
                    case = {"layer": name, "op": op, "batch": b, "dtype": str(dtype).removeprefix("torch.")}
                    results.append(case | {"seconds": times, "grown_bytes": grown})
                    told = "  ".join(
                        f"{i} {1e3 * times[i]:7.1f} ms {grown[i] / 2**20:6.1f} MiB" for i in IMPLEMENTATIONS
                    )
                    print(f"{name:8} {op:8} batch {b:2} {case['dtype']:8} {told}", flush=True)
    if args.json:
        report = {"command": " ".join(["python", *sys.argv]), "rows": args.rows, "rank": RANK}
        report |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "results": results}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
