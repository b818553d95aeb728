"""How a training tells where it is: a log file, a progress bar, what it ran on."""

from __future__ import annotations

import logging
import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from pizoo.config import CONFIG

log = logging.getLogger("pizoo")


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The commit of the clone this runs from, ``-dirty`` if its code or recipes were changed since.

    Without git, as where sources were copied to, what ``$PIZOO_COMMIT`` says; None: nobody knows.
    """
    clone = Path(__file__).parents[2]
    git = ["git", "-C", str(clone)]
    if (clone / ".git").exists() and shutil.which("git"):
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "pizoo", "recipes"], capture_output=True)
        if head.returncode == 0:
            return head.stdout.strip() + ("-dirty" if changed.returncode else "")
    return os.environ.get("PIZOO_COMMIT")


def peak_memory(device: torch.device) -> int:
    """Bytes: the most the process has held on the GPU, or in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class LapTimer:
    """Wall time in laps: :meth:`lap` gives the seconds since the last one, or since it was made."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def lap(self) -> float:
        before, self.began = self.began, time.perf_counter()
        return self.began - before


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: a line of log that cannot be written is no reason to fill the terminal with tracebacks."""


@contextmanager
def logging_to(folder: Path | None) -> Iterator[None]:
    """Send the package's log to ``train.log`` in a folder while training; of a training that never began nothing is kept."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "train.log"
    new = not file.exists()
    handler = _LogFile(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        log.error("stopped by %s: %s", type(error).__name__, error)
        raise
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        with suppress(OSError):  # a full disk is told by the checkpoint that could not be written
            handler.close()
        if new and not (folder / CONFIG).exists():
            file.unlink(missing_ok=True)


class StepProgress:
    """A progress bar over all steps, or nothing."""

    def __init__(self, show: bool, name: str, epochs: int, steps_per_epoch: int):
        self.bar = None
        if show:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns)
            self.task = self.bar.add_task(name, total=epochs * steps_per_epoch)
        self.name, self.epochs, self.steps_per_epoch = name, epochs, steps_per_epoch
        self.done = None

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, epoch: int, loss: float) -> None:
        if self.bar is None:
            return
        if self.done is None:
            self.done = epoch * self.steps_per_epoch
        self.done += 1
        description = f"{self.name} epoch {epoch + 1}/{self.epochs} loss {loss:.3f}"
        self.bar.update(self.task, completed=self.done, description=description)

    def __enter__(self):
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.stop()
