"""The settings of a kernel recipe, chosen on training images that are held out; the test images are never looked at.

A kernel matrix serves every ridge, a factorisation one: the eigendecomposition that would serve all takes as long as some
twenty Cholesky decompositions.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pizoo import functional
from pizoo.data import Dataset, split_validation
from pizoo.evaluation.accuracy import accuracy
from pizoo.files import read_json, write_json
from pizoo.recipes import Recipe, decisive
from pizoo.training.report import log

SEARCH = "search.json"


def tune(recipe: Recipe, dataset: Dataset, device: torch.device, folder: Path | None = None) -> dict[str, Any]:
    """Try every setting of ``recipe.tune`` on part of the training images and measure it on the rest.

    Args:
        dataset: its test part is dropped before anything is computed.
        device: on a GPU it takes two matrices of float64 as large as the kernel between the training images.
        folder: where the search is kept; one of the same recipe is read back instead of made again.

    Returns:
        ``settings`` (the best, the first of equals), ``validation_accuracy``, ``validation_images``, ``training_images``,
        ``seconds``, and ``tried``: every setting with its accuracy, None where the kernel needs a larger ridge.

    Raises:
        ValueError: that is so of all.
    """
    asked = {**decisive(recipe.to_dict()), "tune": recipe.to_dict()["tune"]}
    if folder is not None and (folder / SEARCH).exists():
        kept = read_json(folder / SEARCH)
        if kept["recipe"] == asked:
            return kept["found"]
    begin, tried = time.perf_counter(), []
    held_out = split_validation(dataset, recipe.tune.validation)
    ridges: dict[tuple, list[float]] = {}  # of every kernel
    for settings in recipe.tune.settings:
        ridge = settings.pop("ridge", recipe.model.ridge)
        ridges.setdefault(tuple(settings.items()), []).append(ridge)
    for kernel, its_ridges in ridges.items():
        measured = _try_kernel(recipe.with_model(**dict(kernel)), its_ridges, held_out, device)
        for ridge, percent in zip(its_ridges, measured, strict=True):
            tried.append({**dict(kernel), "ridge": ridge, "validation_accuracy": percent})
            log.info("%s", tried[-1])
    best = max(tried, key=lambda one: one["validation_accuracy"] or 0.0)
    if best["validation_accuracy"] is None:
        raise ValueError(
            f"{recipe.entry}: every kernel of tune.grid needs a larger ridge than {max(max(ridges.values()))}"
        )
    found = {
        "settings": {key: value for key, value in best.items() if key != "validation_accuracy"},
        "validation_accuracy": best["validation_accuracy"],
        "validation_images": len(held_out.test_x),
        "training_images": len(held_out.train_x),
        "seconds": time.perf_counter() - begin,
        "tried": tried,
    }
    if folder is not None:
        write_json(folder / SEARCH, {"recipe": asked, "found": found})
    return found


def _try_kernel(recipe: Recipe, ridges: list[float], held_out: Dataset, device: torch.device) -> list[float | None]:
    """Accuracy of one kernel with each ridge; the memory it takes is free again when it returns."""
    model = recipe.build_model(device)
    x, validation_x = (_inputs(recipe, part, device) for part in (held_out.train_x, held_out.test_x))
    kernel, across = model.kernel_matrix(x, x), model.kernel_matrix(validation_x, x)
    targets = functional.centred_one_hot(held_out.train_y.to(device), held_out.classes)
    measured: list[float | None] = []
    for ridge in ridges:
        try:
            scores = across @ functional.solve_ridge(kernel, targets, ridge)
            measured.append(accuracy(scores.cpu(), held_out.test_y))
        except ValueError as error:  # not positive definite with this ridge
            log.info("%s", error)
            measured.append(None)
    return measured


def _inputs(recipe: Recipe, x: Tensor, device: torch.device) -> Tensor:
    return recipe.data.normalize(x.to(device), torch.float64).flatten(1)
