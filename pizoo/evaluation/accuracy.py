"""Predictions and test accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pizoo import processes
from pizoo.rows import Rows

EVALUATION_BATCH = 1000
ROUNDING = 1e-6  # points, of accuracies that are the same


@torch.no_grad()
def predict(
    model: nn.Module, x: Tensor, normalize: Callable[..., Tensor] | None, batch_size: int = EVALUATION_BATCH
) -> Tensor:
    """Logits of a net in eval mode.

    In several processes, all of which must ask: each computes a part of the inputs, or, of a net whose rows are shared, its
    part of every logit.

    Args:
        model: a net or an attached kernel regressor; its mode is restored afterwards.
        x: inputs [n, ...] as the data set holds them, on any device.
        normalize: turns these into the net's (:class:`pizoo.data.Normalize`); None: they are the net's, on its device.
        batch_size: inputs at a time.

    Returns:
        [n, classes] on the CPU, in the net's dtype.
    """
    anchor = next((t for t in (*model.parameters(), *model.buffers())), x)
    training = model.training

    def of(x: Tensor) -> Tensor:
        parts = x.split(batch_size)
        if normalize is not None:
            parts = (normalize(part.to(anchor.device), anchor.dtype) for part in parts)
        return torch.cat([model(part) for part in parts]).cpu()  # once: a copy to the host waits for the device

    model.eval()
    try:
        return over_processes(model, of, x)
    finally:
        model.train(training)


def over_processes(model: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` [n, ...], which ``model`` computes: of x [n, ...] every process takes a part, unless the net's rows are
    shared already, and has the whole afterwards."""
    shared = any(isinstance(module, Rows) and module.shared for module in model.modules())
    return function(x) if shared else processes.split(function, x)


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """Bool [n]: in which rows of ``logits`` [n, classes] the largest entry is at the label in ``y`` int64 [n].

    Raises:
        ValueError: a logit that is not finite: no prediction was made.
    """
    if not logits.isfinite().all():
        raise ValueError(f"logits {list(logits.shape)} hold values that are not finite; the net makes no prediction")
    return logits.argmax(1) == y.to(logits.device)


def percent(right: Tensor) -> float:
    """Percent of entries of a bool tensor that are true, as near to it as a float is: 57.6 of 5,760 in 10,000."""
    return 100 * int(right.sum()) / right.numel()


def within(points: float, a: float, b: float) -> bool:
    """Whether two accuracies in percent are at most so many points apart; exactly so many, whatever their last bits, are."""
    return abs(a - b) <= points + ROUNDING


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Percent of rows of ``logits`` [n, classes] that are :func:`correct` for the labels ``y`` int64 [n]."""
    return percent(correct(logits, y))


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of ``values`` (None for fewer than two)."""
    if len(values) < 2:
        return None
    return (torch.tensor(values, dtype=torch.float64).std() / len(values) ** 0.5).item()


class Difference(NamedTuple):
    """Of two accuracies, in points: the difference, and its 95 % interval over test images."""

    points: float
    low: float
    high: float


def paired_difference(a: Tensor, b: Tensor) -> Difference:
    """By how much a's accuracy is above b's on the same test images.

    Args:
        a, b: [n], for each image the share of runs that classify it correctly, 0 to 1 (one run: 0 or 1).

    Returns:
        the difference and its normal interval for other images like these; the runs are taken as they are.

    Raises:
        ValueError: not as many images in both, or fewer than two.
    """
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(
            f"a and b have shapes {list(a.shape)} and {list(b.shape)}; they must be [n] with n of at least 2"
        )
    difference = 100 * (a.double() - b.double())
    mean, half = difference.mean().item(), 1.96 * (difference.std() / len(difference) ** 0.5).item()
    return Difference(mean, mean - half, mean + half)
