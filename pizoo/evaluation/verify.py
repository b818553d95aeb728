"""Is this checkpoint what it claims, and does our training reproduce the paper? Two questions, kept apart."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pizoo import checkpoint, zoo
from pizoo.config import CONFIG, read_config
from pizoo.data import DataNotFoundError, load_tasks
from pizoo.evaluation.accuracy import correct, percent, predict, within
from pizoo.evaluation.entries import attach_training_images
from pizoo.evaluation.fewshot import TaskAccuracy, adapter, split_correct
from pizoo.evaluation.reproduction import Reproduction, recorded_mean, reproduction
from pizoo.evaluation.transfer import measure_transfer, measures_all
from pizoo.files import CheckpointError, read_json, read_tensors
from pizoo.memory import choose_device

# Logits of the probe may differ between devices and libraries by rounding, float16 rows included.
PROBE_TOLERANCE = 2e-3

NUMBER = (int, float)
CONFIG_TYPES = {
    "recipe": {
        "published": {"accuracy": NUMBER},
        "tolerance": {"verify": NUMBER, "reproduce": NUMBER},
        "tasks": {},
        "data": {},
    }
}
RESULTS_TYPES = {
    "accuracy": NUMBER,
    "mean_accuracy": NUMBER,
    "standard_error": NUMBER,
    "seeds": [{"seed": int, "accuracy": NUMBER}],
    "verification": {"tasks": int, "accuracy": NUMBER},
    "split": str,
    "correct_sha256": str,
}


class _NotRun(Exception):
    """What a check needs is not there."""


Status = Literal["verified", "mismatch", "not run"]


@dataclass(frozen=True)
class VerifyReport:
    """What re-measuring an entry gave.

    Attributes:
        entry: its name.
        status: is the checkpoint what it claims? ``measured`` against ``recorded``.
        reason: why not, or why it was not run; empty when verified.
        check: "test accuracy", "first N test images" (", all there are" where more were asked for), "probe", or how many tasks
            of which split.
        recorded, measured: accuracy in percent; for the probe 0 and the relative error of its logits.
        differing: how many of these test images (queries of tasks) were right when recorded and wrong now, or the reverse;
            None: not recorded.
        half_width: of the 95 % interval of ``measured`` over tasks, in points; None: not measured on tasks.
        part: whether ``recorded`` and ``measured`` are on a part of the images that ``mean`` and ``published`` are on.
        reproduction: does our training reproduce the paper? ``mean`` against ``published``.
        mean, standard_error, seeds: recorded accuracy over seeds.
        published: the paper's accuracy in percent, if it gives one.
        seconds: how long it took.
    """

    entry: str
    status: Status
    reason: str
    check: str
    recorded: float | None
    measured: float | None
    differing: int | None
    half_width: float | None
    part: bool
    reproduction: Reproduction
    mean: float | None
    standard_error: float | None
    seeds: int
    published: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Outcome(NamedTuple):
    """What a check found."""

    status: Status
    reason: str
    recorded: float | None = None
    measured: float | None = None
    differing: int | None = None
    half_width: float | None = None
    part: bool = False


class _Found(NamedTuple):
    """What there is to verify: a checkpoint's folder and net, and what is recorded of it, of single test images too."""

    folder: Path
    model: nn.Module
    config: dict[str, Any]
    results: dict[str, Any]
    correct: dict[str, Tensor]


