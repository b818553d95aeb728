"""Time of the growing layers' ops against the number of rows, the memory limit drawn in, and their error.

    python benchmarks/ops.py [--out benchmarks/results] [--rows 50000 250000 1000000 2500000]

One step of ``cifar10_infpi`` (r = 400, batch 8, float16): forward and backward of the hidden layer (400 columns), output and
Jacobian of the read-out (10 columns), replayed as one CUDA graph. The limit counts every row read once forward and once
backward at the bandwidth of a device-to-device copy measured in the same run; the Jacobian needs no second pass. Times are
medians; rows are random. Errors are relative, in norm, against float64 on the same rounded rows and inputs, at ``ERROR_ROWS``.
Writes ``ops_<gpu>.json`` and ``ops_<gpu>.png``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from pizoo import ops
from pizoo.functional import unit
from pizoo.ops import reference

RANK, BATCH, FEW_SHOT_BATCH, COLUMNS = 400, 8, 80, {"hidden": 400, "readout": 10}
CUDA = torch.device("cuda")
ERROR_ROWS, ERROR_BLOCK = 1_000_000, 50_000
PLAIN_ROWS = 1_000_000  # beyond it plain torch is not timed
SCALES = ((1.0, 1.0), (1e-6, 1.0), (4.0, 1.0), (1.0, 1e-6))  # of amult and of A
STEP = (("hidden", "forward"), ("readout", "jacobian"), ("hidden", "backward"))


def random_layer(M: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, B, amult of M rows, A padded so that rows start at multiples of 32 bytes."""
    A = torch.empty(M, -(-columns // 16) * 16, dtype=torch.float16, device=CUDA)[:, :columns]
    B = torch.empty(M, RANK, dtype=torch.float16, device=CUDA)
    for part, rows in zip(A.split(1 << 18), B.split(1 << 18), strict=True):
        part.copy_(torch.randn(part.shape, device=CUDA))
        rows.copy_(unit(torch.randn(rows.shape, device=CUDA))[0])
    return A, B, torch.randn(M, device=CUDA)


def calls(name: str, layer: tuple[Tensor, Tensor, Tensor], b: int, count: Tensor) -> dict[str, Callable[[], object]]:
    """The ops of one layer on random inputs and gradients."""
    gbar = unit(torch.randn(b, RANK, device=CUDA))[0]
    delta = torch.randn(b, COLUMNS[name], device=CUDA)
    return {
        f"{name} forward": lambda: ops.growing_forward(gbar, *layer, count),
        f"{name} backward": lambda: ops.growing_backward(gbar, *layer, delta, count),
        f"{name} jacobian": lambda: ops.growing_forward_jacobian(gbar, *layer, count),
    }


def milliseconds(*functions: Callable[[], object], repeat: int = 10, rounds: int = 7) -> float:
    """Median time of running the functions one after the other, captured ``repeat`` times in one CUDA graph."""
    for function in functions:
        function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            for function in functions:
                function()
    return eager_milliseconds(graph.replay, rounds=rounds) / repeat


def eager_milliseconds(function: Callable[[], object], rounds: int = 7) -> float:
    """Median time of one call, between device events, after two calls to warm up."""
    times = []
    for _ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def errors() -> list[dict]:
    """Relative error of every op in float16, over scales of amult and of A."""
    results = []
    for amult_scale, A_scale in SCALES:
        for name, columns in COLUMNS.items():
            A, B, amult = random_layer(ERROR_ROWS, columns)
            A, amult = (A.float() * A_scale).half(), amult * amult_scale
            gbar, delta = unit(torch.randn(BATCH, RANK, device=CUDA))[0], torch.randn(BATCH, columns, device=CUDA)
            found = {"forward": (ops.growing_forward(gbar, A, B, amult),)}
            found["backward"] = (ops.growing_backward(gbar, A, B, amult, delta),)
            if ops.fused(gbar, A, "growing_forward_jacobian"):
                found["jacobian"] = ops.growing_forward_jacobian(gbar, A, B, amult)
            blocks = list(zip(*(part.split(ERROR_BLOCK) for part in (A, B, amult)), strict=True))
            for op, parts in found.items():
                exact = [torch.zeros_like(part, dtype=torch.float64) for part in parts]
                for block in blocks:
                    for total, more in zip(exact, _exact(op, gbar.double(), delta.double(), block), strict=True):
                        total += more
                error = max(float((x - y).norm() / y.norm()) for x, y in zip(parts, exact, strict=True))
                results.append({"op": f"{name} {op}", "amult": amult_scale, "A": A_scale, "relative_error": error})
                print(f"error of {name} {op}, amult {amult_scale:g}, A {A_scale:g}: {error:.1e}", flush=True)
    return results


def _exact(op: str, gbar: Tensor, delta: Tensor, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    rows = tuple(part.double() for part in rows)
    if op == "forward":
        return (reference.growing_forward(gbar, *rows),)
    if op == "backward":
        return (reference.growing_backward(gbar, *rows, delta),)
    return reference.growing_forward_jacobian(gbar, *rows)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 4 GB."""
    source = torch.randn(1 << 30, device=CUDA)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (eager_milliseconds(lambda: target.copy_(source)) * 1e-3)


def measure(rows: list[int]) -> dict:
    """All numbers of the JSON file."""
    bandwidth = copy_bandwidth()
    layers = {name: random_layer(max(rows), columns) for name, columns in COLUMNS.items()}
    row_bytes = {name: 2 * layer[0].stride(0) + 2 * RANK + 4 for name, layer in layers.items()}
    results = []
    for M in rows:
        count = torch.tensor([M], device=CUDA)
        ops_of = {key: call for name, layer in layers.items() for key, call in calls(name, layer, BATCH, count).items()}
        del ops_of["hidden jacobian"]
        step = [ops_of[f"{name} {op}"] for name, op in STEP]
        few_shot = calls("hidden", layers["hidden"], FEW_SHOT_BATCH, count)
        result = {
            "rows": M,
            "limit_ms": 2 * M * sum(row_bytes.values()) / bandwidth * 1e3,
            "step_ms": milliseconds(*step),
            "ops_ms": {name: milliseconds(call) for name, call in ops_of.items()},
            "few_shot_hidden_ms": milliseconds(few_shot["hidden forward"], few_shot["hidden backward"]),
        }
        result["share_of_copy_bandwidth"] = {
            name: M * row_bytes[name.split()[0]] / (time * 1e-3) / bandwidth for name, time in result["ops_ms"].items()
        }
        results.append(result)
        print(f"M = {M:>9,}: step {result['step_ms']:.3f} ms, two-pass limit {result['limit_ms']:.3f} ms", flush=True)
        if M > PLAIN_ROWS:
            continue
        with ops.use("blocked"):
            sliced = {name: tuple(part[:M] for part in layer) for name, layer in layers.items()}
            plain = {key: c for name, layer in sliced.items() for key, c in calls(name, layer, BATCH, None).items()}
            result["plain_torch_step_ms"] = eager_milliseconds(lambda p=plain: [p[f"{n} {op}"]() for n, op in STEP], 3)
            plain = calls("hidden", sliced["hidden"], FEW_SHOT_BATCH, None)
            result["plain_torch_few_shot_hidden_ms"] = eager_milliseconds(
                lambda p=plain: (p["hidden forward"](), p["hidden backward"]()), 3
            )
    return {
        "command": " ".join(["python", *sys.argv]),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rank": RANK,
        "batch": BATCH,
        "few_shot_batch": FEW_SHOT_BATCH,
        "columns": COLUMNS,
        "dtype": "float16",
        "copy_bandwidth_TB_s": bandwidth / 1e12,
        "bytes_per_row_and_pass": row_bytes,
        "results": results,
        "error_rows": ERROR_ROWS,
        "errors": errors(),
    }


def draw(report: dict, path: Path) -> None:
    """Time per step against rows: measured, plain torch, and the memory limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = report["results"]
    rows = [result["rows"] for result in results]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), facecolor="white")
    plain = [(r["rows"], r["plain_torch_step_ms"]) for r in results if "plain_torch_step_ms" in r]
    axes.loglog(*zip(*plain, strict=True), "s-", color="tab:gray", label="plain torch, blocked")
    axes.loglog(rows, [r["step_ms"] for r in results], "o-", color="tab:blue", label="fused")
    axes.loglog(rows, [r["limit_ms"] for r in results], "--", color="black", label="memory limit of two passes")
    axes.set_xlabel("rows M")
    axes.set_ylabel("forward and backward of both growing layers [ms]")
    axes.set_title(
        f"{report['gpu']}, r = {RANK}, batch {BATCH}, float16 ({report['copy_bandwidth_TB_s']:.2f} TB/s copy)"
    )
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 50_000, 250_000, 1_000_000, 2_500_000])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device", file=sys.stderr)
        return 2
    report = measure(arguments.rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"ops_{report['gpu'].removeprefix('NVIDIA ').lower().replace(' ', '_')}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, stem.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
