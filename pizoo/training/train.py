"""Training any recipe: on images or on tasks, by steps or, for kernels, without."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from pizoo import checkpoint
from pizoo.data import Dataset, TaskPool, TransferData
from pizoo.evaluation.accuracy import choose_device
from pizoo.recipes import Recipe, RecipeError, load_recipe
from pizoo.training.meta import MetaTraining, measure_kernel
from pizoo.training.report import logging_to
from pizoo.training.supervised import Training, TrainResult, check_folder, solve_kernel
from pizoo.training.transfer import TransferTraining


def train(
    recipe: str | os.PathLike | Recipe,
    out: str | os.PathLike | None = None,
    *,
    overrides: Iterable[str] = (),
    data_dir: str | os.PathLike | None = None,
    dataset: Dataset | TransferData | dict[str, TaskPool] | None = None,
    device: torch.device | str | None = None,
    engine: bool | None = None,
    rows_on: str = "auto",
    progress: bool = False,
) -> TrainResult:
    """Train a recipe; if ``out`` holds an unfinished training of the same recipe, go on with it.

    Args:
        recipe: an entry's name, a path to a YAML file, or a recipe.
        out: folder for checkpoint, log and results; None: nothing is written.
        overrides: ``"train.epochs=1"`` and the like, for a name or path.
        data_dir: where data sets are (:func:`pizoo.data.data_directory`).
        dataset: use this one instead of the one the recipe names; of a recipe with tasks, the classes of each split, as
            :func:`pizoo.data.load_tasks` gives them, of one with ``transfer`` a :class:`pizoo.data.TransferData`.
        device: None: a GPU if there is one.
        engine: train with :class:`pizoo.training.engine.Engine` instead of the plain loop, to the same result within
            rounding; None: on a GPU, where it can.
        rows_on: where the rows of an infinite net are kept: "device", "host" (they stream to the GPU in every step), or
            "auto": on the host, with a warning, if they fit there and not on the GPU. A training may be resumed with another
            choice; the net is then the same within rounding.
        progress: show a progress bar.

    Raises:
        RecipeError, FileNotFoundError, ValueError: recipe or data are missing or do not fit; nothing was begun.
        NotEnoughMemory: it would not fit, and nothing was begun; or memory ran out, and epochs saved before it stay.
        TrainingDiverged: a loss that is not finite; epochs saved before it stay.
        CheckpointError: ``out`` holds another training, or the disk is full.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif list(overrides):
        raise RecipeError("overrides go with a name or path; a Recipe is complete already")
    device = choose_device(device)
    training, solve, wanted = Training, solve_kernel, Dataset
    if recipe.tasks is not None:
        training, solve, wanted = MetaTraining, measure_kernel, dict
    elif recipe.transfer is not None:
        training, wanted = TransferTraining, TransferData
    if dataset is None:
        dataset = recipe.load_data(data_dir)
    if not isinstance(dataset, wanted):
        raise TypeError(f"dataset is a {type(dataset).__name__}; for {recipe.entry} it must be a {wanted.__name__}")
    training.check_data(recipe, dataset)
    folder = Path(out) if out is not None else None
    if folder is not None:
        check_folder(folder, recipe)  # a folder that is refused stays as it is, its log included
    with checkpoint.training_lock(folder):
        if recipe.train is None:
            return solve(recipe, dataset, folder, device)
        with logging_to(folder):
            return training(recipe, dataset, folder, device, engine, rows_on).run(progress)
