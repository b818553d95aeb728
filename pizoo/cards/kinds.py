"""Which kind of card an entry has."""

from __future__ import annotations

from pathlib import Path

from pizoo import checkpoint
from pizoo.cards.images import Card, KernelCard
from pizoo.cards.tasks import TasksCard
from pizoo.cards.transfer import TransferCard
from pizoo.config import read_config
from pizoo.files import read_json, read_tensors


def read(folder: Path) -> Card:
    """The card of a folder's entry, of the kind that its recipe says.

    Raises:
        CheckpointError: something recorded is damaged.
    """
    recipe = read_config(folder)["recipe"]
    if recipe.get("tasks"):
        kind = TasksCard
    elif recipe.get("transfer"):
        kind = TransferCard
    else:
        kind = Card if recipe["train"] else KernelCard
    if not (folder / checkpoint.RESULTS).exists():
        return kind(folder, recipe, {}, {})
    results = read_json(folder / checkpoint.RESULTS)
    return kind(folder, recipe, results, read_tensors(folder / checkpoint.CORRECT, results["correct_sha256"]))
