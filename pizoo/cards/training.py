"""Sections of a card about how its entry came about: training, and the search for a kernel's settings."""

from __future__ import annotations

from pizoo.cards.images import Card
from pizoo.cards.text import duration, markdown_table, settings
from pizoo.plots import CURVES
from pizoo.zoo import TUNED

TUNED_SHOWN = 8  # settings of a search
EPOCHS = (
    " Rows are appended and stay: those after an epoch are the first of those after the next, and the net of every epoch "
    "loads from the training's folder (`pizoo evaluate runs/{entry} --epoch 1`)."
)


def training(card: Card) -> str:
    """How it is trained, or solved; with the picture of its epochs."""
    recipe, train = card.recipe, card.recipe["train"]
    if train is None:
        return f"Not trained: {card.solved} ({settings(recipe['model'])})."
    clip, schedule, entry = train["clip"], train["schedule"], recipe["entry"]
    clipped = "" if clip["max_norm"] is None else f", gradients clipped at {clip['max_norm']:g}"
    stored = "rows" if recipe["model"]["kind"] == "infpi" else "weights"
    drawn = (
        f"over the epochs, {card.drawn} accuracy against rows"
        if card.rows
        else f"and {card.drawn} accuracy over the epochs"
    )
    return (
        f"{card.epochs}, SGD with learning rate {train['lr']:g}, "
        f"{schedule['name']} schedule{clipped}; {stored} in {train['dtype']}. `config.json` holds the whole recipe. "
        f"To run it again: `pizoo train {entry}`; all of it, this card included: `pizoo reproduce {entry}`."
        + (EPOCHS.format(entry=entry) if card.rows else "")
        + (f" {recipe['cost']}" if recipe.get("cost") else "")
        + (f"\n\n![Training loss {drawn}]({CURVES})" if (card.folder / CURVES).exists() else "")
    )


def tuning(card: Card) -> str:
    """What the search on held-out training images tried, and its best."""
    tuned, entry = card.results["tuned"], card.recipe["entry"]
    solved = [tried for tried in tuned["tried"] if tried["validation_accuracy"] is not None]
    best = sorted(solved, key=lambda tried: -tried["validation_accuracy"])[:TUNED_SHOWN]
    told = (
        f"{len(tuned['tried'])} settings were solved on {tuned['training_images']:,} training images and measured on "
        f"{tuned['validation_images']:,} held-out ones, never on the test images, in {duration(tuned['seconds'])}. The best, "
        f"{settings(tuned['settings'])}, solved again on all of them, gives **{tuned['accuracy']:.2f}** on the test images: "
        f"`pizoo verify {entry}/{TUNED}`, [its own card]({TUNED}/README.md). The best {len(best)} (`results.json` has all):"
    )
    rows = [(settings(tried), f"{tried['validation_accuracy']:.2f}") for tried in best]
    return f"{told}\n\n{markdown_table(('settings', 'validation accuracy'), rows)}"
