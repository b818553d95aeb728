"""Time per training step of the CIFAR-10 nets, everything included, and of testing, against the number of rows M.

    python benchmarks/steps.py [--rows 50000 250000 1000000 2500000] [--dtype int8] [--steps 200] [--json FILE] [--png FILE]

Inputs and labels are random (time does not depend on them); nets and batch sizes are the recipes', dtypes too unless
``--dtype`` names that of rows. Needs a GPU.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from ops import copy_bandwidth

from pizoo.data import Dataset
from pizoo.evaluation.accuracy import predict
from pizoo.recipes import load_recipe
from pizoo.training.supervised import Training

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PAPER_MS = {50_000: 4.0, 250_000: 4.0, 1_000_000: 5.9, 2_500_000: 10.7}
AT_ONCE = 1 << 18  # rows


def training(entry: str, samples: int, *overrides: str) -> Training:
    """A training of ``entry`` on random data."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8, generator=generator)
    y = torch.randint(0, 10, (samples,), generator=generator)
    recipe = load_recipe(entry, ["train.epochs=1", "train.schedule={name: constant}", *overrides])
    return Training(recipe, Dataset("random", x, y, None, None, tuple(NAMES)), None, torch.device("cuda"))


def fill(run: Training, rows: int, more: int) -> None:
    """Grow every layer that trains to ``rows`` random rows, small enough not to matter, with room for ``more``."""
    for layer in [state.layer for state in run.engine.growing]:
        layer.reserve(rows + more)
        for first in range(layer.count, rows, AT_ONCE):
            count = min(AT_ONCE, rows - first)
            A, B = (torch.randn(count, part.shape[1], device=layer.device) for part in (layer.A, layer.B))
            layer.put(first, A, B / B.shape[1] ** 0.5, torch.full((count,), 1e-6, device=layer.device))
        layer.grown(rows, 1.0)
    run.engine = run._make_engine()


def bytes_of_two_passes(run: Training) -> int:
    """A and B of a row of every growing layer, once forward and once backward."""
    return 2 * sum(part.shape[1] * part.element_size() for layer in run.growing.values() for part in (layer.A, layer.B))


def time_steps(run: Training, steps: int) -> tuple[float, float]:
    """Milliseconds per step, and seconds to compile and capture."""
    size = run.recipe.train.batch_size
    begin = time.perf_counter()
    order = torch.arange(len(run.train_x), device="cuda")
    step = run.engine._step_of(size)
    torch.cuda.synchronize()
    setup = time.perf_counter() - begin
    run.engine.order.copy_(order)
    step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(steps):
        step()
    events[1].record()
    torch.cuda.synchronize()
    assert run.engine.finite.item()
    return events[0].elapsed_time(events[1]) / steps, setup


def time_test(run: Training, images: int = 10_000) -> float:
    """Seconds from raw images in host memory to their logits there; the second time of two."""
    x = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8)
    for _ in range(2):
        begin = time.perf_counter()
        predict(run.model, x, run.recipe.data.normalize)
        seconds = time.perf_counter() - begin
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(PAPER_MS))
    parser.add_argument("--dtype", default=load_recipe("cifar10_infpi").train.dtype)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    result = {
        "command": " ".join(["python", *sys.argv]),
        "gpu": torch.cuda.get_device_name(),
        "copy_bandwidth": bandwidth,
        "torch": torch.__version__,
        "steps": [],
    }
    print(f"copy {bandwidth / 1e12:.2f} TB/s")
    for rows in args.rows:
        run = training("cifar10_infpi", 8 * (args.steps + 10), f"train.dtype={args.dtype}")
        fill(run, rows, len(run.train_x))
        torch.cuda.reset_peak_memory_stats()
        ms, setup = time_steps(run, args.steps)
        peak = torch.cuda.max_memory_allocated()
        test = time_test(run)
        limit = 1e3 * rows * bytes_of_two_passes(run) / bandwidth
        row = {
            "entry": "cifar10_infpi",
            "dtype": args.dtype,
            "rows": rows,
            "ms": ms,
            "two_pass_limit_ms": limit,
            "paper_ms": PAPER_MS.get(rows),
        }
        row |= {"share_of_copy_bandwidth": limit / ms, "test_of_10000_images_s": test}
        result["steps"].append({**row, "setup_s": setup, "peak_bytes": peak})
        print(
            f"cifar10_infpi M={rows:>9,}  {ms:.3f} ms  two-pass limit {limit:.3f}  10,000 images {test:.2f} s  "
            f"setup {setup:.1f} s",
            flush=True,
        )
        del run
        torch.cuda.empty_cache()
    for entry in ("cifar10_finpi", "cifar10_mu"):
        run = training(entry, 32 * (args.steps + 10))
        ms, setup = time_steps(run, args.steps)
        result["steps"].append({"entry": entry, "ms": ms, "setup_s": setup})
        print(f"{entry}  {ms:.3f} ms  setup {setup:.1f} s", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.png:
        draw(result, args.png, "cifar10_infpi, batch 8")


def draw(result: dict, path: Path, title: str) -> None:
    """Time per step against rows: this package, the paper's code, and two passes over the rows at copy bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [step for step in result["steps"] if "rows" in step]
    rows = [step["rows"] for step in steps]
    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    axes.loglog(rows, [step["paper_ms"] for step in steps], "s--", color="tab:gray", label="the paper's code")
    axes.loglog(rows, [step["ms"] for step in steps], "o-", color="tab:blue", label="pizoo, everything included")
    axes.loglog(rows, [step["two_pass_limit_ms"] for step in steps], "k:", label="two passes at copy bandwidth")
    axes.set(xlabel="rows a layer, M", ylabel="milliseconds per step", title=f"{title}, {result['gpu']}")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
