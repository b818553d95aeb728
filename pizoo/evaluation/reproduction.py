"""Does our training reproduce the paper? The recorded mean over seeds against the published number; nothing is measured."""

from __future__ import annotations

from typing import Any, Literal

from pizoo.evaluation.accuracy import within

Reproduction = Literal["reproduced", "above", "below", "no published number", "no recorded number"]


def recorded_mean(results: dict[str, Any]) -> float | None:
    """Accuracy over seeds in percent that ``results.json`` records; None: none."""
    return results.get("mean_accuracy", results.get("accuracy"))


def verdict(found: Reproduction) -> str:
    """As tables have it: a dash where there is nothing to compare."""
    return "–" if found.startswith("no ") else found


def reproduction(recipe: dict[str, Any], results: dict[str, Any]) -> Reproduction:
    """Whether our training reproduces the paper: the recorded mean against the number that the recipe says is published."""
    mean, published = recorded_mean(results), (recipe.get("published") or {}).get("accuracy")
    tolerance = (recipe.get("tolerance") or {}).get("reproduce") or 1.0
    if published is None:
        return "no published number"
    if mean is None:
        return "no recorded number"
    if within(tolerance, mean, published):
        return "reproduced"
    return "above" if mean > published else "below"
