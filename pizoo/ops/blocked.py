"""The growing layer in plain torch, block of rows by block of rows: what the CPU runs, and any device without kernels.

Same functions and signatures as ``pizoo.ops.reference``. Correlations and upcast rows exist for one block at a time, so
memory stays at the rows plus one block, and on a CPU a block is still in cache when it is used the second time.
Blocks are summed in the order of the rows: two runs give the same bits. Within a block samples are columns, [n, b]: a
product of many rows with few columns keeps a CPU's memory busy, while its transpose takes up to twice as long.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pizoo.functional import F00, F02, F11
from pizoo.ops.reference import accumulate_dtype, correlations

CPU_BLOCK = 4096  # 4096 x 400 float32 are 7 MB: blocks of A and B stay in an ordinary cache until they are used again
DEVICE_BLOCK = 1 << 18  # elsewhere launches cost more than memory


def growing_forward(
    gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, count: Tensor | None = None, bmult: Tensor | None = None
) -> Tensor:
    """``F00(q) (amult A)``; see :func:`pizoo.ops.reference.growing_forward`."""
    dtype = accumulate_dtype(A.dtype)
    gbar = gbar.to(dtype)
    out = gbar.new_zeros(len(gbar), A.shape[1])
    for A_block, B_block, amult_block in _blocks(dtype, count, A, B, amult, bmult):
        out.addmm_((F00(correlations(B_block, gbar)) * amult_block).T, A_block)
    return out


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
    dtype = accumulate_dtype(A.dtype)
    gbar, delta = gbar.to(dtype), delta.to(dtype)
    grad, along = torch.zeros_like(gbar), gbar.new_zeros(len(gbar))
    for A_block, B_block, amult_block in _blocks(dtype, count, A, B, amult, bmult):
        q = correlations(B_block, gbar)
        dgamma = A_block @ delta.T * amult_block
        grad.addmm_((dgamma * F11(q)).T, B_block)
        along += (dgamma * F02(q)).sum(0)
    return grad + along[:, None] * gbar


def growing_forward_jacobian(
    gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, count: Tensor | None = None, bmult: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and Jacobian in one pass; see :func:`pizoo.ops.reference.growing_forward_jacobian`."""
    dtype = accumulate_dtype(A.dtype)
    gbar = gbar.to(dtype)
    (b, r), r_out = gbar.shape, A.shape[1]
    out, along = gbar.new_zeros(b, r_out), gbar.new_zeros(b, r_out)
    jacobian = gbar.new_zeros(b * r_out, r)
    for A_block, B_block, amult_block in _blocks(dtype, count, A, B, amult, bmult):
        q = correlations(B_block, gbar)
        weights = A_block * amult_block
        out.addmm_(F00(q).T, weights)
        along.addmm_(F02(q).T, weights)
        jacobian.addmm_((F11(q)[:, :, None] * weights[:, None]).flatten(1).T, B_block)
    return out, jacobian.view(b, r_out, r) + along[:, :, None] * gbar[:, None]


def _blocks(
    dtype: torch.dtype, count: Tensor | None, A: Tensor, B: Tensor, amult: Tensor, bmult: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the rows in use, block by block in ``dtype``: A, unit rows ``bmult B``, and amult as a column.

    What had to be converted is overwritten by the next block.
    """
    M = len(A) if count is None else int(count)
    size = CPU_BLOCK if A.device.type == "cpu" else DEVICE_BLOCK
    as_is = A.dtype == dtype and bmult is None
    rooms = [None if as_is else rows.new_empty(min(size, M), rows.shape[1], dtype=dtype) for rows in (A, B)]
    for start in range(0, M, size):
        block = slice(start, min(start + size, M))
        A_block, B_block = (
            rows[block] if room is None else room[: block.stop - start].copy_(rows[block])
            for rows, room in zip((A, B), rooms, strict=True)
        )
        if bmult is not None:
            B_block *= bmult[block, None]
        yield A_block, B_block, amult[block, None].to(dtype)
