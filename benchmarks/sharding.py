"""Time per training step on 1, 2, 4, ... GPUs that share the rows, everything included.

    torchrun --nproc-per-node 1 benchmarks/sharding.py --json FILE
    torchrun --nproc-per-node 2 benchmarks/sharding.py --json FILE
    torchrun --nproc-per-node 4 benchmarks/sharding.py --json FILE

Each run adds its number of processes to the file, and prints the table of all that are in it. Rows, inputs and labels are
random (time does not depend on them); nets, batch sizes and dtypes are the recipes'. The time is that of the slowest process.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy
import torch
from steps import fill

from pizoo import processes
from pizoo.data import Dataset, training_images
from pizoo.memory import choose_device
from pizoo.recipes import load_recipe
from pizoo.training.report import hardware
from pizoo.training.supervised import Training

ROWS = {"cifar10_infpi": 2_500_000, "imagenet32_infpi_r200": 8_000_000}
ROUNDS = 3  # the best of them counts: others may use the machine


def training(entry: str, batches: int, device: torch.device) -> Training:
    """A training of ``entry`` on so many batches of random data."""
    recipe = load_recipe(entry, ["train.epochs=1", "train.schedule={name: constant}", "train.lr=1.0e-6"])
    generator = torch.Generator().manual_seed(0)
    samples, classes = batches * recipe.train.batch_size, recipe.data.classes
    x = torch.randint(0, 256, (samples, *recipe.data.input_size), dtype=torch.uint8, generator=generator)
    y = torch.randint(0, classes, (samples,), generator=generator)
    data = Dataset("random", x, y, None, None, tuple(map(str, range(classes))))
    return Training(recipe, data, None, device, engine=True)


def synchronised(device: torch.device) -> float:
    """The time, once this process and all others have done what they were given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    processes.gathered(None)
    return time.perf_counter()


@torch.no_grad()
def measured(entry: str, rows: int, steps: int, device: torch.device) -> dict:
    """Milliseconds per step with ``rows`` rows in every growing layer, and what it takes beside."""
    run = training(entry, (ROUNDS + 1) * steps, device)
    fill(run, rows, len(run.train_x))
    begin = synchronised(device)
    step = run.engine._step_of(run.recipe.train.batch_size)
    setup = synchronised(device) - begin
    rounds = []
    for _ in range(ROUNDS + 1):  # the first warms up
        begin = synchronised(device)
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rounds.append(max(processes.gathered(time.perf_counter() - begin)))
    assert run.engine.finite.item()
    counts = [state.count.item() for state in run.engine.growing]
    assert counts == [rows + len(run.train_x)] * len(counts)
    held = sum(part.nbytes for state in run.engine.growing for part in state.storages)
    return {
        "entry": entry,
        "rows": rows,
        "processes": processes.count(),
        "ms": 1e3 * min(rounds[1:]) / steps,
        "rounds_ms": [1e3 * seconds / steps for seconds in rounds[1:]],
        "setup_s": setup,
        "bytes_of_rows_a_process": max(processes.gathered(held)),
    }


def table(found: list[dict]) -> str:
    """Time, and how many times faster than one process, by net and number of processes."""
    alone = {(one["entry"], one["rows"]): one["ms"] for one in found if one["processes"] == 1}
    lines = [f"{'entry':<24}{'rows':>12}{'processes':>11}{'ms a step':>11}{'faster':>9}{'GB of rows each':>17}"]
    for one in sorted(found, key=lambda one: (one["entry"], one["rows"], one["processes"])):
        faster = alone.get((one["entry"], one["rows"]), math.nan) / one["ms"]
        size = one["bytes_of_rows_a_process"] / 1e9
        lines.append(
            f"{one['entry']:<24}{one['rows']:>12,}{one['processes']:>11}{one['ms']:>11.3f}{faster:>8.2f}x{size:>17.2f}"
        )
    return "\n".join(lines)


def whole_recipe(found: list[dict], entry: str) -> str:
    """Estimated hours of all steps of a recipe, from the times of its steps at one number of rows.

    A step's time is taken as proportional to the rows, which grow from next to none; on n processes as ``a + b / n``, fitted.
    """
    times = {one["processes"]: one["ms"] for one in found if (one["entry"], one["rows"]) == (entry, ROWS[entry])}
    recipe = load_recipe(entry)
    train, samples = recipe.train, training_images(recipe.data.name)
    steps, rows = train.epochs * math.ceil(samples / train.batch_size), train.epochs * samples
    b, a = numpy.polyfit([1 / n for n in times], list(times.values()), 1)
    hours = {n: steps * times.get(n, a + b / n) * rows / 2 / ROWS[entry] / 3.6e6 for n in (1, 2, 4, 8)}
    told = ", ".join(f"{h:.2f} h on {n}" + ("" if n in times else " (extrapolated)") for n, h in hours.items())
    return f"{entry}, {steps:,} steps, {rows:,} rows in the end: {told}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="in all nets, instead of their own")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = processes.join(choose_device(args.device))
    with processes.explained(), processes.watched("start the benchmark again"):
        found = [measured(entry, args.rows or rows, args.steps, device) for entry, rows in ROWS.items()]
    if processes.index() == 0:
        result = {"hardware": hardware(device), "torch": torch.__version__, "steps": found}
        if args.json is not None and args.json.exists():
            before = json.loads(args.json.read_text())
            new = {(one["entry"], one["rows"], one["processes"]) for one in found}
            kept = [one for one in before["steps"] if (one["entry"], one["rows"], one["processes"]) not in new]
            result["steps"] = kept + found
        if args.json is not None:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(table(result["steps"]), flush=True)
        if len({one["processes"] for one in result["steps"]}) > 1:
            print(whole_recipe(result["steps"], "imagenet32_infpi_r200"))
    processes.leave()


if __name__ == "__main__":
    main()
