"""Processes that work on one net together, one a device, as ``torchrun`` starts them; alone, everything here does nothing.

What is computed at every step is exchanged over NCCL between GPUs and over gloo between CPUs, in collectives that a CUDA graph
can capture. What the host decides or writes (records, digests, amounts of memory) goes over gloo, in groups of their own: a
thread that writes a checkpoint does not get in the way of the steps.

A process that ends closes its connections, which the others see at once over gloo. Over NCCL, in a CUDA graph above all, they
would wait, as they would for one that has stopped: :func:`watched` has the processes look after each other.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=10)  # compilers and disks do not take as long in every process; for the lost there is BEAT
WRITING_TIMEOUT = timedelta(minutes=30)
BEAT, MISSED_AFTER = 2.0, 50.0  # seconds between signs of life, and without one until a process counts as lost
LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")


class ProcessLost(RuntimeError):
    """Another process of the run has ended or does not answer."""


class _Groups(NamedTuple):
    """How processes talk beside the steps: main threads to each other, and the threads that write checkpoints."""

    host: dist.ProcessGroup
    writing: dist.ProcessGroup
    store: dist.Store | None


_groups: _Groups | None = None


# ---------------------------------------------------------------------------------------------------- who is there


def started() -> int:
    """How many processes ``torchrun`` has started, this one included; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ) else 1


def join(device: torch.device) -> torch.device:
    """Join the processes that ``torchrun`` started beside this one, and return the device of this one.

    Args:
        device: what kind of device to work on: on GPUs, process k of a machine takes its k-th. Alone it is returned as it is.

    Raises:
        RuntimeError: no NCCL in this build of torch.
        ValueError: more processes than GPUs on this machine.
        ProcessLost: the others do not come.
    """
    global _groups
    if started() == 1:
        return device
    if device.type == "cuda":
        device = _own_gpu()
    if _groups is None:
        store = None
        with explained():
            if not dist.is_initialized():
                store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
                backend = "nccl" if device.type == "cuda" else "gloo"
                own = dist.PrefixStore("pizoo", store)
                dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=TIMEOUT)
            host, writing = (dist.new_group(backend="gloo", timeout=t) for t in (TIMEOUT, WRITING_TIMEOUT))
        _groups = _Groups(host, writing, store)
    return device


def _own_gpu() -> torch.device:
    local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if not dist.is_nccl_available():
        raise RuntimeError("this build of torch has no NCCL, over which GPUs talk; train on one, or with --device cpu")
    if local >= there:
        raise ValueError(
            f"process {local} of this machine has no GPU: there are {there}; start torchrun with --nproc-per-node {there}"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def leave() -> None:
    """Close the connections; for a process that is done."""
    global _groups
    if _groups is not None:
        _groups = None
        gc.collect()  # graphs with collectives in them go first: NCCL would wait for these
        dist.destroy_process_group()


def count() -> int:
    """How many processes have joined; 1 alone."""
    return 1 if _groups is None else dist.get_world_size()


def index() -> int:
    """Which of them this is: 0 logs, prints and writes what there is one of."""
    return 0 if _groups is None else dist.get_rank()


def on_this_machine() -> int:
    """How many of them share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count())) if count() > 1 else 1


# ---------------------------------------------------------------------------------------------------- on devices


def summed(*parts: Tensor) -> tuple[Tensor, ...]:
    """The sums over all processes of tensors that each of them has computed, of one dtype; one collective, the same bits in
    every process. May be captured in a CUDA graph."""
    if count() == 1:
        return parts
    joined = parts[0].contiguous() if len(parts) == 1 else torch.cat([part.flatten() for part in parts])
    dist.all_reduce(joined)
    if len(parts) == 1:
        return (joined,)
    pieces = joined.split([part.numel() for part in parts])
    return tuple(piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True))


def interleaved(part: Tensor, total: int) -> Tensor:
    """The whole [total] of which process k holds ``part``, every number from the k-th on whose place is k modulo the count."""
    if count() == 1:
        return part
    padded = part.new_zeros(-(-total // count()))
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(count())]
    dist.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten()[:total]


def equalise(tensors: Iterable[Tensor]) -> None:
    """Give tensors the values they have in process 0: those computed alike everywhere may differ by rounding."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


# ---------------------------------------------------------------------------------------------------- on hosts


def gathered(value: Any, writing: bool = False) -> list[Any]:
    """What every process gives, in their order. ``writing``: between the threads that write checkpoints."""
    if _groups is None:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value, group=_groups.writing if writing else _groups.host)
    return values


