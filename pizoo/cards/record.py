"""What a card's folder records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pizoo import checkpoint
from pizoo.plots import rows_by_epoch
from pizoo.zoo import TUNED, stood_in_for

DATASETS = {
    "cifar10": "CIFAR-10",
    "digits": "scikit-learn digits",
    "imagenet32": "250 classes of ImageNet at 32x32",
    "omniglot": "Omniglot",
    "tinyimagenet32": "Tiny-ImageNet at 32x32",
}


def data_sets(recipe: dict[str, Any]) -> tuple[str, str]:
    """What a recipe trains on, and what its number is on."""
    return recipe["data"]["name"], (recipe.get("transfer") or recipe)["data"]["name"]


def title(name: str) -> str:
    """What readers call a data set."""
    return DATASETS.get(name, name)


@dataclass(frozen=True)
class Record:
    """What a card's folder records.

    Attributes:
        recipe: of its ``config.json``.
        results: its ``results.json``; empty for an entry without weights.
        correct: which test images were classified correctly, by the shipped net and every seed's, bool [n]; of tasks, which
            queries of the headline's, bool [T, Q].
    """

    folder: Path
    recipe: dict[str, Any]
    results: dict[str, Any]
    correct: dict[str, Tensor]

    @property
    def name(self) -> str:
        """What ``pizoo.load`` takes."""
        return f"{self.recipe['entry']}/{TUNED}" if self.folder.name == TUNED else self.recipe["entry"]

    @property
    def source(self) -> str:
        """What it is trained on."""
        return title(data_sets(self.recipe)[0])

    @property
    def data(self) -> str:
        """What its number is on."""
        return title(data_sets(self.recipe)[1])

    @property
    def trained(self) -> bool:
        """Whether it is a net; kernels are solved."""
        return self.recipe["train"] is not None

    @property
    def published(self) -> dict[str, Any] | None:
        return self.recipe["published"]

    @property
    def papers_entry(self) -> str:
        """The paper's entry: this one, or the one that it stands in for, on data that may not be handed on."""
        return stood_in_for(self.recipe["entry"])

    @property
    def seeds(self) -> list[dict[str, Any]]:
        """What is recorded of every training."""
        return self.results.get("seeds", [])

    @property
    def run(self) -> str:
        """What differs from one of its trainings to the next."""
        return "split" if self.recipe["data"]["name"] == "digits" else "seed"

    @property
    def count(self) -> int:
        """How many test images, or tasks."""
        return len(self.correct[checkpoint.SHIPPED])

    @property
    def compact(self) -> dict[str, Any] | None:
        """Of a checkpoint that is a compact net, what is recorded of how it was made."""
        return self.results.get("compact")

    @property
    def made_of(self) -> str:
        """Which training the shipped net is from, and whether it is that net or a compact one."""
        return f"{'compact, of ' if self.compact else ''}{self.run} {self.results['shipped_seed']}"

    @property
    def curves(self) -> bool:
        """Whether epoch by epoch is recorded."""
        return bool(self.seeds) and "curve" in self.seeds[0]

    @property
    def rows(self) -> list[int] | None:
        """Of a growing layer after every epoch; None of what does not grow."""
        return rows_by_epoch(self.results.get("history", ()))
