"""The folder of a training: that it holds no other one, and that no other process trains there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pizoo import checkpoint
from pizoo.config import CONFIG, read_config
from pizoo.files import CheckpointError
from pizoo.recipes import Recipe, decisive

LOCK = "train.lock"


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Raise CheckpointError if a folder holds another recipe's training, a shipped net that training would mix with, or the
    trainings of several seeds, whose results it would overwrite."""
    if not (folder / CONFIG).exists():
        _check_no_seeds(folder)
        return
    config = read_config(folder)
    if "converted" in config:
        raise CheckpointError(f"{folder} holds a converted net, not a training; choose another folder")
    found, wanted = decisive(config.get("recipe")), decisive(recipe.to_dict())
    if found != wanted:
        raise CheckpointError(
            f"{folder} holds a training of another recipe ({_difference(found, wanted)}); "
            "choose another folder, or remove it"
        )
    if recipe.train is not None and (folder / checkpoint.MODEL).exists():
        raise CheckpointError(f"{folder} holds a shipped net, not a training; choose another folder")


def seed_folders(folder: Path) -> list[Path]:
    """The trainings of several seeds that a folder holds, each with its own."""
    return sorted(config.parent for config in folder.glob(f"{checkpoint.seed_key('*')}/{CONFIG}"))


def _check_no_seeds(folder: Path) -> None:
    """Raise CheckpointError if a folder without a training of its own holds those of several seeds, or results."""
    seeds = [path.name for path in seed_folders(folder)]
    results = [checkpoint.RESULTS] if (folder / checkpoint.RESULTS).exists() else []
    if seeds:
        raise CheckpointError(
            f"{folder} holds trainings of several seeds ({', '.join(seeds + results)}), which a single one would mix with; "
            "choose another folder, or go on with them: --seeds"
        )
    if results:
        raise CheckpointError(
            f"{folder} holds a {checkpoint.RESULTS} of something else, which a training would overwrite; choose another folder"
        )


def _difference(found: Any, wanted: Any, key: str = "") -> str:
    """The first key in which two recipes differ, with both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in sorted(set(found) | set(wanted)):
            if found.get(name) != wanted.get(name):
                return _difference(found.get(name), wanted.get(name), f"{key}.{name}" if key else name)
    return f"{key or 'recipe'} is {found!r} there, {wanted!r} here"


@contextmanager
def training_lock(folder: Path | None) -> Iterator[None]:
    """Keep a training folder (None: nothing) to this process; the lock ends with the process, however that ends.

    A training that is refused before it has begun leaves no folder behind that it made, and no lock.

    Raises:
        CheckpointError: another process trains in this folder.
    """
    if folder is None:
        yield
        return
    import fcntl  # not on Windows, where loading works

    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder} is in use: another process trains there; wait for it, or choose another folder"
            ) from None
        try:
            yield
        finally:
            if not (folder / CONFIG).exists():
                (folder / LOCK).unlink(missing_ok=True)
                with suppress(OSError):  # something else has come into it
                    for path in made:
                        path.rmdir()
