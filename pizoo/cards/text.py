"""How cards write numbers, times and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from pizoo.evaluation.accuracy import standard_error


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def mean_and_error(results: dict[str, Any]) -> str:
    """The recorded mean over seeds, with its standard error if there is one."""
    return plus_minus(results["mean_accuracy"], results["standard_error"])


def plus_minus(accuracy: float, error: float | None) -> str:
    """An accuracy, with what is known of its error."""
    return f"{accuracy:.2f}" + ("" if error is None else f" ± {error:.2f}")


def mean_of(accuracies: Sequence[float]) -> str:
    """Their mean with its standard error; one alone as it is."""
    return plus_minus(fmean(accuracies), standard_error(accuracies))


def duration(seconds: float) -> str:
    """Seconds in the unit a reader would choose."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def words(split: str) -> str:
    """``"test_rotated"`` as a reader says it."""
    return ", ".join(split.split("_"))


def settings(model: dict[str, Any]) -> str:
    """A kernel's settings in a line."""
    return ", ".join(f"{key} {value:g}" for key, value in model.items() if key not in ("kind", "validation_accuracy"))


def measured(results: dict[str, Any]) -> str:
    """Where and when numbers were measured, and by which versions of the code."""
    of_runs = dict.fromkeys(filter(None, (run.get("commit") for run in (results, *results["seeds"]))))
    commit = f", commit {', '.join(of_runs)}" if of_runs else ""
    return f"Measured on {results['hardware']}, {results['date']}, torch {results['versions']['torch']}{commit}."
