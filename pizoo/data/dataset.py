"""A data set in memory, what is done to its pixels, and every random draw from it.

Everything drawn at random here (splits, subsets, batch order) comes from numpy's legacy ``RandomState``, whose streams
are frozen: the same seed gives the same numbers whatever the numpy version and the device.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# What a file calls the fields of a Dataset.
FILE_KEYS = {"train_x": "train_images", "train_y": "train_labels", "test_x": "test_images", "test_y": "test_labels"}
_SEED_LIMIT = 2**32  # RandomState takes 32-bit seeds
_ORDER, _SUBSET, _VALIDATION, TASKS, TEST_TASKS = 1, 2, 3, 4, 5  # keep the streams of one seed apart


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images (or vectors) and labels in memory, checked on construction.

    Args:
        name: what the data set is called.
        train_x: images [N, C, H, W] channel first, or vectors [N, d]; uint8 or floating point.
        train_y: labels int64 [N], 0 to ``classes - 1``.
        test_x, test_y: the same for the test images, item shape and dtype as in ``train_x``; both ``None`` where there
            are none.
        class_names: one name per class.
        source: file or folder the arrays were read from, for messages; empty when they were made in memory.

    Raises:
        ValueError: wrong shape or dtype, no images, numbers of images and labels that differ, a label out of range, a
            value that is not finite.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor | None
    test_y: Tensor | None
    class_names: tuple[str, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if not self.class_names:
            raise ValueError(f"{self._where}: class_names is empty; there must be a name per class")
        self._check_part("train_x", self.train_x, "train_y", self.train_y)
        if (self.test_x is None) != (self.test_y is None):
            there, lacking = ("test_y", "test_x") if self.test_x is None else ("test_x", "test_y")
            raise ValueError(f"{self._where}: {self._key(there)} without {self._key(lacking)}; give both or neither")
        if self.test_x is not None and self.test_y is not None:
            self._check_part("test_x", self.test_x, "test_y", self.test_y)
            for what, found, wanted in (
                ("items of shape", tuple(self.test_x.shape[1:]), self.input_size),
                ("dtype", self.test_x.dtype, self.train_x.dtype),
            ):
                if found != wanted:
                    raise ValueError(
                        f"{self._where}: {self._key('test_x')} has {what} {found}; it must be {wanted} as in "
                        f"{self._key('train_x')} (shapes here are channel first)"
                    )

    @property
    def input_size(self) -> tuple[int, ...]:
        """Shape of one item: (C, H, W) or (d,)."""
        return tuple(self.train_x.shape[1:])

    @property
    def classes(self) -> int:
        return len(self.class_names)

    def require(self, input_size: Iterable[int], classes: int | None = None) -> None:
        """Raise ValueError unless items have the shape ``input_size`` and there are ``classes`` classes."""
        if self.input_size != tuple(input_size):
            raise ValueError(
                f"{self._where}: {self._key('train_x')} has items of shape {self.input_size}; they must be of shape "
                f"{tuple(input_size)} (shapes here are channel first)"
            )
        if classes is not None and self.classes != classes:
            raise ValueError(f"{self._where}: {self.classes} classes; there must be {classes}")

    @property
    def _where(self) -> str:
        return self.source or f"data set {self.name!r}"

    def _key(self, field: str) -> str:
        return FILE_KEYS[field] if self.source else field

    def _check_part(self, x_field: str, x: Tensor, y_field: str, y: Tensor) -> None:
        x_key, y_key = self._key(x_field), self._key(y_field)
        if x.ndim not in (2, 4) or x.numel() == 0:
            raise ValueError(
                f"{self._where}: {x_key} has shape {list(x.shape)}; it must be [N, C, H, W] (channel first) or [N, d], "
                "with no dimension 0"
            )
        if x.dtype != torch.uint8 and not x.dtype.is_floating_point:
            raise ValueError(f"{self._where}: {x_key} has dtype {x.dtype}; it must be uint8 or floating point")
        if y.dtype != torch.int64 or y.ndim != 1:
            raise ValueError(f"{self._where}: {y_key} is {y.dtype} {list(y.shape)}; it must be int64 [N]")
        if len(x) != len(y):
            raise ValueError(
                f"{self._where}: {x_key} has {len(x)} items and {y_key} has {len(y)}; they must be as many"
            )
        for label in (int(y.min()), int(y.max())):
            if not 0 <= label < self.classes:
                raise ValueError(
                    f"{self._where}: {y_key} holds the label {label}; labels must be 0 to {self.classes - 1}, for "
                    f"{self.classes} classes"
                )
        if x.dtype.is_floating_point and not torch.isfinite(x).all():
            raise ValueError(f"{self._where}: {x_key} holds a value that is not finite (NaN or infinity)")


class TransferData(NamedTuple):
    """What a net learns its features on, and what they are then measured on."""

    source: Dataset
    target: Dataset


@dataclass(frozen=True)
class Normalize:
    """``(x / scale - mean) / std`` per channel, for whole tensors on the device they are on.

    Args:
        scale: the value that becomes 1: 255 for 8-bit images.
        mean, std: one value per channel (dimension 1), in units after scaling; both ``None``: scaling only.
    """

    scale: float = 255.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale is {self.scale}; it must be positive")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean is {self.mean} and std is {self.std}; give both or neither")
        if self.mean is not None and self.std is not None:
            if len(self.mean) != len(self.std):
                raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}; they must be as many")
            if not all(math.isfinite(s) and s > 0 for s in self.std):
                raise ValueError(f"std is {self.std}; every value must be positive")

    def __call__(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normalise ``x`` [N, C, ...] (uint8 or floating point) into a new tensor of the same shape.

        The arithmetic is done in float32 (float64 for ``dtype`` float64), one correctly rounded operation after
        another, so that every device gives the same bits; ``dtype`` is rounded to at the end.

        Raises:
            ValueError: ``dtype`` is not floating point, or ``mean`` has not one value per channel.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; it must be a floating point type")
        exact = torch.promote_types(dtype, torch.float32)
        # Dividing by a Python number multiplies by its reciprocal on CUDA; dividing by a tensor there divides.
        out = x.to(exact, copy=True).div_(torch.tensor(self.scale, dtype=exact, device=x.device))
        if self.mean is not None and self.std is not None:
            if x.ndim < 2 or x.shape[1] != len(self.mean):
                raise ValueError(
                    f"x has shape {tuple(x.shape)}; dimension 1 must have the {len(self.mean)} of mean and std"
                )
            per_channel = (-1, *(1,) * (x.ndim - 2))
            mean, std = (torch.tensor(v, dtype=exact, device=x.device).view(per_channel) for v in (self.mean, self.std))
            out.sub_(mean).div_(std)
        return out.to(dtype)


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order in which epoch ``epoch`` (0-based) visits ``n`` training items: a permutation, int64 [n], on the CPU.

    A function of its arguments alone, so training resumes at any epoch with the batches it would have seen. Batches are
    ``epoch_order(...).split(batch_size)``: a short last batch is kept, an epoch has ``ceil(n / batch_size)`` steps.

    Raises:
        ValueError: ``n`` below 1, ``seed`` or ``epoch`` not in 0 to 2³² - 1.
    """
    return permutation(n, _ORDER, seed=seed, epoch=epoch)


