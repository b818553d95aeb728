"""Fine-tuning against training from scratch for the same number of steps, on other data than the source's.

    python benchmarks/finetuning.py --source cifar10_infpi --target tinyimagenet32 --epochs 5 --runs DIR [--json FILE]

Three contenders, each for the same steps of the same batch size: from random initial values; the source's net under a fresh
read-out, all layers trained; the same with all layers but the read-out frozen. Net and training are the source's recipe, with
a cosine schedule down to zero over these steps and gradients clipped; data and pixels' normalisation are those of the target's
entries. Every contender has its own learning rate: a tenth of the target's training images is held out, and what a training on
the others scores there decides, on a ladder of rates that is climbed until the best rung has a worse one on either side. With
it the whole training set is learned, with three seeds; should one of them diverge, the next best rate takes its place. The
test images are looked at in these trainings only.

Finished trainings are kept in ``--runs``, so that the same command goes on where it was stopped. Each call adds its comparison
to the JSON file and draws all that are in it beside it. Minutes on a GPU; ``--subset 2000`` shows the way on a CPU.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from datetime import date
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from pizoo import zoo
from pizoo.data import Dataset, fingerprint, split_validation
from pizoo.evaluation.accuracy import standard_error
from pizoo.files import json_sha256, read_json, write_json
from pizoo.memory import choose_device
from pizoo.plots import drawn
from pizoo.recipes import Recipe, RecipeError, decisive, load_recipe
from pizoo.training.finetune import initial_rows
from pizoo.training.report import commit, hardware
from pizoo.training.supervised import TrainingDiverged
from pizoo.training.train import train

SCRATCH, TUNED, FROZEN = "from scratch", "fine-tuned", "frozen trunk"
COLOURS = {SCRATCH: "k", TUNED: "C0", FROZEN: "C1"}
SEEDS = (0, 1, 2)
MAX_NORM = 0.4  # as cifar10_infpi has it; where the source's recipe clips nothing, the best rates of some seeds diverge
VALIDATION = 0.1  # of the target's training images, held out to choose a learning rate
RUNGS_A_DECADE = 2  # of the ladder of rates, whose rung 0 is the recipe's
FIRST_RUNGS = (-2, 0, 2)
MOST_RUNGS = {2: 5, 1: 7}  # tried in all, when steps of two and then of one rung have been taken


class Comparison:
    """A source, a target and a number of epochs: the recipes these make, and the trainings of them that are there."""

    def __init__(self, source: str, target: str, epochs: int, subset: int | None, runs: Path, device: torch.device):
        net = zoo.load(source)
        self.source = Recipe.from_dict(zoo.recipe_of(net.config, source), source)
        if self.source.train is None or self.source.tasks is not None:
            raise RecipeError(
                f"--source is {source}; it must be a net trained on images, not a kernel or few-shot learner"
            )
        self.source_rows = initial_rows(net)
        self.source_sha256 = json_sha256({name: fingerprint(value) for name, value in net.state_dict().items()})
        self.address, self.target, self.epochs, self.subset, self.device = source, target, epochs, subset, device
        self.data = load_recipe(f"{target}_mu").data  # which all entries on these images share
        self.runs = runs / f"{self.source.entry}_{target}_{epochs}"

    def recipe(self, contender: str, rung: int, seed: int) -> Recipe:
        raw = self.source.to_dict()
        clip = raw["train"]["clip"]
        own = {
            "lr": raw["train"]["lr"] * 10 ** (rung / RUNGS_A_DECADE),
            "seed": seed,
            "epochs": self.epochs,
            "schedule": {"name": "cosine"},
            "clip": {**clip, "max_norm": clip["max_norm"] or MAX_NORM},
        }
        train = {key: value for key, value in raw["train"].items() if key not in ("init_from", "freeze")} | own
        if contender != SCRATCH:
            train["init_from"] = self.address
        if contender == FROZEN:
            train["freeze"] = ["input", "hidden"]
        made = {
            "entry": f"{self.source.entry}_on_{self.target}",
            "description": f"{self.source.description}; {contender} on {self.target}",
            "model": raw["model"],
            "data": {**self.data.model_dump(mode="json"), "subset": self.subset},
            "train": train,
        }
        return Recipe.from_dict(made, f"{contender} on {self.target}")

    def trained(self, part: str, contender: str, rung: int, seed: int, dataset: Dataset) -> dict[str, Any]:
        """What a training came to, or came to before: its accuracies on the test images of ``dataset``, in percent.

        Args:
            part: of the target's images, what ``dataset`` is.

        Returns:
            ``accuracy`` after the last epoch, None if it diverged; else also ``curve`` and the rest of its record.
        """
        recipe = self.recipe(contender, rung, seed)
        asked = {"part": part, "source": self.source_sha256, "recipe": decisive(recipe.to_dict())}
        name = f"{contender.replace(' ', '_')}_{part}_{json_sha256(asked)[:12]}.json"
        if (kept := self.runs / name).exists():
            found, remark = read_json(kept)["found"], "kept"
        else:
            found = self._train(recipe, dataset)
            self.runs.mkdir(parents=True, exist_ok=True)
            write_json(kept, {**asked, "found": found})
            remark = f"{found['wall_seconds']:.1f} s" if "wall_seconds" in found else "diverged"
        scored = "no accuracy" if found["accuracy"] is None else f"{found['accuracy']:.2f} %"
        print(f"{contender}, lr {recipe.train.lr:.4g}, seed {seed}, {part}: {scored} ({remark})", flush=True)
        return found

    def _train(self, recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
        try:
            results = train(recipe, dataset=dataset, device=self.device).results
        except TrainingDiverged as error:
            return {"accuracy": None, "diverged": str(error)}
        finally:
            gc.collect()  # a training and its engine know each other; their rows are the next one's memory
        history = results["history"]
        return {
            "accuracy": results["accuracy"],
            "steps": [record["step"] for record in history],
            "curve": [record["test_accuracy"] for record in history],
            "train_loss": [record["train_loss"] for record in history],
            "rows": history[-1].get("rows"),
            **{key: results[key] for key in ("train_seconds", "wall_seconds", "hardware", "date")},
        }

    def measured(self, dataset: Dataset) -> dict[str, Any]:
        """The record of the comparison."""
        held_out, contenders = split_validation(dataset, VALIDATION), {}
        for contender in (SCRATCH, TUNED, FROZEN):
            tried = climbed(lambda rung: self.trained("held-out", contender, rung, 0, held_out)["accuracy"])  # noqa: B023
            rung, runs = self._settled(contender, tried, dataset)
            accuracies = [run["accuracy"] for run in runs]
            contenders[contender] = {
                "lr": self._lr(rung),
                "tried": [{"lr": self._lr(rung), "validation_accuracy": tried[rung]} for rung in sorted(tried)],
                "bracketed": {rung - 1, rung + 1} <= tried.keys(),
                "mean_accuracy": statistics.fmean(accuracies),
                "standard_error": standard_error(accuracies),
                "seeds": [{"seed": seed, **run} for seed, run in zip(SEEDS, runs, strict=True)],
            }
        settings = self.recipe(SCRATCH, 0, 0).train
        return {
            "source": self.source.entry,
            "target": self.target,
            "epochs": self.epochs,
            "subset": self.subset,
            "command": f"python benchmarks/finetuning.py --source {self.source.entry} --target {self.target} --epochs "
            f"{self.epochs}" + (f" --subset {self.subset}" if self.subset else ""),
            "source_rows": self.source_rows,
            "steps": runs[0]["steps"][-1],
            "batch_size": settings.batch_size,
            "recipes_lr": self.source.train.lr,
            "schedule": settings.schedule.name,
            "images": {"train": len(dataset.train_y), "held_out": len(held_out.test_y), "test": len(dataset.test_y)},
            "contenders": contenders,
            "hardware": hardware(self.device),
            "torch": torch.__version__,
            "commit": commit(),
            "date": date.today().isoformat(),
        }

    def _settled(self, contender: str, tried: dict[int, float | None], dataset: Dataset) -> tuple[int, list[dict]]:
        """The best rung with which no seed diverges on the whole training set, and what the seeds came to."""
        left = dict(tried)
        while left:
            rung, runs = best(left), []
            for seed in SEEDS:
                runs.append(self.trained("test", contender, rung, seed, dataset))
                if runs[-1]["accuracy"] is None:
                    break
            else:
                return rung, runs
            del left[rung]
        raise TrainingDiverged(f"{contender} diverges with every learning rate tried")

    def _lr(self, rung: int) -> float:
        return self.recipe(SCRATCH, rung, 0).train.lr


def climbed(score: Callable[[int], float | None]) -> dict[int, float | None]:
    """The rungs of the ladder that were tried, with their scores (None: diverged).

    In long steps first, on from the best as long as a neighbour of it was not tried, so that a plateau of nets that have not
    begun to learn is left; in short ones then.
    """
    tried = {rung: score(rung) for rung in FIRST_RUNGS}
    for step, most in MOST_RUNGS.items():
        while len(tried) < most:
            beside = [rung for rung in (best(tried) + step, best(tried) - step) if rung not in tried]
            if not beside:
                break
            tried[beside[0]] = score(beside[0])
    return tried


def best(tried: dict[int, float | None]) -> int:
    """The rung with the highest score, the highest of equals; if all diverged, the lowest."""
    scored = {rung: value for rung, value in tried.items() if value is not None}
    return max(scored, key=lambda rung: (scored[rung], rung)) if scored else min(tried)


def table(records: list[dict[str, Any]]) -> str:
    lines = [f"{'source -> target':<46}{'epochs':>7}{'steps':>9}  {'contender':<14}{'lr':>9}  test accuracy"]
    for one in records:
        for name, found in one["contenders"].items():
            lines.append(
                f"{one['source'] + ' -> ' + one['target']:<46}{one['epochs']:>7}{one['steps']:>9,}  {name:<14}"
                f"{found['lr']:>9.3g}  {found['mean_accuracy']:.2f} ± {found['standard_error']:.2f}"
            )
    return "\n".join(lines)


def draw_curves(records: list[dict[str, Any]], path: Path) -> None:
    """Test accuracy against steps: a panel for every source and target, a line for every contender and number of epochs."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for one in records:
        images = f", {one['subset']} images" if one["subset"] else ""
        panels.setdefault(f"{one['source']} to {one['target']}{images}", []).append(one)

    def draw(*every) -> None:
        from matplotlib.ticker import EngFormatter

        for axes, (title, theirs) in zip(every, panels.items(), strict=True):
            for one, marker in zip(sorted(theirs, key=lambda one: -one["epochs"]), cycle("oDs^v")):
                for name, found in one["contenders"].items():
                    draw_contender(
                        axes, f"{name}, epochs: {one['epochs']}", found["seeds"], f"{COLOURS[name]}{marker}-"
                    )
            axes.set(xlabel="steps", ylabel="test accuracy in percent", title=title, xlim=(0, None))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.legend(frameon=False, fontsize="small")

    drawn(path, draw, len(panels))