def verify(
    entry: str,
    data_dir: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    quick: bool = False,
    images: int | None = None,
) -> VerifyReport:
    """Re-measure an entry's checkpoint and compare with what it recorded.

    Args:
        entry: a name of the zoo, the path of a checkpoint with a ``results.json``, or where one is on the Hub.
        data_dir: where data sets are (:func:`pizoo.data.data_directory`).
        device: None: a GPU if there is one.
        quick: compare the logits of the stored probe instead of the test accuracy; needs no data set. A kernel
            regressor's probe checks what a few training images contribute to them.
        images: measure on this many first test images, and compare with what was recorded of the same ones: a smaller
            check where all of them take long, as for kernel regressors. None: all. What learns tasks has no test images: of
            these tasks the first :data:`pizoo.evaluation.fewshot.VERIFIED_TASKS` are measured. Transfer is measured on all
            images on a GPU with room for their kernel, elsewhere on fewer, of which an accuracy of their own is recorded.

    Returns:
        the report. A missing data set, missing weights or a damaged file are reported, not raised.

    Raises:
        UnknownEntryError: no such entry.
        HubError: the Hub does not give it.
        ValueError: ``images`` below 1, or together with ``quick``.
    """
    if images is not None and (images < 1 or quick):
        raise ValueError(f"images is {images}; it must be at least 1, and the probe (quick) has its own")
    begin = time.perf_counter()
    folder = zoo.locate(entry, records=True)
    device = choose_device(device)
    outcome = _Outcome("not run", "")
    results: dict[str, Any] = {}
    config: dict[str, Any] = {}
    there: int | None = None  # test images
    try:
        config = _checked_types(read_config(folder), CONFIG_TYPES, folder / CONFIG)
        if not (folder / checkpoint.RESULTS).exists():
            zoo.check_weights(folder)  # of an entry it says how to get them
            raise zoo.WeightsNotFoundError(
                f"{folder} records no results yet: a training goes on with the command that began it, and has them in the end"
            )
        path = folder / checkpoint.RESULTS
        results = _checked_types(read_json(path), RESULTS_TYPES, path)
        records = _recorded_correct(folder, results)
        if checkpoint.SHIPPED in records:
            there = len(records[checkpoint.SHIPPED])
        recipe = config["recipe"]
        dtype = torch.float64 if recipe.get("transfer") and not quick else None
        found = _Found(folder, zoo.load(folder, device=device, dtype=dtype), config, results, records)
        measure = _test_accuracy
        if recipe.get("tasks"):
            measure = _task_accuracy
        elif recipe.get("transfer"):
            measure = _transfer_accuracy
        outcome = _probe(found) if quick else measure(found, data_dir, images)
    except DataNotFoundError as error:
        outcome = _Outcome("not run", str(error) + _needs(config))
    except (_NotRun, zoo.WeightsNotFoundError) as error:
        outcome = _Outcome("not run", str(error))
    except (CheckpointError, ValueError) as error:  # ValueError: other training images, logits that are not finite
        outcome = _Outcome("mismatch", str(error))
    except KeyError as error:
        outcome = _Outcome("mismatch", f"{folder} does not record {error}: it is damaged, or was changed by hand")
    recipe = config.get("recipe") or {}
    published, mean = (recipe.get("published") or {}).get("accuracy"), recorded_mean(results)
    return VerifyReport(
        entry=str(entry),
        check="probe" if quick else _checked(results, images, there, device),
        **outcome._asdict(),
        reproduction=reproduction(recipe, results),
        mean=mean,
        standard_error=results.get("standard_error"),
        seeds=len(results.get("seeds") or []) or int("accuracy" in results),
        published=published,
        seconds=time.perf_counter() - begin,
    )


def _checked_types(value: Any, types: Any, where: Path | str) -> Any:
    """A JSON value; CheckpointError unless what is read of it here has these types, or is not there."""
    inner: list[tuple[Any, Any, str]] = []
    if isinstance(types, dict):
        fits = isinstance(value, dict)
        inner = [(value[key], types[key], f"{where}: {key}") for key in types if key in value] if fits else []
    elif isinstance(types, list):
        fits = isinstance(value, list)
        inner = [(one, types[0], f"{where}[{i}]") for i, one in enumerate(value)] if fits else []
    else:
        fits = isinstance(value, types) and not isinstance(value, bool)
    if not fits:
        raise CheckpointError(f"{where} is a {type(value).__name__}: it is damaged, or was changed by hand")
    for one in inner:
        if one[0] is not None:
            _checked_types(*one)
    return value


def _checked(results: dict[str, Any], images: int | None, there: int | None, device: torch.device) -> str:
    """What the recorded number is of, without ``quick``; ``there``: how many test images, None: not known."""
    if "transfer" in results:
        whole = part = results["transfer"]
        if not measures_all(whole["training_images"], device):
            part = results.get("verification", whole)
        counts = [
            f"{part[key]:,}" + (f" of {whole[key]:,}" if part[key] < whole[key] else "")
            for key in ("test_images", "training_images")
        ]
        return "{} test images, {} training images".format(*counts)
    if tasks := results.get("verification"):
        return f"{tasks['tasks']:,} tasks of {results['split']}"
    if images is None:
        return "test accuracy"
    if there is not None and images > there:
        return f"first {there} test images, all there are"
    return f"first {images} test images"


def _needs(config: dict[str, Any]) -> str:
    """What a kernel regressor needs beyond what every net does; empty for nets."""
    if config["recipe"]["train"] is not None or config["recipe"].get("tasks"):
        return ""
    return (
        ". A kernel regressor computes its kernel between all test and all training images; --images 1000 takes fewer test "
        "images, --quick needs no data"
    )


