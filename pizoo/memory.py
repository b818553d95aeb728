"""Memory: on which device, how much is free, host memory that a GPU reads directly, and what to say when there is none left."""

from __future__ import annotations

import errno
import math
import mmap
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

HEADROOM = 2**30  # bytes beside rows and data: workspaces, the compiler's and the allocator's own
PINNED_BYTES = 1 << 28  # of one copy: what is page-locked is kept, and the system cannot have it back
DEVICES = ("cpu", "cuda", "meta")  # meta: shapes without numbers
CGROUPS = (  # limit, use, and what of the use the system takes back when asked: version 2, version 1
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device asked for; None: a GPU if there is one. Where there is none to be had, with a warning, the CPU.

    Raises:
        ValueError: neither the CPU nor a CUDA device.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in DEVICES:
        raise ValueError(f"device is {str(device)!r}; it must be cpu or cuda (cuda:1 for the second GPU)")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        warnings.warn(
            f"device is {str(chosen)!r}, but no GPU is in reach: the CPU computes the same, slower",
            RuntimeWarning,
            stacklevel=3,
        )
        return torch.device("cpu")
    return chosen


class NotEnoughMemory(RuntimeError):
    """What would not fit, or did not; the message says what it needs, what there is, and what would fit."""


def free_memory(device: torch.device) -> int:
    """Bytes free on a GPU; on the host, what the machine has available and the process' control group allows."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except FileNotFoundError:  # not Linux: take the machine's whole memory, on Windows its address space
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else sys.maxsize
    return min(available, *(_free_in_group(*group) for group in CGROUPS))


def _free_in_group(folder: Path, limit: str, used: str, reclaimable: str) -> float:
    """Bytes that a control group (a container) still gives; infinite without a limit."""
    try:
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        free = int((folder / limit).read_text()) - int((folder / used).read_text()) + int(fields[reclaimable])
    except (OSError, ValueError, KeyError):  # no such group, or "max"
        return math.inf
    return max(0, free)


# ---------------------------------------------------------------------------------------------------- page-locked memory


class _HostMemory(mmap.mmap):
    """Memory of exactly the size asked for, page-locked as long as it exists.

    torch's own pinned memory is rounded up to a power of two and kept for later: rows may be half of what a host has.
    """

    address: int | None = None

    def lock(self, address: int) -> None:
        """Have CUDA lock these pages, which begin at ``address``; where it will not, warn and leave them as they are."""
        try:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, len(self), 0))
            self.address = address
        except RuntimeError as error:
            with suppress(RuntimeError):  # the failed call leaves an error behind for the next launch to report
                torch.zeros(1, device="cuda")
            warnings.warn(
                f"CUDA could not page-lock {len(self) / 2**30:.2f} GiB of host memory ({error}): rows stream from ordinary "
                "memory, several times slower",
                RuntimeWarning,
                stacklevel=4,
            )

    def __del__(self):
        if self.address is None or sys.is_finalizing():
            return
        for device in (torch.cuda.current_device(), *_streams):  # copies may still read it
            torch.cuda.synchronize(device)
        torch.cuda.cudart().cudaHostUnregister(self.address)


def empty_on_host(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in host memory: page-locked where there is a GPU, which then copies from it at full speed.

    Raises:
        MemoryError: there is not that much.
    """
    count = math.prod(shape)
    if not count or not torch.cuda.is_available() or not hasattr(mmap, "MAP_PRIVATE"):  # Windows has no such flag
        return torch.empty(shape, dtype=dtype)
    try:
        memory = _HostMemory(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no host memory for {count * dtype.itemsize / 2**30:.2f} GiB: {error}") from None
    tensor = torch.frombuffer(memory, dtype=dtype, count=count).view(*shape)
    memory.lock(tensor.data_ptr())
    return tensor


def to_host(data: Tensor, dtype: torch.dtype) -> Tensor:
    """``data`` as :func:`empty_on_host` makes tensors; itself if it is one already."""
    if data.device.type == "cpu" and data.dtype == dtype and (data.is_pinned() or not torch.cuda.is_available()):
        return data
    return empty_on_host(data.shape, dtype).copy_(data)


def copied_to_host(data: Tensor) -> Tensor:
    """A copy in host memory. Of data on a GPU in page-locked memory, several times as fast; torch keeps it for the next one."""
    if not data.is_cuda or data.nbytes > PINNED_BYTES:
        return data.detach().to("cpu", copy=True)
    return torch.empty(data.shape, dtype=data.dtype, pin_memory=True).copy_(data.detach())


_streams: dict[torch.device, torch.cuda.Stream] = {}


def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of copies from the host to ``device``: one for all, copies share the bus."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


# ---------------------------------------------------------------------------------------------------- out of memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out: Python's, the system's, torch's for GPUs or for CPUs."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError) and not isinstance(error, NotEnoughMemory):
        return isinstance(error, torch.OutOfMemoryError) or any(
            sign in str(error) for sign in ("can't allocate memory", "CUDA error: out of memory")
        )
    return isinstance(error, MemoryError)


@contextmanager
def explained(explain: Callable[[str], str]) -> Iterator[None]:
    """Within this context memory that runs out is NotEnoughMemory, with ``explain(what was reported)`` for a message."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # The rest of torch's message is about its allocator.
        reported = ". ".join(str(error).split(". ")[:2]).splitlines() or ["no memory left"]
        raise NotEnoughMemory(explain(reported[0])) from error
