"""Checkpoints: folders of plain JSON and safetensors. Nothing that is loaded is ever executed.

A shipped net::

    config.json         what builds the net and its preprocessing, under a SHA-256; class names; SHA-256 of the files below
    model.safetensors   its state
    probe.safetensors   a few dozen inputs with the net's logits: checks the weights in a second, without a data set
    results.json        the recorded numbers

A net while it trains (and after: any epoch can be loaded)::

    config.json
    checkpoint.json           the manifest: epochs, and the segments each is made of, with SHA-256, its own included
    rows-00000.safetensors    A and B of the rows the net started with; then one immutable segment an epoch, its new rows
    state-00001.safetensors   what else an epoch's net is: input layer, biases, amult and its decay factor, optimizer

A finite net has no segments, and its state files hold all of it. Every file is written under a temporary name, flushed and
renamed, the manifest last: whatever interrupts a save, the epochs before it stay loadable.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pizoo import models
from pizoo.data import Dataset
from pizoo.models.base import persistent_tensors
from pizoo.rows import Rows

FORMAT = 1
PROBE_INPUTS = 32
CONFIG, MANIFEST, MODEL, PROBE, RESULTS = (
    "config.json",
    "checkpoint.json",
    "model.safetensors",
    "probe.safetensors",
    "results.json",
)
LOCK = "train.lock"
RowBlock = tuple[Tensor, Tensor, Tensor]  # A, B, amult of some of a layer's rows, the decay factor multiplied in
NETWORKS = {cls.__name__: cls for cls in (models.InfPiMLP, models.FinPiMLP, models.MuMLP)}
REGRESSORS = {cls.__name__: cls for cls in (models.NNGPRegressor, models.NTKRegressor)}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be loaded or saved; the message names the file and what is wrong with it."""


# ---------------------------------------------------------------------------------------------------- files


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a temporary file beside ``path``, flush it to disk and rename it to ``path``.

    Raises:
        CheckpointError: the disk is full; what stood at ``path`` before still does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a kill leaves behind, the next write replaces
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors writes files that only their owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_names(path.parent)
    except (OSError, SafetensorError) as error:
        # safetensors reports what the system said as text alone.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise CheckpointError(
                f"no space left on the disk to write {path}; what was saved before is untouched"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _flush_names(folder: Path) -> None:
    """Flush a folder itself to disk: without it a power cut may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors as safetensors and return the file's SHA-256."""
    contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary))
    return sha256(path)


def read_json(path: Path) -> Any:
    """Raises CheckpointError if there is no such file or it is not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: {path.parent} is not a checkpoint, or lost a file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): it is damaged") from None


def read_tensors(path: Path, digest: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        digest: the SHA-256 it must have; None: not checked.

    Raises:
        CheckpointError: no such file, a Git LFS pointer in its place, another digest, not safetensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; the checkpoint cannot be loaded without it")
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")
    if digest is not None and (found := sha256(path)) != digest:
        raise CheckpointError(
            f"{path} has SHA-256 {found[:16]}…, recorded was {digest[:16]}…: it is damaged or another file"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}): it is truncated or damaged"
        ) from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """SHA-256 of a JSON value, written with sorted keys and no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------- nets


def describe(model: nn.Module) -> dict[str, Any]:
    """What :func:`build` needs to make a net like ``model``, as plain JSON values."""
    described = {"class": type(model).__name__, "hparams": model.hparams}
    if rows := next((module for module in model.modules() if isinstance(module, Rows)), None):
        described["rows_dtype"] = str(rows.A.dtype).removeprefix("torch.")
    if (compacted := getattr(model, "compacted", None)) is not None:
        described["compacted"] = compacted
    return described


