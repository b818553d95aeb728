"""What a training will need, before it begins: rows, memory, time; and what would have fit, when memory runs out after all."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pizoo import processes
from pizoo.functional import unit
from pizoo.memory import HEADROOM, NotEnoughMemory, free_memory, to_host
from pizoo.ops import fused, growing_backward, growing_forward, growing_forward_jacobian, streamed
from pizoo.recipes import InfPi, Recipe
from pizoo.rows import check_place, converted, empty_rows, stored_columns
from pizoo.training.report import peak_memory

# Enough on a GPU for its work to take much longer than asking for it; where they stream from the host, for several chunks.
PROBE_ROWS, HOST_ROWS, DRAWN_ROWS = {"cuda": 2**22, "cpu": 2**13}, 2**18, 2**13
ROUNDS = 3  # the best of them counts: clocks rise, others may use the machine
# A step's work that does not depend on the rows, measured: replayed graph on an H200, plain loop on two CPU cores.
STEP_OVERHEAD = {"graph": 1e-4, "plain": 2e-3}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Plan:
    """What training a recipe on ``samples`` images takes.

    Attributes:
        device: where it computes.
        steps: of the whole training.
        rows: final number of rows of the largest growing layer (0 for finite nets).
        row_bytes: of all growing layers at the end; of what one process holds of them where several train together.
        rows_on: where they are kept: "device", or "host", from where they stream to the device.
        needed: bytes in all, on the device: rows unless they are on the host, data, and headroom for all else.
        available: bytes free on the device now.
        host_needed, host_available: the same of the host, when rows are kept there; else 0 and what is free.
        seconds: estimate from a measurement on this device; None for finite nets (:mod:`pizoo.training.trial` measures them).
        on_tasks: whether it trains on tasks, which are drawn: then there is no part of the data to take.
    """

    device: torch.device
    steps: int
    rows: int
    row_bytes: int
    rows_on: str
    needed: int
    available: int
    host_needed: int
    host_available: int
    seconds: float | None
    on_tasks: bool

    def check(self, entry: str) -> None:
        """Raise NotEnoughMemory unless the training fits."""
        if self.rows_on == "device" and self.needed > self.available:
            raise NotEnoughMemory(
                f"{entry} needs {_gib(self.needed)}, {_gib(self.row_bytes)} of them for {self.rows:,} rows a layer; "
                f"{_gib(self.available)} are free{self._on_the_host()}. "
                + self._fewer_rows(self.available - (self.needed - self.row_bytes))
            )
        if self.needed > self.available:
            raise NotEnoughMemory(
                f"{entry} needs {_gib(self.needed)} on {self.device} beside its rows on the host; {_gib(self.available)} are "
                f"free: {self._less_beside}"
            )
        if self.host_needed > self.host_available:
            raise NotEnoughMemory(
                f"{entry} needs {_gib(self.host_needed)} of host memory for {self.rows:,} rows a layer; "
                f"{_gib(self.host_available)} are free. " + self._fewer_rows(self.host_available - HEADROOM)
            )

    def summary(self, entry: str) -> str:
        """What it needs and what there is, in a line."""
        rows = f", {_gib(self.row_bytes)} of rows among them" if self.rows and self.rows_on == "device" else ""
        return f"{entry} needs {_gib(self.needed)} of memory on {self.device}{rows}; {_gib(self.available)} are free"

    def streaming(self, entry: str) -> str:
        """That the rows stream, and what it costs, in a line."""
        each = f", about {1e3 * self.seconds / self.steps:.3g} ms a step" if self.seconds else ""
        return (
            f"{entry}: {_gib(self.host_needed - HEADROOM)} of rows are kept in host memory ({_gib(self.host_available)} free) "
            f"and stream to {self.device}{each}"
        )

    def ran_out(self, entry: str, reported: str) -> str:
        """What to say when memory has run out in spite of the plan, with what was ``reported``: why, and what would fit."""
        on_host = self.rows_on == "host"
        now = free_memory(self.device) + (torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0)
        room, rows_here = (now if self.device.type == "cuda" else self.available), (0 if on_host else self.row_bytes)
        beside = max(self.needed, peak_memory(self.device) + _asked_for(reported)) - rows_here
        if on_host and "CUDA" not in reported:
            remedy = self._fewer_rows(self.host_available - HEADROOM - _asked_for(reported))
        elif on_host or not self.rows:
            remedy = f"What a step needs beside rows did not fit: {self._less_beside}"
        elif room - beside >= self.row_bytes:
            remedy = f"The rows fit, what a step needs beside them did not: {self._less_beside}"
        else:
            remedy = self._fewer_rows(room - beside)
        there = f"{_gib(room)} can be had on {self.device}{self._on_the_host()}"
        return f"{entry} ran out of memory ({reported}); {there}. {remedy}"

    def _fewer_rows(self, room: int) -> str:
        fitting = self.rows * max(0, room) // max(1, self.row_bytes)
        samples = "train.steps_per_epoch" if self.on_tasks else "data.subset"
        return f"About {fitting:,} rows would fit: fewer train.epochs, a smaller {samples} or model.r, or a shorter train.dtype"

    @property
    def _less_beside(self) -> str:
        return "a smaller train.batch_size" + ("" if self.on_tasks else " or data.subset")

    def _on_the_host(self) -> str:
        """What the host has, where keeping rows there is a way out."""
        if self.device.type == "cpu" or not self.rows or self.rows_on == "host":
            return ""
        fit = self.row_bytes + HEADROOM <= self.host_available
        way = "rows fit there (--rows-on host, rows_on='host') and stream" if fit else "too little for the rows as well"
        return f", {_gib(self.host_available)} on the host: {way}"


def plan(
    recipe: Recipe,
    samples: int,
    device: torch.device,
    estimate_time: bool = False,
    rows_on: str = "auto",
    first: Mapping[str, int] | None = None,
    tested: int = 0,
) -> Plan:
    """Plan the training of ``recipe`` on ``samples`` training images an epoch (:func:`samples_per_epoch` of tasks).

    Args:
        estimate_time: measure for a second.
        rows_on: "device", "host", or "auto": on the host if rows fit there and not on the device. On a CPU, and for nets
            without rows, it is all one, and "host" is answered with a warning.
        first: rows that growing layers start with, by name, where not with as many as a fresh net's.
        tested: images that the net is measured on after every epoch.

    Raises:
        ValueError: another ``rows_on``.
    """
    check_place(rows_on, "auto")
    settings = recipe.train
    steps_per_epoch = settings.steps_per_epoch or math.ceil(samples / settings.batch_size)
    steps = steps_per_epoch * settings.epochs
    layers = _layers(recipe, samples * settings.epochs, first or {})
    dtype = getattr(torch, settings.dtype)
    itemsize = dtype.itemsize
    rows = max((last for _, _, last in layers), default=0)
    multipliers = 2 if itemsize == 1 else 1  # int8 rows have bmult beside amult
    mult_bytes = sum(last for _, _, last in layers) * multipliers * max(4, itemsize)
    row_bytes = mult_bytes
    for r_out, _, last in layers:
        row_bytes += last * itemsize * (stored_columns(r_out, dtype) + stored_columns(recipe.model.r, dtype))
    row_bytes, mult_bytes = (math.ceil(part / processes.count()) for part in (row_bytes, mult_bytes))
    # As the net takes them in float32, and to train on also raw; all of Omniglot, rotated, is 100 MB.
    data = 0 if recipe.tasks else recipe.data.d * (samples * (4 + 1) + tested * 4)
    beside = data + HEADROOM
    available, host_available = _free(device), _free(CPU)
    host_needed = row_bytes - mult_bytes + HEADROOM
    on_host = device.type == "cuda" and bool(layers) and rows_on != "device"
    if rows_on == "host" and not on_host:
        why = "its rows are in host memory as it is, on a CPU" if layers else "a net of this kind has no rows"
        warnings.warn(f"{recipe.entry}: rows_on is 'host', which changes nothing: {why}", RuntimeWarning, stacklevel=2)
    if rows_on == "auto":
        on_host = on_host and row_bytes + beside > available and host_needed <= host_available
    seconds = None
    if estimate_time and layers:
        batch = math.ceil(samples / steps_per_epoch)
        of_rows = sum(
            _seconds_per_row(recipe, r_out, batch, device, on_host) * (before + last) / 2 / processes.count()
            for r_out, before, last in layers
        )
        graph = device.type == "cuda" and not on_host
        overhead = STEP_OVERHEAD["graph" if graph else "plain"]
        seconds = steps * (overhead + of_rows)
    buffers = streamed.BUFFERS * streamed.CHUNK_BYTES
    return Plan(
        device=device,
        steps=steps,
        rows=rows,
        row_bytes=row_bytes,
        rows_on="host" if on_host else "device",
        needed=beside + (mult_bytes + buffers if on_host else row_bytes),
        available=available,
        host_needed=host_needed if on_host else 0,
        host_available=host_available,
        seconds=seconds,
        on_tasks=recipe.tasks is not None,
    )


def samples_per_epoch(recipe: Recipe) -> int:
    """Samples whose rows an epoch on tasks appends: of support and query, at first order of queries alone."""
    tasks, settings = recipe.tasks, recipe.train
    images = tasks.queries if tasks.first_order else tasks.shots + tasks.queries
    return settings.steps_per_epoch * settings.batch_size * recipe.data.classes * images


def check_solving(recipe: Recipe, samples: int, device: torch.device) -> None:
    """Raise NotEnoughMemory unless a kernel recipe can be solved on ``samples`` training images: a matrix and its factor."""
    needed = 2 * 8 * samples**2 + 8 * samples * recipe.data.d + HEADROOM
    available = free_memory(device)
    if needed > available:
        fitting = math.isqrt(max(0, available - HEADROOM) // 16)
        raise NotEnoughMemory(
            f"{recipe.entry} needs {needed / 2**30:.1f} GiB, for the float64 kernel between {samples:,} training images and "
            f"its factor; {available / 2**30:.1f} GiB are free on {device}. A GPU may have them, or take a data.subset of less "
            f"than {fitting:,}"
        )


def _free(device: torch.device) -> int:
    """Bytes that are free for every process: all of them plan alike."""
    beside_each_other = processes.on_this_machine() if device.type == "cpu" else 1
    return min(processes.gathered(free_memory(device) // beside_each_other))


def _layers(recipe: Recipe, appended: int, first: Mapping[str, int]) -> list[tuple[int, int, int]]:
    """Outputs, first and last number of rows of each layer with rows that a step reads; none for finite nets."""
    if not isinstance(recipe.model, InfPi):
        return []
    model, train = recipe.model, recipe.train
    frozen = train.freeze or ()
    layers = []
    for i in range(model.hidden_layers - 1):
        before = first.get(f"hidden.{i}", model.r)
        layers.append((model.r, before, before + (0 if "hidden" in frozen else appended)))
    if train.last_layer_lr_mult:
        layers.append((recipe.data.classes, model.r, model.r + (0 if "readout" in frozen else appended)))
    return layers


def _seconds_per_row(recipe: Recipe, r_out: int, b: int, device: torch.device, on_host: bool) -> float:
    """Forward and backward of one growing layer, per row, for batches of b samples, measured on random rows.

    In one pass where the engine takes one (:mod:`pizoo.training.engine`).
    """
    r, dtype = recipe.model.r, getattr(torch, recipe.train.dtype)
    rows = HOST_ROWS if on_host else PROBE_ROWS[device.type]
    rows = max(DRAWN_ROWS, min(rows, free_memory(device) // (4 * dtype.itemsize * (r + r_out))))
    gbar = unit(torch.randn(b, r, device=device))[0]
    A, B = (torch.randn(DRAWN_ROWS, n, device=device) for n in (r_out, r))
    drawn = converted(A, B / r**0.5, torch.ones(DRAWN_ROWS, device=device), dtype)
    A, B, amult, *bmults = (_repeated(part, rows) for part in drawn)
    if on_host:
        A, B = to_host(A, dtype), to_host(B, dtype)
    delta, bmult = torch.randn(b, r_out, device=device), bmults[0] if bmults else None

    one_pass = fused(b, A, B, "growing_forward_jacobian")

    def run() -> None:
        if one_pass:
            growing_forward_jacobian(gbar, A, B, amult, bmult=bmult)
        else:
            growing_forward(gbar, A, B, amult, bmult=bmult)
            growing_backward(gbar, A, B, amult, delta, bmult=bmult)

    def finished() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    run()
    times = [finished()]
    for _ in range(ROUNDS):
        for _ in range(3):
            run()
        times.append(finished())
    return min(end - begin for begin, end in pairwise(times)) / 3 / rows


def _repeated(drawn: Tensor, rows: int) -> Tensor:
    """So many rows, stored as a layer stores them."""
    storage = empty_rows((rows, *drawn.shape[1:]), drawn.dtype, drawn.device)
    for block in storage.split(len(drawn)):
        block.copy_(drawn[: len(block)])
    return storage


def _asked_for(reported: str) -> int:
    """Bytes that torch's message says could not be had; 0 if it does not say."""
    if found := re.search(r"allocate ([\d.]+) (bytes|KiB|MiB|GiB)", reported):
        return int(float(found[1]) * 2 ** {"bytes": 0, "KiB": 10, "MiB": 20, "GiB": 30}[found[2]])
    return 0


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