def of_first(value: Any) -> Any:
    """What process 0 gives."""
    if _groups is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0, group=_groups.host)
    return values[0]


def split(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` [n, ...] of x [n, ...], of which every process computes a part and has all."""
    if count() == 1 or len(x) < count():
        return function(x)
    found = function(x.tensor_split(count())[index()])
    return torch.cat([part.to(found.device) for part in gathered(found.cpu())])


def compare(fingerprints: Mapping[str, str]) -> None:
    """Raise ValueError, in every process, unless all of them have the same fingerprints.

    Args:
        fingerprints: of what must be alike, by name: code, recipe, data.
    """
    everyones = gathered(dict(fingerprints))
    for name, wanted in everyones[0].items():
        if others := [k for k, one in enumerate(everyones) if one.get(name) != wanted]:
            raise ValueError(
                f"the processes do not work on the same thing: {name} of process {', '.join(map(str, others))} is not that "
                f"of process 0 ({everyones[others[0]].get(name)!s:.16} there, {wanted!s:.16} here)"
            )


# ---------------------------------------------------------------------------------------------------- a process is lost


@contextmanager
def explained(remedy: str = "start all of them again") -> Iterator[None]:
    """Within this context a collective that fails is ProcessLost, with what to do."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ProcessLost) or not is_lost(error):
            raise
        told = str(error).splitlines()[0].split(". ")[0]  # the rest is advice to look at the others' logs
        raise ProcessLost(f"{_missed('another process')} ({told}): {remedy}") from error


def is_lost(error: RuntimeError) -> bool:
    """Whether an error says that another process is gone."""
    distributed = started() > 1 and isinstance(error, dist.DistError)
    return distributed or (count() > 1 and any(sign in str(error) for sign in LOST))


@contextmanager
def watched(remedy: str) -> Iterator[None]:
    """Within this context, which all processes enter and leave, each ends itself when another is missed.

    Collectives in a CUDA graph wait for ever for a process that is gone, and nothing in Python can interrupt them.
    """
    if _groups is None or _groups.store is None or not hasattr(_groups.store, "clone"):
        yield
        return
    stop, store = threading.Event(), _groups.store.clone()  # of its own: a store answers one thread at a time
    entered = gathered(time.time_ns())[0]  # all of them are here: nobody is missed who has yet to come
    thread = threading.Thread(target=_watch, args=(stop, store, f"alive/{entered}", remedy), daemon=True)
    thread.start()
    try:
        yield
        gathered(None)  # nobody is missed who is only done before the others
    finally:
        stop.set()
        thread.join()


def _watch(stop: threading.Event, store: dist.Store, key: str, remedy: str) -> None:
    own, others = index(), [k for k in range(count()) if k != index()]
    seen = dict.fromkeys(others, (b"", time.monotonic()))
    beats = 0
    try:
        while not stop.wait(BEAT):
            beats += 1
            store.set(f"{key}/{own}", str(beats))
            now = time.monotonic()
            for k in others:
                found = store.get(f"{key}/{k}") if store.check([f"{key}/{k}"]) else b""
                if found != seen[k][0]:
                    seen[k] = (found, now)
                elif now - seen[k][1] > MISSED_AFTER:
                    _end(f"{_missed(f'process {k}')}: {remedy}")
    except RuntimeError as error:  # the store is gone, and with it the process or the agent that kept it
        if not stop.is_set():
            _end(f"{_missed('the process that kept count of the others')} ({str(error).splitlines()[0]}): {remedy}")


def _missed(who: str) -> str:
    return f"{who} of this run has ended or does not answer"


def _end(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)
