"""Pictures for model cards. matplotlib is imported when one is drawn; nothing else needs it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pizoo.files import write_atomically

log = logging.getLogger("pizoo")

CURVES = "curves.png"
SIZES = "sizes.png"
ACCURACIES = {  # of a curve: the axis they are drawn on
    "test_accuracy": "test accuracy in percent",
    "validation_accuracy": "validation accuracy (rotated) in percent",
    "quick_accuracy": "transfer to three classes, held out, in percent",
}


def rows_by_epoch(history: Sequence[dict[str, Any]]) -> list[int] | None:
    """Rows of the largest growing layer after every epoch of a training's history; None where nothing grows."""
    return [max(record["rows"].values()) for record in history] if history and "rows" in history[0] else None


def draw_curves(
    path: Path, records: list[dict[str, Any]], published: float | None = None, rows: Sequence[int] | None = None
) -> bool:
    """Draw training loss and test accuracy (on tasks validation accuracy) of every seed, epoch by epoch, as a PNG.

    Args:
        records: of seeds, with ``seed`` and ``curve`` (:class:`pizoo.training.seeds.SeedRun`).
        published: accuracy in percent, for a line to compare test accuracies with.
        rows: of :func:`rows_by_epoch`: accuracies are drawn against them, a point for every epoch.

    Returns:
        whether there is a picture: False, and a warning in the log, without matplotlib.
    """
    (measured,) = ACCURACIES.keys() & records[0]["curve"]

    def draw(left, right) -> None:
        for record in records:
            curve, label = record["curve"], f"seed {record['seed']}"
            epochs = range(1, len(curve["train_loss"]) + 1)
            left.plot(epochs, curve["train_loss"], linewidth=1.2, label=label)
            right.plot(rows or epochs, curve[measured], ".-" if rows else "-", linewidth=1.2, label=label)
        left.set(xlabel="epoch", ylabel="training loss", yscale="log")
        lowest, highest = left.get_ylim()
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_formatter("{x:g}" if highest < 10 * lowest else "")
        right.set(
            xlabel="rows of a growing layer, one point an epoch" if rows else "epoch", ylabel=ACCURACIES[measured]
        )
        if rows:
            from matplotlib.ticker import EngFormatter

            right.xaxis.set_major_formatter(EngFormatter())
        if published is not None and measured == "test_accuracy":
            right.axhline(published, color="black", linestyle=":", linewidth=1, label="published")
        right.legend(frameon=False)

    return drawn(path, draw)


def draw_sizes(path: Path, record: dict[str, Any]) -> bool:
    """Draw how well compact nets of growing size agree with the full net, and both their accuracies, as a PNG.

    Args:
        record: of :func:`pizoo.training.compact.compact_net`.

    Returns:
        as :func:`draw_curves`.
    """
    sizes, whole = record["sizes"], record["full_accuracy"]
    part = sizes[-1]["measured_on"].replace("_", ", ")
    megabytes = [size["bytes"] / 1e6 for size in sizes]

    def draw(left, right) -> None:
        left.plot(megabytes, [size["agreement"] for size in sizes], "o-", linewidth=1.2)
        left.set(xlabel="size in MB", ylabel="predictions equal to the full net's, in percent", xscale="log")
        right.set(xlabel="size in MB", ylabel=f"{part} accuracy in percent", xscale="log")
        if whole is not None:
            right.plot(megabytes, [size["accuracy"] for size in sizes], "o-", linewidth=1.2, label="compact")
            right.axhline(whole, color="black", linestyle=":", linewidth=1, label="full net")
            right.legend(frameon=False)
        for axes in (left, right):
            axes.set_xticks(megabytes, [f"{size:.1f}" for size in megabytes])
            axes.minorticks_off()

    return drawn(path, draw)


def drawn(path: Path, draw: Callable[..., None], panels: int = 2) -> bool:
    """Write what ``draw`` puts on so many axes, side by side, as a PNG; False, and a warning, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no %s: drawing it needs matplotlib (pip install 'pizoo[extras]')", path)
        return False
    figure = Figure(figsize=(5 * panels, 3.8), layout="constrained")
    (axes,) = figure.subplots(1, panels, squeeze=False)
    draw(*axes)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    # Without the version of what drew it, the same curves are the same file.
    options = {"dpi": 110, "format": "png", "metadata": {"Software": None}}
    write_atomically(path, lambda temporary: figure.savefig(temporary, **options))
    return True
