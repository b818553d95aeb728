"""pizoo: a model zoo of π-nets, infinitely wide networks that learn features.

::

    import pizoo

    model = pizoo.load("digits_infpi")
    pizoo.verify("digits_infpi")
    pizoo.train("digits_infpi", out="runs/mine")

Importing pizoo registers its networks with timm.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# What is heavy to import (recipes, training) is imported when first used.
_LAZY = {
    "compact": "pizoo.compaction.full",
    "evaluate": "pizoo.evaluation.entries",
    "feature_kernel": "pizoo.evaluation.features",
    "load_recipe": "pizoo.recipes",
    "publish": "pizoo.upload",
    "train": "pizoo.training.train",
    "verify": "pizoo.evaluation.verify",
}

from pizoo.zoo import list_entries, load  # noqa: E402 (after __version__, which checkpoints record)

__all__ = [
    "compact",
    "evaluate",
    "feature_kernel",
    "list_entries",
    "load",
    "load_recipe",
    "publish",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'pizoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*globals(), *_LAZY))