def complete(config: Mapping[str, Any], model: nn.Module, files: Mapping[str, str]) -> dict[str, Any]:
    """``config`` with what builds ``model``, the SHA-256 of ``files``, and the one of what decides the net's function."""
    found = {**config, "pizoo": {"format": FORMAT, **describe(model), "files": dict(files)}}
    found["pizoo"]["sha256"] = config_digest(found)
    return found


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of what decides a net's function and what it is measured on: hyper-parameters, data and preprocessing.

    All else may be edited: descriptions, class names, published numbers, and where somebody's own data lie.
    """
    built = {key: config["pizoo"].get(key) for key in ("class", "hparams", "rows_dtype")}
    recipe = config.get("recipe")
    data = recipe.get("data") if isinstance(recipe, dict) else None
    if isinstance(data, dict):
        data = {key: value for key, value in data.items() if key != "path"}
    return json_sha256({**built, "data": data})


def build(description: Mapping[str, Any], device=None, dtype: torch.dtype | None = None) -> nn.Module:
    """A freshly initialised net from :func:`describe`'s description.

    Args:
        dtype: of parameters and rows; None: float32 parameters, rows as described.

    Raises:
        CheckpointError: an unknown class, or hyper-parameters it does not take.
    """
    name, hparams = description.get("class"), description.get("hparams", {})
    try:
        if name in REGRESSORS:
            return REGRESSORS[name](**hparams).to(device)
        if name not in NETWORKS:
            known = ", ".join((*NETWORKS, *REGRESSORS))
            raise CheckpointError(f"the checkpoint is of a {name!r}; this version of pizoo knows {known}")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        if name == "InfPiMLP" and dtype is None and "rows_dtype" in description:
            options["rows_dtype"] = getattr(torch, description["rows_dtype"])
        return NETWORKS[name](**hparams, **options)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's hyper-parameters do not fit {name}: {error}") from None


def packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with float32 tensors in float16 where that holds every number exactly: a smaller file, the same net."""
    short = {name: tensor.half() for name, tensor in state.items() if tensor.dtype == torch.float32}
    return {**state, **{name: tensor for name, tensor in short.items() if torch.equal(tensor.float(), state[name])}}


def save(folder: Path, model: nn.Module, config: Mapping[str, Any], probe_x: Tensor, probe_logits: Tensor) -> None:
    """Write a shipped checkpoint: weights, probe, and ``config`` completed by what builds and checks the net.

    Args:
        probe_x, probe_logits: inputs as the net takes them [n, ...] and its logits [n, classes].
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A disk that fills up leaves an older checkpoint whole; a kill between the renames leaves digests that do not fit.
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
        staged = Path(scratch)
        digests = {
            MODEL: write_tensors(staged / MODEL, packed(model.state_dict())),
            PROBE: write_tensors(staged / PROBE, {"x": probe_x, "logits": probe_logits}),
        }
        write_json(staged / CONFIG, complete(config, model, digests))
        for name in (MODEL, PROBE, CONFIG):
            os.replace(staged / name, folder / name)
        _flush_names(folder)


@torch.no_grad()
def save_with_probe(
    folder: Path, model: nn.Module, config: Mapping[str, Any], dataset: Dataset, normalize: Callable[..., Tensor]
) -> None:
    """:func:`save` with the first inputs of the data set's test part (its training part if it has none) as the probe."""
    x = dataset.train_x if dataset.test_x is None else dataset.test_x
    anchor = next(iter((*model.parameters(), *model.buffers())))
    probe = normalize(x[:PROBE_INPUTS].to(anchor.device), anchor.dtype)
    save(folder, model, config, probe, model.eval()(probe))


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint.

    Raises:
        CheckpointError: none there, damaged, or of another version of the format.
    """
    config, path = read_json(folder / CONFIG), folder / CONFIG
    found = config.get("pizoo") if isinstance(config, dict) else None
    _check_format(path, found, "class", "hparams", "files", "sha256")
    if found["sha256"] != config_digest(config):
        raise CheckpointError(
            f"{path}: its class, hparams, rows_dtype or recipe.data are not those it was written with: it is damaged, or "
            "was changed by hand"
        )
    return config


def _check_format(path: Path, found: Any, *keys: str) -> None:
    """Raise CheckpointError unless ``found``, read from ``path``, is of this format and has the keys."""
    version = found.get("format") if isinstance(found, dict) else None
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version!r}; this version of pizoo reads format {FORMAT}")
    if missing := [key for key in keys if key not in found]:
        raise CheckpointError(f"{path} has no {missing[0]!r}: it is damaged")


def load(
    folder: Path, epoch: int | None = None, device=None, dtype: torch.dtype | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a net and its ``config.json`` from a shipped or a training checkpoint.

    Args:
        epoch: of a training checkpoint, the epoch to load; None: the last.
        dtype: None: float32, rows as stored.

    Raises:
        CheckpointError: anything missing, damaged, or of another architecture than its config says.
    """
    folder = Path(folder)
    config = read_config(folder)
    if _in_training(folder, epoch):
        state = read_epoch(folder, epoch).model_state
    else:
        state = read_tensors(folder / MODEL, config["pizoo"]["files"].get(MODEL))
    return _built(folder, config, state, device, dtype), config


