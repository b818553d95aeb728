"""A zoo entry from its recipe: train every seed, ship one net, record all numbers, write the card."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pizoo import checkpoint
from pizoo.cards import write_card
from pizoo.evaluation.accuracy import accuracy, predict, standard_error
from pizoo.evaluation.entries import attach_training_images
from pizoo.recipes import Recipe
from pizoo.training import meta
from pizoo.training.supervised import TrainResult, train


def reproduce(
    recipe: Recipe,
    card: str | os.PathLike,
    runs: str | os.PathLike,
    seeds: Iterable[int] | None = None,
    *,
    data_dir: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Make an entry's card from its recipe.

    Args:
        recipe: of the entry.
        card: folder to write ``config.json``, ``model.safetensors``, ``probe.safetensors``, ``results.json``, ``README.md``.
        runs: folder for the trainings, ``seed-K`` each; finished ones are not trained again.
        seeds: which; None: as many as the recipe says. The first is the one that is shipped.
        data_dir, device, progress: as for :func:`pizoo.train`.

    Returns:
        what ``results.json`` holds.
    """
    seeds = list(range(recipe.seeds)) if seeds is None else list(seeds)
    shipped, trained = None, []
    for seed in seeds:
        folder = Path(runs) / f"seed-{seed}"
        outcome = train(recipe.with_seed(seed), folder, data_dir=data_dir, device=device, progress=progress)
        shipped = shipped or outcome  # of the others only the numbers are kept, not their nets
        trained.append(
            {
                "seed": seed,
                "accuracy": outcome.results["accuracy"],
                "best_epoch": outcome.results["best_epoch"],
                "epochs": outcome.recipe.train.epochs if outcome.recipe.train else 0,
                "train_seconds": outcome.results["train_seconds"],
            }
        )
    accuracies = [run["accuracy"] for run in trained]
    if recipe.tasks is None:
        measured = {"accuracy": _ship(shipped, Path(card), data_dir)}
    else:
        measured = meta.ship(shipped, Path(card), recipe.data.load_tasks(data_dir))
    results = {
        **shipped.results,
        **measured,
        "shipped_seed": seeds[0],
        "seeds": trained,
        "mean_accuracy": sum(accuracies) / len(accuracies),
        "standard_error": standard_error(accuracies),
    }
    checkpoint.write_json(Path(card) / checkpoint.RESULTS, results)
    write_card(Path(card))
    return results


def _ship(outcome: TrainResult, card: Path, data_dir: str | os.PathLike | None) -> float:
    """Write the net of ``outcome`` into its card and return the accuracy of what a user will load from there."""
    recipe = outcome.recipe
    dataset, normalize = recipe.data.load(data_dir), recipe.data.normalize
    checkpoint.save_with_probe(card, outcome.model, recipe.config(dataset.class_names), dataset, normalize)
    model, _ = checkpoint.load(card, device=next(iter(outcome.model.state_dict().values())).device)
    attach_training_images(model, dataset.train_x, normalize)
    return accuracy(predict(model, dataset.test_x, normalize), dataset.test_y)