def draw_contender(axes, label: str, runs: list[dict[str, Any]], style: str) -> None:
    """Mean over seeds after every epoch, with its standard error."""
    after = list(zip(*(run["curve"] for run in runs), strict=True))
    means, errors = [statistics.fmean(each) for each in after], [standard_error(list(each)) for each in after]
    axes.errorbar(runs[0]["steps"], means, errors, fmt=style, markersize=4, capsize=2, label=label)


def merged(record: dict[str, Any], before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``before`` with the record in it, instead of one of the same comparison."""

    def key(one: dict[str, Any]) -> tuple:
        return one["source"], one["target"], one["subset"] or 0, one["epochs"]

    return sorted([*(one for one in before if key(one) != key(record)), record], key=key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="cifar10_infpi", help="an entry, or the folder of a training")
    parser.add_argument("--target", choices=("cifar10", "digits", "imagenet32", "tinyimagenet32"), required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--subset", type=int, help="so many training images instead of all")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    compared = Comparison(args.source, args.target, args.epochs, args.subset, args.runs, choose_device(args.device))
    records = [compared.measured(compared.recipe(SCRATCH, 0, 0).load_data(args.data))]
    if args.json is not None:
        records = merged(records[0], read_json(args.json)["comparisons"] if args.json.exists() else [])
        write_json(args.json, {"comparisons": records})
        draw_curves(records, args.json.with_suffix(".png"))
    print(table(records), flush=True)


if __name__ == "__main__":
    main()
