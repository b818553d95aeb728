"""Writing rows behind those in use, at a place only the device knows: in plain torch, and as one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform, and no GPU either: nobody asks for the kernel
    triton = None


def append_reference(new: tuple[Tensor, ...], storages: tuple[Tensor, ...], first: Tensor) -> None:
    """Write ``new`` (A [b, r_out], B [b, r], amult [b], of int8 rows bmult [b]) into ``storages`` from row ``first`` on."""
    rows = first + torch.arange(len(new[0]), device=first.device)
    for storage, part in zip(storages, new, strict=True):
        storage.index_copy_(0, rows, part.to(storage.dtype))


def append_fused(new: tuple[Tensor, ...], storages: tuple[Tensor, ...], first: Tensor) -> None:
    """As :func:`append_reference`, in one launch; CUDA (or Triton's interpreter)."""
    (b, r_out), r = new[0].shape, new[1].shape[1]
    strides = (storages[0].stride(0), storages[1].stride(0))
    width = triton.next_power_of_2(max(r, r_out))
    with torch.cuda.device_of(storages[0]):
        _append_kernel[(b,)](
            *_with_bmult(*(part.contiguous() for part in new)),
            first,
            *_with_bmult(*storages),
            r_out,
            r,
            *strides,
            width,
        )


def _with_bmult(A: Tensor, B: Tensor, amult: Tensor, bmult: Tensor | None = None) -> tuple[Tensor | None, ...]:
    return A, B, amult, bmult


def _append_kernel(
    A_new,
    B_new,
    amult_new,
    bmult_new,
    first,
    A,
    B,
    amult,
    bmult,
    r_out: tl.constexpr,
    r: tl.constexpr,
    A_stride: tl.constexpr,
    B_stride: tl.constexpr,
    WIDTH: tl.constexpr,
):
    i, column = tl.program_id(0), tl.arange(0, WIDTH)
    row = tl.load(first).to(tl.int64) + i
    tl.store(A + row * A_stride + column, tl.load(A_new + i * r_out + column, column < r_out), column < r_out)
    tl.store(B + row * B_stride + column, tl.load(B_new + i * r + column, column < r), column < r)
    tl.store(amult + row, tl.load(amult_new + i))
    if bmult is not None:
        tl.store(bmult + row, tl.load(bmult_new + i))


if triton is not None:
    _append_kernel = triton.jit(_append_kernel)
