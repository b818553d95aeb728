"""Tensors whose numbers are still in the file: where they lie, and how they are read, in blocks."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from pizoo.files import CheckpointError
from pizoo.pickles.messages import told

AT_ONCE = 1 << 23  # bytes that are read at once; no index of a zip file may be longer


@dataclass(eq=False, repr=False)
class Storage:
    """``count`` numbers of a dtype that lie one after the other in a file."""

    key: str
    dtype: torch.dtype
    count: int
    open: Callable[[], BinaryIO] = field(init=False)  # a reader that stands at the first of them

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True, eq=False, repr=False)
class StoredTensor:
    """A tensor whose numbers are still in the file, from ``offset`` (in numbers) of a storage on.

    Only what lies there in row-major order can be read.
    """

    path: Path
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    row_major: bool = True

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def first(self, count: int) -> StoredTensor:
        """Its first ``count`` rows."""
        return replace(self, shape=(count, *self.shape[1:]))

    def read(self) -> Tensor:
        """All of it."""
        rows = self if self.shape else replace(self, shape=(1,))
        (whole,) = rows.blocks(max(1, rows.shape[0])) if rows.shape[0] else (torch.empty(self.shape, dtype=self.dtype),)
        return whole.reshape(self.shape)

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """Its rows in order, ``rows`` at once (the last block may be shorter).

        Raises:
            CheckpointError: the file ends before, or its check sum does not fit; numbers that lie in another order.
        """
        if not self.row_major:
            raise CheckpointError(f"{self.path} has a tensor of shape {list(self.shape)} that is not contiguous")
        row = math.prod(self.shape[1:])
        with told(self.path), self.storage.open() as file:
            skip(file, self.offset * self.dtype.itemsize)
            for start in range(0, self.shape[0], rows):
                block = torch.empty(min(rows, self.shape[0] - start), *self.shape[1:], dtype=self.dtype)
                fill(file, block.flatten())
                yield block
            # What lies behind is read too: a zip file checks its sum at the end.
            skip(file, (self.storage.count - self.offset - self.shape[0] * row) * self.dtype.itemsize)
            file.read(1)


def fill(file: BinaryIO, block: Tensor) -> None:
    """Read a 1-d tensor's bytes."""
    into = memoryview(block.view(torch.uint8).numpy()) if len(block) else memoryview(bytearray())
    for start in range(0, len(into), AT_ONCE):
        piece = into[start : start + AT_ONCE]
        while piece:
            if not (got := file.readinto(piece)):
                raise EOFError("it ends within a tensor")
            piece = piece[got:]


def skip(file: BinaryIO, count: int) -> None:
    if isinstance(file, io.BufferedReader):  # no check sum: nothing to read it for
        file.seek(count, io.SEEK_CUR)
        return
    while count:
        got = len(file.read(min(count, AT_ONCE)))
        if not got:
            raise EOFError("it ends within a tensor")
        count -= got
