"""Finite nets: the π-net sampled from an infinite one, and the μ-net.

Source: Yang, Santacroce, Hu (ICLR 2022), section 4 and the appendix on finite-width projection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pizoo import functional
from pizoo.models.base import InfiniteLayers, PiNet, infinite_layers
from pizoo.nn import InfPiLinear, PiLinear, projection_basis
from pizoo.rows import converted

if TYPE_CHECKING:
    from pizoo.models.infpi import InfPiMLP

ROWS_AT_ONCE = 65_536  # rows of the infinite net that sampling holds in memory, times the width


class _FiniteMLP(PiNet):
    """An ordinary ReLU MLP with the π-net's multipliers: ``hidden_layers`` hidden layers of ``width`` and a read-out."""

    def __init__(self, *, device=None, dtype=None, **hparams):
        super().__init__(**hparams)
        self.width: int = hparams["width"]
        self.layers = nn.ModuleList(self._layer(l, device, dtype) for l in range(hparams["hidden_layers"] + 1))

    def _layer(self, l: int, device: torch.device | str | None, dtype: torch.dtype | None) -> PiLinear:
        hparams, depth = self.hparams, self.hparams["hidden_layers"]
        last_bias_alpha = hparams["bias_alpha"] if hparams["last_bias_alpha"] is None else hparams["last_bias_alpha"]
        return PiLinear(
            self.d_in if l == 0 else self.width,
            self.num_classes if l == depth else self.width,
            bias_alpha=last_bias_alpha if l == depth else hparams["bias_alpha"],
            alpha={0: hparams["first_layer_alpha"], depth: hparams["last_layer_alpha"]}.get(l, 1.0),
            role="input" if l == 0 else "readout" if l == depth else "hidden",
            device=device,
            dtype=dtype,
        )

    def new_readout(self) -> None:
        if not self.num_classes:
            self.layers[-1] = nn.Identity()
            return
        weight = self.layers[0].weight
        self.layers[-1] = self._layer(len(self.layers) - 1, weight.device, weight.dtype)
        if self.hparams["readout_zero_init"]:
            nn.init.zeros_(self.layers[-1].weight)

    @property
    def all_layers(self) -> list[nn.Module]:
        return list(self.layers)

    def call_layer(self, l: int, h: Tensor) -> Tensor:
        return self.layers[l](h, self.basis(l))

    def activation(self, h: Tensor) -> Tensor:
        return torch.relu(h)

    def feature_kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """``cos(x, y) / 2`` between two sets of features: [n, width], [m, width] -> [n, m]."""
        return functional.feature_kernel_from_postactivations(x, y)


