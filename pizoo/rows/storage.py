"""Where rows are kept: on the device or the host, in this process or in others, in storage that has room for more.

Processes that train together (:mod:`pizoo.processes`) may each hold a share of a layer's rows (:class:`Share`). Rows are
numbered in the order in which they were appended, however many processes hold them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from pizoo.memory import empty_on_host

Place = Literal["device", "host"]

GROWTH = 1.5  # room made at once when nothing was reserved: appending stays linear in the rows appended


def check_place(place: str, *more: str) -> None:
    """Raise ValueError unless ``place`` is where rows can be kept, or one of ``more``."""
    if place not in (places := (*get_args(Place), *more)):
        raise ValueError(f"rows_on is {place!r}; it must be one of {', '.join(map(repr, places))}")


@dataclass(frozen=True)
class Share:
    """Which rows of a layer are held here: of all its rows 0, 1, ..., those whose number is ``index`` modulo ``of``.

    Appended rows are dealt in turn: shares differ by one row at most, whatever the batch size.
    """

    index: int = 0
    of: int = 1

    def count(self, total):
        """How many of ``total`` rows (int, or an integer tensor) are held here."""
        return total if self.of == 1 else (total - self.index + self.of - 1) // self.of

    def first(self, total):
        """Of rows that come after ``total`` others, the first held here; every ``of``-th after it is too."""
        return (self.index - total) % self.of

    def room(self, total: int) -> int:
        """Rows to reserve for a share of ``total``: one more than it holds where a step writes as many in every process."""
        return total if self.of == 1 else self.count(total) + 1


WHOLE = Share()


class Reserved:
    """A tensor that grows along its first dimension inside storage reserved ahead.

    With ``on_host`` the storage is host memory that a GPU reads directly (:func:`pizoo.memory.empty_on_host`).
    """

    def __init__(self, data: Tensor, on_host: bool = False):
        self.storage = data
        self.count = len(data)
        self.on_host = on_host

    @property
    def used(self) -> Tensor:
        """The part in use, a view [count, ...]."""
        return self.storage[: self.count]

    @property
    def capacity(self) -> int:
        return len(self.storage)

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` rows in all; what is there is copied once. Less room than there is changes nothing."""
        if capacity > self.capacity:
            self.storage = self._copied(capacity, self.storage.device, self.on_host)

    def moved(self, device: torch.device, on_host: bool) -> Reserved:
        """The same elsewhere, with its room."""
        moved = Reserved(self._copied(self.capacity, device, on_host), on_host)
        moved.count = self.count
        return moved

    def _copied(self, capacity: int, device: torch.device, on_host: bool) -> Tensor:
        shape, dtype = (capacity, *self.storage.shape[1:]), self.storage.dtype
        storage = empty_on_host(shape, dtype) if on_host else empty_rows(shape, dtype, device)
        storage[: self.count] = self.used
        return storage

    def append(self, rows: Tensor) -> None:
        needed = self.count + len(rows)
        if needed > self.capacity:
            self.reserve(max(needed, int(GROWTH * self.capacity)))
        # A copy from a GPU to the host waits until it is done: whoever reads next, on either side, finds the rows.
        self.storage[self.count : needed] = rows
        self.count = needed


def stored_columns(columns: int, dtype: torch.dtype) -> int:
    """Columns that a row takes in reserved storage: kernels for GPUs want rows of 2 bytes an entry to start at multiples of 16
    bytes, of 1 byte at multiples of 4, and get that where it costs at most a twentieth."""
    unit = {1: 4, 2: 8}.get(dtype.itemsize, 1)
    aligned = -(-columns // unit) * unit
    return aligned if aligned <= 1.05 * columns else columns


def empty_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised storage [M] or [M, columns]; a view where rows take more than their columns."""
    rows, *columns = shape
    storage = torch.empty(rows, *(stored_columns(n, dtype) for n in columns), dtype=dtype, device=device)
    return storage[:, : columns[0]] if columns else storage
