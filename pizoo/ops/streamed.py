"""The growing layer over rows that stay in host memory: they cross to the device chunk by chunk, at every call.

Same functions and signatures as ``pizoo.ops.reference``; ``gbar`` and the results are on the device, rows on the host
(multipliers may be on either side). Two buffers on the device take turns: while one chunk is computed with, by the
ordinary op of the device, the next is copied on a stream of its own. What the chunks contribute is added in the order of
the rows: two runs give the same bits.

Page-locked rows (:func:`pizoo.memory.empty_on_host`) are copied at the speed of the bus. Others work too, several times
slower: the driver copies them through page-locked memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pizoo import ops
from pizoo.memory import copy_stream

CHUNK_BYTES = 1 << 26  # over a millisecond of copying, far more than launching the copy and the op takes
BUFFERS = 2


def growing_forward(
    gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, count: Tensor | None = None, bmult: Tensor | None = None
) -> Tensor:
    """``F00(q) (amult A)``; see :func:`pizoo.ops.reference.growing_forward`."""
    return _summed(ops.growing_forward, gbar, A, B, amult, count=count, bmult=bmult)[0]


def growing_backward(
    gbar: Tensor,
    A: Tensor,
    B: Tensor,
    amult: Tensor,
    delta: Tensor,
    count: Tensor | None = None,
    bmult: Tensor | None = None,
) -> Tensor:
    """The gradient with respect to g; see :func:`pizoo.ops.reference.growing_backward`."""
    return _summed(ops.growing_backward, gbar, A, B, amult, delta, count=count, bmult=bmult)[0]


def growing_forward_jacobian(
    gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, count: Tensor | None = None, bmult: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and Jacobian in one pass; see :func:`pizoo.ops.reference.growing_forward_jacobian`."""
    return _summed(ops.growing_forward_jacobian, gbar, A, B, amult, count=count, bmult=bmult)


def _summed(
    op, gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, *delta: Tensor, count: Tensor | None, bmult: Tensor | None
) -> tuple[Tensor, ...]:
    """The results of ``op``, which are linear in the rows, on all chunks, added up in order."""
    totals: tuple[Tensor, ...] | None = None
    rows = (A, B, amult) if bmult is None else (A, B, amult, bmult)
    for A, B, amult, *bmults in chunks(gbar.device, count, *rows):
        results = op(gbar, A, B, amult, *delta, bmult=bmults[0] if bmults else None)
        results = results if isinstance(results, tuple) else (results,)
        totals = results if totals is None else tuple(t.add_(r) for t, r in zip(totals, results, strict=True))
    return totals


def chunks(device: torch.device, count: Tensor | None, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the rows in use on ``device``, chunk by chunk; a chunk is gone when the next but one is asked for."""
    M = len(rows[0]) if count is None else min(int(count), len(rows[0]))
    row_bytes = sum(part.shape[1:].numel() * part.element_size() for part in rows)
    size = max(1, min(M, CHUNK_BYTES // row_bytes))
    buffers = [_Buffer(device, size, rows) for _ in range(BUFFERS)]
    if device.type == "cuda":
        # Buffers may be made of memory that queued work still uses, and queued work may still change amult.
        copy_stream(device).wait_stream(torch.cuda.current_stream(device))
    try:
        for i, start in enumerate(range(0, max(M, 1), size)):
            buffer = buffers[i % BUFFERS]
            yield buffer.fill(tuple(part[start : min(start + size, M)] for part in rows))
            buffer.release()
    finally:
        if device.type == "cuda":  # left early: memory is reused in the order of this stream, copies must be over first
            torch.cuda.current_stream(device).wait_stream(copy_stream(device))


class _Buffer:
    """Room for a chunk on a device. On a GPU it is filled on the copy stream, once what was computed with it is done."""

    def __init__(self, device: torch.device, size: int, rows: tuple[Tensor, ...]):
        self.device = device
        self.parts = tuple(part.new_empty(size, *part.shape[1:], device=device) for part in rows)
        self.filled, self.released = (torch.cuda.Event(), torch.cuda.Event()) if device.type == "cuda" else (None, None)

    def fill(self, chunk: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Copy a chunk in; returns it, for work on the current stream."""
        parts = tuple(part[: len(new)] for part, new in zip(self.parts, chunk, strict=True))
        if self.device.type != "cuda":
            return tuple(part.copy_(new) for part, new in zip(parts, chunk, strict=True))
        stream = copy_stream(self.device)
        stream.wait_event(self.released)  # an event not yet recorded holds nothing up
        with torch.cuda.stream(stream):
            for part, new in zip(parts, chunk, strict=True):
                part.copy_(new, non_blocking=True)
            self.filled.record(stream)
        torch.cuda.current_stream(self.device).wait_event(self.filled)
        return parts

    def release(self) -> None:
        """What was launched on the current stream is the last to use the chunk."""
        if self.released is not None:
            self.released.record(torch.cuda.current_stream(self.device))