def _test_accuracy(found: _Found, data_dir: str | os.PathLike | None, images: int | None) -> _Outcome:
    config, recorded = found.config, found.results.get("accuracy")
    try:
        dataset, normalize = zoo.dataset(config, data_dir), zoo.preprocessing(config)
    except ValueError as error:
        raise _NotRun(str(error)) from error
    if recorded is None or dataset.test_x is None:
        raise _NotRun(
            f"{found.folder} records no accuracy, or data set {dataset.name!r} has no test part to measure it on"
        )
    shipped = found.correct.get(checkpoint.SHIPPED)
    if images is not None:
        if shipped is None:
            raise _NotRun(f"{found.folder} does not record single test images: verify it on all of them")
        recorded = percent(shipped[:images])
    attach_training_images(found.model, dataset.train_x, normalize)
    right = correct(predict(found.model, dataset.test_x[:images], normalize), dataset.test_y[:images])
    return _compared(found, recorded, right)


def _task_accuracy(found: _Found, data_dir: str | os.PathLike | None, images: int | None) -> _Outcome:
    config, recorded = found.config["recipe"], found.results.get("verification")
    if images is not None:
        raise _NotRun(f"{found.folder} is measured on tasks, not on test images: verify it without --images")
    if recorded is None:
        raise _NotRun(f"{found.folder} records no accuracy on tasks")
    pools = load_tasks(config["data"]["name"], data_dir)
    right = split_correct(found.model, pools, config["tasks"], found.results["split"], recorded["tasks"])
    return _compared(found, recorded["accuracy"], right)._replace(half_width=TaskAccuracy.of(right).half_width)


def _transfer_accuracy(found: _Found, data_dir: str | os.PathLike | None, images: int | None) -> _Outcome:
    transfer, recorded = found.config["recipe"]["transfer"], found.results.get("transfer")
    if images is not None:
        raise _NotRun(
            f"{found.folder}: how many images are measured depends on the device alone: verify it without --images"
        )
    if recorded is None or "verification" not in found.results:
        raise _NotRun(f"{found.folder} records no accuracy of transfer to be measured again; shipped nets do")
    described = {"recipe": transfer}
    target, normalize = zoo.dataset(described, data_dir), zoo.preprocessing(described)
    split, right = measure_transfer(found.model, target, normalize, recorded["ridge"], torch.float64)
    part, key = recorded, checkpoint.SHIPPED
    if (len(split.train_y), len(split.test_y)) != (recorded["training_images"], recorded["test_images"]):
        part, key = found.results["verification"], checkpoint.VERIFIED
    return _compared(found, part["accuracy"], right, key)._replace(part=part is not recorded)


def _compared(found: _Found, recorded: float, right: Tensor, key: str = checkpoint.SHIPPED) -> _Outcome:
    """The recorded accuracy in percent beside that of ``right``, bool of test images [n] or of tasks and queries [T, Q]."""
    measured, tolerance = percent(right), found.config["recipe"]["tolerance"]["verify"]
    shipped = found.correct.get(key)
    differing = None if shipped is None else int((right != shipped[: len(right)]).sum())
    if within(tolerance, measured, recorded):
        return _Outcome("verified", "", recorded, measured, differing)
    reason = f"measured {measured:.2f} %, recorded {recorded:.2f} %: further apart than {tolerance} points"
    return _Outcome("mismatch", reason, recorded, measured, differing)


@torch.no_grad()
def _probe(found: _Found) -> _Outcome:
    files = found.config["pizoo"]["files"]
    if checkpoint.PROBE not in files:
        raise _NotRun(f"{found.folder} has no probe, only shipped nets do: verify it without --quick")
    probe = read_tensors(found.folder / checkpoint.PROBE, files[checkpoint.PROBE])
    if "support_x" in probe:
        learner = adapter(found.model, found.config["recipe"]["tasks"])
        logits = learner(probe["support_x"], probe["support_y"])(probe["x"])
    else:
        logits = checkpoint.probe_logits(found.model, probe["x"], probe.get("train_x"))
    logits, stored = logits.cpu().double(), probe["logits"].double()
    error = ((logits - stored).norm() / stored.norm()).item()
    if error <= PROBE_TOLERANCE:
        return _Outcome("verified", "", 0.0, error)
    return _Outcome("mismatch", f"the probe's logits are off by {error:.2g}, more than {PROBE_TOLERANCE}", 0.0, error)


def _recorded_correct(folder: Path, results: dict[str, Any]) -> dict[str, Tensor]:
    """Which test images (queries of tasks) were classified correctly, by the shipped net and every seed's; empty where not
    recorded.

    Raises:
        CheckpointError: these records and the recorded accuracies do not belong together.
    """
    if "correct_sha256" not in results:
        return {}
    found = read_tensors(folder / checkpoint.CORRECT, results["correct_sha256"])
    recorded = {checkpoint.SHIPPED: results} | {checkpoint.seed_key(r["seed"]): r for r in results.get("seeds", ())}
    for key, run in recorded.items():
        if key not in found or not within(0, percent(found[key]), run["accuracy"]):
            raise CheckpointError(
                f"{folder}: the accuracy recorded of {key} is not that of its images in {checkpoint.CORRECT}"
            )
    return found
