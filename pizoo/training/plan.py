"""What a training will need, before it begins: rows, memory, time."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass

import torch

from pizoo.functional import unit
from pizoo.ops import growing_backward, growing_forward
from pizoo.recipes import InfPi, Recipe

HEADROOM = 2**30  # bytes beside rows and data: workspaces, the compiler's and the allocator's own
PROBE_ROWS = {"cuda": 2**18, "cpu": 2**13}
# A step's work that does not depend on the rows, measured: replayed graph on an H200, plain loop on two CPU cores.
STEP_OVERHEAD = {"cuda": 1.5e-4, "cpu": 2e-3}


class NotEnoughMemory(RuntimeError):
    """A training that would not fit; the message says what it needs, what there is, and what would fit."""


@dataclass(frozen=True)
class Plan:
    """What training a recipe on ``samples`` images takes.

    Attributes:
        steps: of the whole training.
        rows: final number of rows of each growing layer (0 for finite nets).
        row_bytes: of all growing layers at the end.
        needed: bytes in all, on the device: rows, data, and headroom for all else.
        available: bytes free on the device now.
        seconds: estimate from a measurement on this device; None for finite nets.
    """

    steps: int
    rows: int
    row_bytes: int
    needed: int
    available: int
    seconds: float | None

    def check(self, entry: str) -> None:
        """Raise NotEnoughMemory unless the training fits."""
        if self.needed > self.available:
            fitting = self.rows * max(0, self.available - (self.needed - self.row_bytes)) // max(1, self.row_bytes)
            raise NotEnoughMemory(
                f"{entry} needs {self.needed / 2**30:.1f} GiB, {self.row_bytes / 2**30:.1f} of them for {self.rows:,} rows a "
                f"layer; {self.available / 2**30:.1f} GiB are free. About {fitting:,} rows would fit: fewer train.epochs, a "
                "data.subset, a smaller model.r or a shorter train.dtype"
            )


def plan(recipe: Recipe, samples: int, device: torch.device, estimate_time: bool = False) -> Plan:
    """Plan the training of ``recipe`` on ``samples`` training images an epoch (:func:`samples_per_epoch` of tasks).

    With ``estimate_time`` it measures for a second.
    """
    settings = recipe.train
    steps_per_epoch = settings.steps_per_epoch or math.ceil(samples / settings.batch_size)
    steps = steps_per_epoch * settings.epochs
    rows, row_bytes, seconds = 0, 0, None
    widths = _layer_widths(recipe)
    if widths:
        itemsize = getattr(torch, settings.dtype).itemsize
        first = recipe.model.r
        rows = first + samples * settings.epochs
        row_bytes = sum(rows * (itemsize * (r_out + recipe.model.r) + max(4, itemsize)) for r_out in widths)
        if estimate_time:
            batch = math.ceil(samples / steps_per_epoch)
            per_row = sum(_seconds_per_row(recipe, r_out, batch, device) for r_out in widths)
            seconds = steps * STEP_OVERHEAD[device.type] + per_row * (first + rows) / 2 * steps
    data = 0 if recipe.tasks else samples * recipe.data.d * (4 + 1)  # all of Omniglot, rotated, is 100 MB
    return Plan(steps, rows, row_bytes, row_bytes + data + HEADROOM, free_memory(device), seconds)


def samples_per_epoch(recipe: Recipe) -> int:
    """Samples whose rows an epoch on tasks appends: of support and query, at first order of queries alone."""
    tasks, settings = recipe.tasks, recipe.train
    images = tasks.queries if tasks.first_order else tasks.shots + tasks.queries
    return settings.steps_per_epoch * settings.batch_size * recipe.data.classes * images


def free_memory(device: torch.device) -> int:
    """Bytes free on a GPU, or in the machine's memory."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except FileNotFoundError:  # not Linux: take the machine's whole memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _layer_widths(recipe: Recipe) -> list[int]:
    """Outputs of each layer that grows; none for finite nets."""
    if not isinstance(recipe.model, InfPi):
        return []
    readout = [recipe.data.classes] if recipe.train.last_layer_lr_mult else []
    return [recipe.model.r] * (recipe.model.hidden_layers - 1) + readout


def _seconds_per_row(recipe: Recipe, r_out: int, b: int, device: torch.device) -> float:
    """Forward and backward of one growing layer, per row, for batches of b samples, measured on random rows."""
    r, dtype = recipe.model.r, getattr(torch, recipe.train.dtype)
    rows = PROBE_ROWS[device.type]
    gbar = unit(torch.randn(b, r, device=device))[0]
    A, B = (torch.randn(rows, n, device=device).to(dtype) for n in (r_out, r))
    B /= r**0.5
    amult, delta = torch.ones(rows, device=device), torch.randn(b, r_out, device=device)

    def run() -> None:
        growing_forward(gbar, A, B, amult)
        growing_backward(gbar, A, B, amult, delta)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    begin = time.perf_counter()
    for _ in range(3):
        run()
    return (time.perf_counter() - begin) / 3 / rows
