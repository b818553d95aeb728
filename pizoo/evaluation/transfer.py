"""Transfer: how well the features of a net that learned one data set do on another, by ridge regression on their kernel.

Source: Yang, Santacroce, Hu (ICLR 2022), section 6. The paper reports one epoch and one ridge; here both can be chosen on
training images that are held out, and the test images are looked at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pizoo import kernels
from pizoo.data import Dataset, Normalize, keep_classes, split_validation, take_subset
from pizoo.evaluation.accuracy import correct, percent
from pizoo.evaluation.features import features
from pizoo.functional import centred_one_hot
from pizoo.kernels import KernelFunction
from pizoo.memory import free_memory
from pizoo.models import PiNet

# What `pizoo verify` measures again without a large GPU: ridge regression on so many training images, on so many test images.
VERIFIED_TRAIN, VERIFIED_TEST = 5000, 2000
QUICK_CLASSES = 3


def featured(model: PiNet, target: Dataset, normalize: Normalize, dtype: torch.dtype | None = None) -> Dataset:
    """A data set with a net's features [n, num_features] in the place of images; they stay on the net's device.

    Args:
        target: raw images, of the size that the net takes.
        normalize: what makes the net's inputs out of them.
        dtype: of the features; None: the net's (float32 at least).

    Raises:
        ValueError: images of another size; features that are not finite.
    """
    parts = {
        key: None if part is None else features(model, part, dtype=dtype, normalize=normalize)
        for key, part in (("train_x", target.train_x), ("test_x", target.test_x))
    }
    return replace(target, **parts, source="")


def transfer_correct(
    kernel: KernelFunction, found: Dataset, ridges: Sequence[float], tolerance: float | None = None
) -> list[Tensor]:
    """Which test items kernel ridge regression on the training items classifies correctly, with each ridge: bool [n].

    Float64 throughout.

    Args:
        kernel: of features: a net's ``feature_kernel``.
        found: features (:func:`featured`), with a test part.
        tolerance: solve iteratively, to this relative residual (:func:`pizoo.kernels.solve_iteratively`); None: directly.

    Raises:
        ValueError: a ridge not positive, a kernel that needs a larger one.
        NotEnoughMemory: the kernel does not fit, with its size.
    """
    kernels.check_ridges(ridges)
    x, test_x = found.train_x.double(), found.test_x.double()
    targets = centred_one_hot(found.train_y.to(x.device), found.classes)
    if tolerance is None:
        kernels.check_solving(len(x), len(ridges), x.device, remedy="; or solve on a subset, or iteratively")
        duals = kernels.solve_ridges(kernels.matrix(kernel, x, x), targets, ridges)
    else:
        duals = [kernels.solve_iteratively(kernel, x, targets, r, tolerance)[0] for r in ridges]
    scores = kernels.product(kernel, test_x, x, torch.cat(duals, 1))
    return [correct(part.cpu(), found.test_y.cpu()) for part in scores.split(found.classes, 1)]


def regressed(
    model: PiNet, target: Dataset, normalize: Normalize, ridge: float, dtype: torch.dtype | None = None
) -> tuple[Dataset, Tensor]:
    """A data set's features (:func:`featured`), and which test images regression on them classifies correctly: bool [n]."""
    found = featured(model, target, normalize, dtype)
    return found, transfer_correct(model.feature_kernel, found, [ridge])[0]


def validation_accuracies(
    kernel: KernelFunction, found: Dataset, ridges: Sequence[float], size: float, tolerance: float | None = None
) -> list[float]:
    """Accuracy in percent with each ridge on a share ``size`` of the training items, held out; the test part is not used."""
    return [percent(right) for right in transfer_correct(kernel, split_validation(found, size), ridges, tolerance)]


def quick_split(target: Dataset, size: float) -> Dataset:
    """The first three classes alone, part of their training items held out: a check that takes a moment."""
    return keep_classes(split_validation(target, size), range(min(QUICK_CLASSES, target.classes)))


def verification_split(target: Dataset) -> Dataset:
    """The subset that is measured where not all is: the first training images of a permutation, the first test images."""
    train = min(VERIFIED_TRAIN, len(target.train_x))
    small = take_subset(target, train)
    return replace(small, test_x=target.test_x[:VERIFIED_TEST], test_y=target.test_y[:VERIFIED_TEST])


def measures_all(count: int, device: torch.device) -> bool:
    """Whether a regression on ``count`` training images is measured: on a GPU with room for the kernel and its factor."""
    needed = kernels.kernel_bytes(count, count, 8, device, kernels.FACTORED)
    return device.type == "cuda" and needed <= free_memory(device)


def measure_transfer(
    model: PiNet, target: Dataset, normalize: Normalize, ridge: float, dtype: torch.dtype | None = None
) -> tuple[Dataset, Tensor]:
    """Which test images are classified correctly: of the whole target where :func:`measures_all`, else of
    :func:`verification_split`.

    Returns:
        features that it is measured on, and bool [n] of their test part.
    """
    if not measures_all(len(target.train_y), next(model.parameters()).device):
        target = verification_split(target)
    return regressed(model, target, normalize, ridge, dtype)


def described(split: Dataset, right: Tensor) -> dict[str, Any]:
    """What is recorded of a measurement: how many images it is on, and the accuracy in percent."""
    return {"training_images": len(split.train_y), "test_images": len(split.test_y), "accuracy": percent(right)}
