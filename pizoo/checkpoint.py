"""Checkpoints: folders of plain JSON and safetensors. Nothing that is loaded is ever executed.

A shipped net::

    config.json         what builds the net and its preprocessing, under a SHA-256; class names; SHA-256 of the files below
    model.safetensors   its state
    probe.safetensors   a few dozen inputs with the net's logits: checks the weights in a second, without a data set
    results.json        the recorded numbers
    correct.safetensors which test images were classified correctly, by the shipped net and by every seed's

A net while it trains (and after: any epoch can be loaded)::

    config.json
    checkpoint.json           the manifest: epochs, and the segments each is made of, with SHA-256, its own included
    rows-00000.safetensors    A and B of the rows the net started with; then one immutable segment an epoch, its new rows
    state-00001.safetensors   what else an epoch's net is: input layer, biases, amult and its decay factor, optimizer

Processes that train together write a segment each, ``rows-00007-1of4.safetensors``. Which rows it holds stands in the manifest,
by numbers that do not depend on who held them: any number of processes loads what any number has written.

A finite net has no segments, and its state files hold all of it. Every file is written under a temporary name, flushed and
renamed, the manifest last: whatever interrupts a save, the epochs before it stay loadable.

Damage is refused with a message: every file a net is loaded from stands under a SHA-256, and what those stand in
(``config.json``, the manifest) under one of its own, as far as it decides the net, its data and its preprocessing. Names,
descriptions, published numbers and ``pretrained_cfg`` may be edited and are not checked. No digest keeps out somebody who
writes digests that fit: of a shipped net the probe then tells whether it computes what it did (``pizoo verify --quick``), of a
training nothing does. Even so nothing is executed, and no net is given memory before the files are seen to have its shapes.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pizoo import models, processes
from pizoo.config import (
    CONFIG,
    FORMAT,
    NETWORKS,
    beside,
    build,
    check_format,
    complete,
    one_line,
    read_config,
    without_memory,
)
from pizoo.data import Dataset
from pizoo.files import (
    CheckpointError,
    check_file,
    flush_names,
    json_sha256,
    opened,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from pizoo.memory import HEADROOM, NotEnoughMemory, copied_to_host, free_memory, is_out_of_memory
from pizoo.models.base import check_state, persistent_tensors
from pizoo.rows import Rows, check_place, growing_layers

PROBE_INPUTS = 32
MANIFEST, MODEL, PROBE, RESULTS, CORRECT = (
    "checkpoint.json",
    "model.safetensors",
    "probe.safetensors",
    "results.json",
    "correct.safetensors",
)
SHIPPED = "shipped"  # in CORRECT: the shipped net, beside those of the seeds
VERIFIED = (
    "verified"  # in CORRECT: the shipped net where `pizoo verify` takes a smaller problem instead of the recorded one
)
LOCK = "train.lock"
CPU = torch.device("cpu")
READ_BYTES = 1 << 26  # of rows at once, from a file into the storage reserved for them


# ---------------------------------------------------------------------------------------------------- nets


def packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with float32 tensors in float16 where that holds every number exactly: a smaller file, the same net."""
    short = {name: tensor.half() for name, tensor in state.items() if tensor.dtype == torch.float32}
    return {**state, **{name: tensor for name, tensor in short.items() if torch.equal(tensor.float(), state[name])}}


def save(
    folder: Path,
    model: nn.Module,
    config: Mapping[str, Any],
    probe: Mapping[str, Tensor],
) -> None:
    """Write a shipped checkpoint: weights, probe, and ``config`` completed by what builds and checks the net.

    Args:
        probe: ``x``, inputs as the net takes them [n, ...], and ``logits`` [n, classes], its own there. Of a kernel regressor
            also ``train_x``, the first of its training inputs [m, ...]: the logits are what these contribute. Of what learns
            tasks also ``support_x`` and ``support_y``, to which it is adapted first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A disk that fills up leaves an older checkpoint whole; a kill between the renames leaves digests that do not fit.
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
        staged = Path(scratch)
        digests = {
            MODEL: write_tensors(staged / MODEL, packed(model.state_dict())),
            PROBE: write_tensors(staged / PROBE, probe),
        }
        write_json(staged / CONFIG, complete(config, model, digests))
        for name in (MODEL, PROBE, CONFIG):
            os.replace(staged / name, folder / name)
        flush_names(folder)


@torch.no_grad()
def save_with_probe(
    folder: Path, model: nn.Module, config: Mapping[str, Any], dataset: Dataset, normalize: Callable[..., Tensor]
) -> None:
    """:func:`save` with the first inputs of the data set's test part (its training part if it has none) as the probe.

    A kernel regressor's probe holds the first training inputs as well: with them it checks the kernel and their dual
    coefficients where the training inputs are not at hand.
    """
    x = dataset.train_x if dataset.test_x is None else dataset.test_x
    anchor = next(iter((*model.parameters(), *model.buffers())))
    dtype = (
        torch.float32 if anchor.dtype == torch.float64 else anchor.dtype
    )  # float64 would double the file for nothing
    probe = {"x": normalize(x[:PROBE_INPUTS].to(anchor.device), dtype)}
    if isinstance(model, models.KernelRegressor):
        probe["train_x"] = normalize(dataset.train_x[:PROBE_INPUTS].to(anchor.device), dtype)
    save(folder, model, config, {**probe, "logits": probe_logits(model.eval(), **probe)})


@torch.no_grad()
def probe_logits(model: nn.Module, x: Tensor, train_x: Tensor | None = None) -> Tensor:
    """What a net gives for a probe: the logits of x [n, ...], or of a kernel regressor what ``train_x`` contributes."""
    anchor = next(iter((*model.parameters(), *model.buffers())))
    x = x.to(anchor.device, anchor.dtype)
    if train_x is None:
        return model(x)
    return model.scores(x.flatten(1), train_x.to(anchor.device, anchor.dtype).flatten(1))


def seed_key(seed: int) -> str:
    """What a seed's net is called in CORRECT, and the folder of its training among those of other seeds."""
    return f"seed-{seed}"


