"""Sections of a card that compare: with the paper, and with the entries beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from pizoo import checkpoint
from pizoo.cards.images import Card
from pizoo.cards.kinds import read
from pizoo.cards.record import data_sets, title
from pizoo.cards.text import markdown_table
from pizoo.config import CONFIG, read_config
from pizoo.data import IMAGENET32
from pizoo.evaluation.accuracy import paired_difference, within

COMPARED = (
    "Accuracy here minus accuracy there in points, mean over seeds, {unit} by {unit}; 95 % interval over {unit}s:"
)


def published(card: Card) -> str:
    """The paper's number, how far ours is from it and why."""
    there, mean = card.published, card.results.get("mean_accuracy")
    if there is not None:
        told = [f"{there['accuracy']:.2f} ({there['source']}; {there['protocol']})."]
        if mean is not None:
            told.append(_distance(card, mean - there["accuracy"]))
        if there["rerun"] is not None:
            here = "" if mean is None else f", {abs(mean - there['rerun']):.2f} points from the number here"
            told.append(f"The paper's own code, run once with this recipe, gives {there['rerun']:.2f}{here}.")
    elif (number := _in_the_paper(card)) is not None:
        told = [f"The paper has no number for it; of the same net trained on {title(IMAGENET32)} it has {number:.2f}."]
    else:
        told = ["The paper has no number for it."]
    return " ".join([*told, *filter(None, [card.recipe["differs"]])])


def _distance(card: Card, away: float) -> str:
    """How far the number is from the published one, for what it is worth."""
    tolerance = card.recipe["tolerance"]["reproduce"]
    beyond = "within" if within(tolerance, away, 0) else f"{abs(away) - tolerance:.2f} beyond"
    return (
        f"The number here is {abs(away):.2f} points {'above' if away > 0 else 'below'} it, {beyond} the recipe's tolerance of "
        f"{tolerance:g}; {card.count:,} {card.unit}s alone give a standard error of {card.chance:.2f} points."
    )


def compared(card: Card) -> str:
    """A table: how far this entry is from those beside it on the same test images, or tasks; nothing without others."""
    others = _others(card)
    if not others:
        return ""
    here, numbers = _in_the_paper(card), list(map(_in_the_paper, others))
    printed = here is not None and numbers != [None] * len(numbers)
    theirs = "published difference" + ("" if card.published else ", on ImageNet32")
    heads = ["entry", "difference", "interval", *([theirs] if printed else [])]
    rows = []
    for other, there in zip(others, numbers, strict=True):
        away = paired_difference(_share(card), _share(other))
        row = [f"`{other.name}`", f"{away.points:+.2f}", f"{away.low:+.2f} to {away.high:+.2f}"]
        rows.append(row + (["–" if there is None else f"{here - there:+.2f}"] if printed else []))
    return f"{COMPARED.format(unit=card.unit)}\n\n{markdown_table(heads, rows)}"


def _others(card: Card) -> list[Card]:
    """The cards beside it of what was trained and measured on the same data."""
    if not card.results or card.run == "split":  # other splits are other test images
        return []
    folders = sorted({config.parent for config in card.folder.parent.glob(f"*/{CONFIG}")} - {card.folder})
    like = [folder for folder in folders if data_sets(read_config(folder)["recipe"]) == data_sets(card.recipe)]
    others = [other for other in map(read, like) if other.results]
    return [other for other in others if (other.split, other.count) == (card.split, card.count)]


def _in_the_paper(card: Card) -> float | None:
    """The paper's number for an entry; for one that stands in for the paper's, on other data, that one's."""
    if card.published or card.papers_entry == card.recipe["entry"]:
        return card.published and card.published["accuracy"]
    there = card.folder.parent / card.papers_entry
    return _in_the_paper(read(there)) if (there / CONFIG).exists() else None


def _share(card: Card) -> Tensor:
    """For each test image the share of seeds that classify it correctly; for each task the mean share of its queries."""
    rights = [card.correct[checkpoint.seed_key(run["seed"])] for run in card.seeds]
    return torch.stack(rights).double().mean(0).view(card.count, -1).mean(1)