def take_subset(dataset: Dataset, n: int, seed: int = 0) -> Dataset:
    """Keep the first ``n`` training items of a seeded permutation, classes unbalanced; the test part stays as it is.

    Raises:
        ValueError: ``n`` not in 1 to the number of training items.
    """
    total = len(dataset.train_x)
    if not 1 <= n <= total:
        raise ValueError(f"subset is {n}; it must be 1 to {total}, the training items of {dataset.name}")
    keep = permutation(total, _SUBSET, seed=seed)[:n]
    return replace(dataset, train_x=dataset.train_x[keep], train_y=dataset.train_y[keep])


def keep_classes(dataset: Dataset, classes: Sequence[int]) -> Dataset:
    """Keep the items of some classes; the k-th of ``classes`` becomes label k.

    Raises:
        ValueError: a class twice, a number that is none; a class without training items.
    """
    check_classes(classes, dataset.classes, dataset.name)
    label_of = torch.full((dataset.classes,), -1)
    label_of[list(classes)] = torch.arange(len(classes))
    parts: dict[str, Tensor | None] = {}
    for x, y in (("train_x", "train_y"), ("test_x", "test_y")):
        if getattr(dataset, y) is not None:
            labels = label_of[getattr(dataset, y)]
            parts |= {x: getattr(dataset, x)[labels >= 0], y: labels[labels >= 0]}
    missing = set(range(len(classes))) - set(parts["train_y"].unique().tolist())
    if missing:
        raise ValueError(f"classes: {dataset.name} has no training items of class {classes[min(missing)]}")
    if "test_y" in parts and not len(parts["test_y"]):
        parts |= {"test_x": None, "test_y": None}
    return replace(dataset, class_names=tuple(dataset.class_names[k] for k in classes), **parts)


