"""Dense layers of a training step with few samples: the product going up, and the step of the weight.

Both are bound by reading the weight; matrix products made for many samples take several times as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pizoo.ops.reference import accumulate_dtype

try:
    import triton
    import triton.language as tl

    from pizoo.ops.triton import add_up, padded
except ImportError:  # no Triton on this platform, and no GPU either: nobody asks for the kernels
    triton = None

DEPTH = 32  # rows of a weight that a program multiplies


def product(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`product_reference` by the kernel where there is one for it."""
    return (product_fused if _fused(weight) else product_reference)(x, weight)


def step(weight: Tensor, left: Tensor, right: Tensor, kept: Tensor, factor: Tensor, finite: Tensor) -> None:
    """:func:`step_reference` by the kernel where there is one for it."""
    (step_fused if _fused(weight) else step_reference)(weight, left, right, kept, factor, finite)


def _fused(weight: Tensor) -> bool:
    return triton is not None and weight.is_cuda and weight.dtype in (torch.float16, torch.bfloat16, torch.float32)


def product_reference(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight`` for x [b, n], weight [n, m] of any strides: [b, m] in the accumulate dtype."""
    dtype = accumulate_dtype(weight.dtype)
    return x.to(dtype) @ weight.to(dtype)


def product_fused(x: Tensor, weight: Tensor) -> Tensor:
    """As :func:`product_reference` for float16 to float32; CUDA (or Triton's interpreter).

    Programs share out the depth n; their sums are added up in a fixed order.
    """
    (b, n), m = x.shape, weight.shape[1]
    programs, tile = triton.cdiv(n, DEPTH), max(16, triton.next_power_of_2(b))
    width = max(16, min(128, triton.next_power_of_2(m)))
    partial, out = x.new_empty(programs, b, padded(m), dtype=torch.float32), x.new_empty(b, m, dtype=torch.float32)
    with torch.cuda.device_of(weight):
        _product_kernel[(programs, triton.cdiv(m, width))](
            *(x, weight, partial, n, m, b, partial.shape[2], *x.stride(), *weight.stride()),
            *(tile, width, DEPTH, _precision(weight.dtype)),
        )
        add_up(partial, out, None, n, DEPTH)
    return out


def step_reference(weight: Tensor, left: Tensor, right: Tensor, kept: Tensor, factor: Tensor, finite: Tensor) -> None:
    """Set ``weight`` to ``kept weight - factor leftᵀ right``, rounded once; leave it as it is if not ``finite``.

    Args:
        weight: [n, m], contiguous.
        left, right: [b, n], [b, m], in the dtype of the weight.
        kept, factor: one number each.
        finite: bool of one element.
    """
    dtype = accumulate_dtype(weight.dtype)
    stepped = weight.to(dtype) * kept.to(dtype) - factor.to(dtype) * (left.to(dtype).T @ right.to(dtype))
    weight.copy_(torch.where(finite, stepped.to(weight.dtype), weight))


def step_fused(weight: Tensor, left: Tensor, right: Tensor, kept: Tensor, factor: Tensor, finite: Tensor) -> None:
    """As :func:`step_reference`, in one pass over the weight; float16 to float32, CUDA (or Triton's interpreter)."""
    (n, m), b = weight.shape, len(left)
    tile, across = (32, 64) if weight.dtype == torch.float32 else (64, 128)
    with torch.cuda.device_of(weight):
        _step_kernel[(triton.cdiv(n, tile), triton.cdiv(m, across))](
            *(weight, left, right, kept.to(torch.float32), factor.to(torch.float32), finite, n, m, b),
            *(
                left.stride(0),
                right.stride(0),
                max(16, triton.next_power_of_2(b)),
                tile,
                across,
                _precision(weight.dtype),
            ),
        )


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "ieee"


def _product_kernel(
    x,
    weight,
    partial,
    n,
    m,
    b,
    line,
    x_stride,
    x_step,
    weight_stride,
    weight_step,
    BATCH: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    k = program * DEPTH + tl.arange(0, DEPTH)
    i, j = tl.arange(0, BATCH)[:, None], tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    left = tl.load(x + i * x_stride + k[None, :] * x_step, mask=(i < b) & (k < n)[None, :], other=0.0)
    right = tl.load(weight + k[:, None] * weight_stride + j * weight_step, mask=(k < n)[:, None] & (j < m), other=0.0)
    total = tl.dot(left.to(right.dtype), right, input_precision=PRECISION)
    tl.store(partial + (program.to(tl.int64) * b + i) * line + j, total, mask=(i < b) & (j < m))


def _step_kernel(
    weight,
    left,
    right,
    kept,
    factor,
    finite,
    n,
    m,
    b,
    left_stride,
    right_stride,
    BATCH: tl.constexpr,
    TILE: tl.constexpr,
    ACROSS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if tl.load(finite):
        i, j = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)
        sample = tl.arange(0, BATCH)
        ups = tl.load(
            left + sample[None, :] * left_stride + i[:, None], mask=(sample < b)[None, :] & (i < n)[:, None], other=0.0
        )
        downs = tl.load(
            right + sample[:, None] * right_stride + j[None, :],
            mask=(sample < b)[:, None] & (j < m)[None, :],
            other=0.0,
        )
        pointer = weight + i[:, None].to(tl.int64) * m + j[None, :]
        mask = (i < n)[:, None] & (j < m)[None, :]
        old = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
        new = old * tl.load(kept) - tl.load(factor) * tl.dot(ups, downs, input_precision=PRECISION)
        tl.store(pointer, new.to(weight.dtype.element_ty), mask=mask)


if triton is not None:
    _product_kernel = triton.jit(_product_kernel)
    _step_kernel = triton.jit(_step_kernel)
