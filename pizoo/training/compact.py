"""A trained net made compact: one file that anybody can carry, with the full net's numbers beside its own."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pizoo import checkpoint, zoo
from pizoo.compaction.full import (
    READOUT_SHARE,
    Full,
    agreement,
    check_rows,
    giving,
    shares,
    sizes_of,
    without_rows,
)
from pizoo.config import CONFIG, read_config
from pizoo.data import Dataset, TaskPool
from pizoo.evaluation.accuracy import accuracy, percent
from pizoo.evaluation.entries import correct_once_loaded
from pizoo.evaluation.fewshot import split_logits, split_pool
from pizoo.files import CheckpointError, read_json, read_tensors, write_json, write_tensors
from pizoo.memory import choose_device
from pizoo.models import InfPiMLP
from pizoo.plots import SIZES, draw_sizes
from pizoo.recipes import Compact, Recipe
from pizoo.training import meta
from pizoo.training.report import hardware
from pizoo.training.transfer import measure_shipped

CURVE = (1 / 8, 1 / 4, 1 / 2, 1)  # of the rows asked for
AMULT_BYTES = 4
HEADER_PER_TENSOR = 150  # bytes of a safetensors file that are not numbers, at most


def compact_net(
    model: InfPiMLP,
    dataset: Dataset | Mapping[str, TaskPool],
    recipe: Recipe,
    settings: Compact,
    curve: bool = False,
    progress: bool = False,
) -> tuple[InfPiMLP, dict[str, Any]]:
    """:func:`pizoo.compact` on a data set's training inputs, as ``settings`` say, measured on its test inputs.

    Args:
        dataset: what the net was trained on. A few-shot learner is fitted on the training classes, rotated; its features are
            compared on validation classes, rotated, its predictions and accuracy on the headline's tasks.
        recipe: of the net.
        curve: fit to an eighth, a quarter and half of the rows too.

    Returns:
        the net, and what to record of it: ``full_rows``, ``full_accuracy``, ``hardware``, ``date`` and ``sizes``: of every
        size fitted, ending with the net's own, rows, bytes as stored, seconds, agreement with the full net, accuracy, and the
        part or split that these are on.

    Raises:
        TypeError, ValueError: as :func:`pizoo.compact`; megabytes that hold no net.
    """
    if recipe.tasks is None:
        x, test_x, normalize = dataset.train_x, dataset.test_x, recipe.data.normalize
    else:
        x, test_x = (split_pool(dataset, split).samples() for split in ("train_rotated", "validation_rotated"))
        normalize = None
    counts, _ = sizes_of(model, x, settings.views)
    dtype = getattr(torch, settings.dtype)
    rows = settings.rows or rows_within(model, settings.megabytes, dtype)
    if settings.rows is None and rows >= min(counts.values()):
        raise ValueError(
            f"a net of {zoo.counted(counts)} rows needs no {settings.megabytes:g} MB: give fewer megabytes, or rows"
        )
    check_rows(rows, model, x, settings.views)
    full = Full(model, x, normalize, test_x, settings.views, progress=progress)
    beside = (
        _OnImages(full, dataset) if recipe.tasks is None else _OnTasks(full, model, dataset, recipe.tasks.model_dump())
    )
    sizes = []
    for share in CURVE if curve else (1,):
        begin = time.perf_counter()
        net = full.fit(max(READOUT_SHARE, int(share * rows)), dtype)
        size = {**net.compacted, "seconds": time.perf_counter() - begin, "bytes": stored_bytes(net)}
        sizes.append(size | {"measured_on": beside.part, **beside.measure(net)})
    net.compacted |= {"accuracy": sizes[-1].get("accuracy"), "full_accuracy": beside.full_accuracy}
    made_on = {"hardware": hardware(model.output.device), "date": date.today().isoformat()}
    return net, {"full_rows": full.counts, "full_accuracy": beside.full_accuracy, **made_on, "sizes": sizes}


class _OnImages:
    """Compact nets beside the full one on test images, or on what was held out where there are none."""

    def __init__(self, full: Full, dataset: Dataset):
        self.full, self.y = full, dataset.test_y
        self.part = "held out" if self.y is None else "test"
        self.full_accuracy = None if self.y is None else accuracy(full.output("test"), self.y)

    def measure(self, net: InfPiMLP) -> dict[str, float]:
        return self.full.measure(net, self.part, self.y)


class _OnTasks:
    """Compact nets beside the full one on the queries of the headline's tasks, each adapted to them; features on validation
    classes."""

    def __init__(self, full: Full, model: InfPiMLP, pools: Mapping[str, TaskPool], tasks: Mapping[str, Any]):
        self.full, self.pools, self.tasks = full, pools, tasks
        self.part = tasks["headline"]
        self.logits, self.y = self._queries(model)
        self.full_accuracy = accuracy(self.logits, self.y)

    def measure(self, net: InfPiMLP) -> dict[str, float]:
        return {**self.full.measure(net, "test"), **agreement(self._queries(net)[0], self.logits, self.y)}

    def _queries(self, net: InfPiMLP) -> tuple[Tensor, Tensor]:
        """Logits [n, ways] and labels [n] of all queries."""
        logits, labels = split_logits(net, self.pools, self.tasks)
        return logits.flatten(0, 1), labels.flatten()


def compact_checkpoint(
    source: str | os.PathLike,
    out: str | os.PathLike,
    settings: Compact,
    *,
    curve: bool = False,
    epoch: int | None = None,
    data_dir: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """:func:`pizoo.compact` from checkpoint to checkpoint. Rows that do not fit the GPU stay on the host and stream.

    Args:
        source: an entry's name, the folder of a checkpoint, finished or in training, or where one is on the Hub.
        out: folder to write ``config.json``, ``model.safetensors``, ``probe.safetensors``, ``results.json`` and
            ``correct.safetensors``.
        settings: what they leave out is as the recipe's part ``compact`` says, where it has one.
        curve: fit to an eighth, a quarter and half of the rows too, and draw agreement and accuracy against size.
        epoch: of a training checkpoint; None: the one its training chose, else the last.
        data_dir, device: as for :func:`pizoo.train`.

    Returns:
        what ``results.json`` holds: the source's, where ``accuracy`` (``transfer``, ``splits``) is now the compact net's,
        and under ``compact`` what :func:`compact_net` records. ``mean_accuracy`` goes on speaking of full nets.

    Raises:
        UnknownEntryError, CheckpointError, DataNotFoundError: source or data are missing or damaged, or ``out`` holds another
            checkpoint.
        TypeError, ValueError: as :func:`compact_net`; another epoch of a transfer entry than its training chose, of which no
            ridge is known.
    """
    folder, out, device = zoo.locate(source, epoch=epoch, records=True), Path(out), choose_device(device)
    zoo.check_weights(folder)
    if (out / CONFIG).exists() and "compacted" not in read_config(out)["pizoo"]:
        raise CheckpointError(f"{out} holds a checkpoint that is not a compact net; choose another folder")
    model, config = checkpoint.load(folder, epoch, device)
    recipe = Recipe.from_dict(zoo.recipe_of(config, source), str(source))
    source_results = _results(folder, recipe.entry, epoch)
    if recipe.transfer is not None and "transfer" not in source_results:
        raise ValueError(
            f"epoch is {epoch}; of {source} only the epoch that its training chose has a ridge to measure it with"
        )
    settings = (recipe.compact or Compact()).model_copy(update=settings.model_dump(exclude_unset=True))
    loaded = recipe.load_data(data_dir)
    dataset, normalize = loaded if recipe.transfer is None else loaded.source, recipe.data.normalize
    net, record = compact_net(model, dataset, recipe, settings, curve, progress)
    whole = source_results.get("accuracy", record["full_accuracy"])
    results = {"mean_accuracy": whole, **source_results, "accuracy": None, "compact": record}
    right = _correct_before(folder, source_results)
    if recipe.tasks is None:
        checkpoint.save_with_probe(out, net, config, dataset, normalize)
    if recipe.tasks is not None:
        measured = meta.ship(net, config, out, loaded)
        results, right[checkpoint.SHIPPED] = results | measured.recorded, measured.correct
    elif recipe.transfer is not None:
        results, right[checkpoint.SHIPPED], right[checkpoint.VERIFIED] = measure_shipped(
            out, recipe, loaded, results, device
        )
    elif dataset.test_x is not None:
        right[checkpoint.SHIPPED] = correct_once_loaded(out, dataset, normalize, device)
    if checkpoint.SHIPPED in right:
        results["accuracy"] = percent(right[checkpoint.SHIPPED])
        results["correct_sha256"] = write_tensors(out / checkpoint.CORRECT, right)
    write_json(out / checkpoint.RESULTS, results)
    (out / SIZES).unlink(missing_ok=True)
    if curve:
        draw_sizes(out / SIZES, record)
    return results


def _results(folder: Path, entry: str, epoch: int | None) -> dict[str, Any]:
    """The source's results; of an earlier or unfinished epoch there are none."""
    path = folder / checkpoint.RESULTS
    return read_json(path) if epoch is None and path.exists() else {"entry": entry}


