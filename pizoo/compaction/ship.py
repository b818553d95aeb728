"""A checkpoint made compact: one file that anybody can carry, with the full net's numbers beside its own."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pizoo import checkpoint, zoo
from pizoo.checkpoint import CheckpointError
from pizoo.compaction.full import READOUT_SHARE, ROWS_DTYPE, STEPS, VIEWS, Full, copy_without_rows, row_counts
from pizoo.evaluation.accuracy import accuracy, choose_device
from pizoo.models import InfPiMLP
from pizoo.training.report import hardware

MEGABYTES = 25.0
CURVE = (1 / 8, 1 / 4, 1 / 2, 1)  # of the rows asked for
PICTURE = "compact.png"
AMULT_DTYPE = torch.float32
HEADER_PER_TENSOR = 150  # bytes of a safetensors file that are not numbers, at most


def compact_checkpoint(
    source: str | os.PathLike,
    out: str | os.PathLike,
    rows: int | None = None,
    *,
    megabytes: float = MEGABYTES,
    steps: int = STEPS,
    views: int = VIEWS,
    curve: bool = False,
    epoch: int | None = None,
    data_dir: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """:func:`pizoo.compact` from checkpoint to checkpoint; the rows of a training checkpoint are read from disk, once.

    Args:
        source: an entry's name, or the folder of a checkpoint, finished or in training.
        out: folder to write ``config.json``, ``model.safetensors``, ``probe.safetensors``, ``results.json``.
        rows: of each hidden layer, with a quarter as many for the read-out; None: what fits ``megabytes`` (of 10⁶ bytes).
        steps, views, seed, progress: as for :func:`pizoo.compact`.
        curve: fit to an eighth, a quarter and half of the rows too, and draw agreement and accuracy against size.
        epoch: of a training checkpoint; None: the last.
        data_dir, device: as for :func:`pizoo.train`.

    Returns:
        what ``results.json`` holds: the source's, where ``accuracy`` is now the compact net's; ``full``: rows and accuracy
        of the net it was made of; ``compact``: every size that was fitted, with its agreement. ``mean_accuracy`` goes on
        speaking of full nets.

    Raises:
        UnknownEntryError, CheckpointError, DataNotFoundError: source or data are missing or damaged, or ``out`` holds another
            checkpoint.
        TypeError, ValueError: a net that does not grow; rows or megabytes that are too few, or more than there are.
    """
    folder, out, device = zoo.folder_of(source), Path(out), choose_device(device)
    zoo.check_weights(folder)
    if (out / checkpoint.CONFIG).exists() and "compacted" not in checkpoint.read_config(out)["pizoo"]:
        raise CheckpointError(f"{out} holds a checkpoint that is not a compact net; choose another folder")
    model, config, blocks = checkpoint.load_streamed(folder, epoch, device)
    if not isinstance(model, InfPiMLP):
        raise TypeError(f"{source} is a {type(model).__name__}; only an InfPiMLP has rows to make fewer of")
    if rows is None:
        rows = rows_within(model, megabytes)
    row_counts(rows, {name: sum(len(A) for A, _, _ in layer) for name, layer in blocks.items()})
    dataset, normalize = zoo.dataset(config, data_dir), zoo.preprocessing(config)

    full = Full(model, dataset.train_x, normalize, dataset.test_x, blocks, views, seed, progress)
    sizes = [max(READOUT_SHARE, int(share * rows)) for share in CURVE] if curve else [rows]
    nets, points = zip(*fit_sizes(full, sizes, dataset.test_y, steps), strict=True)
    net = nets[-1]
    own, whole = points[-1].get("accuracy"), full_accuracy(full, dataset.test_y)
    net.compacted |= {"accuracy": own, "full_accuracy": whole}
    checkpoint.save_with_probe(out, net, config, dataset, normalize)
    results = {
        **_results(folder, config, epoch, whole),
        "accuracy": own,
        "full": {"rows": full.counts, "accuracy": whole},
        "compact": {"sizes": list(points), "hardware": hardware(device), "date": date.today().isoformat()},
    }
    checkpoint.write_json(out / checkpoint.RESULTS, results)
    if curve:
        checkpoint.write_atomically(out / PICTURE, lambda temporary: draw(points, whole, temporary))
    return results


def fit_sizes(
    full: Full, sizes: Sequence[int | Sequence[int]], test_y: Tensor | None, steps: int, **options: Any
) -> Iterator[tuple[InfPiMLP, dict[str, Any]]]:
    """Per size the net fitted, and a record of its rows, bytes as stored, seconds, agreement with the full net, accuracy."""
    part = "held out" if test_y is None else "test"
    for rows in sizes:
        begin = time.perf_counter()
        net = full.fit(rows, steps, **options)
        point = {**net.compacted, "seconds": time.perf_counter() - begin, "bytes": stored_bytes(net)}
        point |= {"measured_on": part, **full.measure(net, part)}
        if test_y is not None:
            point["accuracy"] = accuracy(full.logits_of(net, part), test_y)
        yield net, point


def full_accuracy(full: Full, test_y: Tensor | None) -> float | None:
    """Test accuracy of the full net in percent; None where there is no test part."""
    return None if test_y is None else accuracy(full.logits("test"), test_y)


def _results(folder: Path, config: dict[str, Any], epoch: int | None, whole: float | None) -> dict[str, Any]:
    """The source's results, of full nets; of an earlier or unfinished epoch there are none but this one number."""
    path = folder / checkpoint.RESULTS
    found = checkpoint.read_json(path) if epoch is None and path.exists() else {"entry": config["recipe"]["entry"]}
    return {"mean_accuracy": whole, **found}


def stored_bytes(net: InfPiMLP) -> int:
    """Bytes of a net's numbers as a checkpoint stores them."""
    return sum(tensor.nbytes for tensor in checkpoint.packed(net.state_dict()).values())


def rows_within(model: InfPiMLP, megabytes: float) -> int:
    """How many rows a hidden layer may have (a read-out a quarter) for a net like ``model`` to be stored in ``megabytes``.

    Raises:
        ValueError: not even one row fits.
    """
    state = checkpoint.packed(copy_without_rows(model).state_dict())
    fixed = HEADER_PER_TENSOR * len(state)
    fixed += sum(t.nbytes for name, t in state.items() if name == "input.A" or name.endswith("bias"))
    *hidden, readout = (
        ROWS_DTYPE.itemsize * (layer.A.shape[1] + layer.B.shape[1]) + AMULT_DTYPE.itemsize
        for layer in model.growing_layers.values()
    )
    per_row = sum(hidden) + readout / READOUT_SHARE if hidden else readout
    rows = int((megabytes * 1e6 - fixed) // per_row)
    if rows < READOUT_SHARE:
        least = (fixed + READOUT_SHARE * per_row) / 1e6
        raise ValueError(f"megabytes is {megabytes}; a net like this takes {math.ceil(100 * least) / 100} at least")
    return rows


def draw(points: Sequence[dict[str, Any]], whole: float | None, path: Path) -> None:
    """Draw agreement, and accuracy beside the full net's, against size, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    megabytes = [point["bytes"] / 1e6 for point in points]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained", facecolor="white")
    left.plot(megabytes, [point["agreement"] for point in points], "o-")
    left.set(ylabel="predictions equal to the full net's [%]", xlabel="size [MB]")
    if whole is not None:
        right.plot(megabytes, [point["accuracy"] for point in points], "o-", label="compact")
        right.axhline(whole, color="black", linestyle="--", label="full net")
        right.set(ylabel="test accuracy [%]", xlabel="size [MB]")
        right.legend(frameon=False)
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)
