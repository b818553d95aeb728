"""The section of a card about its compact net."""

from __future__ import annotations

from pizoo.cards.images import Card
from pizoo.cards.text import duration, markdown_table
from pizoo.evaluation.accuracy import within
from pizoo.plots import SIZES
from pizoo.zoo import counted


def compact(card: Card) -> str:
    """What the shipped net was made of, and how near it comes at this and smaller sizes."""
    made, recipe = card.compact, card.recipe
    full, shipped = counted(made["full_rows"]), made["sizes"][-1]
    errors = {"logits_error": "logits' error"}
    if "features_error" in shipped:
        errors["features_error"] = "features' error, on validation, rotated classes"
    heads = ["net", "rows", "size", "accuracy", "predictions equal to the full net's", *errors.values(), "time"]
    rows = [["full", full, "", f"{made['full_accuracy']:.2f}", *[""] * (len(heads) - 4)]]
    for size in made["sizes"]:
        near = [f"{size['accuracy']:.2f}", f"{size['agreement']:.2f}", *(f"{size[error]:.3f}" for error in errors)]
        megabytes, time = f"{size['bytes'] / 1e6:.1f} MB", duration(size["seconds"])
        rows.append(["compact", counted(size["rows"]), megabytes, *near, time])
    told = (
        f"The net that was trained has {full} rows in its growing layers. The checkpoint here computes nearly the same with "
        f"{counted(shipped['rows'])}: landmarks drawn from the training images, a ridge regression layer on layer, "
        f"rounded to {recipe['compact']['dtype']} so that the errors make up for each other; no test image had a part "
        f"in it. It is a net like any other: it trains and grows on. Accuracies and equal predictions in percent, on "
        f"{card.part}; errors are relative."
    )
    again = (
        f"Made on {made['hardware']}, {made['date']}. To make one of another size from a full net: `pizoo compact FOLDER "
        f"--megabytes 10 --out {recipe['entry']}-10mb`."
    )
    picture = f"![Agreement and accuracy against size]({SIZES})"
    return "\n\n".join([told, markdown_table(heads, rows), *_in_float32(card), picture, again])


def _in_float32(card: Card) -> list[str]:
    """Why the full net's accuracy beside the compact one is not the training's, where it is not."""
    full = next(run for run in card.seeds if run["seed"] == card.results["shipped_seed"])["accuracy"]
    # Of transfer the one is on what the net was trained on, the other on what it is measured on.
    if card.recipe.get("transfer") or within(0, full, card.compact["full_accuracy"]):
        return []
    dtype = card.recipe["train"]["dtype"]
    return [
        f"Here the full net computes in float32 between its layers; in {dtype}, as it was trained, it is the one above with "
        f"{full:.2f}."
    ]
