"""A whole training with rows in 8 bits beside those of the entry's card, in the recipe's dtype: accuracy, time and memory.

    python benchmarks/eight_bit.py [--entry cifar10_infpi] [--seeds 0 1 2] --runs DIR [--data DIR] [--json FILE]

Trains the entry's recipe with ``train.dtype=int8``, nothing else changed, once a seed; finished trainings are kept in
``--runs``, interrupted ones go on. Accuracies are after the last epoch; each is compared with that of the card's training of
the same seed, image by image on the same test images. Each call adds its seeds to the JSON file and draws all that are in it
beside it. Minutes a seed on a GPU.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from pizoo import checkpoint, zoo
from pizoo.cards.images import Card
from pizoo.cards.kinds import read
from pizoo.evaluation.accuracy import paired_difference, standard_error
from pizoo.files import read_json, write_json
from pizoo.plots import drawn
from pizoo.recipes import load_recipe
from pizoo.training.seeds import SeedRun, train_seeds


def compared(card: Card, run: SeedRun) -> dict[str, Any]:
    """The record of a seed: its training, the card's of the same seed, and by how many points it is above that."""
    seed = run.record["seed"]
    there = next(record for record in card.seeds if record["seed"] == seed)
    away = paired_difference(run.correct, card.correct[checkpoint.seed_key(seed)])
    return {"seed": seed, "int8": run.record, card.recipe["train"]["dtype"]: there, "difference": away._asdict()}


def table(record: dict[str, Any]) -> str:
    dtypes = ("int8", record["dtype"])
    lines = [f"{'seed':<6}" + "".join(f"{name:>10}{'wall':>8}{'memory':>10}" for name in dtypes) + "  difference"]
    for seed in record["seeds"]:
        line = f"{seed['seed']:<6}"
        for name in dtypes:
            one = seed[name]
            line += f"{one['accuracy']:>10.2f}{one['wall_seconds']:>6.0f} s{one['peak_memory_bytes'] / 1e9:>7.2f} GB"
        away = seed["difference"]
        lines.append(f"{line}  {away['points']:+.2f} ({away['low']:+.2f} to {away['high']:+.2f})")
    points = [seed["difference"]["points"] for seed in record["seeds"]]
    error = standard_error(points)
    lines.append(f"mean difference {statistics.fmean(points):+.2f}" + ("" if error is None else f" ± {error:.2f}"))
    return "\n".join(lines)


def draw(record: dict[str, Any], path: Path) -> None:
    """Training loss and test accuracy after every epoch, a line a seed."""

    def lines(left, right) -> None:
        for axes, curve in ((left, "train_loss"), (right, "test_accuracy")):
            for name, colour in (("int8", "C0"), (record["dtype"], "0.6")):
                for i, seed in enumerate(record["seeds"]):
                    values = seed[name]["curve"][curve]
                    label = None if i else f"rows in {name}"
                    axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=1, label=label)
            axes.set(xlabel="epoch", title=f"{record['entry']}, {len(record['seeds'])} seeds")
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
    recipe, card = load_recipe(args.entry, ["train.dtype=int8"]), read(zoo.card(args.entry))
    record = {"entry": args.entry, "dtype": card.recipe["train"]["dtype"], "seeds": []}
    if args.json is not None and args.json.exists():
        record = read_json(args.json)
    for run in train_seeds(recipe, args.seeds, args.runs, data_dir=args.data, device=args.device):
        found = compared(card, run)
        del run  # its net's memory is the next one's
        others = [seed for seed in record["seeds"] if seed["seed"] != found["seed"]]
        record["seeds"] = sorted([*others, found], key=lambda seed: seed["seed"])
        if args.json is not None:
            write_json(args.json, record)
            draw(record, args.json.with_suffix(".png"))
    print(table(record), flush=True)


if __name__ == "__main__":
    main()
