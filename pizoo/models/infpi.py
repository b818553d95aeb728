"""The infinitely wide π-net. Source: Yang, Santacroce, Hu (ICLR 2022), sections 2 and 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pizoo import functional
from pizoo.models.base import PiNet, infinite_layers, infinite_readout
from pizoo.models.finite import FinPiMLP
from pizoo.nn import InfPiLinear
from pizoo.rows import Place


class InfPiMLP(PiNet):
    """An infinitely wide ReLU MLP that learns features, restricted to a probability space of rank r.

    Args:
        d_in: input dimension; images [B, C, H, W] are flattened channel-first.
        d_out: number of outputs.
        r: rank of the probability space.
        hidden_layers: the paper's L: L - 1 growing hidden layers, then the growing read-out.
        bias_alpha: multiplier of all biases but the read-out's; 0 leaves them out.
        last_bias_alpha: multiplier of the read-out's bias; None: ``bias_alpha``.
        first_layer_alpha, last_layer_alpha: multipliers of the first layer's and the read-out's whole output.
        layernorm: normalise what enters each growing layer.
        readout_zero_init: start with a read-out of one row that contributes nothing.
        device, dtype: of the parameters; ``amult`` stays in at least float32.
        rows_dtype: of the rows of growing layers, where nearly all memory is; None: ``dtype``. float16 rows under float32
            inputs and biases is how the zoo's nets are trained. int8 (a scale per row) takes half of that memory.

    Attributes:
        compacted: of a net made by :func:`pizoo.compact`, what it was made of; else None.

    State: ``input.A [d_in, r]``, ``input.bias [r]``, ``hidden.{i}.A [M, r] | B [M, r] | amult [M] | bias [r]``,
    ``output.A [M, d_out] | B | amult | bias [d_out]``.

    Raises:
        ValueError: sizes not positive, multipliers not finite.
        TypeError: a ``dtype`` that is not floating-point, a ``rows_dtype`` that is neither that nor int8.
    """

    compacted: dict[str, Any] | None = None

    def __init__(
        self,
        d_in: int,
        d_out: int,
        r: int,
        hidden_layers: int = 2,
        bias_alpha: float = 1.0,
        last_bias_alpha: float | None = None,
        first_layer_alpha: float = 1.0,
        last_layer_alpha: float = 1.0,
        layernorm: bool = False,
        readout_zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        rows_dtype: torch.dtype | None = None,
    ):
        super().__init__(
            d_in=d_in,
            d_out=d_out,
            r=r,
            hidden_layers=hidden_layers,
            bias_alpha=bias_alpha,
            last_bias_alpha=last_bias_alpha,
            first_layer_alpha=first_layer_alpha,
            last_layer_alpha=last_layer_alpha,
            layernorm=layernorm,
            readout_zero_init=readout_zero_init,
        )
        self.r = r
        layers = infinite_layers(self.hparams, device, dtype)
        self.input, self.hidden, self.output = layers.input, nn.ModuleList(layers.hidden), layers.output
        if rows_dtype is not None:
            for layer in self.growing_layers.values():
                layer.to_rows_dtype(rows_dtype)

    def new_readout(self) -> None:
        if not self.num_classes:
            self.output = nn.Identity()
            return
        like = next(reversed(self.growing_layers.values()), None)  # none: one hidden layer and no read-out before
        rows_dtype, rows_on = (like.A.dtype, like.rows_on) if like else (self.input.A.dtype, "device")
        self.output = infinite_readout(self.hparams, self.input.A.device, self.input.A.dtype)
        self.output.to_rows_dtype(rows_dtype)
        self.output.keep_rows_on(rows_on)

    def keep_rows_on(self, place: Place) -> InfPiMLP:
        """Keep the rows of growing layers, where nearly all memory is, on the net's "device" or on the "host".

        From the host they stream to the net's device in every forward and backward pass, in page-locked memory at the speed
        of the bus. They stay there whatever device the net is moved to. Returns the net.

        Raises:
            ValueError: another place.
        """
        for layer in self.growing_layers.values():
            layer.keep_rows_on(place)
        return self

    @property
    def growing_layers(self) -> dict[str, InfPiLinear]:
        """Name to layer: ``hidden.0``, ..., ``output`` (if there is a read-out)."""
        layers = {**{f"hidden.{i}": layer for i, layer in enumerate(self.hidden)}, "output": self.output}
        return {name: layer for name, layer in layers.items() if isinstance(layer, InfPiLinear)}

    @property
    def all_layers(self) -> list[nn.Module]:
        return [self.input, *self.hidden, self.output]

    def feature_kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """``F00(cos(x, y))`` between two sets of features: [n, r], [m, r] -> [n, m]."""
        return functional.feature_kernel_from_preactivations(x, y)

    @torch.no_grad()
    def sample(self, width: int, omegas: list[Tensor] | None = None, projected: bool = True) -> FinPiMLP:
        """A finite π-net of ``width`` units a layer, drawn from this net; as the width grows its function approaches this one.

        Args:
            width: n, at least r.
            omegas: one [n, r] per hidden layer; None: drawn standard normal.
            projected: project its gradients onto the span of the omegas; False: train it without.

        Raises:
            ValueError: width below r, omegas of other number or shape; a net with layernorm, which has no finite counterpart,
                or without a read-out.
        """
        if not self.num_classes:
            raise ValueError("a net without a read-out cannot be sampled; reset_classifier gives it one")
        if self.hparams["layernorm"]:
            raise ValueError("a net with layernorm=True has no finite counterpart to sample")
        hparams = {key: value for key, value in self.hparams.items() if key != "layernorm"}
        weight = self.input.A
        return FinPiMLP(
            **hparams,
            width=width,
            projected=projected,
            source=self,
            omegas=omegas,
            device=weight.device,
            dtype=weight.dtype,
        )
