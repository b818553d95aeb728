"""The growing layer in plain torch, block of rows by block of rows: what the CPU runs, and any device without kernels.

Same functions and signatures as ``pizoo.ops.reference``. Correlations and upcast rows exist for one block at a time, so
memory stays at the rows plus one block, and on a CPU a block is still in cache when it is used the second time.
Blocks are summed in the order of the rows: two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pizoo.functional import F00, F02, F11
from pizoo.ops.reference import accumulate_dtype, correlations

CPU_BLOCK = 8192  # 8192 x 400 float32 are 13 MB: blocks of A and B converted to float32 fit an ordinary cache
CPU_BLOCK_AS_IS = 32768  # nothing to convert: fewer, larger products
DEVICE_BLOCK = 1 << 18  # elsewhere launches cost more than memory


def growing_forward(
    gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, count: Tensor | None = None, bmult: Tensor | None = None
) -> Tensor:
    """``F00(q) (amult A)``; see :func:`pizoo.ops.reference.growing_forward`."""
    dtype = accumulate_dtype(A.dtype)
    gbar = gbar.to(dtype)
    out = gbar.new_zeros(len(gbar), A.shape[1])
    for A_block, B_block, amult_block, bmult_block in _blocks(dtype, count, A, B, amult, bmult):
        out.addmm_(F00(correlations(gbar, B_block, bmult_block)) * amult_block, A_block)
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
    grad, along = torch.zeros_like(gbar), gbar.new_zeros(len(gbar), 1)
    for A_block, B_block, amult_block, bmult_block in _blocks(dtype, count, A, B, amult, bmult):
        q = correlations(gbar, B_block, bmult_block)
        dgamma = delta @ A_block.T * amult_block
        grad.addmm_(_times(dgamma * F11(q), bmult_block), B_block)
        along += (dgamma * F02(q)).sum(1, keepdim=True)
    return grad + along * gbar


def growing_forward_jacobian(
    gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, count: Tensor | None = None, bmult: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and Jacobian in one pass; see :func:`pizoo.ops.reference.growing_forward_jacobian`."""
    dtype = accumulate_dtype(A.dtype)
    gbar = gbar.to(dtype)
    (b, r), r_out = gbar.shape, A.shape[1]
    out, along = gbar.new_zeros(b, r_out), gbar.new_zeros(b, r_out)
    jacobian = gbar.new_zeros(b * r_out, r)
    for A_block, B_block, amult_block, bmult_block in _blocks(dtype, count, A, B, amult, bmult):
        q = correlations(gbar, B_block, bmult_block)
        weights = (A_block.T * amult_block).contiguous()
        out.addmm_(F00(q), weights.T)
        along.addmm_(F02(q), weights.T)
        jacobian.addmm_((_times(F11(q), bmult_block)[:, None] * weights).flatten(0, 1), B_block)
    return out, jacobian.view(b, r_out, r) + along[:, :, None] * gbar[:, None]


def _times(coefficients: Tensor, bmult: Tensor | None) -> Tensor:
    return coefficients if bmult is None else coefficients * bmult


def _blocks(dtype: torch.dtype, count: Tensor | None, *rows: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Yield the rows in use, converted to ``dtype``, block by block."""
    M = len(rows[0]) if count is None else int(count)
    size = DEVICE_BLOCK
    if rows[0].device.type == "cpu":
        size = CPU_BLOCK_AS_IS if rows[0].dtype == dtype else CPU_BLOCK
    for start in range(0, M, size):
        stop = min(start + size, M)
        yield tuple(part if part is None else part[start:stop].to(dtype) for part in rows)
