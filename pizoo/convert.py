"""Checkpoints of the paper's two code bases, converted without executing anything in them.

What a file states (:mod:`pizoo.layouts`) must be what the entry says, up to the rounding of the file's own numbers, and the
file's number is kept.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pizoo import checkpoint, segments, zoo
from pizoo.config import NETWORKS, build, read_config
from pizoo.data import DataNotFoundError
from pizoo.evaluation.entries import evaluate
from pizoo.evaluation.reproduction import recorded_mean
from pizoo.files import CheckpointError, read_json
from pizoo.layouts import Foreign, knows, understand
from pizoo.memory import NotEnoughMemory
from pizoo.models import InfPiMLP, MuMLP
from pizoo.models.base import check_state
from pizoo.pickles import StoredTensor, read_pickled
from pizoo.rows import growing_layers

SEGMENT_BYTES = 1 << 27  # of A and B: what is in memory at once
PROBE_INPUTS = 32
UNIT = 0.02  # how far norms of unit rows may be from 1: float16's rounding, and that of the norm they were divided by
ROUNDING = 1e-6  # relative, of an alpha that was written down in decimals


class Conversion(NamedTuple):
    """What a conversion wrote: where, from which layout, and how many rows each growing layer has."""

    folder: Path
    layout: str
    rows: dict[str, int]


class Comparison(NamedTuple):
    """A converted net's accuracy in percent beside its entry's; None: not known. ``reason``: why it was not measured."""

    measured: float | None
    recorded: float | None
    published: float | None
    reason: str


def convert(file: str | os.PathLike, entry: str | os.PathLike, folder: str | os.PathLike) -> Conversion:
    """Write a checkpoint of the paper's code as a checkpoint folder, which :func:`pizoo.load` reads.

    An infinite net is streamed into segments of 128 MB, so that the file may be far larger than memory; a finite net becomes
    one file with a probe.

    Args:
        file: what the paper's code saved.
        entry: what it is a net of, an entry's name or the folder of a checkpoint: its data, preprocessing and classes become
            the folder's, and its hyper-parameters must be the file's.
        folder: to be made.

    Raises:
        UnknownEntryError: no such entry.
        FileExistsError: the folder is there and not empty.
        CheckpointError: a file that is damaged, names anything that is not part of a network, is of no known layout, or
            holds another net than the entry's. Nothing was executed, and no folder made.
    """
    file, folder = Path(file), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already; give a folder to be made")
    config = read_config(zoo.folder_of(entry))
    if config["pizoo"]["class"] not in NETWORKS:
        raise CheckpointError(f"{entry} is a kernel, which has no network to convert")
    foreign = understand(read_pickled(file, knows), file)
    model, tensors = _matched(foreign, config["pizoo"], file, entry)
    config = {**config, "converted": {"file": file.name, "layout": foreign.layout}}
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        rows = (_write_infinite if isinstance(model, InfPiMLP) else _write_finite)(made, model, config, tensors)
        made.chmod(0o755)
        os.replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return Conversion(folder, foreign.layout, rows)


def compare(
    folder: str | os.PathLike,
    entry: str | os.PathLike,
    data_dir: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
) -> Comparison:
    """Measure a converted net where its data are, beside what its entry records (mean over seeds) and the paper published."""
    config, results = read_config(Path(folder)), zoo.folder_of(entry) / checkpoint.RESULTS
    recorded = read_json(results) if results.exists() else {}
    published = (zoo.recipe_of(config, entry).get("published") or {}).get("accuracy")
    measured, reason = None, ""
    try:
        measured = evaluate(folder, data_dir=data_dir, device=device)["accuracy"]
    except (DataNotFoundError, NotEnoughMemory) as error:
        reason = str(error)
    return Comparison(measured, recorded_mean(recorded), published, reason)


def _matched(
    foreign: Foreign, described: Mapping[str, Any], file: Path, entry: str | os.PathLike
) -> tuple[nn.Module, dict[str, StoredTensor]]:
    """A fresh net of the entry with the file's numbers for alphas, and what is to be loaded into it."""
    infinite, kind = "input.A" in foreign.tensors, described["class"]
    if infinite != (NETWORKS[kind] is InfPiMLP):
        raise CheckpointError(f"{file} holds {foreign.layout}; {entry} is a {kind}")
    hparams = dict(described["hparams"])
    wanted = {**hparams, "layernorm": hparams.get("layernorm", False)}
    if wanted["last_bias_alpha"] is None:
        wanted["last_bias_alpha"] = wanted["bias_alpha"]
    differing = [
        f"{name} is {value!r} in the file, {wanted[name]!r} in the entry"
        for name, value in foreign.stated.items()
        if name in wanted and not _agrees(value, wanted[name])
    ]
    if differing:
        raise CheckpointError(f"{file} holds another net than {entry}: {'; '.join(differing)}")
    hparams |= {name: value for name, value in foreign.stated.items() if name in hparams}
    description = {"class": kind, "hparams": hparams}
    tensors = dict(foreign.tensors)
    if infinite:
        dtypes = {str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items() if _is_row(name)}
        if len(dtypes) != 1 or not dtypes <= {"float16", "bfloat16", "float32", "float64"}:
            raise CheckpointError(f"{file} has rows of dtypes {sorted(dtypes)}; one floating-point dtype was wanted")
        description["rows_dtype"] = dtypes.pop()
    model = build(description)
    if isinstance(model, MuMLP):  # those of the first code base carry the Ω they were sampled with before
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("omega.")}
    if not infinite:  # its code keeps biases that an alpha of 0 multiplies
        own = model.state_dict()
        tensors = {name: tensor for name, tensor in tensors.items() if name in own or not name.endswith(".bias")}
    try:
        check_state(model, {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise CheckpointError(f"{file} holds {foreign.layout} that is not whole: {error}") from None
    return model, tensors


def _agrees(found: Any, wanted: Any) -> bool:
    """Whether a hyper-parameter is the entry's: counts are equal, alphas as far as the file's dtype can tell."""
    if not isinstance(found, float):
        return found == wanted
    stored = [wanted, *(torch.tensor(wanted, dtype=dtype).item() for dtype in (torch.float32, torch.float16))]
    return any(math.isclose(found, value, rel_tol=ROUNDING) for value in stored)


def _is_row(name: str) -> bool:
    return name.endswith((".A", ".B")) and not name.startswith("input.")


def _write_infinite(
    folder: Path, model: InfPiMLP, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> dict[str, int]:
    amults = {}
    for name in growing_layers(model):
        amult = tensors[f"{name}.amult"].read()
        amults[name] = amult.to(torch.promote_types(amult.dtype, torch.float32))
        _check_finite(tensors[f"{name}.amult"], amult, name, "amult")
    rest = {
        name: tensor.read() for name, tensor in tensors.items() if not _is_row(name) and not name.endswith(".amult")
    }
    for name, tensor in rest.items():
        _check_finite(tensors[name], tensor, *name.rsplit(".", 1))
    segments.save_in_parts(folder, model, config, _rows(tensors, amults), amults, rest)
    return {name: len(amult) for name, amult in amults.items()}


def _rows(tensors: Mapping[str, StoredTensor], layers: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The rows of all layers, a segment's worth at once, each checked to be what rows are."""
    for name in layers:
        stored = [tensors[f"{name}.{part}"] for part in ("A", "B")]
        row_bytes = sum(part.shape[1] * part.dtype.itemsize for part in stored)
        first, at_once = 0, max(1, SEGMENT_BYTES // row_bytes)
        for A, B in zip(*(part.blocks(at_once) for part in stored), strict=True):
            _check_finite(stored[0], A, name, "A", first)
            _check_unit(stored[1], B, name, first)
            yield name, A, B
            first += len(A)


def _check_finite(stored: StoredTensor, found: Tensor, layer: str, part: str, first: int = 0) -> None:
    wrong = found.isfinite().logical_not()
    if wrong.any():
        row = first + int(wrong.nonzero()[0, 0])
        raise CheckpointError(
            f"{stored.path}: {part} of {layer} is not finite in row {row}: it is damaged, or its training diverged"
        )


def _check_unit(stored: StoredTensor, B: Tensor, layer: str, first: int) -> None:
    """Room that was never written, or another layout, does not look like unit rows."""
    norms = torch.linalg.vector_norm(B, dim=1, dtype=torch.promote_types(B.dtype, torch.float32))
    wrong = ((norms - 1).abs() <= UNIT).logical_not().nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise CheckpointError(
            f"{stored.path}: row {first + row} of B of {layer} has norm {norms[row].item():.3g}; rows of B have norm 1"
        )


@torch.no_grad()
def _write_finite(
    folder: Path, model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> dict[str, int]:
    state = {name: tensor.read() for name, tensor in tensors.items()}
    for name, tensor in state.items():
        _check_finite(tensors[name], tensor, *name.rsplit(".", 1))
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    model.eval()
    x = torch.randn(PROBE_INPUTS, model.d_in, generator=torch.Generator().manual_seed(0))
    checkpoint.save(folder, model, config, {"x": x, "logits": checkpoint.probe_logits(model, x)})
    return {}
