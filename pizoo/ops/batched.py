"""Forward and backward for batches larger than a Triton tile can sum in registers: compiles and launches ``batched.cu``.

Few-shot training sends 80 samples (8 tasks of 10 images) through a layer. Triton cuts them into powers of two and spills what
registers cannot hold. This kernel keeps all sums in registers, uses Hopper's own matrix products and copies, and takes up to
80 samples in one pass over the rows.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from pizoo.ops import nvrtc

ROWS, WIDTH = 64, 64  # of a chunk of rows
MOST_SAMPLES, MOST_TILES = 80, 7  # of a program: that many sums fit its registers
LEAST_SAMPLES = 17  # fewer fit two of Triton's tiles
THREADS = 4 * 128
CAPABILITY = (9, 0)  # its matrix products exist on no other


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
        and A.dtype in (torch.float16, torch.bfloat16)
        and all(rows.stride(1) == 1 and rows.stride(0) % 8 == 0 and rows.data_ptr() % 16 == 0 for rows in (A, B))
        and A.is_cuda
        and torch.cuda.get_device_capability(device) == CAPABILITY
        and nvrtc.available()
        and layout(b, B.shape[1], A.shape[1], backward, _properties(device).shared_memory_per_block_optin) is not None
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
    properties, backward = _properties(A.device), delta is not None
    shared = properties.shared_memory_per_block_optin
    constants = constants_of(b, r, r_out, backward, line, A.dtype, shared)
    samples = dict(constants)["SAMPLES"]
    found = nvrtc.kernel(A.device, "batched.cu", "growing_layer", constants, shared, headers(samples, A.dtype))
    tiles = -(-b // samples)
    programs = max(1, properties.multi_processor_count // tiles)
    partial = gbar.new_empty(programs, b, line)
    early, late = (_tensor_map(rows) for rows in ((A, B) if backward else (B, A)))
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
    tiles = _blocks_of(b, MOST_SAMPLES)
    samples = 16 * _blocks_of(b, 16 * tiles)
    inputs = 32 * samples * (_blocks_of(r, 16) + backward * _blocks_of(r_out, 16))
    coefficients = 2 * ROWS * samples * (1 if backward else 2)
    rest = 1024 + 20 * samples  # units, barriers, what alignment costs
    slots = (shared - inputs - coefficients - rest) // (2 * ROWS * WIDTH)
    early_chunks, late_chunks = (_blocks_of(columns, WIDTH) for columns in ((r_out, r) if backward else (r, r_out)))
    # Backward, a block of late rows stays until it has been multiplied; forward, all chunks pass.
    late = min(2 * late_chunks, max(late_chunks, slots - early_chunks)) if backward else slots - slots // 2
    early = min(slots - late, 4 * early_chunks)
    return Layout(samples, early, late) if min(early, late) >= 2 and late_chunks <= MOST_TILES else None


def headers(samples: int, dtype: torch.dtype) -> tuple[tuple[str, str], ...]:
    """``wgmma.cuh``: the matrix product of a warpgroup, for this many samples."""
    count, kind = samples // 2, "bf16" if dtype == torch.bfloat16 else "f16"
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    text = f"""// sums [64, {samples}] = a [64, 16] b [16, {samples}], or += with more.
// TRANSPOSED: 1 where the rows of chunks are summed over, 0 where their columns are.
template <int TRANSPOSED>
__device__ __forceinline__ void multiply(float (&sums)[{count}], unsigned long long a, unsigned long long b, int more) {{
    asm volatile("{{\\n.reg .pred more;\\nsetp.ne.b32 more, %{count + 2}, 0;\\n"
                 "wgmma.mma_async.sync.aligned.m64n{samples}k16.f32.{kind}.{kind} "
                 "{{{registers}}}, %{count}, %{count + 1}, more, 1, 1, %{count + 3}, %{count + 3};\\n}}"
                 : {operands}
                 : "l"(a), "l"(b), "r"(more), "n"(TRANSPOSED));
}}
"""
    return (("wgmma.cuh", text),)


def _tensor_map(rows: Tensor) -> ctypes.Array:
    """How the copy engine finds chunks of rows [M, columns]; what lies outside them is zero.

    Through ctypes: the driver wants maps at multiples of 128 bytes, where the bindings do not put them.
    """
    from cuda.bindings import driver

    kind = "BFLOAT16" if rows.dtype == torch.bfloat16 else "FLOAT16"
    kind = getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{kind}")
    swizzle = driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B
    promotion = driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B
    memory = (ctypes.c_byte * 256)()
    found = (ctypes.c_byte * 128).from_buffer(memory, -ctypes.addressof(memory) % 128)
    M, columns = rows.shape
    status = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled(
        ctypes.byref(found),
        ctypes.c_int(int(kind)),
        ctypes.c_uint32(2),
        ctypes.c_void_p(rows.data_ptr()),
        (ctypes.c_uint64 * 2)(columns, M),
        (ctypes.c_uint64 * 1)(rows.stride(0) * rows.element_size()),
        (ctypes.c_uint32 * 2)(WIDTH, ROWS),
        (ctypes.c_uint32 * 2)(1, 1),
        ctypes.c_int(0),  # no interleaving
        ctypes.c_int(int(swizzle)),
        ctypes.c_int(int(promotion)),
        ctypes.c_int(0),  # zeros outside
    )
    if status:
        raise RuntimeError(f"cuTensorMapEncodeTiled: error {status}")
    return found


def _blocks_of(n: int, size: int) -> int:
    return -(-n // size)


_properties = functools.cache(torch.cuda.get_device_properties)
