"""The folder of a training: no other process trains there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pizoo.config import CONFIG
from pizoo.files import CheckpointError

LOCK = "train.lock"


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
