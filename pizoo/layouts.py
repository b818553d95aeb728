"""The layouts in which the paper's two code bases saved their nets.

Five layouts are known, all files of ``torch.save`` (:mod:`pizoo.pickles` reads them):

- an infinite net pickled whole (``inf.pimlp.InfPiMLP``): dictionaries ``As``, ``Bs``, ``Amult``, ``biases`` by layer number
  from 1, of growable arrays (``arr``, of which the first ``size`` rows are in use), and the alphas;
- the same dictionaries alone: what the first code base's converter writes (tensors), and its few-shot nets (growable arrays);
- the ``state_dict`` of an infinite net of the newer library: ``layers.{i}.A|B|Amult|bias|bias_alpha`` and the alphas, i from 0.
  It does not say whether there is layernorm: that is as in the entry;
- a finite net pickled whole (``inf.pimlp.FinPiMLP``): ``linears`` and ``omegas`` by layer number, and the alphas;
- the ``state_dict`` of a finite net: ``layers.{i}.weight|bias|omega`` (newer library) or ``_linears.{i}.weight|bias`` and
  ``omegas``. It does not hold all alphas: what it lacks is the entry's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pizoo.files import CheckpointError
from pizoo.pickles import Inert, StoredTensor

INFINITE, FINITE = "InfPiMLP", ("FinPiMLP", "MetaFinPiMLP")
ARRAYS = ("DynArr", "CycArr")
CLASSES = {
    "pimlp": (INFINITE, "FinPiMLP", "MyLinear"),
    "dynamicarray": ARRAYS,
    "model": ("MetaFinPiMLP", "SafeMetaLinear"),
    "torch.nn.modules.container": ("ModuleList",),
    "torch.nn.modules.activation": ("ReLU",),
}
ALPHAS = ("first_layer_alpha", "last_layer_alpha", "bias_alpha", "last_bias_alpha")
MODULE_KEY = re.compile(r"layers\.(\d+)\.(A|B|Amult|bias|bias_alpha|layer_alpha)")
LINEAR_KEY = re.compile(r"(?:layers|_linears)\.(\d+)\.(weight|bias|bias_alpha|omega|gcovinv|pi_proj)")


class Foreign(NamedTuple):
    """A net as a file holds it.

    Attributes:
        layout: which one, in words.
        stated: the hyper-parameters that the file states or its shapes imply.
        tensors: by their name in our ``state_dict``.
    """

    layout: str
    stated: dict[str, Any]
    tensors: dict[str, StoredTensor]


def understand(value: Any, file: Path) -> Foreign:
    """Which net a file's value is.

    Raises:
        CheckpointError: none of the layouts; names what was found and what was wanted.
    """
    try:
        if isinstance(value, Inert) and isinstance(value.state, dict):
            if _last(value.name) == INFINITE:
                return _of_arrays(value.state, f"an infinite net pickled whole ({value.name})")
            if _last(value.name) in FINITE:
                return _of_module(value)
        if isinstance(value, dict):
            if "As" in value:
                return _of_arrays(value, "dictionaries of an infinite net")
            if "layers.0.A" in value:
                return _of_infinite_state(value)
            if {"layers.0.weight", "_linears.0.weight"} & value.keys():
                return _of_finite_state(value)
        raise _Misfit(
            f"{_told(value)}; known are a pickled InfPiMLP or FinPiMLP, dictionaries As, Bs, Amult and biases, and state_dicts "
            "with layers.0.A, layers.0.weight or _linears.0.weight"
        )
    except _Misfit as error:
        raise CheckpointError(f"{file} holds {error}") from None


class _Misfit(Exception):
    """What a file holds, and what was wanted; the message goes on after "FILE holds"."""


def knows(name: str) -> bool:
    """Whether a class may stand in a file. Where the paper's code lay on its authors' paths differs from file to file."""
    module = name.rpartition(".")[0]
    own = CLASSES.get(module if module.startswith("torch.") else module.rpartition(".")[2], ())
    return _last(name) in own


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _told(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, StoredTensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, Inert):
        return f"a {value.name[:80]}"
    if isinstance(value, dict):
        keys = ", ".join(ascii(key)[:40] for key in list(value)[:12])
        return f"a dictionary of {len(value)}: {keys or 'nothing'}"
    return f"a {type(value).__name__}"


def _take(mapping: Mapping[Any, Any], key: Any, kinds: type | tuple[type, ...], where: str) -> Any:
    """``mapping[key]``, of one of the kinds."""
    if key not in mapping:
        raise _Misfit(f"{where} without {key!r}: {_told(mapping)}")
    if not isinstance(mapping[key], kinds):
        wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise _Misfit(f"{where} whose {key!r} is {_told(mapping[key])}; wanted is a {wanted}")
    return mapping[key]


def _number(mapping: Mapping[Any, Any], key: str, where: str) -> float:
    """A number, or a tensor of one: then rounded to its dtype, as the net that wrote it computed."""
    value = _take(mapping, key, (int, float, StoredTensor), where)
    if isinstance(value, StoredTensor):
        if math.prod(value.shape) != 1:
            raise _Misfit(f"{where} whose {key!r} is {_told(value)}; wanted is one number")
        value = value.read().item()
    if not math.isfinite(value):
        raise _Misfit(f"{where} whose {key!r} is {value}; wanted is a finite number")
    return float(value)


def _used(arrays: Mapping[Any, Any], layer: int, where: str) -> StoredTensor:
    """The rows in use of a growable array; behind them lies room that was never written."""
    array = _take(arrays, layer, (StoredTensor, Inert), where)
    if isinstance(array, StoredTensor):
        return array
    state = array.state or {}
    if _last(array.name) not in ARRAYS:
        raise _Misfit(f"{where} whose {layer} is {_told(array)}; wanted is a tensor or a DynArr")
    whole, size = _take(state, "arr", StoredTensor, where), _take(state, "size", int, where)
    if not whole.shape or not 0 < size <= whole.shape[0]:
        raise _Misfit(f"{where} whose {layer} uses {size} rows of {_told(whole)}")
    return whole.first(size)


def _of_arrays(found: Mapping[str, Any], layout: str) -> Foreign:
    parts = {part: _take(found, part, dict, layout) for part in ("As", "Bs", "Amult")}
    biases = _take(found, "biases", (dict, type(None)), layout) or {}
    last = len(parts["As"])
    if last < 2 or set(parts["As"]) != set(range(1, last + 1)):
        raise _Misfit(f"{layout} whose As is {_told(parts['As'])}; wanted are layers 1, 2, ...")
    tensors = {"input.A": _take(parts["As"], 1, StoredTensor, f"{layout} with As")}
    for l in range(2, last + 1):
        for part, name in (("As", "A"), ("Bs", "B"), ("Amult", "amult")):
            tensors[f"{_layer(l, last)}.{name}"] = _used(parts[part], l, f"{layout} with {part}")
    stated = {name: _number(found, name, layout) for name in ALPHAS}
    stated["layernorm"] = _take(found, "layernorm", bool, layout)
    if not biases:  # its code makes none at all where bias_alpha is 0
        if stated["bias_alpha"]:
            raise _Misfit(f"{layout} without biases, though its bias_alpha is {stated['bias_alpha']}")
        stated["last_bias_alpha"] = 0.0
    for l in range(1, last + 1) if biases else ():
        if stated["last_bias_alpha" if l == last else "bias_alpha"]:
            tensors[f"{_layer(l, last)}.bias"] = _take(biases, l, StoredTensor, f"{layout} with biases")
    return Foreign(layout, _infinite_shapes(tensors, last - 1) | stated, tensors)


def _layer(l: int, last: int) -> str:
    """Our name of layer ``l`` of 1..last."""
    return "input" if l == 1 else "output" if l == last else f"hidden.{l - 2}"


def _infinite_shapes(tensors: Mapping[str, StoredTensor], hidden_layers: int) -> dict[str, int]:
    first, last = tensors["input.A"], tensors["output.A"]
    if not len(first.shape) == len(last.shape) == 2:
        raise _Misfit(f"an infinite net whose first A is {_told(first)}, its last {_told(last)}; wanted are matrices")
    return {"d_in": first.shape[0], "r": first.shape[1], "d_out": last.shape[1], "hidden_layers": hidden_layers}


def _of_infinite_state(found: Mapping[str, Any]) -> Foreign:
    layout = "a state_dict of an infinite net"
    layers = _layers(found, MODULE_KEY, layout, ALPHAS)
    last, tensors = len(layers), {}
    for i, layer in enumerate(layers):
        parts = {"A": "A"} if i == 0 else {"A": "A", "B": "B", "Amult": "amult"}
        for part, name in parts.items():
            tensors[f"{_layer(i + 1, last)}.{name}"] = _take(layer, part, StoredTensor, f"{layout} with layers.{i}")
    stated = {name: _number(found, name, layout) for name in ALPHAS}
    for i, layer in enumerate(layers):
        where, name = f"{layout} with layers.{i}", "last_bias_alpha" if i == last - 1 else "bias_alpha"
        # The net multiplied by the layer's own; where the two differ, nobody can know which was meant.
        if (alpha := _number(layer, "bias_alpha", where)) != stated[name]:
            raise _Misfit(f"{where} whose bias_alpha is {alpha:g}, though its {name} is {stated[name]:g}")
        if alpha:
            tensors[f"{_layer(i + 1, last)}.bias"] = _take(layer, "bias", StoredTensor, where)
        elif "bias" in layer and _take(layer, "bias", StoredTensor, where).read().count_nonzero():
            raise _Misfit(f"{where} whose bias_alpha is 0 and whose bias is not: that library adds it all the same")
    return Foreign(layout, _infinite_shapes(tensors, last - 1) | stated, tensors)


def _layers(found: Mapping[str, Any], pattern: re.Pattern, layout: str, more: tuple[str, ...]) -> list[dict[str, Any]]:
    """The entries of a state_dict by layer; all others must be among ``more``."""
    layers: dict[int, dict[str, Any]] = {}
    for key, value in found.items():
        if match := pattern.fullmatch(str(key)):
            layers.setdefault(int(match[1]), {})[match[2]] = value
        elif key not in more:
            raise _Misfit(f"{layout} with {ascii(key)[:80]}, which is not known there")
    if len(layers) < 2 or set(layers) != set(range(len(layers))):
        raise _Misfit(f"{layout} with layers {sorted(layers)[:12]}; wanted are 0, 1, ...")
    return [layers[i] for i in range(len(layers))]


def _of_module(found: Inert) -> Foreign:
    layout = f"a finite net pickled whole ({found.name})"
    linears = _take(found.state, "linears", dict, layout)
    if len(linears) < 2 or set(linears) != set(range(1, len(linears) + 1)):
        raise _Misfit(f"{layout} whose linears are {_told(linears)}; wanted are layers 1, 2, ...")
    layers = []
    for l in range(1, len(linears) + 1):
        where = f"{layout} with linears[{l}]"
        state = _take(linears, l, Inert, layout).state or {}
        parameters = _take(state, "_parameters", dict, where)
        layers.append({name: value for name, value in parameters.items() if value is not None})
    stated = {name: _number(found.state, name, layout) for name in ALPHAS}
    stated["layernorm"] = _take(found.state, "layernorm", bool, layout)
    return _of_linears(layers, found.state.get("omegas"), stated, layout)


def _of_finite_state(found: Mapping[str, Any]) -> Foreign:
    layout = "a state_dict of a finite net"
    layers = _layers(found, LINEAR_KEY, layout, ("omegas", "Gcovinvs", "no_adapt_readout", "adapt_readout_only"))
    omegas = found.get("omegas")
    if any("omega" in layer for layer in layers):
        omegas = {i + 1: layer["omega"] for i, layer in enumerate(layers) if "omega" in layer}
    alphas: dict[str, float] = {}
    for i, layer in enumerate(layers):
        where, name = f"{layout} with layers.{i}", "last_bias_alpha" if i == len(layers) - 1 else "bias_alpha"
        if "bias_alpha" in layer and (alpha := _number(layer, "bias_alpha", where)) != alphas.setdefault(name, alpha):
            raise _Misfit(f"{where} whose bias_alpha is {alpha:g}, though that of layers before is {alphas[name]:g}")
    return _of_linears(layers, omegas, alphas, layout)


def _of_linears(layers: list[dict[str, Any]], omegas: Any, stated: dict[str, Any], layout: str) -> Foreign:
    tensors = {}
    for i, layer in enumerate(layers):
        tensors[f"layers.{i}.weight"] = _take(layer, "weight", StoredTensor, f"{layout} with layer {i + 1}")
        if "bias" in layer:
            tensors[f"layers.{i}.bias"] = _take(layer, "bias", StoredTensor, f"{layout} with layer {i + 1}")
    for i in range(len(layers) - 1) if omegas else ():
        tensors[f"omega.{i}"] = _take(omegas, i + 1, StoredTensor, f"{layout} with omegas")
    first, last = tensors["layers.0.weight"], tensors[f"layers.{len(layers) - 1}.weight"]
    if not len(first.shape) == len(last.shape) == 2:
        raise _Misfit(f"{layout} whose first weight is {_told(first)}, its last {_told(last)}; wanted are matrices")
    shapes = {"d_in": first.shape[1], "width": first.shape[0], "d_out": last.shape[0], "hidden_layers": len(layers) - 1}
    return Foreign(layout, shapes | stated, tensors)
