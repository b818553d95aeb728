"""The growing layer fused: rows are read once, correlations never leave the chip.

Same functions and signatures as ``pizoo.ops.reference``, for CUDA devices from compute capability 8.0.

A fixed grid of programs walks over blocks of rows; each keeps its share of the result in registers and writes it out
once, and a second kernel adds the shares in the order of the programs. No atomics: two runs give the same bits. The
number of rows in use is read on the device, so that one captured launch serves a layer while it grows.

Triton's kernels (:mod:`pizoo.ops.triton_kernels`) take what is left by those in CUDA C++: powers of two do not fit
``jacobian``, for few outputs, and ``batched``, for many samples; ``eight_bit`` multiplies 8-bit rows as the integers they are.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from pizoo.ops import batched, eight_bit, hopper, jacobian
from pizoo.ops.triton_kernels import backward_kernel, forward_kernel, reduce_kernel


class Launch(NamedTuple):
    """How an op is cut: rows a block, samples a tile, warps a program, stages of its loads."""

    rows: int
    batch: int
    warps: int
    stages: int


def growing_forward(
    gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, count: Tensor | None = None, bmult: Tensor | None = None
) -> Tensor:
    """``F00(q) (amult A)``, [b, r_out] float32; see :func:`pizoo.ops.reference.growing_forward`."""
    return _run(forward_kernel, gbar, A, B, amult, bmult, count)


def growing_backward(
    gbar: Tensor,
    A: Tensor,
    B: Tensor,
    amult: Tensor,
    delta: Tensor,
    count: Tensor | None = None,
    bmult: Tensor | None = None,
) -> Tensor:
    """The gradient with respect to g, [b, r] float32; see :func:`pizoo.ops.reference.growing_backward`."""
    return _run(backward_kernel, gbar, A, B, amult, bmult, count, delta.to(torch.float32).contiguous())


def growing_forward_jacobian(
    gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, count: Tensor | None = None, bmult: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and Jacobian in one pass, float32; see :func:`pizoo.ops.reference.growing_forward_jacobian`."""
    (b, r), (M, r_out) = gbar.shape, A.shape
    gbar, amult, bmult, count = _read_by_kernels(gbar, amult, bmult, count)
    with torch.cuda.device_of(A):
        partial = jacobian.partial_sums(gbar, A, B, amult, count, bmult)
        out, gradients = gbar.new_empty(b, r_out), gbar.new_empty(b, r_out, r)
        add_up(partial, gradients, count, M, jacobian.ROWS, gbar, out)
    return out, gradients


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; ``None`` where they can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"{device} is not an NVIDIA GPU in reach"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def supports(op: str, b: int, A: Tensor, B: Tensor) -> bool:
    """Whether the kernels cover these dtypes and shapes; sums of wider layers would not fit registers."""
    r, r_out = B.shape[1], A.shape[1]
    if op == "growing_forward_jacobian":
        return b > 0 and A.is_cuda and jacobian.supports(r, r_out, A.dtype, A.device)
    fits = r <= 1024 and r_out <= 1024
    return fits and b > 0 and A.dtype in (torch.int8, torch.float16, torch.bfloat16, torch.float32)


def _run(kernel, gbar: Tensor, A: Tensor, *others: Tensor | None) -> Tensor:
    """Launch ``kernel`` on the device of the rows and add up its partial sums."""
    with torch.cuda.device_of(A):
        return _run_on_current_device(kernel, gbar, A, *others)