def load_streamed(
    folder: Path, epoch: int | None = None, device=None
) -> tuple[nn.Module, dict[str, Any], dict[str, list[RowBlock]]]:
    """As :func:`load`, but the rows of a training checkpoint stay in their files, to be read block by block.

    Returns:
        the net, of a training checkpoint with its first rows only; its config; per growing layer all its rows.

    Raises:
        CheckpointError: as :func:`load`.
    """
    folder = Path(folder)
    if not _in_training(folder, epoch):
        model, config = load(folder, device=device)
        return model, config, {name: [layer.block] for name, layer in growing_layers(model).items()}
    config, found = read_config(folder), read_epoch(folder, epoch)
    rows = {layer: found.rows(layer) for layer in found.stored}
    first = {
        f"{layer}.{name}": tensor
        for layer, blocks in rows.items()
        for name, tensor in zip(("A", "B", "amult"), blocks[0], strict=True)
    }
    return _built(folder, config, found.dense | first, device), config, rows


def _in_training(folder: Path, epoch: int | None) -> bool:
    """Whether to load from a folder's training checkpoint, not its shipped net; CheckpointError for an epoch of the latter."""
    training = (folder / MANIFEST).exists() and (epoch is not None or not (folder / MODEL).exists())
    if epoch is not None and not training:
        raise CheckpointError(f"{folder} holds one net, not epochs: epoch={epoch} cannot be loaded from it")
    return training


def _built(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], device, dtype=None) -> nn.Module:
    model = build(config["pizoo"], device, dtype)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} does not hold what its {CONFIG} says: {error}") from None
    if "compacted" in config["pizoo"]:
        model.compacted = config["pizoo"]["compacted"]
    return model.eval()


# ---------------------------------------------------------------------------------------------------- training


class Epoch:
    """One epoch of a training checkpoint, read back.

    Attributes:
        record: its entry in the manifest (epoch, step, metrics, ...).
        dense: the part of its net's ``state_dict`` that is not rows.
        stored: name of a growing layer -> (amult as stored, decay): resuming goes on from these, bit for bit.
        optimizer: tensors of the optimizer, by name.
    """

    def __init__(self, record: dict[str, Any], tensors: dict[str, Tensor], segments: list[dict[str, Tensor]]):
        self.record = record
        parts = {"model": {}, "amult": {}, "decay": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = tensor
        self.optimizer: dict[str, Tensor] = parts["optimizer"]
        self.stored = {layer: (amult, parts["decay"][layer].item()) for layer, amult in parts["amult"].items()}
        self.dense: dict[str, Tensor] = parts["model"]
        self._segments = segments

    def rows(self, layer: str) -> list[RowBlock]:
        """The rows of a growing layer, a block per segment, ``amult`` with the decay factor multiplied in.

        ``A`` and ``B`` are views of the files, read when they are used: they hold no memory that the system cannot take back.

        Raises:
            CheckpointError: the segments hold other rows than the state says.
        """
        amult, decay = self.stored[layer]
        parts = [(s[f"{layer}.A"], s[f"{layer}.B"]) for s in self._segments if f"{layer}.A" in s]
        counts = [len(A) for A, _ in parts]
        if sum(counts) != len(amult):
            raise CheckpointError(
                f"{layer}: the segments hold {sum(counts)} rows, the state {len(amult)}: it is damaged"
            )
        return [(A, B, part) for (A, B), part in zip(parts, (amult * decay).split(counts), strict=True)]

    @property
    def model_state(self) -> dict[str, Tensor]:
        """``state_dict`` of its net."""
        state = dict(self.dense)
        for layer in self.stored:
            joined = (torch.cat(parts) for parts in zip(*self.rows(layer), strict=True))
            state |= {f"{layer}.{name}": tensor for name, tensor in zip(("A", "B", "amult"), joined, strict=True)}
        return state


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


def growing_layers(model: nn.Module) -> dict[str, Rows]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Rows)}


