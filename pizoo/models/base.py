"""What all networks of the zoo share: inputs, features, and a description from which they can be rebuilt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pizoo.models.adapt import Adaptable, NearestNeighbour, check_layout
from pizoo.models.pretrained import Pretrained
from pizoo.nn import InfPiInput, InfPiLinear, check_finite, check_positive
from pizoo.rows import Rows, rows_problem


class PiNet(Adaptable, Pretrained):
    """Base of :class:`InfPiMLP`, :class:`FinPiMLP` and :class:`MuMLP`.

    Attributes:
        hparams: the constructor's arguments as plain JSON values: ``type(net)(**net.hparams)`` builds a net like it.
        d_in, num_classes: input dimension and number of outputs; 0 after ``reset_classifier(0)``.
        num_features: size of what :meth:`features` gives.
    """

    def __init__(self, **hparams: Any):
        super().__init__()
        check_positive(**{k: v for k, v in hparams.items() if k in ("d_in", "d_out", "r", "width", "hidden_layers")})
        alphas = {name: value for name, value in hparams.items() if name.endswith("alpha")}
        check_finite(
            **{name: value for name, value in alphas.items() if name != "last_bias_alpha" or value is not None}
        )
        self.hparams = hparams
        self.d_in: int = hparams["d_in"]
        self.num_classes: int = hparams["d_out"]
        self.num_features: int = hparams.get("width") or hparams["r"]

    def flatten(self, x: Tensor) -> Tensor:
        """[B, d] or [B, C, H, W] (channel-first) -> [B, d].

        Raises:
            ValueError: another number of values per sample than ``d_in``, images of another size than ``input_size``, or an
                empty batch.
        """
        if x.ndim < 2 or math.prod(x.shape[1:]) != self.d_in:
            raise ValueError(
                f"x has shape {list(x.shape)}; it must be [B, {self.d_in}] or [B, C, H, W] with C*H*W = {self.d_in}"
            )
        if self.input_size is not None and x.shape[1:] != self.input_size:
            check_layout(x.shape[1:], self.input_size)
        return x.flatten(1)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the read-out by a freshly initialised one with ``num_classes`` outputs; the rest stays (timm's name).

        With 0 there is none: the net gives its features, until it is given another. Of a net loaded from a checkpoint,
        ``config`` follows; classes get numbers for names. ``pretrained_cfg`` goes on describing the pretrained weights, as in
        timm.
        """
        if num_classes != 0 or isinstance(num_classes, bool):
            check_positive(num_classes=num_classes)
        self.hparams["d_out"] = self.num_classes = num_classes
        if (config := getattr(self, "config", None)) is not None:
            self.config = {**config, "num_classes": num_classes, "class_names": [str(k) for k in range(num_classes)]}
        self.new_readout()

    def get_classifier(self) -> nn.Module:
        """The read-out (timm's name)."""
        return self.readout

    def new_readout(self) -> None:
        """A fresh read-out for ``num_classes``, of the old one's device and dtypes; see the subclasses."""
        raise NotImplementedError

    def preactivation(self, x: Tensor) -> Tensor:
        """The last hidden pre-activation: [B, d_in] or [B, C, H, W] -> [B, r] or [B, width]."""
        h = self.flatten(x)
        *before, last = range(len(self.all_layers) - 1)
        for l in before:
            h = self.activation(self.call_layer(l, h))
        return self.call_layer(last, h)

    def features(self, x: Tensor) -> Tensor:
        """What the read-out takes and the feature kernel uses.

        The last hidden pre-activation g [B, r] of an infinite net, post-activation [B, width] of a finite one.
        """
        return self.activation(self.preactivation(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """:meth:`features` (timm's name)."""
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """From features to outputs (timm's name); with ``pre_logits`` what the read-out takes: the features themselves."""
        return x if pre_logits else self.readout(x)

    def forward(self, x: Tensor) -> Tensor:
        """[B, d_in] or [B, C, H, W] -> [B, num_classes]; without a read-out its features."""
        return self.forward_head(self.forward_features(x))

    @torch.no_grad()
    def nearest_neighbour(self, support_x: Tensor, support_y: Tensor) -> NearestNeighbour:
        """A predictor that gives queries the label of the nearest support sample; arguments as for :meth:`adapt`."""
        x, y = self.support_sets(support_x, support_y)
        return NearestNeighbour(self, x, y, single=support_y.ndim == 1)

    def feature_kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """Feature kernel between two sets of :meth:`features`: [n, k], [m, k] -> [n, m]."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """As torch's; growing layers take any number of rows. A state that does not fit leaves the net as it was.

        Raises:
            RuntimeError: missing or unexpected keys (when ``strict``), shapes that do not fit.
        """
        check_state(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict, assign)


class InfiniteLayers(NamedTuple):
    """The layers of an infinite net: what :class:`InfPiMLP` holds and what a finite net is sampled from."""

    input: InfPiInput
    hidden: list[InfPiLinear]
    output: InfPiLinear


def infinite_layers(hparams: Mapping[str, Any], device=None, dtype: torch.dtype | None = None) -> InfiniteLayers:
    """Freshly initialised layers of the infinite net with these hyper-parameters (of :class:`InfPiMLP`)."""
    d_in, r, bias_alpha = hparams["d_in"], hparams["r"], hparams["bias_alpha"]
    factory = {"device": device, "dtype": dtype}
    hidden = {"layernorm": hparams.get("layernorm", False), "identity_init": d_in == r}
    return InfiniteLayers(
        InfPiInput(d_in, r, bias_alpha=bias_alpha, alpha=hparams["first_layer_alpha"], **factory),
        [InfPiLinear(r, r, bias_alpha=bias_alpha, **hidden, **factory) for _ in range(hparams["hidden_layers"] - 1)],
        infinite_readout(hparams, device, dtype),
    )


def infinite_readout(hparams: Mapping[str, Any], device=None, dtype: torch.dtype | None = None) -> InfPiLinear:
    """The read-out of :func:`infinite_layers`."""
    return InfPiLinear(
        hparams["r"],
        hparams["d_out"],
        bias_alpha=hparams["bias_alpha"] if hparams["last_bias_alpha"] is None else hparams["last_bias_alpha"],
        alpha=hparams["last_layer_alpha"],
        layernorm=hparams.get("layernorm", False),
        role="readout",
        zero_init=hparams["readout_zero_init"],
        identity_init=hparams["d_in"] == hparams["r"],
        device=device,
        dtype=dtype,
    )


def check_state(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> None:
    """Raise RuntimeError unless ``model`` can load ``state_dict``, of which names and shapes matter alone."""
    if problems := state_problems(model, state_dict):
        raise RuntimeError(f"{type(model).__name__} cannot load this state: " + "; ".join(problems))
    if strict:
        own = {name for name, _ in persistent_tensors(model)}
        missing, unexpected = sorted(own - set(state_dict)), sorted(set(state_dict) - own)
        if missing or unexpected:
            raise RuntimeError(
                f"{type(model).__name__} cannot load this state: missing keys {missing}, unexpected keys {unexpected}"
            )


def state_problems(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """What in ``state_dict`` does not fit ``model``, in words: shapes, and rows that do not belong together."""
    problems = []
    rows = {f"{name}." if name else "": module for name, module in model.named_modules() if isinstance(module, Rows)}
    grown = set()
    for prefix, module in rows.items():
        names = [prefix + part for part in ("A", "B", "amult")]
        grown.update(names)
        if all(name in state_dict for name in names):
            A, B, amult = (state_dict[name] for name in names)
            problem = rows_problem(A, B, amult, r=module.B.shape[1], r_out=module.A.shape[1], prefix=prefix)
            problems += [problem] if problem else []
    for name, tensor in persistent_tensors(model):
        if name not in grown and name in state_dict and state_dict[name].shape != tensor.shape:
            problems.append(f"{name} has shape {list(state_dict[name].shape)}; it must be {list(tensor.shape)}")
    return problems


def persistent_tensors(model: nn.Module):
    """Names and tensors of ``model.state_dict()``, without copying rows."""
    for prefix, module in model.named_modules():
        prefix = f"{prefix}." if prefix else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield prefix + name, tensor
        if isinstance(module, Rows):
            yield prefix + "amult", module.stored_amult


@torch.no_grad()
def batched(function, x: Tensor, batch_size: int) -> Tensor:
    """``function`` over x in batches, joined; keeps memory at one batch."""
    return torch.cat([function(part) for part in x.split(batch_size)])
