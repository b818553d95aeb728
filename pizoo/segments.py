"""Checkpoints of trainings: an epoch adds its new rows as a segment, and any epoch can be loaded.

A folder::

    config.json
    checkpoint.json           the manifest: epochs, and the segments each is made of, with SHA-256, its own included
    rows-00000.safetensors    A and B of the rows the net started with; then one immutable segment an epoch, its new rows
    state-00001.safetensors   what else an epoch's net is: input layer, biases, amult and its decay factor, optimizer

Processes that train together write a segment each, ``rows-00007-1of4.safetensors``. Which rows it holds stands in the manifest,
by numbers that do not depend on who held them: any number of processes loads what any number has written.

A finite net has no segments, and its state files hold all of it. The manifest is written last: whatever interrupts a save, the
epochs before it stay loadable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pizoo import processes
from pizoo.config import CONFIG, FORMAT, beside, check_format, complete
from pizoo.files import (
    CheckpointError,
    check_file,
    json_sha256,
    opened,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from pizoo.memory import copied_to_host
from pizoo.models.base import persistent_tensors
from pizoo.rows import growing_layers
from pizoo.stored import Segment, State

MANIFEST = "checkpoint.json"


class Epoch:
    """One epoch of a training checkpoint, read back.

    Attributes:
        record: its entry in the manifest (epoch, step, metrics, ...).
        state: of its net: ``state.fill(model)`` makes ``model`` that net, bit for bit.
        optimizer: tensors of the optimizer, by name.
    """

    def __init__(self, record: dict[str, Any], tensors: dict[str, Tensor], segments: list[Segment]):
        self.record = record
        parts = {"model": {}, "amult": {}, "decay": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = tensor
        self.optimizer: dict[str, Tensor] = parts["optimizer"]
        stored = {layer: (amult, parts["decay"][layer].item()) for layer, amult in parts["amult"].items()}
        self.state = State(parts["model"], stored, segments)


def start_training(folder: Path, model: nn.Module, config: Mapping[str, Any]) -> None:
    """Begin a training checkpoint in an empty folder: config, first segment, manifest."""
    manifest = _begin(folder, model, config)
    _write_segment(folder, *_new_rows(model, manifest), manifest)
    if processes.index() == 0:
        _write_manifest(folder, manifest)
    processes.gathered(None, writing=True)  # nobody looks for the manifest before it is there


def _begin(folder: Path, model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``config.json``; returns the manifest that goes with it, with nothing in it yet."""
    completed = complete(config, model, {})
    if processes.index() == 0:
        write_json(folder / CONFIG, completed)
    return {"format": FORMAT, "config": completed["pizoo"]["sha256"], "epochs": [], "segments": []}


def save_epoch(
    folder: Path,
    model: nn.Module,
    record: Mapping[str, Any],
    optimizer: Mapping[str, Tensor],
    keep: Collection[int] | None = None,
    chosen: int | None = None,
    submit: Callable[[Callable[[], None]], None] = lambda work: work(),
) -> None:
    """Add an epoch: a segment with the rows appended since the last, a state file, then the manifest that names them.

    Of processes that train together each calls it, and writes a segment with its own rows; process 0 writes the rest.

    Args:
        record: JSON values to keep with it; ``record["epoch"]`` numbers it.
        optimizer: tensors of the optimizer, by name.
        keep: earlier epochs to keep loadable; None: all. Of others the files are removed and the records kept (finite nets,
            whose state is the whole net).
        chosen: the epoch that :func:`pizoo.checkpoint.load` is to give when not told which; None: the last.
        submit: takes the writing, which may be done while the net trains on, but before the next epoch is saved.
    """
    manifest = read_manifest(folder)
    new_rows, ranges = _new_rows(model, manifest)
    layers = growing_layers(model)
    rows = {f"{name}.{part}" for name in layers for part in ("A", "B", "amult")}
    tensors = {f"model/{name}": tensor for name, tensor in persistent_tensors(model) if name not in rows}
    tensors |= {f"amult/{name}": layer.gathered(layer.stored_amult) for name, layer in layers.items()}
    tensors |= {f"decay/{name}": torch.tensor(layer.decay, dtype=torch.float64) for name, layer in layers.items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}
    tensors = {name: copied_to_host(tensor) for name, tensor in tensors.items()}

    def write() -> None:
        _write_segment(folder, new_rows, ranges, manifest)
        if processes.index() == 0:
            write_rest()
        processes.gathered(None, writing=True)  # the next epoch begins with reading the manifest

    def write_rest() -> None:
        if keep is not None:
            manifest["epochs"] = [old if old["epoch"] in keep else {**old, "state": None} for old in manifest["epochs"]]
        _write_state(folder, record, tensors, manifest)
        if chosen is not None:
            manifest["chosen"] = chosen
        _write_manifest(folder, manifest)
        if keep is not None:
            held = {record["state"]["file"] for record in manifest["epochs"] if record["state"]}
            for file in folder.glob("state-*.safetensors"):
                if file.name not in held:
                    file.unlink()

    submit(write)


