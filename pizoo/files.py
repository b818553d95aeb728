"""Files that are written whole or not at all, and checked when they are read; nothing that is read is executed.

Whatever interrupts a write, what stood at its path before is still there. What is read is JSON or safetensors, with the SHA-256
that was recorded of it where one was, or it is refused with a message that names the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be loaded or saved; the message names the file and what is wrong with it."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a temporary file beside ``path``, flush it to disk and rename it to ``path``.

    Raises:
        CheckpointError: the disk is full; what stood at ``path`` before still does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a kill leaves behind, the next write replaces
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors writes files that only their owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_names(path.parent)
    except (OSError, SafetensorError) as error:
        # safetensors reports what the system said as text alone.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise CheckpointError(
                f"no space left on the disk to write {path}; what was saved before is untouched"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def flush_names(folder: Path) -> None:
    """Flush a folder itself to disk: without it a power cut may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors as safetensors and return the file's SHA-256."""
    contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary))
    return sha256(path)


def read_json(path: Path) -> Any:
    """Raises CheckpointError if there is no such file or it is not JSON."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, IsADirectoryError):
        raise CheckpointError(f"{path} does not exist: {path.parent} is not a checkpoint, or lost a file") from None
    # ValueError: not JSON, not UTF-8, a number of too many digits. RecursionError: lists in lists in lists.
    except (ValueError, RecursionError) as error:
        check_file(path)  # a Git LFS pointer in its place is called one
        raise CheckpointError(f"{path} is not valid JSON ({error}): it is damaged") from None


def read_tensors(path: Path, digest: str | None = None, leave: Callable[[str], bool] = lambda name: False):
    """Read a safetensors file: its tensors by name.

    Args:
        digest: the SHA-256 it must have; None: not checked.
        leave: which tensors to leave in the file.

    Raises:
        CheckpointError: no such file, a Git LFS pointer in its place, another digest, not safetensors.
    """
    with opened(check_file(path, digest)) as file:
        return {name: file.get_tensor(name) for name in file.keys() if not leave(name)}  # noqa: SIM118 (not a dict)


def check_file(path: Path, digest: str | None = None) -> Path:
    """The path; CheckpointError unless the file is there, itself and not a pointer, with this SHA-256 (None: any)."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; the checkpoint cannot be loaded without it")
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")
    if digest is not None and (found := sha256(path)) != digest:
        raise CheckpointError(
            f"{path} has SHA-256 {found[:16]}…, recorded was {digest[:16]}…: it is damaged or another file"
        )
    return path


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file to read from; CheckpointError if it is none, or lacks what is asked for."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}): it is truncated or damaged"
        ) from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def json_sha256(value: Any) -> str:
    """SHA-256 of a JSON value, written with sorted keys and no spaces."""
    return sha256_of(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
