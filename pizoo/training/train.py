"""Training any recipe: on images or on tasks, by steps or, for kernels, without."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from pizoo import __version__, processes, segments
from pizoo.data import Dataset, TaskPool, TransferData
from pizoo.files import json_sha256, sha256
from pizoo.memory import choose_device
from pizoo.recipes import Recipe, RecipeError, load_recipe
from pizoo.training.folder import check_folder, training_lock
from pizoo.training.kernel import solve_kernel
from pizoo.training.meta import MetaTraining, measure_kernel
from pizoo.training.report import logging_to
from pizoo.training.results import TrainResult
from pizoo.training.supervised import Training
from pizoo.training.transfer import TransferTraining

COMPARED_ITEMS = 4096  # images, of data sets that would take long to read whole


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

    In processes started by ``torchrun``, one a device, all train one net: of an infinite net each holds a share of the rows and
    sees every batch, of a finite one each computes a part of every batch. Any number of processes goes on with what any number
    has begun. The net returned computes only where all of them call it with the same inputs; load it from ``out`` to have it
    whole.

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
        RecipeError, FileNotFoundError, ValueError: recipe or data are missing or do not fit; code, recipe, data or checkpoint
            are not the same in all processes; nothing was begun.
        ProcessLost: another process has ended or does not answer; epochs saved before it stay.
        NotEnoughMemory: it would not fit, and nothing was begun; or memory ran out, and epochs saved before it stay.
        TrainingDiverged: a loss that is not finite; epochs saved before it stay.
        CheckpointError: ``out`` holds another training, or the disk is full.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif list(overrides):
        raise RecipeError("overrides go with a name or path; a Recipe is complete already")
    device = processes.join(choose_device(device))
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
    stands = f"the same command goes on after the last finished epoch in {folder}" if folder else "no epoch was saved"
    remedy = f"{stands}; as many processes as are left will do"
    with processes.explained(remedy), processes.watched(remedy):
        if processes.count() > 1:
            _check_processes(recipe, dataset, folder)
        own_folder = folder if processes.index() == 0 else None  # one process logs
        with training_lock(own_folder):
            if recipe.train is None:
                return solve(recipe, dataset, folder, device)
            with logging_to(own_folder):
                return training(recipe, dataset, folder, device, engine, rows_on).run(
                    progress and processes.index() == 0
                )


def _check_processes(
    recipe: Recipe, dataset: Dataset | TransferData | dict[str, TaskPool], folder: Path | None
) -> None:
    """Raise unless several processes can train the recipe together, and are about to train the same."""
    if recipe.train is None:
        raise RecipeError(f"{recipe.entry} is a kernel, which is not trained by steps; start it in one process")
    if recipe.tasks is not None and recipe.model.kind != "infpi":
        raise RecipeError(
            f"{recipe.entry}: tasks are not split over processes; a finite net learns from them in one process"
        )
    begun = folder is not None and (folder / segments.MANIFEST).exists()
    processes.compare(
        {
            "code": _code_fingerprint(),
            "recipe": json_sha256(recipe.to_dict()),
            "data": _data_fingerprint(dataset),
            "checkpoint": sha256(folder / segments.MANIFEST) if begun else "none",
        }
    )


def _code_fingerprint() -> str:
    """Of this package's source, and of torch's version."""
    root, digest = Path(segments.__file__).parent, hashlib.sha256(f"{__version__} {torch.__version__}".encode())
    for file in sorted(file for file in root.rglob("*") if file.suffix in (".py", ".cu", ".cuh")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _data_fingerprint(data: object) -> str:
    """Of every tensor in ``data``: shape, dtype, and items spread evenly over it."""
    digest = hashlib.sha256()
    for tensor in _tensors(data):
        digest.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
        items = tensor[:: max(1, len(tensor) // COMPARED_ITEMS)].cpu().contiguous()
        digest.update(items.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(data: object) -> Iterator[Tensor]:
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, dict | tuple):
        for value in data.values() if isinstance(data, dict) else data:
            yield from _tensors(value)
    elif hasattr(data, "__dict__"):
        yield from _tensors(vars(data))