class MuMLP(_FiniteMLP):
    """The μ-net, the paper's baseline: normal weights with variance 2 / fan_in, zero biases, no projection.

    Args:
        d_in, d_out, hidden_layers, bias_alpha, last_bias_alpha, first_layer_alpha, last_layer_alpha: as for
            :class:`InfPiMLP`.
        width: units of each hidden layer.
        readout_zero_init: start with a read-out of zeros.
        initial_scales: what the initial weights of the first layers are multiplied by, from the input on; None: nothing.
        device, dtype: of the parameters.

    State: ``layers.{l}.weight``, ``layers.{l}.bias``, l = 0..hidden_layers.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        width: int,
        hidden_layers: int = 2,
        bias_alpha: float = 1.0,
        last_bias_alpha: float | None = None,
        first_layer_alpha: float = 1.0,
        last_layer_alpha: float = 1.0,
        readout_zero_init: bool = False,
        initial_scales: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        scales = {} if initial_scales is None else {"initial_scales": list(initial_scales)}
        super().__init__(
            d_in=d_in,
            d_out=d_out,
            width=width,
            hidden_layers=hidden_layers,
            bias_alpha=bias_alpha,
            last_bias_alpha=last_bias_alpha,
            first_layer_alpha=first_layer_alpha,
            last_layer_alpha=last_layer_alpha,
            readout_zero_init=readout_zero_init,
            device=device,
            dtype=dtype,
            **scales,
        )
        if len(initial_scales or ()) > hidden_layers + 1:
            raise ValueError(f"initial_scales are {initial_scales}; there are {hidden_layers + 1} layers to scale")
        with torch.no_grad():
            for layer, scale in zip(self.layers, initial_scales or (), strict=False):
                layer.weight.mul_(scale)
        if readout_zero_init:
            nn.init.zeros_(self.layers[-1].weight)


class _Projections(nn.Module):
    """The Ω of each hidden layer as buffers "0", "1", ..., and orthonormal bases of their spans."""

    def __init__(self, omegas: list[Tensor]):
        super().__init__()
        self.layers = len(omegas)
        for l, omega in enumerate(omegas):
            self.register_buffer(str(l), omega)
            self.register_buffer(f"basis{l}", projection_basis(omega), persistent=False)

    def omega(self, l: int) -> Tensor:
        return getattr(self, str(l))

    def basis(self, l: int) -> Tensor:
        return getattr(self, f"basis{l}")

    def _span(self, l: int) -> None:
        setattr(self, f"basis{l}", projection_basis(self.omega(l)))

    def _apply(self, fn, recurse=True):
        before = self.omega(0).dtype
        super()._apply(fn, recurse)
        # A converted basis would keep the rounding of the shortest dtype it went through, and Ω has another span now.
        if self.omega(0).dtype != before:
            for l in range(self.layers):
                self._span(l)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        for l in range(self.layers):
            if f"{prefix}{l}" in state_dict:
                self._span(l)


class FinPiMLP(_FiniteMLP):
    """A finite π-net: sampled from an infinite one, trained with gradients projected onto the span of its samples Ω.

    Args:
        r: rank of the probability space, at most ``width``.
        projected: project gradients; False trains the same sample without.
        source: what to sample from, of the same hyper-parameters (see :meth:`InfPiMLP.sample`); None: a fresh infinite net.
        omegas: the samples Ω, one [width, r] per hidden layer; None: drawn standard normal.
        the rest: as for :class:`MuMLP`.

    State: ``layers.{l}.weight``, ``layers.{l}.bias``, l = 0..hidden_layers; buffers ``omega.{l}`` [width, r] of the hidden
    layers.

    Raises:
        ValueError: width below r, omegas of other number or shape.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        width: int,
        r: int,
        hidden_layers: int = 2,
        bias_alpha: float = 1.0,
        last_bias_alpha: float | None = None,
        first_layer_alpha: float = 1.0,
        last_layer_alpha: float = 1.0,
        readout_zero_init: bool = False,
        projected: bool = True,
        source: InfPiMLP | None = None,
        omegas: list[Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            d_in=d_in,
            d_out=d_out,
            width=width,
            r=r,
            hidden_layers=hidden_layers,
            bias_alpha=bias_alpha,
            last_bias_alpha=last_bias_alpha,
            first_layer_alpha=first_layer_alpha,
            last_layer_alpha=last_layer_alpha,
            readout_zero_init=readout_zero_init,
            projected=projected,
            device=device,
            dtype=dtype,
        )
        if width < r:
            raise ValueError(f"width is {width}; it must be at least r = {r} to project onto the span of the samples")
        self.r = r
        if omegas is None:
            omegas = [torch.randn(width, r, device=device, dtype=dtype) for _ in range(hidden_layers)]
        shapes = [list(omega.shape) for omega in omegas]
        if shapes != [[width, r]] * hidden_layers:
            raise ValueError(f"omegas have shapes {shapes}; they must be {hidden_layers} of {[width, r]}")
        self.omega = _Projections([omega.to(self.layers[0].weight) for omega in omegas])
        self._sample(infinite_layers(self.hparams, device, dtype) if source is None else source)

    def basis(self, l: int) -> Tensor | None:
        hidden = l < self.hparams["hidden_layers"]  # the read-out's gradient is not projected
        return self.omega.basis(l) if hidden and self.hparams["projected"] else None

    @torch.no_grad()
    def _sample(self, source: InfiniteLayers | InfPiMLP) -> None:
        """Set weights and biases to the sample of ``source`` at this net's Ω."""
        n = self.width
        omegas = [self.omega.omega(l) for l in range(self.hparams["hidden_layers"])]
        first, *hidden, last = self.layers
        first.weight.copy_(omegas[0] @ source.input.A.T / math.sqrt(n))
        for layer, rows, before, after in zip(hidden, source.hidden, omegas, omegas[1:], strict=False):
            layer.weight.copy_(after @ _output_of_units(rows, before).to(after.dtype) / n)
        last.weight.copy_(_output_of_units(source.output, omegas[-1]) / math.sqrt(n))
        for layer, grown, omega in zip([first, *hidden], [source.input, *source.hidden], omegas, strict=True):
            if grown.bias is not None:
                layer.bias.copy_(omega @ grown.bias / math.sqrt(n))
        if last.bias is not None:
            last.bias.copy_(source.output.bias)


def _output_of_units(layer: InfPiLinear, omega: Tensor) -> Tensor:
    """``(amult A)ᵀ relu(Ω Bᵀ)ᵀ`` [r_out, n], block by block of rows, in at least float32."""
    dtype = torch.promote_types(layer.A.dtype, torch.float32)
    total = torch.zeros(layer.A.shape[1], len(omega), device=omega.device, dtype=dtype)
    for rows in zip(*(t.detach().split(ROWS_AT_ONCE) for t in (layer.A, layer.B, layer.amult)), strict=True):
        A, B, amult = converted(*(part.to(omega.device) for part in rows), dtype)  # they may be kept on the host
        total += (amult[:, None] * A).T @ torch.relu(B @ omega.to(dtype).T)
    return total
