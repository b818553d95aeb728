"""Appending b rows costs b rows: time per appended batch at small and large M.

python benchmarks/append.py [--json FILE]
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from pizoo.nn import InfPiLinear

BATCH, RANK, APPENDS = 8, 100, 2000


def time_per_append(rows: int) -> float:
    """Median microseconds to append a batch to a layer of ``rows`` rows with room reserved."""
    layer = InfPiLinear(RANK, RANK, dtype=torch.float16)
    layer.reserve(rows + BATCH * APPENDS)
    filler = torch.randn(rows - layer.count, RANK)
    layer.append(filler, filler, 1.0)
    new = torch.randn(BATCH, RANK)
    times = []
    for _ in range(APPENDS):
        begin = time.perf_counter()
        layer.append(new, new, -0.1)
        times.append(time.perf_counter() - begin)
    assert layer.count == rows + BATCH * APPENDS
    return 1e6 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    result = {
        "command": " ".join(["python", *sys.argv]),
        "what": f"microseconds per appended batch of {BATCH} rows, rank {RANK}, float16 rows, median of {APPENDS}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "microseconds": {rows: round(time_per_append(rows), 2) for rows in (10_000, 100_000, 1_000_000)},
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
