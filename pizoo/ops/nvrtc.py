"""CUDA C++ kernels of this folder: compiled by NVRTC when first asked for (about a second), launched by the CUDA driver.

Both through NVIDIA's own bindings, which come with PyTorch for CUDA. As Triton's, kernels have to be called once before a CUDA
graph is captured: compiling and loading cannot be.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from importlib import resources

import torch

Constants = tuple[tuple[str, int], ...]
HEADERS = ("device.cuh", "hopper.cuh", "eight_bit.cuh", "jacobian_8.cuh", "jacobian_16.cuh")


@functools.cache
def available() -> bool:
    """Whether there are the bindings, a compiler that knows compute capability 9.0, and a driver that runs what it makes.

    On Linux alone, by whose name for it the driver is asked for tensor maps.
    """
    if sys.platform != "linux":
        return False
    try:
        from cuda.bindings import driver, nvrtc

        (_, compiler, _), (_, installed) = nvrtc.nvrtcVersion(), driver.cuDriverGetVersion()
        return 12 <= compiler <= installed // 1000
    except Exception:  # no bindings, older ones, or libraries that they do not find, each with errors of its own
        return False


def compile_source(
    name: str, constants: Constants, capability: tuple[int, int], generated: tuple[tuple[str, str], ...] = ()
) -> tuple[bytes, str]:
    """The machine code (cubin) of ``name`` with these constants, and the compiler's log with registers and spills.

    Args:
        name: a ``.cu`` file of this folder.
        constants: names defined, and their values.
        capability: compute capability of the device.
        generated: headers beside those of this folder: name and text.

    Raises:
        RuntimeError: the compiler's message.
    """
    from cuda.bindings import nvrtc

    def invoke(function: str, *arguments):
        status, *values = getattr(nvrtc, function)(*arguments)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{function}: {status.name}\n{log() if function == 'nvrtcCompileProgram' else ''}")
        return values[0] if values else None

    def read(what: str) -> bytes:
        text = bytes(invoke(f"nvrtcGet{what}Size", program))  # written to: of length 1, no bytes that Python shares
        invoke(f"nvrtcGet{what}", program, text)
        return text

    def log() -> str:
        return read("ProgramLog").decode(errors="replace").rstrip("\0\n ")

    headers = {header: _source(header) for header in HEADERS} | {key: text.encode() for key, text in generated}
    names = [header.encode() for header in headers]
    program = invoke("nvrtcCreateProgram", _source(name), name.encode(), len(headers), list(headers.values()), names)
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}a", "--std=c++17", "--ptxas-options=-v"]
    options += [f"-D{key}={value}" for key, value in constants]
    invoke("nvrtcCompileProgram", program, len(options), [option.encode() for option in options])
    return read("CUBIN"), log()


@functools.cache
def kernel(
    device: torch.device,
    name: str,
    function: str,
    constants: Constants,
    shared: int,
    generated: tuple[tuple[str, str], ...] = (),
):
    """``function`` of the file ``name`` on the current device, which is ``device``, with ``shared`` bytes of shared memory."""
    from cuda.bindings import driver

    _bind_context()
    code, _ = compile_source(name, constants, torch.cuda.get_device_capability(device), generated)
    found = _call("cuModuleGetFunction", _call("cuModuleLoadData", code), function.encode())
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _call("cuFuncSetAttribute", found, limit, shared)
    return found


def launch(function, grid: tuple[int, int], threads: int, shared: int, arguments: Sequence[object]) -> None:
    """Launch on torch's current stream.

    Args:
        function: from :func:`kernel`, on the current device.
        grid: programs in x and y.
        threads: of a program.
        shared: bytes of shared memory of a program.
        arguments: tensors (passed as pointers; ``None`` as a null pointer), integers (int32), structures of ctypes.

    Raises:
        ValueError: a tensor that is not on a GPU.
        RuntimeError: the driver's error; torch.OutOfMemoryError where that is it, here and from :func:`kernel`.
    """
    _bind_context()
    values = [_argument(argument) for argument in arguments]
    pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
    stream = torch.cuda.current_stream().cuda_stream
    _call("cuLaunchKernel", function, *grid, 1, threads, 1, 1, shared, stream, ctypes.addressof(pointers), 0)


def _argument(value: object):
    if value is None:
        return ctypes.c_void_p(0)
    if isinstance(value, torch.Tensor):
        if not value.is_cuda:
            raise ValueError(
                f"a tensor {list(value.shape)} is on {value.device}; a kernel reads tensors on its GPU alone"
            )
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int(value) if isinstance(value, int) else value


def _source(name: str) -> bytes:
    return resources.files("pizoo.ops").joinpath(name).read_bytes()


def _bind_context() -> None:
    """Make the current device's context the thread's: one in which nothing was launched yet may have none."""
    if not int(_call("cuCtxGetCurrent")):
        device = _call("cuDeviceGet", torch.cuda.current_device())
        _call("cuCtxSetCurrent", _call("cuDevicePrimaryCtxRetain", device))


def _call(name: str, *arguments):
    """A function of the CUDA driver."""
    from cuda.bindings import driver

    status, *values = getattr(driver, name)(*arguments)
    if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(f"CUDA out of memory in {name}")
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{name}: {status.name}")
    return values[0] if values else None