def _correct_before(folder: Path, results: dict[str, Any]) -> dict[str, Tensor]:
    """Which test images full nets classify correctly, where the source records it; not the net that it ships."""
    if "correct_sha256" not in results:
        return {}
    found = read_tensors(folder / checkpoint.CORRECT, results["correct_sha256"])
    return {key: right for key, right in found.items() if key not in (checkpoint.SHIPPED, checkpoint.VERIFIED)}


def stored_bytes(net: InfPiMLP) -> int:
    """Bytes of a net's numbers as a checkpoint stores them."""
    return sum(tensor.nbytes for tensor in checkpoint.packed(net.state_dict()).values())


def rows_within(model: InfPiMLP, megabytes: float, dtype: torch.dtype) -> int:
    """How many rows a hidden layer may have (a read-out half) for a net like ``model`` to be stored in ``megabytes``.

    Raises:
        ValueError: not even one row fits.
    """
    state, layers = checkpoint.packed(without_rows(model).state_dict()), giving(model)
    fixed = HEADER_PER_TENSOR * len(state)
    fixed += sum(t.nbytes for key, t in state.items() if key.rpartition(".")[0] not in layers or key.endswith("bias"))
    per_row = sum(
        (dtype.itemsize * (layer.A.shape[1] + layer.B.shape[1]) + AMULT_BYTES) / share
        for layer, share in zip(layers.values(), shares(layers), strict=True)
    )
    rows = int((megabytes * 1e6 - fixed) // per_row)
    if rows < READOUT_SHARE:
        least = (fixed + READOUT_SHARE * per_row) / 1e6
        raise ValueError(f"megabytes is {megabytes}; a net like this takes {math.ceil(100 * least) / 100} at least")
    return rows
