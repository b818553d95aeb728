"""Time per outer step of the Omniglot nets (8 tasks of 5 ways, 1 shot), everything included, against the number of rows M.

    python benchmarks/tasks.py [--rows 50000 500000 2000000 4000000] [--steps 200] [--json FILE] [--png FILE]

Images are random (time does not depend on them); nets and settings are the recipes'. Needs a GPU.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from ops import copy_bandwidth
from steps import draw, fill

from pizoo.data import TaskPool, device_uniform
from pizoo.recipes import load_recipe
from pizoo.training.meta import MetaTraining

PAPER_MS = {50_000: 37.0, 500_000: 40.0, 2_000_000: 74.0, 4_000_000: 129.0}
BYTES_PER_ROW = 3200  # A and B of the hidden layer, float16, once forward and once backward
SPLITS = {"train": 50, "validation": 20, "test": 20}


def training(entry: str, steps: int) -> MetaTraining:
    """A training of ``entry`` on random characters."""
    generator = torch.Generator().manual_seed(0)
    pools = {
        split: TaskPool(split, torch.randint(0, 256, (classes, 20, 1, 28, 28), dtype=torch.uint8, generator=generator))
        for split, classes in SPLITS.items()
    }
    overrides = ["train.epochs=1", f"train.steps_per_epoch={steps}", "train.schedule={name: constant}"]
    return MetaTraining(load_recipe(entry, overrides), pools, None, torch.device("cuda"))


def time_steps(run: MetaTraining, steps: int) -> tuple[float, float]:
    """Milliseconds per outer step, and seconds to compile and capture."""
    size, dtype = run.recipe.train.batch_size, next(run.model.parameters()).dtype
    batch = run.pool.draw(device_uniform(run.device, 0, 0), steps * size).to(dtype)
    seconds = []
    for _ in range(2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        told = run.engine.run_tasks(batch, 0)
        seconds.append(time.perf_counter() - begin)
        assert all(value == value for value in told[-1])
    return 1e3 * seconds[1] / steps, seconds[0] - seconds[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(PAPER_MS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    report = {
        "command": " ".join(["python", *sys.argv]),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    report |= {"copy_bandwidth": bandwidth, "steps": []}
    for rows in args.rows:
        run = training("omniglot_infpi", args.steps)
        fill(run, rows, 80 * 3 * args.steps)
        ms, setup = time_steps(run, args.steps)
        limit = 1e3 * rows * BYTES_PER_ROW / bandwidth
        row = {
            "entry": "omniglot_infpi",
            "rows": rows,
            "ms": ms,
            "two_pass_limit_ms": limit,
            "paper_ms": PAPER_MS.get(rows),
        }
        report["steps"].append(row | {"setup_s": setup})
        print(f"omniglot_infpi M={rows:>9,}  {ms:.3f} ms  two-pass limit {limit:.3f}  setup {setup:.1f} s", flush=True)
        del run
        torch.cuda.empty_cache()
    for entry in ("omniglot_finpi", "omniglot_mu"):
        ms, setup = time_steps(training(entry, args.steps), args.steps)
        report["steps"].append({"entry": entry, "ms": ms, "setup_s": setup})
        print(f"{entry}  {ms:.3f} ms  setup {setup:.1f} s", flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.png:
        draw(report, args.png, "omniglot_infpi, 8 tasks")


if __name__ == "__main__":
    main()
