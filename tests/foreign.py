"""Files as the paper's two code bases write them, of nets made here: the same names and shapes, none of their code."""

from __future__ import annotations

import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pizoo.models import InfPiMLP
from pizoo.models.base import PiNet


class DynArr:
    pass


class InfPiNet:
    pass


class MyLinear(nn.Linear):
    pass


class FinPiNet(nn.Module):
    pass


PICKLED_AS = {
    DynArr: ("inf.dynamicarray", "DynArr"),
    InfPiNet: ("inf.pimlp", "InfPiMLP"),
    MyLinear: ("inf.pimlp", "MyLinear"),
    FinPiNet: ("inf.pimlp", "FinPiMLP"),
}


@contextmanager
def paper_modules() -> Iterator[None]:
    """Under these names, and only here, pickle finds the classes above."""
    before = {cls: (cls.__module__, cls.__qualname__) for cls in PICKLED_AS}
    try:
        for cls, (module, name) in PICKLED_AS.items():
            cls.__module__, cls.__qualname__ = module, name
            for part in ("inf", module):
                sys.modules.setdefault(part, types.ModuleType(part))
            setattr(sys.modules[module], name, cls)
        yield
    finally:
        for cls, (module, name) in before.items():
            cls.__module__, cls.__qualname__ = module, name
        for module in ("inf", "inf.pimlp", "inf.dynamicarray"):
            sys.modules.pop(module, None)


def save(value: Any, path, legacy: bool = False) -> None:
    with paper_modules(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Couldn't retrieve source code"
        )  # the older format keeps it where there is some
        torch.save(value, path, _use_new_zipfile_serialization=not legacy)


# ---------------------------------------------------------------------------------------------------- infinite nets


def with_room(rows: Tensor) -> Tensor:
    """Rows in an array with room behind them that was never written."""
    array = torch.full((2 * len(rows) + 3, *rows.shape[1:]), torch.nan, dtype=rows.dtype)
    array[: len(rows)] = rows
    return array


def growable(rows: Tensor) -> DynArr:
    array = DynArr()
    array.__dict__.update(d=rows.shape[1] if rows.ndim > 1 else None, resizemult=2, device="cpu")
    array.__dict__.update(arr=with_room(rows), size=len(rows))
    return array


def alphas(model: PiNet) -> dict[str, float]:
    found = {name: model.hparams[name] for name in ("first_layer_alpha", "last_layer_alpha", "bias_alpha")}
    last = model.hparams["last_bias_alpha"]
    return found | {"last_bias_alpha": found["bias_alpha"] if last is None else last}


def layers(model: InfPiMLP) -> list[str]:
    return ["input", *(f"hidden.{i}" for i in range(len(model.hidden))), "output"]


def dictionary(model: InfPiMLP, array=lambda rows: with_room(rows)[: len(rows)]) -> dict[str, Any]:
    """What the first code base's converter writes."""
    state, names = model.state_dict(), layers(model)
    found: dict[str, Any] = {**alphas(model), "layernorm": model.hparams["layernorm"], "As": {1: state["input.A"]}}
    found |= {"Bs": {}, "Amult": {}, "biases": {}}
    for l, name in enumerate(names, start=1):
        if l > 1:
            for part, own in (("As", "A"), ("Bs", "B"), ("Amult", "amult")):
                found[part][l] = array(state[f"{name}.{own}"])
        # There is a bias wherever bias_alpha is not 0, at the read-out too when its own is.
        width = model.num_classes if name == "output" else model.hparams["r"]
        found["biases"][l] = state.get(f"{name}.bias", torch.full((width,), 7.0))
    if not found["bias_alpha"]:
        found["biases"] = None
    return found


def few_shot_state(model: InfPiMLP) -> dict[str, Any]:
    return dictionary(model, growable)


