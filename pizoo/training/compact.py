"""A trained net made compact: one file that anybody can carry, with the full net's numbers beside its own."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pizoo import checkpoint, zoo
from pizoo.checkpoint import CheckpointError
from pizoo.compaction.full import READOUT_SHARE, Full, check_rows, sizes_of, without_rows
from pizoo.data import Dataset
from pizoo.evaluation.accuracy import accuracy, choose_device, percent
from pizoo.evaluation.entries import correct_once_loaded
from pizoo.models import InfPiMLP
from pizoo.plots import SIZES, draw_sizes
from pizoo.recipes import Compact, Recipe
from pizoo.training.report import hardware
from pizoo.training.transfer import measure_shipped

CURVE = (1 / 8, 1 / 4, 1 / 2, 1)  # of the rows asked for
AMULT_BYTES = 4
HEADER_PER_TENSOR = 150  # bytes of a safetensors file that are not numbers, at most


def compact_net(
    model: InfPiMLP,
    dataset: Dataset,
    normalize: Callable[..., Tensor],
    settings: Compact,
    curve: bool = False,
    progress: bool = False,
) -> tuple[InfPiMLP, dict[str, Any]]:
    """:func:`pizoo.compact` on a data set's training inputs, as ``settings`` say, measured on its test inputs.

    Args:
        curve: fit to an eighth, a quarter and half of the rows too.

    Returns:
        the net, and what to record of it: ``full_rows``, ``full_accuracy``, ``hardware``, ``date`` and ``sizes``: of every
        size fitted, ending with the net's own, rows, bytes as stored, seconds, agreement with the full net, accuracy.

    Raises:
        TypeError, ValueError: as :func:`pizoo.compact`; megabytes that hold no net.
    """
    counts, _ = sizes_of(model, dataset.train_x, settings.views)
    dtype = getattr(torch, settings.dtype)
    rows = settings.rows or rows_within(model, settings.megabytes, dtype)
    if settings.rows is None and rows >= min(counts.values()):
        raise ValueError(
            f"a net of {zoo.counted(counts)} rows needs no {settings.megabytes:g} MB: give fewer megabytes, or rows"
        )
    check_rows(rows, model, dataset.train_x, settings.views)
    full = Full(model, dataset.train_x, normalize, dataset.test_x, settings.views, progress=progress)
    whole = None if dataset.test_x is None else accuracy(full.logits("test"), dataset.test_y)
    part, sizes = "held out" if dataset.test_x is None else "test", []
    for share in CURVE if curve else (1,):
        begin = time.perf_counter()
        net = full.fit(max(READOUT_SHARE, int(share * rows)), dtype)
        size = {**net.compacted, "seconds": time.perf_counter() - begin, "bytes": stored_bytes(net)}
        sizes.append(size | {"measured_on": part, **full.measure(net, part, dataset.test_y)})
    net.compacted |= {"accuracy": sizes[-1].get("accuracy"), "full_accuracy": whole}
    made_on = {"hardware": hardware(model.output.device), "date": date.today().isoformat()}
    return net, {"full_rows": full.counts, "full_accuracy": whole, **made_on, "sizes": sizes}


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
        curve: fit to an eighth, a quarter and half of the rows too, and draw agreement and accuracy against size.
        epoch: of a training checkpoint; None: the one its training chose, else the last.
        data_dir, device: as for :func:`pizoo.train`.

    Returns:
        what ``results.json`` holds: the source's, where ``accuracy`` (and ``transfer``) is now the compact net's, and under
        ``compact`` what :func:`compact_net` records. ``mean_accuracy`` goes on speaking of full nets.

    Raises:
        UnknownEntryError, CheckpointError, DataNotFoundError: source or data are missing or damaged, or ``out`` holds another
            checkpoint.
        TypeError, ValueError: as :func:`compact_net`; another epoch of a transfer entry than its training chose, of which no
            ridge is known.
    """
    folder, out, device = zoo.locate(source, epoch=epoch, records=True), Path(out), choose_device(device)
    zoo.check_weights(folder)
    if (out / checkpoint.CONFIG).exists() and "compacted" not in checkpoint.read_config(out)["pizoo"]:
        raise CheckpointError(f"{out} holds a checkpoint that is not a compact net; choose another folder")
    model, config = checkpoint.load(folder, epoch, device)
    recipe = Recipe.from_dict(zoo.recipe_of(config, source), str(source))
    source_results = _results(folder, recipe.entry, epoch)
    if recipe.transfer is not None and "transfer" not in source_results:
        raise ValueError(
            f"epoch is {epoch}; of {source} only the epoch that its training chose has a ridge to measure it with"
        )
    loaded = recipe.load_data(data_dir)
    dataset, normalize = loaded if recipe.transfer is None else loaded.source, recipe.data.normalize
    net, record = compact_net(model, dataset, normalize, settings, curve, progress)
    checkpoint.save_with_probe(out, net, config, dataset, normalize)
    whole = source_results.get("accuracy", record["full_accuracy"])
    results = {"mean_accuracy": whole, **source_results, "accuracy": None, "compact": record}
    right = _correct_before(folder, source_results)
    if recipe.transfer is not None:
        results, right[checkpoint.SHIPPED], right[checkpoint.VERIFIED] = measure_shipped(
            out, recipe, loaded, results, device
        )
    elif dataset.test_x is not None:
        right[checkpoint.SHIPPED] = correct_once_loaded(out, dataset, normalize, device)
    if checkpoint.SHIPPED in right:
        results["accuracy"] = percent(right[checkpoint.SHIPPED])
        results["correct_sha256"] = checkpoint.write_tensors(out / checkpoint.CORRECT, right)
    checkpoint.write_json(out / checkpoint.RESULTS, results)
    (out / SIZES).unlink(missing_ok=True)
    if curve:
        draw_sizes(out / SIZES, record)
    return results


