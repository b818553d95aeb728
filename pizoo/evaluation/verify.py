"""Is this checkpoint what it claims, and does our training reproduce the paper? Two questions, kept apart."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pizoo import checkpoint, zoo
from pizoo.checkpoint import CheckpointError
from pizoo.data import DataNotFoundError
from pizoo.evaluation.accuracy import accuracy, choose_device, predict
from pizoo.evaluation.entries import attach_training_images
from pizoo.evaluation.fewshot import adapter, remeasure
from pizoo.models import KernelRegressor

# Logits of the probe may differ between devices and libraries by rounding, float16 rows included.
PROBE_TOLERANCE = 2e-3


class _NotRun(Exception):
    """What a check needs is not there."""


Status = Literal["verified", "mismatch", "not run"]
Reproduction = Literal["reproduced", "above", "below", "no published number", "no recorded number"]


@dataclass(frozen=True)
class VerifyReport:
    """What re-measuring an entry gave.

    Attributes:
        entry: its name.
        status: is the checkpoint what it claims? ``measured`` against ``recorded``.
        reason: why not, or why it was not run; empty when verified.
        check: "test accuracy", "probe", or how many tasks of which split.
        recorded, measured: accuracy in percent; for the probe 0 and the relative error of its logits.
        reproduction: does our training reproduce the paper? ``mean`` against ``published``.
        mean, standard_error, seeds: recorded accuracy over seeds.
        published: the paper's accuracy in percent, if it gives one.
        seconds: how long it took.
        half_width: of the 95 % confidence interval of ``measured``, in points, where tasks are drawn.
    """

    entry: str
    status: Status
    reason: str
    check: str
    recorded: float | None
    measured: float | None
    reproduction: Reproduction
    mean: float | None
    standard_error: float | None
    seeds: int
    published: float | None
    seconds: float
    half_width: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    entry: str,
    data_dir: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    quick: bool = False,
) -> VerifyReport:
    """Re-measure an entry's checkpoint and compare with what it recorded.

    Args:
        entry: a name of the zoo, or the path of a checkpoint with a ``results.json``.
        data_dir: where data sets are (:func:`pizoo.data.data_directory`).
        device: None: a GPU if there is one.
        quick: compare the logits of the stored probe instead of the test accuracy; needs no data set. Kernel regressors
            whose training images do not ship predict from those images alone: not run.

    Returns:
        the report. A missing data set, missing weights or a damaged file are reported, not raised.

    Raises:
        UnknownEntryError: no such entry.
    """
    begin = time.perf_counter()
    folder = zoo.folder_of(entry)
    device = choose_device(device)
    status, reason, recorded, measured, interval = "not run", "", None, None, []
    results: dict[str, Any] = {}
    config: dict[str, Any] = {}
    try:
        config = checkpoint.read_config(folder)
        if not (folder / checkpoint.RESULTS).exists():
            raise zoo.WeightsNotFoundError(f"{folder} records no results yet")
        results = checkpoint.read_json(folder / checkpoint.RESULTS)
        model = zoo.load(entry, device=device)
        check = _probe if quick else _task_accuracy if config["recipe"].get("tasks") else _test_accuracy
        status, reason, recorded, measured, *interval = check(folder, model, config, results, data_dir)
    except (_NotRun, DataNotFoundError, zoo.WeightsNotFoundError) as error:
        reason = str(error)
    except (CheckpointError, ValueError) as error:  # ValueError: other training images, logits that are not finite
        status, reason = "mismatch", str(error)
    published = (config.get("recipe", {}).get("published") or {}).get("accuracy")
    mean = results.get("mean_accuracy", results.get("accuracy"))
    tolerance = config.get("recipe", {}).get("tolerance", {}).get("reproduce", 1.0)
    return VerifyReport(
        entry=str(entry),
        status=status,
        reason=reason,
        check="probe" if quick else _checked(results),
        recorded=recorded,
        measured=measured,
        reproduction=_reproduction(mean, published, tolerance),
        mean=mean,
        standard_error=results.get("standard_error"),
        seeds=len(results.get("seeds", [])) or int("accuracy" in results),
        published=published,
        seconds=time.perf_counter() - begin,
        half_width=next(iter(interval), None),
    )


def _checked(results: dict[str, Any]) -> str:
    """What the recorded number is of, without ``quick``."""
    tasks = results.get("verification")
    return f"{tasks['tasks']:,} tasks of {results['split']}" if tasks else "test accuracy"


def _test_accuracy(folder: Path, model, config, results, data_dir) -> tuple[Status, str, float, float]:
    try:
        dataset, normalize = zoo.dataset(config, data_dir), zoo.preprocessing(config)
    except ValueError as error:
        raise _NotRun(str(error)) from error
    recorded, tolerance = results.get("accuracy"), config["recipe"]["tolerance"]["verify"]
    if recorded is None or dataset.test_x is None:
        raise _NotRun(f"{folder} records no accuracy, or data set {dataset.name!r} has no test part to measure it on")
    attach_training_images(model, dataset.train_x, normalize)
    measured = accuracy(predict(model, dataset.test_x, normalize), dataset.test_y)
    return *_compare(measured, recorded, tolerance), recorded, measured


def _task_accuracy(folder: Path, model, config, results, data_dir) -> tuple[Status, str, float, float, float | None]:
    if "verification" not in results:
        raise _NotRun(f"{folder} records no accuracy on tasks")
    recorded, found = remeasure(model, config, results, data_dir)
    status, reason = _compare(found.accuracy, recorded, config["recipe"]["tolerance"]["verify"])
    return status, reason, recorded, found.accuracy, found.half_width


def _compare(measured: float, recorded: float, tolerance: float) -> tuple[Status, str]:
    if abs(measured - recorded) <= tolerance:
        return "verified", ""
    reason = f"measured {measured:.2f} %, recorded {recorded:.2f} %: further apart than {tolerance} points"
    return "mismatch", reason


def _probe(folder: Path, model, config, results, data_dir) -> tuple[Status, str, float, float | None]:
    if isinstance(model, KernelRegressor) and model.train_x is None:
        raise _NotRun(
            f"a kernel regressor predicts from its training images, {len(model.dual)} of {config['recipe']['data']['name']}: "
            "verify it without --quick"
        )
    if checkpoint.PROBE not in config["pizoo"]["files"]:
        raise _NotRun(f"{folder} has no probe, only shipped nets do: verify it without --quick")
    probe = checkpoint.read_tensors(folder / checkpoint.PROBE, config["pizoo"]["files"][checkpoint.PROBE])
    with torch.no_grad():
        if "support_x" in probe:
            predictor = adapter(model, config["recipe"]["tasks"])(probe["support_x"], probe["support_y"])
            logits = predictor(probe["x"]).cpu().double()
        else:
            anchor = next(iter((*model.parameters(), *model.buffers())))
            logits = model(probe["x"].to(anchor.device, anchor.dtype)).cpu().double()
    stored = probe["logits"].double()
    error = ((logits - stored).norm() / stored.norm()).item()
    if error <= PROBE_TOLERANCE:
        return "verified", "", 0.0, error
    return "mismatch", f"the probe's logits are off by {error:.2g}, more than {PROBE_TOLERANCE}", 0.0, error


def _reproduction(mean: float | None, published: float | None, tolerance: float) -> Reproduction:
    if published is None:
        return "no published number"
    if mean is None:
        return "no recorded number"
    if abs(mean - published) <= tolerance:
        return "reproduced"
    return "above" if mean > published else "below"
