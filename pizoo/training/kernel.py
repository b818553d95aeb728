"""Kernel recipes on images, which are solved instead of trained (on tasks: :func:`pizoo.training.meta.measure_kernel`)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from pizoo import checkpoint
from pizoo.data import Dataset
from pizoo.evaluation.accuracy import accuracy, predict
from pizoo.files import read_json, write_json
from pizoo.models import KernelRegressor
from pizoo.recipes import Recipe, RecipeError
from pizoo.training.folder import check_folder
from pizoo.training.plan import check_solving
from pizoo.training.report import LapTimer
from pizoo.training.results import TrainResult, training_results


def solve_kernel(recipe: Recipe, dataset: Dataset, folder: Path | None, device: torch.device) -> TrainResult:
    """Fit a kernel regressor on all training inputs, in float64; if ``folder`` holds it already, load it."""
    timer, begin = LapTimer(), time.perf_counter()
    model = recipe.build_model(device)
    if not isinstance(model, KernelRegressor):
        raise RecipeError(
            f"{recipe.entry}: a {recipe.model.kind} has no closed solution; its recipe needs a train part"
        )
    normalize = recipe.data.normalize
    train_x = normalize(dataset.train_x.to(device), torch.float64)
    if folder is not None:
        check_folder(folder, recipe)
        if (folder / checkpoint.RESULTS).exists():
            model, _ = checkpoint.load(folder, device=device)
            results = read_json(folder / checkpoint.RESULTS)
            return TrainResult(model.attach(train_x), recipe, folder, results["history"], results)
    check_solving(recipe, len(train_x), device)
    model.fit(train_x, dataset.train_y.to(device))
    record: dict[str, Any] = {"epoch": 0, "train_seconds": time.perf_counter() - begin}
    if dataset.test_x is not None:
        record["test_accuracy"] = accuracy(predict(model, dataset.test_x, normalize), dataset.test_y)
    record["wall_seconds"] = timer.lap()
    results = training_results(recipe, [record], device)
    if folder is not None:
        checkpoint.save_with_probe(folder, model, recipe.config(dataset.class_names), dataset, normalize)
        write_json(folder / checkpoint.RESULTS, results)
    return TrainResult(model.eval(), recipe, folder, [record], results)
