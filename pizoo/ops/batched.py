"""Forward and backward for batches larger than a Triton tile can sum in registers: compiles and launches ``batched.cu``.

Few-shot training sends 80 samples (8 tasks of 10 images) through a layer. Triton cuts them into powers of two and spills what
registers cannot hold. This kernel keeps all sums in registers, uses Hopper's own matrix products and copies, and takes up to
80 samples in one pass over the rows. For 9 samples it is ahead already, for 8 Triton's kernels are as fast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pizoo.ops import hopper, nvrtc
from pizoo.ops.hopper import ROWS, WIDTH, blocks_of

MOST_SAMPLES, MOST_CHUNKS = 80, 7  # of a program: that many sums fit its registers
LEAST_SAMPLES = 9  # 16 at r = 200, r_out = 250: 1.7 ms for 4,000,000 rows, both directions; Triton 3.6
THREADS = 4 * 128


class Layout(NamedTuple):
    """How a program uses shared memory: samples it takes, chunks in the rings of early and late rows."""

    samples: int
    early: int
    late: int


def supports(b: int, A: Tensor, B: Tensor, backward: bool) -> bool:
    """Whether the kernel covers b samples and rows A [M, r_out], B [M, r], forward or backward."""
    device = A.device
    return (
        b >= LEAST_SAMPLES
        and A.is_cuda
        and hopper.supports(A.dtype, device)
        and hopper.fetchable(A)
        and hopper.fetchable(B)
        and layout(b, B.shape[1], A.shape[1], backward, hopper.shared_memory(device)) is not None
    )


def partial_sums(
    gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, count: Tensor | None, line: int, delta: Tensor | None = None
) -> Tensor:
    """Each program's share of the forward, or with ``delta`` of the backward pass.

    Args:
        gbar: unit inputs [b, r], float32, contiguous.
        A: rows [M, r_out], float16 or bfloat16, at multiples of 16 bytes.
        B: rows [M, r], same dtype, likewise.
        amult: multipliers [M], float32, contiguous.
        count: rows in use, int64 of one element on the device; ``None``: all.
        line: columns of a line of the result, at least r_out (forward) or r + 1.
        delta: gradient at the output [b, r_out], float32, contiguous.

    Returns:
        float32 [programs, b, line]: ``Σ F00 amult A``, or ``Σ dγ F11 B`` and in column r ``Σ dγ F02``. Programs beyond the
        number of blocks of ``ROWS`` rows write nothing.

    Raises:
        RuntimeError: the kernel does not compile or launch.
    """
    (b, r), (M, r_out) = gbar.shape, A.shape
    shared, backward = hopper.shared_memory(A.device), delta is not None
    constants = constants_of(b, r, r_out, backward, line, A.dtype, shared)
    samples = dict(constants)["SAMPLES"]
    found = nvrtc.kernel(
        A.device, "batched.cu", "growing_layer", constants, shared, hopper.headers((samples,), A.dtype)
    )
    tiles = blocks_of(b, samples)
    programs = max(1, hopper.properties(A.device).multi_processor_count // tiles)
    partial = gbar.new_empty(programs, b, line)
    early, late = (hopper.tensor_map(rows) for rows in ((A, B) if backward else (B, A)))
    arguments = (gbar, delta, early, late, amult, count, partial, M, b)
    nvrtc.launch(found, (programs, tiles), THREADS, shared, arguments)
    return partial


def constants_of(
    b: int, r: int, r_out: int, backward: bool, line: int, dtype: torch.dtype, shared: int
) -> nvrtc.Constants:
    """What ``batched.cu`` is compiled with."""
    cut = layout(b, r, r_out, backward, shared)
    constants = {"R": r, "OUTPUTS": r_out, "SAMPLES": cut.samples, "EARLY": cut.early, "LATE": cut.late, "LINE": line}
    constants |= {"BACKWARD": int(backward), "SHARED": shared, "BFLOAT16": int(dtype == torch.bfloat16)}
    return tuple(constants.items())


def layout(b: int, r: int, r_out: int, backward: bool, shared: int) -> Layout | None:
    """Shared memory of a program that takes its share of b samples; ``None`` where it is too little."""
    tiles = blocks_of(b, MOST_SAMPLES)
    samples = 16 * blocks_of(b, 16 * tiles)
    inputs = 32 * samples * (blocks_of(r, 16) + backward * blocks_of(r_out, 16))
    coefficients = 2 * ROWS * samples * (1 if backward else 2)
    # Units, barriers, what alignment costs; forward, the place of gradients, of which there are none.
    rest = 1024 + (20 if backward else 36) * samples
    slots = (shared - inputs - coefficients - rest) // (2 * ROWS * WIDTH)
    early_chunks, late_chunks = (blocks_of(columns, WIDTH) for columns in ((r_out, r) if backward else (r, r_out)))
    # Backward, a block of late rows stays until it has been multiplied; forward, all chunks pass.
    late = min(2 * late_chunks, max(late_chunks, slots - early_chunks)) if backward else slots - slots // 2
    early = min(slots - late, 4 * early_chunks)
    return Layout(samples, early, late) if min(early, late) >= 2 and late_chunks <= MOST_CHUNKS else None