def start_training(folder: Path, model: nn.Module, config: Mapping[str, Any]) -> None:
    """Begin a training checkpoint in an empty folder: config, first segment, manifest."""
    write_json(folder / CONFIG, complete(config, model, {}))
    manifest = {"format": FORMAT, "epochs": [], "segments": []}
    _write_segment(folder, model, manifest)
    _write_manifest(folder, manifest)


def save_epoch(
    folder: Path,
    model: nn.Module,
    record: Mapping[str, Any],
    optimizer: Mapping[str, Tensor],
    keep_states: bool,
) -> None:
    """Add an epoch: a segment with the rows appended since the last, a state file, then the manifest that names them.

    Args:
        record: JSON values to keep with it; ``record["epoch"]`` numbers it.
        optimizer: tensors of the optimizer, by name.
        keep_states: keep earlier epochs loadable; False (finite nets, whose state is the whole net) removes their files
            and keeps their records.
    """
    manifest = read_manifest(folder)
    _write_segment(folder, model, manifest)
    layers = growing_layers(model)
    rows = {f"{name}.{part}" for name in layers for part in ("A", "B", "amult")}
    tensors = {f"model/{name}": tensor for name, tensor in persistent_tensors(model) if name not in rows}
    tensors |= {f"amult/{name}": layer.stored_amult for name, layer in layers.items()}
    tensors |= {f"decay/{name}": torch.tensor(layer.decay, dtype=torch.float64) for name, layer in layers.items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}
    state = f"state-{record['epoch']:05d}.safetensors"
    entry = {
        **record,
        "state": {"file": state, "sha256": write_tensors(folder / state, tensors)},
        "segments": len(manifest["segments"]),
    }
    if not keep_states:
        manifest["epochs"] = [{**old, "state": None} for old in manifest["epochs"]]
    manifest["epochs"].append(entry)
    _write_manifest(folder, manifest)
    if not keep_states:
        for file in folder.glob("state-*.safetensors"):
            if file.name != state:
                file.unlink()


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest = read_json(folder / MANIFEST)
    _check_format(folder / MANIFEST, manifest, "epochs", "segments", "sha256")
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
    manifest = read_manifest(folder)
    try:
        records = {record["epoch"]: record for record in manifest["epochs"] if record["state"]}
        if not records:
            raise CheckpointError(f"{folder} holds no finished epoch yet")
        first, last = min(records), max(records)
        wanted = last if epoch is None else epoch
        if wanted not in records:
            held = f"epochs {first} to {last}" if last > first else f"epoch {last} alone"
            raise CheckpointError(f"{folder} holds {held}; epoch={epoch} is not there")
        record = records[wanted]
        segments = [read_tensors(folder / s["file"], s["sha256"]) for s in manifest["segments"][: record["segments"]]]
        return Epoch(record, read_tensors(folder / record["state"]["file"], record["state"]["sha256"]), segments)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} lacks something ({error!r}): it is damaged") from None


def _write_segment(folder: Path, model: nn.Module, manifest: dict[str, Any]) -> None:
    """Write the rows no segment holds yet, if there are any, and enter them into the manifest."""
    tensors, ranges = {}, {}
    for name, layer in growing_layers(model).items():
        held = max((s["rows"][name][1] for s in manifest["segments"] if name in s["rows"]), default=0)
        if layer.count > held:
            tensors |= {f"{name}.A": layer.A[held:], f"{name}.B": layer.B[held:]}
            ranges[name] = [held, layer.count]
    if tensors:
        file = f"rows-{len(manifest['segments']):05d}.safetensors"
        manifest["segments"].append({"file": file, "sha256": write_tensors(folder / file, tensors), "rows": ranges})
