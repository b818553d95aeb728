"""How a file is refused: by a message that names it, and repeats little of what it says."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pizoo.files import CheckpointError

TOLD = 80  # characters of a name from the file that messages repeat


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Tell whatever is wrong with a file as a CheckpointError that names it."""
    try:
        yield
    except Refused as error:
        raise CheckpointError(f"{path} {error}; nothing in it was executed") from None
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, EOFError, LookupError, RuntimeError, ValueError, OverflowError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {ascii(str(error))[1:-1][:200]}") from None
    except (struct.error, zlib.error) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from None


class Refused(Exception):
    """What a file holds and no file of torch.save that is read here does; the message goes on after the file's name."""


def shown(name: object) -> str:
    """A name from the file as a message may repeat it."""
    text = ascii(name)
    return text if len(text) <= TOLD else f"{text[:TOLD]}…"