def save_in_parts(
    folder: Path,
    model: nn.Module,
    config: Mapping[str, Any],
    rows: Iterable[tuple[str, Tensor, Tensor]],
    amults: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write a growing net that need not fit memory, in the form of a training's only epoch, number 0.

    Args:
        model: a net with its hyper-parameters and dtypes, whatever its rows.
        rows: a layer's name with the next of its rows, ``A`` [k, r_out] and ``B`` [k, r]: each becomes a segment.
        amults: name of a growing layer -> amult of all its rows [M].
        tensors: the rest of its ``state_dict``.
    """
    manifest = _begin(folder, model, config)
    held = dict.fromkeys(amults, 0)
    for name, A, B in rows:
        first, held[name] = held[name], held[name] + len(A)
        _write_segment(folder, {f"{name}.A": A, f"{name}.B": B}, {name: [first, held[name]]}, manifest)
    state = {f"model/{name}": tensor for name, tensor in tensors.items()}
    state |= {f"amult/{name}": amult for name, amult in amults.items()}
    state |= {f"decay/{name}": torch.ones((), dtype=torch.float64) for name in amults}
    _write_state(folder, {"epoch": 0}, state, manifest)
    _write_manifest(folder, manifest)


def _write_state(
    folder: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor], manifest: dict[str, Any]
) -> None:
    """Write the state file of an epoch, made of all segments so far, and enter it into the manifest."""
    file = f"state-{record['epoch']:05d}.safetensors"
    state = {"file": file, "sha256": write_tensors(folder / file, tensors)}
    manifest["epochs"].append({**record, "state": state, "segments": len(manifest["segments"])})


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest = read_json(folder / MANIFEST)
    check_format(folder / MANIFEST, manifest, "epochs", "segments", "sha256")
    if manifest.pop("sha256") != json_sha256(manifest):
        raise CheckpointError(f"{folder / MANIFEST} is not as it was written: it is damaged, or was changed by hand")
    return manifest


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_json(folder / MANIFEST, {**manifest, "sha256": json_sha256(manifest)})


def read_epoch(folder: Path, epoch: int | None = None) -> Epoch:
    """Read an epoch back, checking every file it is made of; None: the last.

    Raises:
        CheckpointError: no such epoch; anything missing or damaged.
    """
    record, entries = _recorded(folder, read_manifest(folder), epoch)
    try:
        segments = [
            Segment(
                check_file(folder / entry["file"], entry["sha256"]),
                {name: range(*numbers) for name, numbers in entry["rows"].items()},
            )
            for entry in entries
        ]
        _check_order(segments)
        return Epoch(record, read_tensors(folder / record["state"]["file"], record["state"]["sha256"]), segments)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST} or a state lacks something ({error!r}): it is damaged") from None


def epoch_files(folder: Path, epoch: int | None = None) -> dict[str, str]:
    """Names and SHA-256 of the files an epoch is loaded from; None: the one its training chose, else the last.

    Raises:
        CheckpointError: no such epoch; a damaged manifest, or one that names files of other folders.
    """
    manifest = read_manifest(folder)
    record, entries = _recorded(folder, manifest, manifest.get("chosen") if epoch is None else epoch)
    return _named(folder, [*entries, record["state"]])


def training_files(folder: Path) -> dict[str, str]:
    """Names and SHA-256 of the files of every epoch that a training checkpoint keeps; raises as :func:`epoch_files`."""
    manifest = read_manifest(folder)
    _recorded(folder, manifest)
    return _named(
        folder, [*manifest["segments"], *(record["state"] for record in manifest["epochs"] if record["state"])]
    )


def _named(folder: Path, entries: list[dict[str, Any]]) -> dict[str, str]:
    try:
        return beside(folder / MANIFEST, {entry["file"]: entry["sha256"] for entry in entries})
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} lacks something ({error!r}): it is damaged") from None


def _recorded(folder: Path, manifest: Mapping[str, Any], epoch: int | None = None) -> tuple[dict[str, Any], list[dict]]:
    """The manifest's record of an epoch (None: the last), and of the segments it is made of."""
    try:
        records = {record["epoch"]: record for record in manifest["epochs"] if record["state"]}
        if not records:
            raise CheckpointError(f"{folder} holds no finished epoch yet")
        first, last = min(records), max(records)
        wanted = last if epoch is None else epoch
        if wanted not in records:
            held = f"epochs {first} to {last}" if last > first else f"epoch {last} alone"
            raise CheckpointError(f"{folder} holds {held}; epoch={epoch} is not there")
        return records[wanted], manifest["segments"][: records[wanted]["segments"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST} lacks something ({error!r}): it is damaged") from None


def _check_order(segments: list[Segment]) -> None:
    """Raise CheckpointError unless segments together hold every row once, as they were written: multipliers are kept apart.

    Those that several processes wrote of the same rows stand beside each other.
    """
    parts: dict[str, list[tuple[Path, range]]] = {}
    for path, rows in segments:
        with opened(path) as file:
            if {tensor.rpartition(".")[0] for tensor in file.keys()} != set(rows):  # noqa: SIM118 (not a dict)
                raise CheckpointError(f"{path} does not hold rows of {', '.join(rows)}: it is another segment")
            for name, numbers in rows.items():
                if len(numbers) != file.get_slice(f"{name}.A").get_shape()[0]:
                    raise _another_segment(path, name, numbers)
                parts.setdefault(name, []).append((path, numbers))
    for name, found in parts.items():
        held = torch.zeros(sum(len(numbers) for _, numbers in found), dtype=torch.bool)
        begin = end = 0  # of the rows that processes which wrote together have written
        for path, numbers in found:
            if numbers.stop != end:
                begin, end = end, numbers.stop
            if not begin <= numbers.start < numbers.stop <= len(held) or held[numbers.start : end : numbers.step].any():
                raise _another_segment(path, name, numbers)
            held[numbers.start : end : numbers.step] = True


def _another_segment(path: Path, name: str, numbers: range) -> CheckpointError:
    every = f"one in {numbers.step} of " if numbers.step > 1 else ""
    told = f"{path} does not hold {every}the rows from {numbers.start} to {numbers.stop} of {name}"
    return CheckpointError(f"{told}, or not after those before it: it is another segment")


def _new_rows(model: nn.Module, manifest: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The rows held here that no segment holds yet, in host memory, and their numbers in each layer: first, end and, of
    shares, step. Stored rows never change."""
    tensors, ranges = {}, {}
    for name, layer in growing_layers(model).items():
        held = max((s["rows"][name][1] for s in manifest["segments"] if name in s["rows"]), default=0)
        numbers = range(held + layer.share.first(held), layer.count, layer.share.of)
        if not numbers or (not layer.shared and processes.index()):  # process 0 writes what all of them hold
            continue
        here = layer.share.count(held)
        new = {"A": layer.A[here:].detach(), "B": layer.B[here:].detach()}
        tensors |= {f"{name}.{part}": copied_to_host(rows) if rows.is_cuda else rows for part, rows in new.items()}
        ranges[name] = [numbers.start, numbers.stop] + ([numbers.step] if layer.shared else [])
    return tensors, ranges


def _write_segment(
    folder: Path, tensors: Mapping[str, Tensor], ranges: Mapping[str, list[int]], manifest: dict[str, Any]
) -> None:
    """Write new rows, if there are any, and enter them, with those that other processes have written, into the manifest."""
    entry = None
    if tensors:
        own = f"-{processes.index()}of{processes.count()}" if processes.count() > 1 else ""
        file = f"rows-{len(manifest['segments']):05d}{own}.safetensors"
        entry = {"file": file, "sha256": write_tensors(folder / file, tensors), "rows": ranges}
    manifest["segments"] += [entry for entry in processes.gathered(entry, writing=True) if entry is not None]
