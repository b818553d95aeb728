"""Entries and checkpoints on data: test accuracy, classes of image files."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pizoo import checkpoint, processes, zoo
from pizoo.data import DataNotFoundError, Dataset, TaskPool, load_tasks, read_images
from pizoo.evaluation.accuracy import accuracy, correct, predict
from pizoo.evaluation.fewshot import measure_splits
from pizoo.evaluation.transfer import described, measure_transfer
from pizoo.files import read_json
from pizoo.memory import choose_device, explained
from pizoo.models import KernelRegressor


def evaluate(
    model_or_entry: nn.Module | str | os.PathLike,
    dataset: Dataset | dict[str, TaskPool] | None = None,
    *,
    data_dir: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    epoch: int | None = None,
    rows_on: str = "auto",
    tasks: int | None = None,
    ridge: float | None = None,
) -> dict[str, Any]:
    """Test accuracy of an entry, a checkpoint, or a net loaded from one.

    In processes started by ``torchrun`` each computes a part of the images, of an entry or checkpoint; all return the same.

    Args:
        model_or_entry: what :func:`pizoo.load` takes, or what it gave.
        dataset: None: the one the net was trained on, of a recipe with ``transfer`` the one its features are measured on. Of
            a few-shot learner, classes as :func:`pizoo.data.load_tasks` gives them.
        data_dir: where data sets are (:func:`pizoo.data.data_directory`).
        device: None: the net's own, for a name a GPU if there is one.
        epoch: of a training checkpoint; None: the one its training chose, else the last.
        rows_on: of a name, where its rows are kept (:func:`pizoo.load`).
        tasks: of a few-shot learner, on how many tasks of each split; None: as many as its recipe says.
        ridge: of a net whose recipe has ``transfer``, which is measured by ridge regression on its features' kernel; None: for
            a name the one that its training chose, else the published one. Without a large GPU it is measured on fewer images.

    Returns:
        ``accuracy`` in percent, ``images``, ``data``, ``seconds``, of transfer also ``training_images`` and ``ridge``; of a
        few-shot learner instead of ``images`` what :func:`pizoo.evaluation.fewshot.measure_splits` gives.

    Raises:
        UnknownEntryError, CheckpointError, DataNotFoundError, ValueError: name, checkpoint or data are missing or do not fit.
    """
    begin = time.perf_counter()
    if isinstance(model_or_entry, nn.Module):
        model = model_or_entry if device is None else model_or_entry.to(device)
    else:
        model = zoo.load(model_or_entry, device=processes.join(choose_device(device)), epoch=epoch, rows_on=rows_on)
    if not hasattr(model, "config"):
        raise ValueError(
            "model was not loaded by pizoo.load: its data and preprocessing are unknown; call predict instead"
        )
    recipe = zoo.recipe_of(model.config, model_or_entry)
    if task_settings := recipe.get("tasks"):
        pools = dataset or load_tasks(recipe["data"]["name"], data_dir)
        with explained(_ran_out):
            found = measure_splits(model, pools, task_settings, tasks).recorded
        return {**found, "data": recipe["data"]["name"], "seconds": time.perf_counter() - begin}
    if tasks is not None:
        raise ValueError(f"tasks is {tasks}; this net does not learn from tasks, and is measured on its test images")
    if transfer := recipe.get("transfer"):
        dataset = dataset or zoo.dataset({"recipe": transfer}, data_dir)
        ridge = _chosen_ridge(model_or_entry, epoch, transfer) if ridge is None else ridge
        with explained(_ran_out):
            split, right = measure_transfer(model, dataset, zoo.preprocessing({"recipe": transfer}), ridge)
        found = described(split, right)
        images = {"images": found.pop("test_images"), "data": dataset.name, "ridge": ridge}
        return {**found, **images, "seconds": time.perf_counter() - begin}
    if ridge is not None:
        raise ValueError(f"ridge is {ridge}; this net's recipe has no transfer to measure: `pizoo kernel` does that")
    normalize = zoo.preprocessing(model.config)
    dataset = dataset or zoo.dataset(model.config, data_dir)
    if dataset.test_x is None:
        raise ValueError(f"data set {dataset.name!r} has no test part to evaluate on")
    attach_training_images(model, dataset.train_x, normalize)
    with explained(_ran_out):
        logits = predict(model, dataset.test_x, normalize)
    return {
        "accuracy": accuracy(logits, dataset.test_y),
        "images": len(dataset.test_y),
        "data": dataset.name,
        "seconds": time.perf_counter() - begin,
    }


def _chosen_ridge(model_or_entry: nn.Module | str | os.PathLike, epoch: int | None, transfer: dict[str, Any]) -> float:
    """The ridge that an entry's training chose, where there is a record of that; else the published one."""
    if isinstance(model_or_entry, nn.Module):
        return transfer["ridge"]
    results = zoo.locate(model_or_entry, epoch=epoch, records=True) / checkpoint.RESULTS
    recorded = read_json(results) if results.exists() else {}
    return recorded.get("transfer", transfer)["ridge"]