def _results(folder: Path, entry: str, epoch: int | None) -> dict[str, Any]:
    """The source's results; of an earlier or unfinished epoch there are none."""
    path = folder / checkpoint.RESULTS
    return checkpoint.read_json(path) if epoch is None and path.exists() else {"entry": entry}


def _correct_before(folder: Path, results: dict[str, Any]) -> dict[str, Tensor]:
    """Which test images full nets classify correctly, where the source records it; not the net that it ships."""
    if "correct_sha256" not in results:
        return {}
    found = checkpoint.read_tensors(folder / checkpoint.CORRECT, results["correct_sha256"])
    return {key: right for key, right in found.items() if key not in (checkpoint.SHIPPED, checkpoint.VERIFIED)}


def stored_bytes(net: InfPiMLP) -> int:
    """Bytes of a net's numbers as a checkpoint stores them."""
    return sum(tensor.nbytes for tensor in checkpoint.packed(net.state_dict()).values())


def rows_within(model: InfPiMLP, megabytes: float, dtype: torch.dtype) -> int:
    """How many rows a hidden layer may have (a read-out half) for a net like ``model`` to be stored in ``megabytes``.

    Raises:
        ValueError: not even one row fits.
    """
    state = checkpoint.packed(without_rows(model).state_dict())
    fixed = HEADER_PER_TENSOR * len(state)
    fixed += sum(t.nbytes for name, t in state.items() if name == "input.A" or name.endswith("bias"))
    *hidden, readout = (
        dtype.itemsize * (layer.A.shape[1] + layer.B.shape[1]) + AMULT_BYTES for layer in model.growing_layers.values()
    )
    per_row = sum(hidden) + readout / READOUT_SHARE if hidden else readout
    rows = int((megabytes * 1e6 - fixed) // per_row)
    if rows < READOUT_SHARE:
        least = (fixed + READOUT_SHARE * per_row) / 1e6
        raise ValueError(f"megabytes is {megabytes}; a net like this takes {math.ceil(100 * least) / 100} at least")
    return rows
