"""A whole training with rows in 8 bits beside those of the entry's card, in the recipe's dtype: accuracy, time and memory.

    python benchmarks/eight_bit.py [--entry cifar10_infpi] [--seeds 0 1 2] --runs DIR [--data DIR] [--json FILE]

Trains the entry's recipe with ``train.dtype=int8``, nothing else changed, once a seed; finished trainings are kept in
``--runs``, interrupted ones go on. Accuracies are after the last epoch, and compared seed by seed, and image by image on the
same test images, with those that the card records. Minutes a seed on a GPU; the picture lies beside the JSON file.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pizoo import checkpoint, zoo
from pizoo.cards.kinds import read
from pizoo.evaluation.accuracy import paired_difference
from pizoo.files import write_json
from pizoo.plots import drawn
from pizoo.recipes import load_recipe
from pizoo.training.seeds import summary, train_seeds


def compared(entry: str, runs: list[tuple[dict[str, Any], Tensor]]) -> dict[str, Any]:
    """The record: int8 seeds, the card's of the same numbers, and how far they are apart in points."""
    card = read(zoo.card(entry))
    there = {record["seed"]: record for record in card.seeds}
    dtype = card.recipe["train"]["dtype"]
    seeds = [record["seed"] for record, _ in runs if record["seed"] in there]
    here = torch.stack([right for record, right in runs if record["seed"] in there]).double().mean(0)
    away = paired_difference(
        here, torch.stack([card.correct[checkpoint.seed_key(seed)] for seed in seeds]).double().mean(0)
    )
    return {
        "command": " ".join(["python", *sys.argv]),
        "entry": entry,
        "dtypes": {
            "int8": summary([record for record, _ in runs]),
            "float16": summary([there[seed] for seed in seeds]),
        },
        "difference": away._asdict() | {"note": f"int8 minus {dtype} in points, 95 % interval over test images"},
    }


def table(record: dict[str, Any]) -> str:
    lines = [f"{'rows':<9}{'mean accuracy':<16}{'seeds':<24}{'wall':>8}{'peak memory':>13}"]
    for dtype, found in record["dtypes"].items():
        seeds, error = found["seeds"], found["standard_error"]
        mean = f"{found['mean_accuracy']:.2f}" + ("" if error is None else f" ± {error:.2f}")
        each = ", ".join(f"{seed['accuracy']:.2f}" for seed in seeds)
        wall, peak = (max(seed[key] for seed in seeds) for key in ("wall_seconds", "peak_memory_bytes"))
        lines.append(f"{dtype:<9}{mean:<16}{each:<24}{wall:>6.0f} s{peak / 1e9:>10.2f} GB")
    away = record["difference"]
    lines.append(f"difference {away['points']:+.2f} ({away['low']:+.2f} to {away['high']:+.2f})")
    return "\n".join(lines)


def draw(record: dict[str, Any], path: Path) -> None:
    """Training loss and test accuracy after every epoch, a line a seed."""

    def lines(left, right) -> None:
        for axes, curve in ((left, "train_loss"), (right, "test_accuracy")):
            for (dtype, found), colour in zip(record["dtypes"].items(), ("C0", "0.6"), strict=True):
                for i, seed in enumerate(found["seeds"]):
                    values = seed["curve"][curve]
                    label = None if i else f"rows in {dtype}"
                    axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=1, label=label)
            axes.set(xlabel="epoch", title=record["entry"])
            axes.legend(frameon=False)
        left.set(ylabel="training loss", yscale="log")
        right.set(ylabel="test accuracy in percent")

    drawn(path, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entry", default="cifar10_infpi")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    recipe = load_recipe(args.entry, ["train.dtype=int8"])
    runs = []
    for run in train_seeds(recipe, args.seeds, args.runs, data_dir=args.data, device=args.device):
        runs.append((run.record, run.correct))
        print(
            f"seed {run.record['seed']}: {run.record['accuracy']:.2f} % in {run.record['wall_seconds']:.0f} s",
            flush=True,
        )
        del run  # its net's memory is the next one's
    record = compared(args.entry, runs)
    if args.json is not None:
        write_json(args.json, record)
        draw(record, args.json.with_suffix(".png"))
    print(table(record), flush=True)


if __name__ == "__main__":
    main()