def pickled(model: InfPiMLP) -> InfPiNet:
    """A net saved whole, with what the last step left in it."""
    net, names = InfPiNet(), layers(model)
    net.__dict__.update(few_shot_state(model), d=model.d_in, dout=model.num_classes, r=model.hparams["r"])
    net.__dict__.update(L=len(names) - 1, device=torch.device("cpu"), _last_layer_grad_no_alpha=False, initsize=4)
    net.__dict__.update(dAs={2: [torch.zeros(3, 4)], 3: []}, X=torch.ones(5, 2).T, qs={2: torch.ones(2, 3).half()})
    return net


def newer_state(model: InfPiMLP) -> OrderedDict:
    """``state_dict`` of the newer library."""
    state, names = model.state_dict(), layers(model)
    stated = {name: torch.tensor(value) for name, value in alphas(model).items()}
    found = OrderedDict(stated)
    for i, name in enumerate(names):
        found[f"layers.{i}.A"] = state[f"{name}.A"]
        if name != "input":
            found[f"layers.{i}.Amult"], found[f"layers.{i}.B"] = state[f"{name}.amult"], state[f"{name}.B"]
            found[f"layers.{i}.layer_alpha"] = torch.tensor(1.0)
        alpha = "last_bias_alpha" if name == "output" else "bias_alpha"
        found[f"layers.{i}.bias_alpha"] = stated[alpha]
        if f"{name}.bias" in state:
            found[f"layers.{i}.bias"] = state[f"{name}.bias"]
        elif name != "input":
            found[f"layers.{i}.bias"] = torch.zeros(state[f"{name}.A"].shape[1])
    found._metadata = OrderedDict(version=1)
    return found


INFINITE = {f.__name__: f for f in (pickled, dictionary, few_shot_state, newer_state)}


# ---------------------------------------------------------------------------------------------------- finite nets


def weights(model: PiNet) -> list[tuple[Tensor, Tensor | None]]:
    return [(layer.weight.detach(), None if layer.bias is None else layer.bias.detach()) for layer in model.layers]


def omegas(model: PiNet) -> dict[int, Tensor]:
    found = {name: omega for name, omega in model.state_dict().items() if name.startswith("omega.")}
    return {int(name.removeprefix("omega.")) + 1: omega for name, omega in found.items()}


def pickled_finite(model: PiNet) -> FinPiNet:
    net, linears = FinPiNet(), {}
    for l, (weight, bias) in enumerate(weights(model), start=1):
        linears[l] = MyLinear(weight.shape[1], weight.shape[0], bias=bool(model.hparams["bias_alpha"]))
        linears[l].weight.data = weight
        if bias is not None:
            linears[l].bias.data = bias
        linears[l].bias_alpha, linears[l].device = model.hparams["bias_alpha"], "cpu"
    net._linears, net.linears, net.nonlin = nn.ModuleList(linears.values()), linears, nn.ReLU()
    net.__dict__.update(alphas(model), layernorm=False, omegas=omegas(model), L=len(linears) - 1)
    net.Gcovinvs = {l: torch.eye(3) for l in net.omegas}
    return net


def newer_finite_state(model: PiNet) -> OrderedDict:
    found = OrderedDict()
    for i, (weight, bias) in enumerate(weights(model)):
        found[f"layers.{i}.weight"] = weight
        alpha = "last_bias_alpha" if i == len(model.layers) - 1 else "bias_alpha"
        found[f"layers.{i}.bias_alpha"] = torch.tensor(alphas(model)[alpha])
        if bias is not None:
            found[f"layers.{i}.bias"] = bias
    for l, omega in omegas(model).items():
        found[f"layers.{l - 1}.omega"], found[f"layers.{l - 1}.gcovinv"] = omega, torch.eye(3)
    return found


def few_shot_finite_state(model: PiNet) -> OrderedDict:
    found = OrderedDict(no_adapt_readout=False, adapt_readout_only=True, omegas=omegas(model), Gcovinvs={})
    for i, (weight, bias) in enumerate(weights(model)):
        found[f"_linears.{i}.weight"] = weight
        found[f"_linears.{i}.bias"] = torch.full((len(weight),), 7.0) if bias is None else bias
    return found


FINITE = {f.__name__: f for f in (pickled_finite, newer_finite_state, few_shot_finite_state)}