def _run_on_current_device(kernel, gbar, A, B, amult, bmult, count, *delta) -> Tensor:
    """The layer's output [b, r_out] or the gradient [b, r]."""
    (b, r), (M, r_out) = gbar.shape, A.shape
    gbar, amult, bmult, count = _read_by_kernels(gbar, amult, bmult, count)
    A, B = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (A, B))
    out = gbar.new_empty(b, r if delta else r_out)
    line = padded(out.shape[1] + len(delta))
    along = gbar if delta else None
    if bmult is None and batched.supports(b, A, B, bool(delta)):
        partial = batched.partial_sums(gbar, A, B, amult, count, line, *delta)
        add_up(partial, out, count, M, batched.ROWS, along)
        return out
    if eight_bit.supports(b, A, B, bool(delta)):
        partial = eight_bit.partial_sums(gbar, A, B, amult, bmult, count, line, *delta)
        add_up(partial, out, count, M, eight_bit.ROWS, along)
        return out
    launch = _choose_launch(kernel, b, r, r_out, A.element_size(), A.device)
    strides, cut = (A.stride(0), B.stride(0)), (launch.rows, launch.batch, launch.stages)
    pieces = (*_pieces(r), *_pieces(r_out))
    constants = (r, r_out, *strides, line, *pieces, *cut, "tf32x3" if A.dtype == torch.float32 else "ieee")

    tiles = triton.cdiv(b, launch.batch)
    rows = (A, B, amult, bmult)
    start = functools.partial(kernel.warmup, gbar, *rows, *delta, count, gbar, M, b, *constants, grid=(1,))
    programs = max(1, _resident(start, launch.warps, (kernel, A.dtype, count is None, constants), A.device) // tiles)
    partial = gbar.new_empty(programs, b, line)
    kernel[(tiles, programs)](gbar, *rows, *delta, count, partial, M, b, *constants, num_warps=launch.warps)
    add_up(partial, out, count, M, launch.rows, along)
    return out


def _read_by_kernels(
    gbar: Tensor, amult: Tensor, bmult: Tensor | None, count: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Inputs and multipliers in float32, without gaps, and the number of rows in use in int64."""
    gbar, amult, bmult = (None if part is None else part.float().contiguous() for part in (gbar, amult, bmult))
    return gbar, amult, bmult, None if count is None else count.to(torch.int64)


def add_up(
    partial: Tensor,
    out: Tensor,
    count: Tensor | None,
    M: int,
    rows: int,
    gbar: Tensor | None = None,
    beside: Tensor | None = None,
) -> None:
    """Add up the shares of the programs that had a block of ``rows`` rows of M, or of ``count``, in a fixed order.

    Args:
        partial: float32 [programs, ..., line].
        out: [..., columns].
        gbar: [b, r]; times the column after all others, it is added to the first r columns.
        beside: where the column after those of ``out`` goes [...].
    """
    programs, columns, width = len(partial), out.shape[-1], 32
    length = out.numel() // columns
    r, group = (1, 1) if gbar is None else (gbar.shape[1], length // len(gbar))
    reduce_kernel[(length, triton.cdiv(columns + (beside is not None), width))](
        *(partial, gbar, out, beside, count, M, programs, length, columns, partial.shape[-1]),
        *(r, group, gbar is not None, rows, triton.next_power_of_2(programs), width),
        num_warps=8,
    )


def padded(columns: int) -> int:
    """Columns of a line of partial sums: lines that start at multiples of 16 bytes are read in fewer loads."""
    return -(-columns // 4) * 4


def _choose_launch(kernel, b: int, r: int, r_out: int, itemsize: int, device: torch.device) -> Launch:
    """The first that fits shared memory of the launches that were fastest at r = 400 on an H200."""
    launches = [Launch(32, 8, 4, 3), Launch(32, 8, 4, 2), Launch(16, 8, 4, 3), Launch(16, 8, 4, 2)]
    if b > 32 and itemsize <= 2 and r <= 512 and r_out <= 512:
        wide = [Launch(32, 128, 8, 2)] if b > 64 and kernel is forward_kernel else []
        launches = [*wide, Launch(32, 64, 8, 3), Launch(32, 64, 8, 2), *launches]
    available = hopper.shared_memory(device) if device.type == "cuda" else 1 << 17
    for launch in launches:
        buffers = launch.stages - (launch.batch < 64)
        inputs = r + r_out if kernel is backward_kernel else r
        used = max(itemsize, 2) * launch.batch * inputs + itemsize * buffers * launch.rows * (r + r_out)
        if itemsize == 1:  # int8: B loaded again, and float16 tiles where products of many samples find them
            used += buffers * launch.rows * r if kernel is backward_kernel else 0
            used += 2 * launch.rows * inputs if launch.batch >= 64 else 0
        # Programs of few samples wait more than they compute: two of them must fit.
        if used <= (available if launch.batch >= 64 else available // 2 - 1024):
            break
    return launch


def _pieces(n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cut n columns into pieces that cover them: their first columns and their widths, powers of two from 16 to 256."""
    starts, widths, left = [], [], -(-n // 16) * 16
    while left:
        starts.append(sum(widths))
        widths.append(min(256, 1 << (left.bit_length() - 1)))
        left -= widths[-1]
    return tuple(starts), tuple(widths)


_residents: dict[tuple, int] = {}


def _resident(compile, warps: int, key: tuple, device: torch.device) -> int:
    """How many programs of a kernel the device holds at once, by its registers and shared memory."""
    if device.type != "cuda":
        return 2  # the interpreter: enough to see that programs share the work
    key = (device, *key)
    if key not in _residents:
        properties, compiled = hopper.properties(device), compile(num_warps=warps)
        _ = compiled.run  # loads the kernel, which tells its registers
        registers = triton.cdiv(compiled.n_regs, 8) * 8 * 32 * warps
        shared = compiled.metadata.shared + 1024
        per_multiprocessor = min(
            properties.regs_per_multiprocessor // registers, properties.shared_memory_per_multiprocessor // shared
        )
        _residents[key] = properties.multi_processor_count * max(1, per_multiprocessor)
    return _residents[key]
