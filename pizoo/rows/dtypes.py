"""What rows of a dtype hold: conversion from one to another, the same function within rounding.

Rows in int8 hold ``A / max|A| * 127`` and ``B / max|B| * 127``, rounded. What ``A`` was divided by is part of ``amult``, where
it costs nothing. ``B`` is known to have norm 1, so its integers say it all: they stand for ``bmult B`` with bmult one over
their norm, which is derived from them wherever rows come from, and never saved.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = (torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = torch.iinfo(torch.int8).max
CONVERTED_AT_ONCE = 65_536  # rows: those of another dtype pass through float32


def converted(A: Tensor, B: Tensor, amult: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Rows of any of ``DTYPES`` as those of one of them, the same function within rounding.

    Args:
        A: [k, r_out].
        B: [k, r] of norm 1, or int8.
        amult: [k].

    Returns:
        ``A``, ``B``, ``amult``, and of int8 rows ``bmult`` [k].
    """
    bmult: tuple[Tensor, ...] = ()
    if dtype == torch.int8 != A.dtype:
        A, scale = _in_blocks(lambda part: scaled(part, dtype), A)
        amult = amult * scale.to(amult.device)
    if B.dtype == dtype == torch.int8:
        bmult = _in_blocks(lambda part: directed(part, dtype)[1:], B)
    elif torch.int8 in (B.dtype, dtype):
        B, *bmult = _in_blocks(lambda part: directed(part, dtype), B)
    return A.to(dtype), B.to(dtype), amult, *bmult


def _in_blocks(function: Callable[[Tensor], tuple[Tensor, ...]], rows: Tensor) -> tuple[Tensor, ...]:
    """What ``function`` makes of blocks of rows, joined."""
    return tuple(torch.cat(parts) for parts in zip(*map(function, rows.split(CONVERTED_AT_ONCE)), strict=True))


def scaled(A: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [k, r_out] as rows of ``dtype`` hold it, up to a cast, and what it is to be multiplied by [k], in at least float32.

    int8 rows are rounded to nearest. Rows smaller than float32's normal numbers become zeros, to be multiplied by 0: kernels
    follow the largest multipliers, and those of rows that are nothing must not be among them. What is not finite leaves a
    multiplier that is not.
    """
    if dtype.itemsize >= 4:
        return A, A.new_ones(len(A))
    if dtype != torch.int8:
        scale = row_scale(A)
        return A / _divisor(scale), scale
    A = A.to(torch.promote_types(A.dtype, torch.float32))
    scale = A.abs().amax(1) / LARGEST
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0, scale)
    return (A / _divisor(scale)).round().to(dtype), scale


def _divisor(scale: Tensor) -> Tensor:
    """What rows are divided by to be multiplied by ``scale`` [k]: [k, 1]."""
    return torch.where(scale == 0, torch.inf, scale)[:, None]


def directed(B: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Directions B [k, r] as rows of ``dtype`` hold them, up to a cast; for int8 also one over their norms [k], float32."""
    if torch.int8 not in (B.dtype, dtype):
        return (B,)
    if B.dtype != torch.int8:
        B, _ = scaled(B, torch.int8)
    # In float64 the sum is exact and the rest is rounded alike by every device: nobody has to keep these numbers.
    bmult = (1 / B.double().square().sum(1).clamp(min=1).sqrt()).float()
    return (B, bmult) if dtype == torch.int8 else (B * bmult[:, None],)


def row_scale(A: Tensor) -> Tensor:
    """The power of two per row [k] that brings the largest entry of each row of A [k, r_out] into [1, 2).

    Zero for rows that are zero or below float32's normal numbers: dividing by a power that small overflows where devices
    flush it to zero. One for rows that are not finite.
    """
    largest = A.abs().amax(1)
    exponent = torch.where(largest.isfinite(), torch.frexp(largest).exponent - 1, 0)
    return torch.where(largest < torch.finfo(torch.float32).tiny, 0, torch.ldexp(torch.ones_like(largest), exponent))


def check_rows_dtype(dtype: torch.dtype) -> None:
    """Raise TypeError unless rows can be of this dtype."""
    if dtype not in DTYPES:
        raise TypeError(f"rows have dtype {dtype}; it must be one of {', '.join(map(str, DTYPES))}")
