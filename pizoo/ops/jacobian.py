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
MOST_OUTPUTS, MOST_CHUNKS = 10, 8  # that many sums fit its registers
THREADS = 3 * 128


def supports(r: int, r_out: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel covers rows [M, r_out], [M, r] of ``dtype`` on a CUDA device."""
    return (
        hopper.supports(dtype, device)
        and r % 8 == 0
        and r_out <= MOST_OUTPUTS
        and blocks_of(r, WIDTH) <= MOST_CHUNKS
        and _stages(r, r_out, hopper.properties(device).shared_memory_per_block_optin) >= 3
    )


def partial_sums(gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, count: Tensor | None) -> Tensor:
    """Each program's share of the Jacobian, the output and the factor along gbar.

    Args:
        gbar: unit inputs [b, r], float32, contiguous.
        A: rows [M, r_out], float16 or bfloat16.
        B: rows [M, r], same dtype.
        amult: multipliers [M], float32, contiguous.
        count: rows in use, int64 of one element on the device; ``None``: all.

    Returns:
        float32 [programs, b, r_out, r + 4]: ``Σ F11 w B``, ``Σ F00 w``, ``Σ F02 w`` and two zeros, with w = amult A. Programs
        beyond the number of blocks of ``ROWS`` rows write nothing.

    Raises:
        RuntimeError: the kernel does not compile or launch.
    """
    (b, r), (M, r_out) = gbar.shape, A.shape
    A, B = aligned(A, B)
    properties = hopper.properties(A.device)
    shared, tiles = properties.shared_memory_per_block_optin, blocks_of(b, SAMPLES)
    programs = max(1, properties.multi_processor_count // tiles)
    partial = gbar.new_empty(programs, b, r_out, r + 4)
    constants = constants_of(r, r_out, A.stride(0), A.dtype, shared)
    found = nvrtc.kernel(
        A.device, "jacobian.cu", "growing_forward_jacobian", constants, shared, headers(r_out, A.dtype)
    )
    rows = hopper.tensor_map(B)
    nvrtc.launch(found, (programs, tiles), THREADS, shared, (rows, gbar, A, amult, count, partial, M, b))
    return partial


def aligned(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as the kernel reads them, A two elements at once and B by the copy engine; copied where they lie otherwise."""
    if A.stride(1) != 1 or A.stride(0) % 2 or A.data_ptr() % 4:
        A = pad(A, (0, A.shape[1] % 2)).contiguous()  # nothing to pad is a copy too, but one that keeps strides
    if not hopper.fetchable(B):
        B = B.clone(memory_format=torch.contiguous_format)
    return A, B


def constants_of(r: int, r_out: int, stride: int, dtype: torch.dtype, shared: int) -> nvrtc.Constants:
    """What ``jacobian.cu`` is compiled with."""
    constants = {"R": r, "OUTPUTS": r_out, "SAMPLES": SAMPLES, "STRIDE_A": stride}
    constants |= {"STAGES": _stages(r, r_out, shared), "SHARED": shared, "BFLOAT16": int(dtype == torch.bfloat16)}
    return tuple(constants.items())


def headers(r_out: int, dtype: torch.dtype) -> tuple[tuple[str, str], ...]:
    """Products for correlations and for sums."""
    return hopper.headers((SAMPLES, _columns(r_out)), dtype)


def _stages(r: int, r_out: int, shared: int) -> int:
    """How many blocks of rows fit shared memory beside everything else; ``jacobian.cu`` checks the sum."""
    stage = 2 * ROWS * WIDTH * max(2, blocks_of(r, WIDTH))
    inputs, weights = 2 * SAMPLES * 16 * blocks_of(r, 16), 2 * 2 * ROWS * _columns(r_out)
    rest = 4 * 4 * SAMPLES * r_out * 2 + 1024  # outputs, barriers, what alignment costs
    return min(6, (shared - inputs - weights - rest) // stage)


def _columns(r_out: int) -> int:
    """Of the products: all samples of each output, and of one more than an odd number of them."""
    return 2 * SAMPLES * blocks_of(r_out, 2)
