"""What a training gives, and what of it is recorded."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pizoo import __version__, processes
from pizoo.recipes import Recipe
from pizoo.training.report import commit, hardware, peak_memory


@dataclass
class TrainResult:
    """What a training gave.

    Attributes:
        model: the net after the last epoch, of few-shot and transfer trainings that of the epoch chosen, in eval mode.
        recipe: what was trained.
        folder: where its checkpoint is; None if none was asked for.
        history: one record an epoch: epoch, step, loss, test_accuracy, seconds, ...
        results: what ``results.json`` holds.
        correct: which test images the net classifies correctly, bool [n], where this run has just measured transfer; else None.
    """

    model: nn.Module
    recipe: Recipe
    folder: Path | None
    history: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    correct: Tensor | None = None


def training_results(recipe: Recipe, history: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """What a finished training records: its numbers, what they were measured on, where and when."""
    results: dict[str, Any] = {
        "entry": recipe.entry,
        "data": {"name": recipe.data.name, "part": "test", "subset": recipe.data.subset, "split": recipe.data.split},
        "seed": recipe.train.seed if recipe.train else None,
        "train_seconds": sum(record["train_seconds"] for record in history),
        "wall_seconds": sum(record["wall_seconds"] for record in history),
        "hardware": hardware(device),
        "peak_memory_bytes": peak_memory(device),
        "commit": commit(),
        "versions": {"pizoo": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "date": date.today().isoformat(),
        "history": history,
    }
    if processes.count() > 1:
        results["processes"] = processes.count()
    if "test_accuracy" in history[-1]:
        best = max(history, key=lambda record: record["test_accuracy"])
        results["accuracy"] = history[-1]["test_accuracy"]
        results["best_epoch"] = {"epoch": best["epoch"], "accuracy": best["test_accuracy"], "note": "test-selected"}
    return results
