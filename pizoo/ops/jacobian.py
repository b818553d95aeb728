"""The read-out's output and Jacobian in one pass over its rows: compiles and launches ``jacobian.cu``.

Triton cuts matrices into powers of two; 8 samples times 10 outputs times 400 columns then no longer fit the registers of a
multiprocessor, and the kernel is slower than reading the rows twice. Hence CUDA C++.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from pizoo.ops import hopper, nvrtc
from pizoo.ops.hopper import ROWS, WIDTH, blocks_of

SAMPLES = 8  # of a program
MOST_OUTPUTS, MOST_COLUMNS = 10, 512  # that many sums fit its registers
THREADS = 3 * 128
UNIT = 2 * WIDTH  # columns of 8-bit rows that a thread makes halves of at once; either multiplier has some


def supports(r: int, r_out: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel covers rows [M, r_out], [M, r] of ``dtype`` on a CUDA device."""
    if dtype == torch.int8:
        fits = hopper.present(device) and r % 4 == 0 and UNIT < r <= MOST_COLUMNS - WIDTH
    else:
        fits = hopper.supports(dtype, device) and r % 8 == 0 and r <= MOST_COLUMNS
    return fits and r_out <= MOST_OUTPUTS and _stages(r, r_out, dtype, hopper.shared_memory(device)) >= 3


def partial_sums(
    gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, count: Tensor | None, bmult: Tensor | None = None
) -> Tensor:
    """Each program's share of the Jacobian, the output and the factor along gbar.

    Args:
        gbar: unit inputs [b, r], float32, contiguous.
        A: rows [M, r_out], int8, float16 or bfloat16.
        B: rows [M, r], same dtype.
        amult: multipliers [M], float32, contiguous.
        count: rows in use, int64 of one element on the device; ``None``: all.
        bmult: of int8 rows, what brings those of B to norm 1 [M], float32, contiguous.

    Returns:
        float32 [programs, b, r_out, r + 4]: ``Σ F11 w B``, ``Σ F00 w``, ``Σ F02 w`` and two zeros, with w = amult A. Programs
        beyond the number of blocks of ``ROWS`` rows write nothing.

    Raises:
        RuntimeError: the kernel does not compile or launch.
    """
    (b, r), (M, r_out) = gbar.shape, A.shape
    A, B = aligned(A, B)
    shared, tiles = hopper.shared_memory(A.device), blocks_of(b, SAMPLES)
    programs = max(1, hopper.properties(A.device).multi_processor_count // tiles)
    partial = gbar.new_empty(programs, b, r_out, r + 4)
    constants = constants_of(r, r_out, A.stride(0), A.dtype, shared)
    found = nvrtc.kernel(
        A.device, "jacobian.cu", "growing_forward_jacobian", constants, shared, headers(r_out, A.dtype)
    )
    if A.dtype == torch.int8:
        rows, amult, bmult = B, *(part if part.data_ptr() % 16 == 0 else part.clone() for part in (amult, bmult))
    else:
        rows = hopper.tensor_map(B)
    nvrtc.launch(found, (programs, tiles), THREADS, shared, (rows, gbar, A, amult, bmult, count, partial, M, b))
    return partial


def aligned(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as the kernel reads them, A two entries at once and B by the copy engine, which also takes 8-bit rows of A, without
    gaps; copied where they lie otherwise."""
    pairs, eight_bit = _pairs(A.shape[1]), A.dtype == torch.int8
    near = A.stride(0) == pairs and A.data_ptr() % 16 == 0 if eight_bit else A.stride(0) % 2 == A.data_ptr() % 4 == 0
    if A.stride(1) != 1 or not near:
        A = pad(A, (0, pairs - A.shape[1])).contiguous()  # nothing to pad is a copy too, but one that keeps strides
    fetchable = B.is_contiguous() and B.data_ptr() % 16 == 0 if eight_bit else hopper.fetchable(B)
    return A, B if fetchable else B.clone(memory_format=torch.contiguous_format)


def constants_of(r: int, r_out: int, stride: int, dtype: torch.dtype, shared: int) -> nvrtc.Constants:
    """What ``jacobian.cu`` is compiled with."""
    stride = _pairs(r_out) if dtype == torch.int8 else stride  # of a single row torch keeps whatever stride it had
    constants = {"R": r, "OUTPUTS": r_out, "SAMPLES": SAMPLES, "STRIDE_A": stride}
    constants |= {"STAGES": _stages(r, r_out, dtype, shared), "SHARED": shared}
    constants |= {"EIGHT_BIT": int(dtype == torch.int8), "BFLOAT16": int(dtype == torch.bfloat16)}
    return tuple(constants.items())


def headers(r_out: int, dtype: torch.dtype) -> tuple[tuple[str, str], ...]:
    """Products for correlations and for sums."""
    return hopper.headers((SAMPLES, _columns(r_out)), dtype)


def _stages(r: int, r_out: int, dtype: torch.dtype, shared: int) -> int:
    """How many blocks of rows fit shared memory beside all else, as ``jacobian.cu`` checks; 0 if too few for the sums."""
    if dtype == torch.int8:
        columns = r + _pairs(r_out) + 8  # with multipliers
        stage, inputs = 128 * blocks_of(ROWS * columns + UNIT, 128), 64 * SAMPLES * blocks_of(r, 32)
    else:
        stage, inputs = 2 * ROWS * WIDTH * max(2, blocks_of(r, WIDTH)), 2 * SAMPLES * 16 * blocks_of(r, 16)
    weights = 2 * 2 * ROWS * _columns(r_out)
    rest = 4 * 4 * SAMPLES * r_out * 2 + 1024  # outputs, barriers, what alignment costs
    stages = min(6, (shared - inputs - weights - rest) // stage)
    return stages if stages * stage >= 4 * SAMPLES * r_out * (r + 4) else 0


def _pairs(r_out: int) -> int:
    """Entries of a row of A, which is read two at once."""
    return r_out + r_out % 2


def _columns(r_out: int) -> int:
    """Of the products: all samples of each output, and of one more than an odd number of them."""
    return 2 * SAMPLES * blocks_of(r_out, 2)