def check_classes(classes: Sequence[int], count: int, name: str) -> None:
    """Raise ValueError unless ``classes`` are two or more different numbers of the ``count`` classes of data set ``name``."""
    repeated = [number for number, times in Counter(classes).items() if times > 1]
    if repeated:
        raise ValueError(f"classes: {repeated[0]} is there twice; every class can be kept once")
    unknown = [number for number in classes if not 0 <= number < count]
    if unknown:
        raise ValueError(f"classes: {unknown[0]} is no class of {name}, which has the numbers 0 to {count - 1}")
    if len(classes) < 2:
        raise ValueError(f"classes: found {list(classes)}; there must be two or more to keep")


def split_validation(dataset: Dataset, size: int | float, seed: int = 0) -> Dataset:
    """Hold out part of the training items: the result has them as its test part.

    The data set's own test part is dropped, so what is tuned on the result cannot have seen it.

    Args:
        size: how many items to hold out, or (a float below 1) which fraction.

    Raises:
        ValueError: nothing left to train on or to validate with.
    """
    total = len(dataset.train_x)
    held_out = round(size * total) if isinstance(size, float) else size
    if not 1 <= held_out < total:
        raise ValueError(
            f"size is {size}: {held_out} of {total} training items of {dataset.name}; 1 to {total - 1} can go"
        )
    order = permutation(total, _VALIDATION, seed=seed)
    train, test = order[held_out:], order[:held_out]
    x, y = dataset.train_x, dataset.train_y
    return replace(dataset, train_x=x[train], train_y=y[train], test_x=x[test], test_y=y[test])


def fingerprint(x: Tensor) -> str:
    """SHA-256 (hex) of a tensor's dtype, shape and values, whatever its device and strides."""
    x = x.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{x.dtype} {list(x.shape)} ".encode())
    digest.update(x.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def permutation(n: int, stream: int, **seeds: int) -> Tensor:
    """A random order of ``n`` items, int64 [n]; raises ValueError for n below 1 and as :func:`random_state`."""
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    return torch.from_numpy(random_state(stream, **seeds).permutation(n).astype(np.int64, copy=False))


def random_state(stream: int, **seeds: int) -> np.random.RandomState:
    """The frozen random numbers of a stream and its seeds.

    Raises:
        ValueError: a seed not in 0 to 2³² - 1, by its name.
    """
    for key, value in seeds.items():
        if not 0 <= value < _SEED_LIMIT:
            raise ValueError(f"{key} is {value}; it must be 0 to 2**32 - 1")
    return np.random.RandomState([stream, *seeds.values()])
