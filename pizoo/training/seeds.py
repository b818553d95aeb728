"""A recipe trained with several seeds: each in its own folder, resumed like a single training, and what they give together."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pizoo import checkpoint
from pizoo.config import CONFIG
from pizoo.data import Dataset, TaskPool, TransferData
from pizoo.evaluation.accuracy import correct, percent, predict, standard_error
from pizoo.evaluation.fewshot import TaskAccuracy, split_correct
from pizoo.files import CheckpointError, write_json
from pizoo.memory import choose_device
from pizoo.plots import CURVES, draw_curves, rows_by_epoch
from pizoo.recipes import Recipe
from pizoo.training.folder import check_folder, seed_folders
from pizoo.training.results import TrainResult
from pizoo.training.train import train
from pizoo.training.transfer import target_correct

MOST_SEEDS = 1000  # in a range, as in a recipe


class SeedRun(NamedTuple):
    """One seed's training.

    Attributes:
        record: what is recorded of it beside the others: seed, accuracy, best epoch, times, machine, curve.
        correct: which test images it classifies correctly, bool [n]; of tasks, which queries of the headline's, bool [T, Q].
        outcome: the training itself, net included.
    """

    record: dict[str, Any]
    correct: Tensor
    outcome: TrainResult


def parse_seeds(text: str) -> list[int]:
    """``"0-2"`` -> [0, 1, 2], ``"0,3,7"`` -> [0, 3, 7].

    Raises:
        ValueError: anything else, a range that runs backwards, a seed given twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = [first, last] if dash else [first]
        if not all(n.isdecimal() for n in numbers) or not 0 <= int(numbers[-1]) - int(first) < MOST_SEEDS:
            raise ValueError(f"seeds is {text!r}; it must be a range or a list of seeds: 0-2 or 0,3,7")
        seeds += range(int(first), int(numbers[-1]) + 1)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds is {text!r}; no seed may be given twice")
    return seeds


def seeds_differ(recipe: Recipe) -> bool:
    """Whether one seed gives something else than another: not of a kernel, unless it is solved on other data."""
    return recipe.train is not None or recipe.with_seed(0).data != recipe.with_seed(1).data


def train_seeds(
    recipe: Recipe,
    seeds: Iterable[int],
    runs: str | os.PathLike,
    *,
    data_dir: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    rows_on: str = "auto",
    progress: bool = False,
) -> Iterator[SeedRun]:
    """Train a recipe with each seed in turn, in ``runs/seed-K``; finished trainings are loaded, others resumed.

    One at a time: a run that the caller lets go of gives its memory back before the next begins.

    Raises:
        CheckpointError: ``runs`` holds a training of its own, or seeds of another recipe, of which it has the results.
        ValueError: the data set has no test part to compare seeds on. For the rest see :func:`pizoo.train`.
    """
    runs, device = Path(runs), choose_device(device)
    recipes = {seed: recipe.with_seed(seed) for seed in seeds}
    if (runs / CONFIG).exists():
        raise CheckpointError(f"{runs} holds a training of its own; choose another folder for several seeds")
    for there in seed_folders(runs):
        seed = there.name.removeprefix(checkpoint.seed_key(""))
        if seed.isdecimal():
            check_folder(there, recipe.with_seed(int(seed)))
    if len(recipes) > 1 and not seeds_differ(recipe):
        raise ValueError(
            f"seeds is {list(recipes)}; {recipe.entry} is a kernel, which is not trained: every seed gives the same"
        )
    for seed, seeded in recipes.items():
        dataset = seeded.load_data(data_dir)
        if isinstance(dataset, Dataset) and dataset.test_x is None:
            raise ValueError(f"data set {dataset.name!r} has no test part; seeds are compared by their test accuracy")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        folder = runs / checkpoint.seed_key(seed)
        options = {"dataset": dataset, "device": device, "rows_on": rows_on, "progress": progress}
        yield _record(train(seeded, folder, **options), dataset, seed)


def _record(outcome: TrainResult, dataset: Dataset | TransferData | dict[str, TaskPool], seed: int) -> SeedRun:
    results, recipe = outcome.results, outcome.recipe
    epochs, measured = recipe.train.epochs if recipe.train else 0, "test_accuracy"
    if recipe.transfer is not None:
        right, measured = outcome.correct, "quick_accuracy"
        if right is None:  # it was trained before, and loaded now
            right = target_correct(outcome.model, recipe, dataset, results["transfer"]["ridge"])
    elif recipe.tasks is None:
        right = correct(predict(outcome.model, dataset.test_x, recipe.data.normalize), dataset.test_y)
    else:
        right, measured = split_correct(outcome.model, dataset, recipe.tasks.model_dump()), "validation_accuracy"
    kept = (
        "train_seconds",
        "wall_seconds",
        "peak_memory_bytes",
        "hardware",
        "commit",
        "versions",
        "date",
        "best_epoch",
    )
    record = {"seed": seed, "accuracy": percent(right), "epochs": epochs} | {key: results[key] for key in kept}
    if recipe.tasks is not None:
        record["splits"] = {**results["splits"], recipe.tasks.headline: asdict(TaskAccuracy.of(right))}
    if recipe.transfer is not None:
        record["transfer"] = {**results["transfer"], "accuracy": percent(right)}
    if epochs:
        record["curve"] = {key: [r[key] for r in results["history"]] for key in ("train_loss", measured)}
    return SeedRun(record, right, outcome)


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the records of several seeds give together: mean, standard error (None for one), extremes, times.

    Of few-shot learners also mean and standard error on every split; of others the mean of the best epochs, test-selected
    (not of transfer, where epochs are chosen on held-out images).
    """
    accuracies = [record["accuracy"] for record in records]
    found = {
        "seeds": records,
        "mean_accuracy": statistics.fmean(accuracies),
        "standard_error": standard_error(accuracies),
        "lowest_accuracy": min(accuracies),
        "highest_accuracy": max(accuracies),
        "total_wall_seconds": sum(record["wall_seconds"] for record in records),
    }
    if "transfer" in records[0]:
        return found
    if "splits" not in records[0]:
        best = statistics.fmean(record["best_epoch"]["accuracy"] for record in records)
        return {**found, "mean_best_epoch_accuracy": best}
    splits = {split: [record["splits"][split]["accuracy"] for record in records] for split in records[0]["splits"]}
    means = {
        split: {"accuracy": statistics.fmean(a), "standard_error": standard_error(a)} for split, a in splits.items()
    }
    return {**found, "mean_splits": means}


def run_seeds(recipe: Recipe, seeds: Iterable[int], runs: str | os.PathLike, **options: Any) -> dict[str, Any]:
    """:func:`train_seeds`, with what they give together in ``runs/results.json`` and their curves in ``runs/curves.png``.

    Both are written after every seed. Returns what ``results.json`` holds: the :func:`summary`, and of what it is.
    """
    results: dict[str, Any] = {}
    records: list[dict[str, Any]] = []
    for run in train_seeds(recipe, seeds, runs, **options):
        records.append(run.record)
        results = {"entry": recipe.entry, "data": run.outcome.results["data"], **summary(records)}
        rows = rows_by_epoch(run.outcome.history)
        del run  # its net's memory is the next one's
        write_json(Path(runs) / checkpoint.RESULTS, results)
        if "curve" in records[0]:
            draw_curves(Path(runs) / CURVES, records, recipe.published and recipe.published.accuracy, rows)
    return results