def load(
    folder: Path, epoch: int | None = None, device=None, dtype: torch.dtype | None = None, rows_on: str = "auto"
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a net and its ``config.json`` from a shipped or a training checkpoint.

    Args:
        epoch: of a training checkpoint, the epoch to load; None: the one its training chose, else the last.
        dtype: None: float32, rows as stored.
        rows_on: where rows of growing layers are kept: "device", "host" (they stream from there), or "auto": on the host
            where the device, a GPU, has no room for them.

    Raises:
        CheckpointError: anything missing, damaged, or of another architecture than its config says.
        NotEnoughMemory: rows that, with "auto", fit nowhere.
        ValueError: another ``rows_on``.
    """
    check_place(rows_on, "auto")
    folder = Path(folder)
    config = read_config(folder)
    expected = without_memory(config["pizoo"], dtype)
    layers = growing_layers(expected)
    if (folder / MANIFEST).exists() and (epoch is not None or not (folder / MODEL).exists()):
        manifest = read_manifest(folder)
        # Those written before this was kept do not say which configuration they go with.
        if manifest.get("config", config["pizoo"]["sha256"]) != config["pizoo"]["sha256"]:
            raise CheckpointError(
                f"{folder / CONFIG} is not the one {MANIFEST} was written with: it was changed, or is another training's"
            )
        state = read_epoch(folder, manifest.get("chosen") if epoch is None else epoch).state
    elif epoch is not None:
        raise CheckpointError(f"{folder} holds one net, not epochs: epoch={epoch} cannot be loaded from it")
    else:
        state = _read_shipped(folder / MODEL, config["pizoo"]["files"].get(MODEL), layers)
    try:
        state.check(expected)
        model = build(config["pizoo"], device, dtype)
        layers = growing_layers(model)
        if rows_on == "auto":
            rows_on = _roomy_place(layers, state, str(folder))
        for layer in layers.values():
            layer.keep_rows_on(rows_on)
        state.fill(model)
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error) or isinstance(error, CheckpointError | NotEnoughMemory):
            raise
        raise CheckpointError(f"{folder} does not hold what its {CONFIG} says: {one_line(error)}") from None
    if "compacted" in config["pizoo"]:
        model.compacted = config["pizoo"]["compacted"]
    return model.eval(), config


class Segment(NamedTuple):
    """A file with rows; ``rows``: name of a growing layer -> the numbers of the rows of that layer in it, in their order."""

    path: Path
    rows: dict[str, range]


class State(NamedTuple):
    """A net's state as it lies in files. Rows, where nearly all of it is, are read when they are put into a net.

    Attributes:
        tensors: all of ``state_dict`` but growing layers' ``A``, ``B`` and ``amult``.
        stored: name of a growing layer -> (amult as stored, decay).
        segments: files that hold ``A`` and ``B`` of rows.
    """

    tensors: dict[str, Tensor]
    stored: dict[str, tuple[Tensor, float]]
    segments: list[Segment]

    def check(self, model: nn.Module) -> None:
        """Raise RuntimeError unless it is the state of a net like ``model``: names, shapes, floating-point numbers."""
        amults = {f"{name}.amult": amult for name, (amult, _) in self.stored.items()}
        if isinstance(model, tuple(NETWORKS.values())):  # how much a kernel holds depends on what it was fitted to
            check_state(model, self.tensors | amults | self._row_shapes())
        for name, tensor in (self.tensors | amults).items():
            if not tensor.is_floating_point():
                raise RuntimeError(f"{name} has dtype {tensor.dtype}; it must be a floating-point one")

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Put it into ``model``, to the bit. Rows go straight into the layers' storage: room reserved there is kept.

        Raises:
            RuntimeError: a state of another net; the model is left as it was.
            CheckpointError: a segment that cannot be read.
        """
        if not self.stored:
            model.load_state_dict(self.tensors)
            return
        self.check(model)
        model.load_state_dict(self.tensors, strict=False)
        layers = growing_layers(model)
        for name, layer in layers.items():
            layer.reserve(len(self.stored[name][0]))
        for path, rows in self.segments:
            with opened(path) as file:
                for name in layers.keys() & rows.keys():
                    _read_rows(file, name, layers[name], self.stored[name][0], rows[name])
        for name, layer in layers.items():
            amult, decay = self.stored[name]
            layer.grown(len(amult), decay)

    def _row_shapes(self) -> dict[str, Tensor]:
        """``A`` and ``B`` of all layers, their segments joined, without their values."""
        parts: dict[str, list[Tensor]] = {}
        for path, _ in self.segments:
            with opened(path) as file:
                for layer in self.stored:
                    for name in {f"{layer}.A", f"{layer}.B"}.intersection(file.keys()):
                        parts.setdefault(name, []).append(torch.empty(file.get_slice(name).get_shape(), device="meta"))
        return {name: torch.cat(shapes) for name, shapes in parts.items()}


def _read_rows(file: Any, name: str, layer: Rows, amult: Tensor, numbers: range) -> None:
    """Read a segment's rows of a layer into its storage; ``amult`` [M] is that of all rows."""
    A, B = (file.get_slice(f"{name}.{part}") for part in ("A", "B"))
    row_bytes = sum(storage.shape[1] * storage.element_size() for storage in layer.storages[:2])
    at_once = max(1, READ_BYTES // row_bytes)
    for start in range(0, len(numbers), at_once):
        part = numbers[start : start + at_once]
        stop = start + len(part)
        layer.put(part.start, A[start:stop], B[start:stop], amult[part.start : part.stop : part.step], part.step)


def _read_shipped(path: Path, digest: str | None, layers: Mapping[str, Rows]) -> State:
    """The state in a shipped net's one file."""
    parts = {f"{name}.{part}" for name in layers for part in ("A", "B")}
    tensors = read_tensors(path, digest, leave=parts.__contains__)
    amults = {name: tensors.pop(f"{name}.amult") for name in layers if f"{name}.amult" in tensors}
    rows = {name: range(len(amult)) for name, amult in amults.items()}
    return State(
        tensors, {name: (amult, 1.0) for name, amult in amults.items()}, [Segment(path, rows)] if layers else []
    )


def _roomy_place(layers: Mapping[str, Rows], state: State, name: str) -> str:
    """Where there is room for the rows of ``state``: "device", or, with a warning, "host"; NotEnoughMemory if nowhere."""
    needed = sum(
        len(state.stored[layer][0]) * part.shape[1] * part.element_size()
        for layer, rows in layers.items()
        if layer in state.stored
        for part in (rows.A, rows.B)
    )
    device = next((rows.device for rows in layers.values()), CPU)
    free = free_memory(device)
    if needed + (HEADROOM if device.type == "cuda" else 0) <= free:
        return "device"
    if needed > (on_host := free_memory(CPU)):
        raise NotEnoughMemory(
            f"{name} needs {needed / 2**30:.1f} GiB for its rows; {free / 2**30:.1f} GiB are free on {device}, "
            f"{on_host / 2**30:.1f} on the host"
        )
    warnings.warn(
        f"{name}: {needed / 2**30:.1f} GiB of rows do not fit the GPU, where {free / 2**30:.1f} GiB are free: they stay in "
        "host memory and stream from there in every pass, far slower",
        RuntimeWarning,
        stacklevel=4,
    )
    return "host"


# ---------------------------------------------------------------------------------------------------- training


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


@contextmanager
def training_lock(folder: Path | None) -> Iterator[None]:
    """Keep a training folder (None: nothing) to this process; the lock ends with the process, however that ends.

    Raises:
        CheckpointError: another process trains in this folder.
    """
    if folder is None:
        yield
        return
    import fcntl  # not on Windows, where loading works

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder} is in use: another process trains there; wait for it, or choose another folder"
            ) from None
        yield


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
        chosen: the epoch that :func:`load` is to give when not told which; None: the last.
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
    """Names and SHA-256 of the files that :func:`load` takes for an epoch; None: the one its training chose, else the last.

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
