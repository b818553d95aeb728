"""The read-out's output and Jacobian in one pass over its rows: compiles and launches ``jacobian.cu``.

Triton cuts matrices into powers of two; 8 samples times 10 outputs times 400 columns then no longer fit the registers of a
multiprocessor, and the kernel is slower than reading the rows twice. Hence CUDA C++.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pizoo.ops import nvrtc

WARPS, MULTIPLIERS = 12, 8
ROWS = 64  # a block
SAMPLES = 8  # a tile
REGISTERS = 144  # of a thread, for sums: the rest of 255 goes to fragments
CAPABILITY = (9, 0)


def supports(r: int, r_out: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel covers rows [M, r_out], [M, r] of ``dtype`` on a CUDA device."""
    return (
        dtype in (torch.float16, torch.bfloat16)
        and r % 8 == 0
        and 4 * _pairs(r_out) * -(-_blocks_of(r, 8) // MULTIPLIERS) <= REGISTERS
        and torch.cuda.get_device_capability(device) >= CAPABILITY
        and nvrtc.available()
        and _stages(r, r_out, _properties(device).shared_memory_per_block_optin) >= 3
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
        float32 [programs, b, r_out, r + 4]: ``Σ F11 w B``, ``Σ F00 w``, ``Σ F02 w`` and padding, with w = amult A. Programs
        beyond the number of blocks of ``ROWS`` rows write nothing.

    Raises:
        RuntimeError: the kernel does not compile or launch.
    """
    (b, r), (M, r_out) = gbar.shape, A.shape
    A, B = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (A, B))
    if B.stride(0) % 8 or B.data_ptr() % 16:
        B = B.contiguous()
    properties = _properties(A.device)
    tiles = _blocks_of(b, SAMPLES)
    programs = max(1, properties.multi_processor_count // tiles)
    partial = gbar.new_empty(programs, b, r_out, r + 4)
    shared = properties.shared_memory_per_block_optin
    constants = {
        "R": r,
        "OUTPUTS": r_out,
        "STRIDE_A": A.stride(0),
        "STRIDE_B": B.stride(0),
        "STAGES": _stages(r, r_out, shared),
        "SHARED": shared,
        "BFLOAT16": int(A.dtype == torch.bfloat16),
    }
    kernel = nvrtc.kernel(A.device, "jacobian.cu", "growing_forward_jacobian", tuple(constants.items()), shared)
    nvrtc.launch(kernel, (programs, tiles), 32 * WARPS, shared, (gbar, A, B, amult, count, partial, M, b))
    return partial


def _stages(r: int, r_out: int, shared: int) -> int:
    """How many blocks of rows fit shared memory beside everything else; ``jacobian.cu`` checks the sum."""
    stage = ROWS * 16 * (2 * _blocks_of(r, 16) + 1)
    factors = 4 * ROWS * _pairs(r_out) + 3 * SAMPLES * 2 * (ROWS + 8) + 64
    rest = 2 * factors + _blocks_of(r, 16) * 256 + 256 + 256
    return min(8, (shared - rest) // stage)


def _pairs(r_out: int) -> int:
    return _blocks_of(r_out, 2)


def _blocks_of(n: int, size: int) -> int:
    return -(-n // size)


_properties = functools.cache(torch.cuda.get_device_properties)
