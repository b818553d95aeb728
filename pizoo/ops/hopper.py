"""What the kernels for compute capability 9.0 share: which devices and rows they take, tensor maps, the matrix products.

``hopper.cuh`` is the other half.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from pizoo.ops import nvrtc

CAPABILITY = (9, 0)  # these matrix products exist on no other
ROWS, WIDTH = 64, 64  # of a chunk of rows


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels with Hopper's own matrix products run on rows of ``dtype`` on a CUDA device."""
    return dtype in (torch.float16, torch.bfloat16) and present(device)


def present(device: torch.device) -> bool:
    """Whether a CUDA device runs these kernels, and what compiles them is there."""
    return torch.cuda.get_device_capability(device) == CAPABILITY and nvrtc.available()


def fetchable(rows: Tensor) -> bool:
    """Whether the copy engine can fetch rows [M, columns]: they start at multiples of 16 bytes."""
    return rows.stride(1) == 1 and rows.stride(0) * rows.element_size() % 16 == 0 and rows.data_ptr() % 16 == 0


def tensor_map(rows: Tensor) -> ctypes.Array:
    """How the copy engine finds chunks of rows [M, columns]; what lies outside them is zero.

    Through ctypes: the driver wants maps at multiples of 128 bytes, where the bindings do not put them.

    Raises:
        RuntimeError: rows that are not :func:`fetchable`.
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


@functools.cache
def headers(columns: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[str, str], ...]:
    """``wgmma.cuh``: the matrix products of a warpgroup, for each of these numbers of ``columns``."""
    return (("wgmma.cuh", "".join(_product(n, "bf16" if dtype == torch.bfloat16 else "f16") for n in columns)),)


def _product(columns: int, kind: str) -> str:
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    return f"""template <int TRANSPOSED>
__device__ __forceinline__ void multiply(float (&sums)[{count}], unsigned long long a, unsigned long long b, int more) {{
    asm volatile("{{\\n.reg .pred more;\\nsetp.ne.b32 more, %{count + 2}, 0;\\n"
                 "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} "
                 "{{{registers}}}, %{count}, %{count + 1}, more, 1, 1, %{count + 3}, %{count + 3};\\n}}"
                 : {operands}
                 : "l"(a), "l"(b), "r"(more), "n"(TRANSPOSED));
}}
__device__ __forceinline__ void multiply_registers(float (&sums)[{count}], const unsigned (&a)[4], unsigned long long b) {{
    asm volatile("wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} "
                 "{{{registers}}}, {{%{count}, %{count + 1}, %{count + 2}, %{count + 3}}}, %{count + 4}, 1, 1, 1, 1;"
                 : {operands}
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}
"""


def blocks_of(n: int, size: int) -> int:
    """How many blocks of ``size`` hold n."""
    return -(-n // size)


properties = functools.cache(torch.cuda.get_device_properties)


def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    return properties(device).shared_memory_per_block_optin
