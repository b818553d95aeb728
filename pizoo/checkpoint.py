"""Checkpoints: folders of plain JSON and safetensors. Nothing that is loaded is ever executed.

A shipped net::

    config.json         what builds the net and its preprocessing, under a SHA-256; class names; SHA-256 of the files below
    model.safetensors   its state
    probe.safetensors   a few dozen inputs with the net's logits: checks the weights in a second, without a data set
    results.json        the recorded numbers
    correct.safetensors which test images were classified correctly, by the shipped net and by every seed's

A net while it trains, and after, is a folder of segments (:mod:`pizoo.segments`). Every file of either is written under a
temporary name, flushed and renamed.

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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pizoo import models
from pizoo.config import CONFIG, build, complete, one_line, read_config, without_memory
from pizoo.data import Dataset
from pizoo.files import CheckpointError, flush_names, read_tensors, write_json, write_tensors
from pizoo.memory import HEADROOM, NotEnoughMemory, free_memory, is_out_of_memory
from pizoo.rows import Rows, check_place, growing_layers
from pizoo.segments import MANIFEST, read_epoch, read_manifest
from pizoo.stored import Segment, State

PROBE_INPUTS = 32
MODEL, PROBE, RESULTS, CORRECT = "model.safetensors", "probe.safetensors", "results.json", "correct.safetensors"
SHIPPED = "shipped"  # in CORRECT: the shipped net, beside those of the seeds
VERIFIED = (
    "verified"  # in CORRECT: the shipped net where `pizoo verify` takes a smaller problem instead of the recorded one
)
CPU = torch.device("cpu")


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


def seed_key(seed: int | str) -> str:
    """What a seed's net is called in CORRECT, and the folder of its training among those of other seeds; ``"*"``: of all."""
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
