"""The feature kernel of an entry or a checkpoint on a data set: to a file, or straight into a regression."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pizoo import kernels, zoo
from pizoo.data import DataNotFoundError, Dataset, Normalize, list_datasets, load_dataset, take_subset
from pizoo.evaluation.accuracy import percent
from pizoo.evaluation.features import save_feature_kernel
from pizoo.evaluation.transfer import featured, transfer_correct, validation_accuracies
from pizoo.memory import choose_device
from pizoo.models import PiNet

VALIDATION = 0.2  # of the training images, where ridges are to choose from
PIXELS_AT_ONCE = 2**26
FEATURE_BYTES = 4 + 8  # of a number: as the net gives it, and in float64, as it is solved
REMEDY = "; or take fewer training images (--subset), or solve iteratively (--iterative)"


class EntryFeatures:
    """Features of a net on a data set, and what is made of their kernel.

    Args:
        entry: what :func:`pizoo.load` takes.
        on: a data set's name, or the path of one's own; its pixels are normalised by the mean and standard deviation of each
            channel over its training images. None: the one that the entry's number is on, as its recipe normalises it.
        subset: of so many training images; None: all.
        ridges: how many :meth:`regress` will be given: there must be a test part then; 0: none.
        iterative: it will solve iteratively; else there must be room for the kernel, too, before features are computed.
        data_dir, device, epoch, rows_on: as for :func:`pizoo.evaluate`.

    Attributes:
        model: the net.
        features: a data set with features for images, on the net's device.
        seconds: how long it took to compute them.
        trained_on: whether these are the images that the net was trained on: held-out ones are none then.

    Raises:
        CheckpointError: a checkpoint without a recipe, which says of no size that images must have.
        TypeError: an entry without features.
        ValueError: images of another size than the net's; with ``ridges``, a data set without a test part.
        NotEnoughMemory: the kernel that ``ridges`` are solved with does not fit.
    """

    def __init__(
        self,
        entry: str | os.PathLike,
        on: str | None = None,
        subset: int | None = None,
        *,
        ridges: int = 0,
        iterative: bool = False,
        data_dir: str | os.PathLike | None = None,
        device: torch.device | str | None = None,
        epoch: int | None = None,
        rows_on: str = "auto",
    ):
        self.model: PiNet = zoo.load(entry, device=choose_device(device), epoch=epoch, rows_on=rows_on)
        recipe = zoo.recipe_of(self.model.config, entry)
        if recipe.get("tasks") and on is None:
            raise ValueError(
                f"{entry} learns from tasks, which have no training images: name a data set to take them on"
            )
        if on is None:
            described = {"recipe": recipe.get("transfer") or recipe}
            images, normalize = zoo.dataset(described, data_dir), zoo.preprocessing(described)
        else:
            images = named_dataset(on, tuple(recipe["data"]["input_size"]), data_dir)
            normalize = own_normalize(images.train_x)
        self.trained_on = _is_data_of(recipe, on)
        if ridges:
            check_test_part(images)
        if subset is not None:
            images = take_subset(images, subset)
        if ridges and not iterative:
            self._check_solving(images, ridges)
        begin = time.perf_counter()
        self.features: Dataset = featured(self.model, images, normalize)
        self.seconds = time.perf_counter() - begin

    def _check_solving(self, images: Dataset, ridges: int) -> None:
        """Raise NotEnoughMemory unless what :meth:`regress` decomposes fits beside features that are yet to be computed."""
        if not isinstance(self.model, PiNet):  # which has no features, as is told there
            return
        count, device = len(images.train_y), next(self.model.parameters()).device
        taken = FEATURE_BYTES * self.model.num_features * (count + len(images.test_y))
        kernels.check_solving(count, 1, device, REMEDY, taken)
        if ridges > 1:
            kernels.check_solving(count - round(VALIDATION * count), ridges, device, REMEDY, taken)

    def save(self, path: str | os.PathLike) -> tuple[int, int]:
        """Write the kernel between all images, training images first, to an ``.npy``; returns its shape.

        Raises:
            CheckpointError: the disk is full.
        """
        check_out(path)
        parts = [part for part in (self.features.train_x, self.features.test_x) if part is not None]
        return save_feature_kernel(path, self.model, torch.cat(parts))

    def regress(self, ridges: Sequence[float], tolerance: float | None = None) -> dict[str, Any]:
        """Accuracy of ridge regression on the kernel of the training images, on the test images.

        Args:
            ridges: of several the one that does best on a fifth of the training images, held out, is taken. (A net
                ``trained_on`` these very images knows them all: give it one ridge.)
            tolerance: solve iteratively to this relative residual (:func:`pizoo.kernels.solve_iteratively`): for kernels that
                do not fit; None: directly, in float64.

        Returns:
            ``accuracy`` in percent, ``ridge``, ``validation_accuracies`` (one a ridge; None for one ridge),
            ``training_images``, ``test_images``, ``feature_seconds``, and ``seconds`` of the regression with the ridge taken:
            kernels, solution and predictions.

        Raises:
            ValueError: a ridge not positive, no test images.
            NotEnoughMemory: the kernel does not fit, with its size.
        """
        kernels.check_ridges(ridges)
        check_test_part(self.features)
        ridge, tried = ridges[0], None
        if len(ridges) > 1:
            tried = validation_accuracies(self.model.feature_kernel, self.features, ridges, VALIDATION, tolerance)
            ridge = max(zip(tried, ridges, strict=True), key=lambda one: one[0])[1]
        begin = time.perf_counter()
        right = transfer_correct(self.model.feature_kernel, self.features, [ridge], tolerance)[0]
        return {
            "accuracy": percent(right),
            "ridge": ridge,
            "validation_accuracies": tried,
            "training_images": len(self.features.train_y),
            "test_images": len(self.features.test_y),
            "feature_seconds": self.seconds,
            "seconds": time.perf_counter() - begin,
        }


def _is_data_of(recipe: dict[str, Any], on: str | None) -> bool:
    """Whether a data set is the one that a recipe trains on; ``on``: what :class:`EntryFeatures` takes."""
    data = recipe["data"]
    if on is None:
        return recipe.get("transfer") is None
    if on in list_datasets() or data.get("path") is None:
        return on == data["name"] and data.get("path") is None
    return Path(on).expanduser().resolve() == Path(data["path"]).expanduser().resolve()


def check_out(path: str | os.PathLike) -> None:
    """Raise ValueError unless a kernel can be written to a file of that name."""
    if Path(path).suffix != ".npy":
        raise ValueError(f"out is {str(path)!r}; it must end in .npy")


def check_test_part(dataset: Dataset) -> None:
    """Raise ValueError if a data set has no test part."""
    if dataset.test_y is None:
        raise ValueError(f"data set {dataset.name!r} has no test part to measure a regression on")


def named_dataset(name: str, input_size: tuple[int, ...], data_dir: str | os.PathLike | None = None) -> Dataset:
    """A known data set, or the one at a path, whose items are of the size ``input_size``.

    Raises:
        ValueError: neither a known name nor a path; items of another size.
    """
    if name in list_datasets():
        found = load_dataset(name, data_dir=data_dir)
    else:
        path = Path(name).expanduser()
        if not path.exists():
            raise DataNotFoundError(
                f"{name!r} is neither a data set ({', '.join(list_datasets())}) nor a file or folder"
            )
        found = load_dataset(path.stem, path=path, input_size=input_size if path.is_dir() else None)
    if found.input_size != input_size:
        sizes = f"{list(found.input_size)}; the net takes {list(input_size)}"
        raise ValueError(f"{name} has items of size {sizes}, and only a folder of images is resized to it")
    return found


def own_normalize(x: Tensor) -> Normalize:
    """What gives images x [N, C, H, W] mean 0 and standard deviation 1 in each channel; vectors [N, d] as one channel."""
    channels = x.shape[1] if x.ndim == 4 else 1
    total, squares = torch.zeros(2, channels, dtype=torch.float64)
    for part in x.split(max(1, PIXELS_AT_ONCE // x[0].numel())):
        part = part.view(len(part), channels, -1).double()
        total += part.sum((0, 2))
        squares += part.square().sum((0, 2))
    count = x.numel() / channels
    mean = total / count
    std = (squares / count - mean**2).clamp(min=0).sqrt()
    std[std == 0] = 1  # a channel that tells nothing
    times = 1 if x.ndim == 4 else x.shape[1]
    return Normalize(1.0, tuple(mean.tolist() * times), tuple(std.tolist() * times))
