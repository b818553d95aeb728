"""Training features for another data set: the loop of :mod:`pizoo.training.supervised`, and what its epochs are worth there.

After every epoch a quick check on three classes; after chosen ones the full kernel of the target's training images, part of
them held out. Epoch and ridge are chosen on those, and the net of that epoch is what the training gives; the test images are
looked at once, in the end, and once at the published epoch and ridge.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pizoo import checkpoint, kernels
from pizoo.data import TransferData
from pizoo.evaluation.accuracy import percent
from pizoo.evaluation.transfer import (
    described,
    featured,
    quick_split,
    regressed,
    transfer_correct,
    validation_accuracies,
    verification_split,
)
from pizoo.models import PiNet
from pizoo.recipes import Recipe, Transfer
from pizoo.rows import growing_layers
from pizoo.training.results import TrainResult
from pizoo.training.supervised import REMEDY, Training, TrainingDiverged


class TransferTraining(Training):
    """A supervised training that gives the net of the epoch whose features transfer best."""

    def __init__(
        self,
        recipe: Recipe,
        dataset: TransferData,
        folder: Path | None,
        device: torch.device,
        engine: bool | None = None,
        rows_on: str = "auto",
    ):
        self.target, self.transfer = dataset.target, recipe.transfer
        self.quick = quick_split(self.target, self.transfer.validation)
        super().__init__(recipe, dataset.source, folder, device, engine, rows_on)
        # Now, beside the rows reserved, rather than after some epochs.
        check_measuring(recipe.transfer, len(self.target.train_y), device)

    @staticmethod
    def check_data(recipe: Recipe, dataset: TransferData) -> None:
        Training.check_data(recipe, dataset.source)
        dataset.target.require(recipe.data.input_size, recipe.transfer.data.classes)
        if dataset.target.test_x is None:
            raise ValueError(f"data set {dataset.target.name!r} has no test part to measure transfer on")

    def _measure(self, epoch: int) -> dict[str, Any]:
        begin, found = time.perf_counter(), {}
        try:
            found["quick_accuracy"] = self._quick_accuracy()
            if self.transfer.measured_after(epoch, self.recipe.train.epochs):
                found["transfer"] = self._transfer(epoch)
        except ValueError as error:
            raise TrainingDiverged(f"after epoch {epoch} {error}; {self._kept(epoch - 1)}. {REMEDY}") from None
        return found | {"transfer_seconds": time.perf_counter() - begin}

    def _quick_accuracy(self) -> float:
        """Accuracy in percent on held-out training images of three classes, of features of these classes alone."""
        return percent(regressed(self.model, self.quick, self.transfer.data.normalize, self.transfer.ridge)[1])

    def _transfer(self, epoch: int) -> dict[str, Any]:
        """Accuracy in percent with each ridge on held-out training images; at the published setting on the test images."""
        features = featured(self.model, self.target, self.transfer.data.normalize)
        ridges, size = self.transfer.ridges, self.transfer.validation
        accuracies = validation_accuracies(self.model.feature_kernel, features, ridges, size)
        found: dict[str, Any] = {"ridges": list(ridges), "validation_accuracies": accuracies}
        if epoch == self.transfer.epoch:
            right = transfer_correct(self.model.feature_kernel, features, [self.transfer.ridge])[0]
            found["at_published_setting"] = percent(right)
        return found

    def _choice(self) -> tuple[float, int, float] | None:
        """Best validation accuracy, its epoch and its ridge, the earliest and smallest of several; None: none measured yet."""
        tried = [
            (accuracy, record["epoch"], ridge)
            for record in self.history
            if "transfer" in record
            for ridge, accuracy in zip(
                record["transfer"]["ridges"], record["transfer"]["validation_accuracies"], strict=True
            )
        ]
        return max(tried, key=lambda one: (one[0], -one[1], -one[2]), default=None)

    def _best_epoch(self) -> int | None:
        choice = self._choice()
        return None if choice is None else choice[1]

    def _kept_epochs(self) -> Iterable[int]:
        return [r["epoch"] for r in self.history if "transfer" in r]

    def _results(self) -> dict[str, Any]:
        accuracy, epoch, ridge = self._choice()
        features, self.correct = regressed(self.model, self.target, self.transfer.data.normalize, ridge)
        source = super()._results()
        printed = next((r for r in self.history if "at_published_setting" in r.get("transfer", {})), None)
        return {
            **source,
            "data": {**source["data"], "name": self.target.name, "subset": self.transfer.data.subset},
            "accuracy": percent(self.correct),
            "best_epoch": {"epoch": epoch, "accuracy": accuracy, "note": f"on held-out images of {self.target.name}"},
            "transfer": {
                "ridge": ridge,
                "epoch": epoch,
                "validation_accuracy": accuracy,
                **described(features, self.correct),
                "published_setting": {
                    "epoch": self.transfer.epoch,
                    "ridge": self.transfer.ridge,
                    "accuracy": printed and printed["transfer"]["at_published_setting"],
                },
                "source": {"data": source["data"]["name"], "accuracy": source.get("accuracy")},
            },
        }


def check_measuring(transfer: Transfer, count: int, device: torch.device, taken: int = 0) -> None:
    """Raise NotEnoughMemory unless transfer to ``count`` training images can be measured: on all of them with one ridge, on
    those that are not held out with every ridge. ``taken``: bytes that the training itself will have."""
    remedy = ": a smaller transfer.data.subset"
    kernels.check_solving(count, 1, device, remedy, taken)
    kernels.check_solving(math.ceil((1 - transfer.validation) * count), len(transfer.ridges), device, remedy, taken)


def target_correct(model: PiNet, recipe: Recipe, dataset: TransferData, ridge: float) -> Tensor:
    """Which test images of the target are classified correctly by ridge regression on all of its training images: bool [n]."""
    return regressed(model, dataset.target, recipe.transfer.data.normalize, ridge)[1]


def ship(outcome: TrainResult, card: Path, dataset: TransferData) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Write the net of ``outcome`` into its card, finite nets in float16, and measure what a user will load from there.

    Returns:
        what to record, and which test images are classified correctly, as of :func:`measure_shipped`.
    """
    recipe, model = outcome.recipe, outcome.model
    device, config = next(model.parameters()).device, recipe.config(dataset.source.class_names)
    if growing_layers(model):
        checkpoint.save_with_probe(card, model, config, dataset.source, recipe.data.normalize)
    else:
        short = copy.deepcopy(model).half()
        rounded = copy.deepcopy(short).float().eval()
        x = recipe.data.normalize(dataset.source.train_x[: checkpoint.PROBE_INPUTS].to(device))
        checkpoint.save(card, short, config, {"x": x, "logits": checkpoint.probe_logits(rounded, x)})
    return measure_shipped(card, recipe, dataset, outcome.results, device)


def measure_shipped(
    card: Path, recipe: Recipe, dataset: TransferData, results: dict[str, Any], device: torch.device
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Measure the net in a card with the ridge that its training chose. Its features are computed in float64, so that they are
    the same wherever they are computed again.

    Args:
        results: of its training.

    Returns:
        ``results`` with what to record instead, and which test images are classified correctly: by ridge regression on all
        training images, and on the smaller set of images that `pizoo verify` takes without a GPU.
    """
    exact, ridge = torch.float64, results["transfer"]["ridge"]
    net, _ = checkpoint.load(card, device=device, dtype=exact)
    features, right = regressed(net, dataset.target, recipe.transfer.data.normalize, ridge, exact)
    small = verification_split(features)
    right_of_small = transfer_correct(net.feature_kernel, small, [ridge])[0]
    recorded = {**results, "verification": described(small, right_of_small)}
    recorded["transfer"] = {**results["transfer"], **described(features, right)}
    return recorded, right, right_of_small
