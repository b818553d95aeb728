"""Forward and backward on rows of 8 bits for few samples: compiles and launches ``eight_bit.cu``.

The rows' integers are multiplied as such with inputs in fixed point of 16 bits; Triton makes halves of them first, in shared
memory, which takes longer than reading them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pizoo.ops import hopper, nvrtc
from pizoo.ops.hopper import blocks_of

ROWS = 8 * 16  # that the warps of a program take at once
THREADS = 8 * 32
MOST_SAMPLES = 32  # in tiles of 8, as Triton's kernel has them; for more than these that has larger ones
MOST_SUMS = 128  # of a thread: what fits its registers


def supports(b: int, A: Tensor, B: Tensor, backward: bool) -> bool:
    """Whether the kernel covers b samples and rows A [M, r_out], B [M, r], forward or backward."""
    (_, r_out), (_, r), device = A.shape, B.shape, A.device
    return (
        0 < b <= MOST_SAMPLES
        and A.dtype == torch.int8
        and A.is_cuda
        and hopper.present(device)
        and all(_fetchable(rows) for rows in (A, B))
        and 8 * blocks_of(r if backward else r_out, 32) <= MOST_SUMS
        and _stages(b, r, r_out, A.stride(0), B.stride(0), backward, hopper.shared_memory(device)) >= 2
    )


def partial_sums(
    gbar: Tensor,
    A: Tensor,
    B: Tensor,
    amult: Tensor,
    bmult: Tensor,
    count: Tensor | None,
    line: int,
    delta: Tensor | None = None,
) -> Tensor:
    """Each program's share of the forward, or with ``delta`` of the backward pass.

    Args:
        gbar: unit inputs [b, r], float32, contiguous.
        A: rows [M, r_out], int8, at multiples of 4 bytes.
        B: rows [M, r], likewise.
        amult, bmult: multipliers [M], float32, contiguous.
        count: rows in use, int64 of one element on the device; ``None``: all.
        line: columns of a line of the result, at least r_out (forward) or r + 1.
        delta: gradient at the output [b, r_out], float32, contiguous.

    Returns:
        float32 [programs, b, line], as :func:`pizoo.ops.batched.partial_sums`. Programs beyond the number of blocks of ``ROWS``
        rows write nothing.

    Raises:
        RuntimeError: the kernel does not compile or launch.
    """
    (b, r), (M, r_out) = gbar.shape, A.shape
    device = A.device
    shared = hopper.shared_memory(device)
    constants = constants_of(b, r, r_out, A.stride(0), B.stride(0), delta is not None, line, shared)
    found = nvrtc.kernel(device, "eight_bit.cu", "growing_layer", constants, shared)
    tiles = blocks_of(b, dict(constants)["SAMPLES"])
    programs = max(1, hopper.properties(device).multi_processor_count // tiles)
    partial = gbar.new_empty(programs, b, line)
    arguments = (gbar, delta, A, B, amult, bmult, count, partial, M, b)
    nvrtc.launch(found, (programs, tiles), THREADS, shared, arguments)
    return partial


def constants_of(
    b: int, r: int, r_out: int, stride_A: int, stride_B: int, backward: bool, line: int, shared: int
) -> nvrtc.Constants:
    """What ``eight_bit.cu`` is compiled with."""
    constants = {"R": r, "OUTPUTS": r_out, "STRIDE_A": stride_A, "STRIDE_B": stride_B}
    constants |= {"SAMPLES": _samples(b, r if backward else r_out)}
    stages = _stages(b, r, r_out, stride_A, stride_B, backward, shared)
    constants |= {"BACKWARD": int(backward), "STAGES": stages, "LINE": line, "SHARED": shared, "BFLOAT16": 0}
    return tuple(constants.items())


def _samples(b: int, columns: int) -> int:
    """Of a program that adds up so many columns."""
    return 16 if b > 8 and 16 * blocks_of(columns, 32) <= MOST_SUMS else 8


def _stages(b: int, r: int, r_out: int, stride_A: int, stride_B: int, backward: bool, shared: int) -> int:
    """How many blocks of 16 rows each of 8 warps has room for; ``eight_bit.cu`` checks the sum. Too few for the sums: 0."""
    samples = _samples(b, r if backward else r_out)
    inputs = 64 * samples * (blocks_of(r, 32) + (blocks_of(r_out, 32) if backward else 1))
    stage = 16 * (stride_A + stride_B) + 64
    stages = min(4, (shared - inputs - 64 * samples - 1024) // (8 * stage))
    sums = 4 * samples * (r if backward else r_out)
    return stages if stages * stage >= sums else 0


def _fetchable(rows: Tensor) -> bool:
    """Whether rows lie in words of four entries, the first where the copy engine can begin, with little in between."""
    stride = rows.stride(0)
    close = rows.shape[1] <= stride <= 1.25 * rows.shape[1]
    return rows.stride(1) == 1 and stride % 4 == 0 and close and rows.data_ptr() % 16 == 0
