"""The whole zoo in a table: what each entry scores, what the paper says, how large it is and what it took."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from pizoo import checkpoint
from pizoo.cards import data_sets, duration, markdown_table, mean_and_error, title, words
from pizoo.config import CONFIG, read_config
from pizoo.evaluation.reproduction import reproduction, verdict
from pizoo.files import CheckpointError, read_json, write_atomically

BEGIN = "<!-- entries: written by `pizoo overview` -->"
END = "<!-- end of entries -->"
COLUMNS = ("entry", "timm name", "data", "published", "measured", "our training", "weights", "a training")
PAGE = "README.md"
INTRODUCTION = """\
# The zoo

What an entry's folder here holds is what its repository on the Hugging Face Hub would: its card, its recipe and what builds it
(`config.json`), its weights and a probe of them, every number recorded and which test images were right.
"""
LEGEND = """\
Accuracies in percent; →: on the test images of what stands behind, by ridge regression on the features' kernel. Measured: the
mean over seeds ± its standard error; tuned: with settings chosen on held-out training images; compact: of the net that ships,
made of a full one. Our training, as `pizoo verify` has it: `reproduced` if that mean is within the recipe's tolerance of the
published number, a point or less, else `below` or `above`. Weights: what loading reads. A training: mean wall time of one,
evaluation and saving included, and where it ran."""


def write_overview(cards: Path, readme: Path) -> list[Path]:
    """Write the page of the zoo into the folder of the cards, and its table between the marks in ``readme``.

    Returns:
        the files written.

    Raises:
        CheckpointError: a card that is damaged; a ``readme`` without the marks.
    """
    page, text = overview(cards), with_table(readme.read_text(), cards, f"{cards.name}/")
    written = {cards / PAGE: page, readme: text}
    for path, content in written.items():
        write_atomically(path, lambda temporary, content=content: temporary.write_text(content))
    return list(written)


def overview(cards: Path) -> str:
    """The page of the whole zoo."""
    return f"{INTRODUCTION}\n{table(cards)}\n\n{LEGEND}\n"


def with_table(text: str, cards: Path, links: str) -> str:
    """``text`` with the table of the zoo between its marks; ``links``: what leads from there to the cards."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise CheckpointError(f"the text has no place for the table: it must hold the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table(cards, links)}\n\n{LEGEND}\n\n{END}{after}"


def table(cards: Path, links: str = "") -> str:
    """All entries as a table of Markdown."""
    return markdown_table(COLUMNS, (tuple(_cells(path.parent, links)) for path in sorted(cards.glob(f"*/{CONFIG}"))))


def _cells(card: Path, links: str) -> Iterator[str]:
    config = read_config(card)
    recipe, path = config["recipe"], card / checkpoint.RESULTS
    results = read_json(path) if path.exists() else {}
    yield f"[`{card.name}`]({links}{card.name}/{PAGE})"
    yield f"`{config['architecture']}.{config['pretrained_cfg']['tag']}`" if config["architecture"] else "–"
    yield _data(recipe)
    yield f"{recipe['published']['accuracy']:.2f}" if recipe["published"] else "–"
    yield _measured(results) if "seeds" in results else "–"
    yield verdict(reproduction(recipe, results))
    weights = card / checkpoint.MODEL
    yield _size(weights.stat().st_size) if weights.exists() else "–"
    yield _time(results) if results else "–"


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{max(1, round(size / 1e3))} kB"


def _data(recipe: dict[str, Any]) -> str:
    source, target = map(title, data_sets(recipe))
    if recipe.get("transfer"):
        return f"{source} → {target}"
    return f"{source}, {words(recipe['tasks']['headline'])} classes" if recipe.get("tasks") else source


def _measured(results: dict[str, Any]) -> str:
    tuned = f"; tuned {results['tuned']['accuracy']:.2f}" if "tuned" in results else ""
    compact = f"; compact {results['accuracy']:.2f}" if "compact" in results else ""
    return f"{mean_and_error(results)}{tuned}{compact}"


def _time(results: dict[str, Any]) -> str:
    return f"{duration(fmean(run['wall_seconds'] for run in results['seeds']))}, {results['hardware']}"
