"""Gradients of weights over a batch, as their factors.

That of a weight is ``deltaᵀ inputs``, of rank b. It is never formed: its norm is ``<delta deltaᵀ, inputs inputsᵀ>``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pizoo.ops.reference import accumulate_dtype
from pizoo.rows import product_norm_of_grams, rows_norm_of_grams


@dataclass
class Gradient:
    """The gradient of a weight over a batch, ``deltaᵀ inputs``, as its factors, and of the bias beside it.

    Attributes:
        module: the layer.
        inputs: what entered the layer [b, n_in]; for a growing layer its unit inputs.
        delta: gradient at the layer's output before alpha and bias [b, n_out].
        scale: what delta is multiplied by to make new rows [b, 1]; None for a layer that does not grow.
    """

    module: nn.Module
    inputs: Tensor
    delta: Tensor
    scale: Tensor | None

    def bias(self) -> Tensor:
        """Gradient of the bias [n_out]."""
        return self.module.bias_alpha * self.delta.sum(0)


def grad_norms(gradients: list[Gradient]) -> list[list[Tensor]]:
    """Of each weight and, if there is one, bias, 0-d, as :func:`pizoo.optim.grad_norm`.

    All from inner products of samples: few small kernels, whatever the number of layers.
    """
    norms: dict[int, list[Tensor]] = {}
    for grows, norm in ((False, product_norm_of_grams), (True, rows_norm_of_grams)):
        group = [gradient for gradient in gradients if (gradient.scale is not None) == grows]
        if not group:
            continue
        deltas, inputs = (
            torch.stack([_gram(t) for t in ts]) for ts in zip(*((g.delta, g.inputs) for g in group), strict=True)
        )
        scales = torch.stack([g.scale * g.scale.T for g in group]) if grows else 1
        weights, biases = norm(deltas * scales, inputs), deltas.sum((1, 2)).clamp(min=0).sqrt()
        for gradient, weight, bias in zip(group, weights, biases, strict=True):
            module = gradient.module
            norms[id(gradient)] = [weight] if module.bias is None else [weight, abs(module.bias_alpha) * bias]
    return [norms[id(gradient)] for gradient in gradients]


def _gram(x: Tensor) -> Tensor:
    """``x xᵀ`` [b, b] of [b, n], b small and n large, as a sum: fused, it beats a matrix product made for large b."""
    x = x.to(accumulate_dtype(x.dtype))
    return (x[:, None, :] * x).sum(2)
