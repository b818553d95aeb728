"""What builds a net, as plain JSON: the ``config.json`` of a checkpoint.

It holds, under ``pizoo``, the version of the checkpoint format, the net's class and hyper-parameters, the SHA-256 of the files
beside it, and one of its own, of what decides the net's function and what that is measured on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pizoo import models
from pizoo.files import CheckpointError, json_sha256, read_json
from pizoo.rows import Rows

FORMAT = 1  # raised when an older pizoo would misread what is written now; every format from 1 on stays readable
CONFIG = "config.json"
DEEPEST = 1000  # layers
NETWORKS = {cls.__name__: cls for cls in (models.InfPiMLP, models.FinPiMLP, models.MuMLP)}
KERNELS = {
    cls.__name__: cls for cls in (models.NNGPRegressor, models.NTKRegressor, models.NNGPLearner, models.NTKLearner)
}


class NewerFormatError(CheckpointError):
    """A checkpoint that a later version of pizoo wrote."""


def describe(model: nn.Module) -> dict[str, Any]:
    """What :func:`build` needs to make a net like ``model``, as plain JSON values; CheckpointError if it has no read-out."""
    if not model.num_classes:
        raise CheckpointError("a net without a read-out cannot be saved; reset_classifier gives it one")
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
        if name in KERNELS:
            return KERNELS[name](**hparams).to(device)
        if name not in NETWORKS:
            known = ", ".join((*NETWORKS, *KERNELS))
            raise CheckpointError(f"the checkpoint is of a {name!r}; this version of pizoo knows {known}")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        if name == "InfPiMLP" and dtype is None and "rows_dtype" in description:
            options["rows_dtype"] = getattr(torch, description["rows_dtype"])
        return NETWORKS[name](**hparams, **options)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's hyper-parameters do not fit {name}: {one_line(error)}") from None


def without_memory(description: Mapping[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """A net as described that has shapes and no numbers: whatever sizes a file asks for, none is allocated before the files
    with the numbers are seen to have it.
    """
    for name in ("hidden_layers", "depth"):
        layers = description["hparams"].get(name, 1)
        if isinstance(layers, int) and layers > DEEPEST:
            raise CheckpointError(f"the checkpoint's {name} is {layers}; at most {DEEPEST} are loaded")
    shapes = {key: value for key, value in description.items() if key != "rows_dtype"}
    try:
        return build(shapes, "meta", dtype)
    except CheckpointError:
        raise
    except (RuntimeError, OverflowError) as error:
        raise CheckpointError(f"the checkpoint's hyper-parameters are of no net: {one_line(error)}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint.

    Raises:
        NewerFormatError: of a later version of the format.
        CheckpointError: none there, damaged, or of no version of the format.
    """
    config, path = read_json(folder / CONFIG), folder / CONFIG
    found = config.get("pizoo") if isinstance(config, dict) else None
    check_format(path, found, "class", "hparams", "files", "sha256")
    named = isinstance(found["hparams"], dict) and isinstance(found["files"], dict)
    if not named or not all(isinstance(digest, str) for digest in found["files"].values()):
        raise CheckpointError(f"{path}: hparams or files of pizoo are not what they must be: it is damaged")
    if found["sha256"] != config_digest(config):
        raise CheckpointError(
            f"{path}: its class, hparams, rows_dtype or recipe.data are not those it was written with: it is damaged, or "
            "was changed by hand"
        )
    beside(path, found["files"])
    return config


def check_format(path: Path, found: Any, *keys: str) -> None:
    """Raise CheckpointError unless ``found``, read from ``path``, is of this format and has the keys."""
    version = found.get("format") if isinstance(found, dict) else None
    if version != FORMAT:
        newer = isinstance(version, int) and version > FORMAT
        kind, remedy = (NewerFormatError, ": a later one wrote it") if newer else (CheckpointError, "")
        raise kind(f"{path} has format {version!r}; this version of pizoo reads format {FORMAT}{remedy}")
    if missing := [key for key in keys if key not in found]:
        raise CheckpointError(f"{path} has no {missing[0]!r}: it is damaged")


def beside(path: Path, files: Any) -> dict[str, str]:
    """The names of files and their SHA-256 that ``path`` holds; CheckpointError unless they are those of files beside it."""
    if not isinstance(files, dict):
        raise CheckpointError(f"{path} does not name its files with their SHA-256: it is damaged")
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{path} names {name!r}, which is no file beside it")
    return files


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
