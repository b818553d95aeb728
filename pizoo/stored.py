"""A net's state as it lies in files, shipped or while it trains: rows go from there straight into a net's storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pizoo.config import NETWORKS
from pizoo.files import opened
from pizoo.models.base import check_state
from pizoo.rows import Rows, growing_layers

READ_BYTES = 1 << 26  # of rows at once, from a file into the storage reserved for them


class Segment(NamedTuple):
    """A file with rows; ``rows``: name of a growing layer -> the numbers of the rows of that layer in it, in their order."""

    path: Path
    rows: dict[str, range]


class State(NamedTuple):
    """A net's state as it lies in files. Rows, where nearly all of it is, are read when they are put into a net.

    Attributes:
        tensors: all of ``state_dict`` but growing layers' ``A``, ``B`` and ``amult``.
        stored: name of a growing layer -> (amult as stored, decay).
        segments: files that hold ``A`` and ``B`` of rows.
    """

    tensors: dict[str, Tensor]
    stored: dict[str, tuple[Tensor, float]]
    segments: list[Segment]

    def check(self, model: nn.Module) -> None:
        """Raise RuntimeError unless it is the state of a net like ``model``: names, shapes, floating-point numbers."""
        amults = {f"{name}.amult": amult for name, (amult, _) in self.stored.items()}
        if isinstance(model, tuple(NETWORKS.values())):  # how much a kernel holds depends on what it was fitted to
            check_state(model, self.tensors | amults | self._row_shapes())
        for name, tensor in (self.tensors | amults).items():
            if not tensor.is_floating_point():
                raise RuntimeError(f"{name} has dtype {tensor.dtype}; it must be a floating-point one")

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Put it into ``model``, to the bit. Rows go straight into the layers' storage: room reserved there is kept.

        Raises:
            RuntimeError: a state of another net; the model is left as it was.
            CheckpointError: a segment that cannot be read.
        """
        if not self.stored:
            model.load_state_dict(self.tensors)
            return
        self.check(model)
        model.load_state_dict(self.tensors, strict=False)
        layers = growing_layers(model)
        for name, layer in layers.items():
            layer.reserve(len(self.stored[name][0]))
        for path, rows in self.segments:
            with opened(path) as file:
                for name in layers.keys() & rows.keys():
                    _read_rows(file, name, layers[name], self.stored[name][0], rows[name])
        for name, layer in layers.items():
            amult, decay = self.stored[name]
            layer.grown(len(amult), decay)

    def _row_shapes(self) -> dict[str, Tensor]:
        """``A`` and ``B`` of all layers, their segments joined, without their values."""
        parts: dict[str, list[Tensor]] = {}
        for path, _ in self.segments:
            with opened(path) as file:
                for layer in self.stored:
                    for name in {f"{layer}.A", f"{layer}.B"}.intersection(file.keys()):
                        parts.setdefault(name, []).append(torch.empty(file.get_slice(name).get_shape(), device="meta"))
        return {name: torch.cat(shapes) for name, shapes in parts.items()}


def _read_rows(file: Any, name: str, layer: Rows, amult: Tensor, numbers: range) -> None:
    """Read a segment's rows of a layer into its storage; ``amult`` [M] is that of all rows."""
    A, B = (file.get_slice(f"{name}.{part}") for part in ("A", "B"))
    row_bytes = sum(storage.shape[1] * storage.element_size() for storage in layer.storages[:2])
    at_once = max(1, READ_BYTES // row_bytes)
    for start in range(0, len(numbers), at_once):
        part = numbers[start : start + at_once]
        stop = start + len(part)
        layer.put(part.start, A[start:stop], B[start:stop], amult[part.start : part.stop : part.step], part.step)