def _ran_out(reported: str) -> str:
    return f"evaluation ran out of memory: {reported}. Rows kept off the GPU (--rows-on host, rows_on='host') stream"


def attach_training_images(model: nn.Module, train_x: Tensor, normalize) -> None:
    """Give a kernel regressor that lacks them its training images, raw [n, ...]; other models need none."""
    if isinstance(model, KernelRegressor) and model.train_x is None:
        model.attach(normalize(train_x.to(model.dual.device), torch.float64))


def _attach_own_images(model: nn.Module, entry: str | os.PathLike, data_dir: str | os.PathLike | None) -> None:
    """:func:`attach_training_images`, of the data set that a regressor's recipe names."""
    if isinstance(model, KernelRegressor) and model.train_x is None:
        try:
            dataset = zoo.dataset(model.config, data_dir)
        except DataNotFoundError as error:
            raise DataNotFoundError(f"{entry} is a kernel, which predicts from its training images: {error}") from None
        attach_training_images(model, dataset.train_x, zoo.preprocessing(model.config))


def correct_once_loaded(folder: Path, dataset: Dataset, normalize, device: torch.device) -> Tensor:
    """Which test images a checkpoint classifies correctly when it is loaded as a user loads it: bool [n]."""
    model, _ = checkpoint.load(folder, device=device)
    attach_training_images(model, dataset.train_x, normalize)
    return correct(predict(model, dataset.test_x, normalize), dataset.test_y)


def classify(
    entry: str | os.PathLike,
    images: Sequence[str | os.PathLike],
    *,
    data_dir: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    top: int = 3,
    rows_on: str = "auto",
) -> list[list[tuple[str, float]]]:
    """The likeliest classes of image files, with their probabilities (for kernel regressors: scores).

    Args:
        data_dir: where a kernel regressor's training images are, from which it predicts (:func:`pizoo.data.data_directory`).

    Raises:
        ValueError: a net that takes no images, a file that is none.
        DataNotFoundError: a kernel regressor whose training images are not here.
    """
    model = zoo.load(entry, device=device, rows_on=rows_on)
    recipe = zoo.recipe_of(model.config, entry)
    data = recipe["data"]
    if recipe.get("tasks"):
        raise ValueError(
            f"{entry} has no classes of its own: adapt it to a few images of yours with model.adapt, then predict"
        )
    if len(data["input_size"]) != 3:
        raise ValueError(f"{entry} takes vectors {data['input_size']}, not images")
    pixels = read_images([Path(image) for image in images], tuple(data["input_size"]))
    _attach_own_images(model, entry, data_dir)
    # Files hold 0 to 255; the net's data set may count its pixels otherwise (the digits: 0 to 16).
    logits = predict(model, pixels.float() * (data["scale"] / 255), zoo.preprocessing(model.config))
    scores = logits if isinstance(model, KernelRegressor) else logits.softmax(1)
    names = model.config["class_names"]
    best = scores.topk(min(top, len(names)), dim=1)
    return [
        [(names[i], value) for i, value in zip(row, values, strict=True)]
        for row, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
