"""A zoo entry from its recipe: train every seed, ship one net, record all numbers, write the card; add seeds to it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pizoo import checkpoint
from pizoo.cards import check_recipe, write_card
from pizoo.evaluation.accuracy import percent
from pizoo.evaluation.entries import correct_once_loaded
from pizoo.files import read_json, read_tensors, write_json, write_tensors
from pizoo.memory import choose_device
from pizoo.recipes import Recipe
from pizoo.training import meta, transfer
from pizoo.training.compact import compact_net
from pizoo.training.results import TrainResult
from pizoo.training.seeds import summary, train_seeds
from pizoo.training.tune import tune
from pizoo.zoo import TUNED


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
    """Make an entry's card from its recipe, and from a recipe that is to be tuned a second one in it, ``card/tuned``.

    Args:
        recipe: of the entry.
        card: folder to write ``config.json``, ``model.safetensors``, ``probe.safetensors``, ``results.json``,
            ``correct.safetensors`` and ``README.md`` into.
        runs: folder for the trainings, ``seed-K`` each, as of :func:`train_seeds`; finished ones are not trained again.
        seeds: which; None: as many as the recipe says. The first is the one that is shipped.
        data_dir, device, progress: as for :func:`pizoo.train`.

    Returns:
        what ``results.json`` holds.
    """
    card, runs, device = Path(card), Path(runs), choose_device(device)
    seeds = list(range(recipe.seeds)) if seeds is None else list(seeds)
    shipped: dict[str, Any] = {}
    records, right = [], {}
    for run in train_seeds(recipe, seeds, runs, data_dir=data_dir, device=device, progress=progress):
        if not records:
            shipped, of_shipped = _ship(run.outcome, card, data_dir)
            right |= of_shipped
        records.append(run.record)
        right[checkpoint.seed_key(run.record["seed"])] = run.correct
        del run  # its net's memory is the next one's
    results = {
        **shipped,
        "accuracy": percent(right[checkpoint.SHIPPED]),
        "shipped_seed": seeds[0],
        **summary(records),
        "correct_sha256": write_tensors(card / checkpoint.CORRECT, right),
    }
    if recipe.tune is not None:
        found = tune(recipe, recipe.data.load(data_dir), device, runs)
        tuned = recipe.with_model(**found["settings"])
        theirs = reproduce(
            tuned, card / TUNED, runs / TUNED, seeds, data_dir=data_dir, device=device, progress=progress
        )
        results["tuned"] = {**found, "accuracy": theirs["accuracy"]}
        results["total_wall_seconds"] += found["seconds"] + theirs["total_wall_seconds"]
    write_json(card / checkpoint.RESULTS, results)
    write_card(card)
    return results


def add_seeds(
    recipe: Recipe,
    card: str | os.PathLike,
    runs: str | os.PathLike,
    seeds: Iterable[int],
    *,
    data_dir: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Record more seeds of a net in its card: of those before, what the card records is enough. What ships stays as it is.

    Args:
        recipe, card: of an entry that :func:`reproduce` has made.
        runs, data_dir, device, progress: as for :func:`reproduce`.
        seeds: which; none that the card has.

    Returns:
        what ``results.json`` holds.

    Raises:
        CheckpointError: the card is damaged, has no results, or is of another recipe.
        ValueError: a kernel, of which every seed gives the same; seeds that the card has.
    """
    card, seeds = Path(card), list(seeds)
    if recipe.train is None:
        raise ValueError(f"{recipe.entry} is a kernel, which is not trained: there are no seeds to add")
    check_recipe(card, recipe)
    results = read_json(card / checkpoint.RESULTS)
    right = read_tensors(card / checkpoint.CORRECT, results["correct_sha256"])
    if both := sorted({record["seed"] for record in results["seeds"]}.intersection(seeds)):
        raise ValueError(f"seeds is {seeds}; {card} has {', '.join(map(str, both))} of them already")
    records = results["seeds"]
    for run in train_seeds(recipe, seeds, runs, data_dir=data_dir, device=device, progress=progress):
        records.append(run.record)
        right[checkpoint.seed_key(run.record["seed"])] = run.correct
        del run  # its net's memory is the next one's
    results |= summary(sorted(records, key=lambda record: record["seed"]))
    results["correct_sha256"] = write_tensors(card / checkpoint.CORRECT, right)
    write_json(card / checkpoint.RESULTS, results)
    write_card(card)
    return results


def _ship(
    outcome: TrainResult, card: Path, data_dir: str | os.PathLike | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write the net of ``outcome`` into its card; return what to record of a user's copy of it, and which test images (queries
    of tasks) that classifies correctly, by the names they are kept under."""
    recipe = outcome.recipe
    dataset, normalize = recipe.load_data(data_dir), recipe.data.normalize
    if recipe.compact is not None:
        source = dataset if recipe.transfer is None else dataset.source
        model, record = compact_net(outcome.model, source, recipe, recipe.compact, curve=True)
        outcome = replace(outcome, model=model, results={**outcome.results, "compact": record})
    if recipe.tasks is not None:
        measured = meta.ship(outcome.model, recipe.config(meta.class_names(recipe)), card, dataset)
        return {**outcome.results, **measured.recorded}, {checkpoint.SHIPPED: measured.correct}
    if recipe.transfer is not None:
        recorded, right, right_of_small = transfer.ship(outcome, card, dataset)
        return recorded, {checkpoint.SHIPPED: right, checkpoint.VERIFIED: right_of_small}
    checkpoint.save_with_probe(card, outcome.model, recipe.config(dataset.class_names), dataset, normalize)
    device = next(iter(outcome.model.state_dict().values())).device
    return outcome.results, {checkpoint.SHIPPED: correct_once_loaded(card, dataset, normalize, device)}
