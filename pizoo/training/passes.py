"""A net's passes, written out without autograd: to its output, and back from the gradient there to those of its layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pizoo.functional import unit
from pizoo.models import InfPiMLP, PiNet
from pizoo.ops import library
from pizoo.training.gradients import Gradient
from pizoo.training.growing import GrowingState


class InfinitePasses:
    """Through an infinite net.

    Args:
        growing: its growing layers, as far as the passes go: with the read-out or without.
        trained: which layers are, from the input on.
        one_pass: whether the read-out's Jacobian comes with its output, so that the backward pass reads no row of it again.
    """

    def __init__(self, net: InfPiMLP, growing: list[GrowingState], trained: list[bool], one_pass: bool):
        self.net, self.growing, self.trained, self.one_pass = net, growing, trained, one_pass
        self.lowest = trained.index(True)  # below it no gradient is needed

    def forward(self, x: Tensor) -> tuple[Tensor, list[tuple]]:
        """Output of the layers, and what the backward pass needs."""
        g = self.net.input.alpha * _biased(library.product(x, self.net.input.A), self.net.input)
        entered = []
        for state in self.growing:
            layer, (gbar, s) = state.layer, unit(g)
            scale = state.decay if layer.layernorm else s * state.decay
            if self.one_pass and state is self.growing[-1]:
                out, jacobian = library.growing_forward_jacobian(gbar, *state.rows, *state.options)
            else:
                out, jacobian = library.growing_forward(gbar, *state.rows, *state.options), None
            entered.append((gbar, s, jacobian))
            g = layer.alpha * _biased((out * scale).to(g.dtype), layer)
        return g, entered

    def backward(self, x: Tensor, dg: Tensor, entered: list[tuple]) -> list[Gradient]:
        """Gradients of the layers trained, in their order, from ``dg``, that at the output.

        Args:
            x, entered: what the forward pass took and gave.
        """
        gradients = []
        for l in reversed(range(max(1, self.lowest), len(self.trained))):
            state, (gbar, s, jacobian) = self.growing[l - 1], entered[l - 1]
            layer, delta = state.layer, _times(state.layer.alpha, dg).to(gbar.dtype)
            if self.trained[l]:
                gradients.append(Gradient(layer, gbar, delta, torch.ones_like(s) if layer.layernorm else s))
            if l == self.lowest:
                break
            decayed = delta * state.decay
            if jacobian is not None:
                dg = (decayed.to(jacobian.dtype)[:, :, None] * jacobian).sum(1)
            else:
                dg = library.growing_backward(gbar, *state.rows, decayed.to(delta.dtype), *state.options)
            if layer.layernorm:
                dg = dg - (dg * gbar).sum(1, keepdim=True) * gbar
                dg = dg / torch.where(s > 0, s, torch.ones_like(s))
        if self.lowest == 0:
            gradients.append(Gradient(self.net.input, x, _times(self.net.input.alpha, dg.to(x.dtype)), None))
        return gradients[::-1]


class FinitePasses:
    """Through a finite net: ``layers``, from the input on, of which some are ``trained``."""

    def __init__(self, net: PiNet, layers: list[nn.Module], trained: list[bool]):
        self.net, self.layers, self.trained = net, layers, trained
        self.lowest = trained.index(True)

    def forward(self, x: Tensor) -> tuple[Tensor, list[tuple]]:
        entered, h = [], x
        for layer in self.layers:
            last = layer.role == "readout"  # few columns, at which matrix products made for many are slow
            z = library.product(h, layer.weight.T) if last else h @ layer.weight.T
            out = layer.alpha * _biased(z, layer)
            out = out if last else torch.relu(out)
            entered.append((h, out))
            h = out
        return h, entered

    def backward(self, x: Tensor, delta: Tensor, entered: list[tuple]) -> list[Gradient]:
        gradients = []
        for l in reversed(range(self.lowest, len(self.layers))):
            layer, (h, out) = self.layers[l], entered[l]
            if layer.role != "readout":
                delta = delta * (out > 0)
            delta = _times(layer.alpha, delta).to(x.dtype)
            basis = self.net.basis(l)
            projected = delta if basis is None else (delta @ basis) @ basis.T
            if self.trained[l]:
                gradients.append(Gradient(layer, h, projected, None))
            if l > self.lowest:
                delta = delta @ layer.weight
        return gradients[::-1]


def _times(alpha: float, x: Tensor) -> Tensor:
    """``alpha x``, without a kernel for an alpha of 1."""
    return x if alpha == 1 else alpha * x


def _biased(z: Tensor, module: nn.Module) -> Tensor:
    return z if module.bias is None else z + module.bias_alpha * module.bias
