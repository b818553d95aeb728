"""The read-out's output and Jacobian in one pass over its rows: compiles and launches ``jacobian.cu``.

Triton cuts matrices into powers of two; 8 samples times 10 outputs times 400 columns then no longer fit the registers of a
multiprocessor, and the kernel is slower than reading the rows twice. Hence CUDA C++, compiled by NVRTC when first asked for
(half a second), through NVIDIA's own bindings, which come with PyTorch for CUDA.
"""

from __future__ import annotations

import ctypes
import functools
from importlib import resources
from importlib.util import find_spec

import torch
from torch import Tensor

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
        and find_spec("cuda") is not None
        and find_spec("cuda.bindings") is not None
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
    kernel = _kernel(A.device, tuple(constants.items()))
    pointers = [0 if t is None else t.data_ptr() for t in (gbar, A, B, amult, count, partial)]
    arguments = ((*pointers, M, b), (*[ctypes.c_void_p] * len(pointers), ctypes.c_int, ctypes.c_int))
    stream = torch.cuda.current_stream(A.device).cuda_stream
    _call("cuLaunchKernel", kernel, programs, tiles, 1, 32 * WARPS, 1, 1, shared, stream, arguments, 0)
    return partial


def compile_kernel(constants: tuple[tuple[str, int], ...], capability: tuple[int, int]) -> tuple[bytes, str]:
    """The kernel's machine code (cubin) with these constants, and the compiler's log with registers and spills.

    Raises:
        RuntimeError: the compiler's message.
    """
    from cuda.bindings import nvrtc

    def call(name: str, *arguments):
        status, *values = getattr(nvrtc, name)(*arguments)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{name}: {status.name}\n{log() if name == 'nvrtcCompileProgram' else ''}")
        return values[0] if values else None

    def read(what: str) -> bytes:
        text = b" " * call(f"nvrtcGet{what}Size", program)
        call(f"nvrtcGet{what}", program, text)
        return text

    def log() -> str:
        return read("ProgramLog").decode(errors="replace").rstrip("\0\n ")

    source = resources.files("pizoo.ops").joinpath("jacobian.cu").read_bytes()
    program = call("nvrtcCreateProgram", source, b"jacobian.cu", 0, [], [])
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}a", "--std=c++17", "--ptxas-options=-v"]
    options += [f"-D{name}={value}" for name, value in constants]
    call("nvrtcCompileProgram", program, len(options), [option.encode() for option in options])
    return read("CUBIN"), log()


@functools.cache
def _kernel(device: torch.device, constants: tuple[tuple[str, int], ...]):
    """The kernel on the current device, which is ``device``."""
    from cuda.bindings import driver

    code, _ = compile_kernel(constants, torch.cuda.get_device_capability(device))
    kernel = _call("cuModuleGetFunction", _call("cuModuleLoadData", code), b"growing_forward_jacobian")
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _call("cuFuncSetAttribute", kernel, limit, dict(constants)["SHARED"])
    return kernel


def _call(name: str, *arguments):
    """A function of the CUDA driver."""
    from cuda.bindings import driver

    status, *values = getattr(driver, name)(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{name}: {status.name}")
    return values[0] if values else None


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
