"""Rows streamed from host memory: forward and backward of both growing layers against the bus.

    python benchmarks/streaming.py [--rows 2500000] [--batch 8] [--out benchmarks/results]

``cifar10_infpi``'s layers (r = 400, float16; 6 GB at 2,500,000 rows) stay in page-locked host memory. The limit is the
bandwidth of one large copy from pinned memory to the GPU, measured in the same run; the share of it is what the bytes of
``A`` and ``B`` take at that bandwidth, over what the op took, launches and sums included. Times are medians between device
events. Writes ``streaming_<gpu>.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from ops import COLUMNS, RANK, STEP, calls, eager_milliseconds
from torch import Tensor

from pizoo import ops
from pizoo.memory import empty_on_host
from pizoo.ops import streamed

CUDA = torch.device("cuda")
COPY_BYTES = 1 << 32


def host_bandwidth() -> float:
    """Bytes per second of one copy of 4 GiB from memory that torch pinned to the GPU."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=CUDA)
    return COPY_BYTES / (eager_milliseconds(lambda: target.copy_(source, non_blocking=True)) * 1e-3)


def host_layer(M: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, B on the host and amult on the GPU of M random rows, drawn on the GPU."""
    A, B = (empty_on_host((M, n), torch.float16) for n in (columns, RANK))
    for part in (*A.split(1 << 18), *B.split(1 << 18)):
        part.copy_(torch.randn(part.shape, device=CUDA) / part.shape[1] ** 0.5)
    return A, B, torch.randn(M, device=CUDA)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_500_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device", file=sys.stderr)
        return 2
    bandwidth = host_bandwidth()
    torch.cuda.empty_cache()
    begin = time.perf_counter()
    layers = {name: host_layer(arguments.rows, columns) for name, columns in COLUMNS.items()}
    filled = time.perf_counter() - begin
    assert all(part.is_pinned() for A, B, _ in layers.values() for part in (A, B))
    row_bytes = {name: A[0].nbytes + B[0].nbytes for name, (A, B, _) in layers.items()}

    measured = {
        f"{name} {op}": (calls(name, layers[name], arguments.batch, None)[f"{name} {op}"], row_bytes[name])
        for name, op in STEP
    }
    whole = [call for call, _ in measured.values()]
    measured["step"] = (lambda: [call() for call in whole], 2 * sum(row_bytes.values()))
    torch.cuda.reset_peak_memory_stats()
    at_rest = torch.cuda.memory_allocated()
    results = {}
    print(f"copy from the host {bandwidth / 1e9:.1f} GB/s, M = {arguments.rows:,}, rows filled in {filled:.1f} s")
    for name, (call, size) in measured.items():
        ms = eager_milliseconds(call, rounds=5)
        rate = arguments.rows * size / (ms * 1e-3)
        results[name] = {
            "ms": ms,
            "GB": arguments.rows * size / 1e9,
            "GB_s": rate / 1e9,
            "share_of_bandwidth": rate / bandwidth,
        }
        print(
            f"{name:>17}  {ms:8.2f} ms  {rate / 1e9:6.1f} GB/s  {100 * rate / bandwidth:5.1f} % of the copy", flush=True
        )
    report = {
        "command": " ".join(["python", *sys.argv]),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "fused": ops.fused(torch.empty(1, RANK, device=CUDA), layers["hidden"][0][:1].to(CUDA)),
        "rows": arguments.rows,
        "rank": RANK,
        "batch": arguments.batch,
        "dtype": "float16",
        "chunk_bytes": streamed.CHUNK_BYTES,
        "buffers": streamed.BUFFERS,
        "copy_GB_s": bandwidth / 1e9,
        "device_bytes_beyond_amult": torch.cuda.max_memory_allocated() - at_rest,
        "results": results,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = report["gpu"].removeprefix("NVIDIA ").lower().replace(" ", "_")
    (arguments.out / f"streaming_{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
