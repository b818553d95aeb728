"""Pending rows: the gradient of a growing layer, and its norm."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from pizoo.functional import relu_kernel_of_gram

NO_TENSOR = (
    "the gradient of a growing layer is not a tensor but the rows that a step appends; step with pizoo.optim.PiSGD, clip with "
    "pizoo.optim.clip_grad_norm_"
)


class _NoTensorError(TypeError, AttributeError):
    """What torch's functions raise that are given pending rows; its attributes too, for which ``hasattr`` is then False."""


class PendingRows(Tensor):
    """The gradient of a growing layer: the rows that the next step will append, before learning rate and multiplier.

    It stands in ``layer.A.grad`` and is treated as a gradient is: several backward passes add up (their rows are joined),
    clipping scales it, either ``zero_grad`` removes it. A tensor in name alone: so that torch's own optimizers and clipping ask
    what it can do, and are refused in a sentence, by TypeError.

    Attributes:
        A: ``δ s`` [k, r_out], in float32 or float64.
        B: unit inputs ``gbar`` [k, r], same dtype.
    """

    grad_fn = None  # nn.Module.zero_grad asks for it
    A: Tensor
    B: Tensor

    def __new__(cls, A: Tensor, B: Tensor):
        pending = cls._make_subclass(cls, torch.empty(0))
        pending.A, pending.B = A, B
        return pending

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise _NoTensorError(NO_TENSOR)

    def __len__(self) -> int:
        return len(self.A)

    def __reduce_ex__(self, protocol):
        return type(self), (self.A, self.B)

    def __deepcopy__(self, memo):
        return self.apply(lambda t: copy.deepcopy(t, memo))

    def extend(self, A: Tensor, B: Tensor) -> None:
        self.A, self.B = torch.cat([self.A, A]), torch.cat([self.B, B])

    def norm(self) -> Tensor:
        """:func:`rows_norm` of these rows, 0-d."""
        return rows_norm(self.A, self.B)

    @property
    def device(self) -> torch.device:
        """Where they are: on the layer's device, wherever its rows are kept."""
        return self.A.device

    def mul_(self, factor: Tensor | float) -> PendingRows:
        self.A = self.A * factor
        return self

    def isfinite(self) -> Tensor:
        """0-d bool: whether every entry is finite."""
        return self.A.isfinite().all() & self.B.isfinite().all()

    def apply(self, fn) -> PendingRows:
        return PendingRows(fn(self.A), fn(self.B))

    def __getattr__(self, name: str):
        if hasattr(Tensor, name):
            raise _NoTensorError(NO_TENSOR)
        raise AttributeError(f"PendingRows has no {name!r}: {NO_TENSOR}")

    def __repr__(self, **_: Any) -> str:
        return f"PendingRows({len(self)} rows: {NO_TENSOR})"

    __format__, __dir__ = object.__format__, object.__dir__

    # What nn.Module.zero_grad(set_to_none=False) does to a gradient.
    def requires_grad_(self, requires_grad: bool = True) -> PendingRows:
        return self

    def zero_(self) -> PendingRows:
        self.A, self.B = self.A[:0], self.B[:0]
        return self


def rows_norm(A: Tensor, B: Tensor) -> Tensor:
    """Norm of rows in function space, ``|Δ|² = Σ_ij (a_i . a_j) K(b_i, b_j)`` with K the zero-mean ReLU kernel; 0-d."""
    return rows_norm_of_grams(A @ A.T, B @ B.T)


def rows_norm_of_grams(A: Tensor, B: Tensor) -> Tensor:
    """:func:`rows_norm` from the inner products of the rows' two parts, [..., n, n] each: [...]."""
    return product_norm_of_grams(A, relu_kernel_of_gram(B))


def product_norm_of_grams(A: Tensor, B: Tensor) -> Tensor:
    """Norm of ``XᵀY`` for X [n, ...], Y [n, ...] from their inner products [..., n, n] each: [...]."""
    return (A * B).sum((-2, -1)).clamp(min=0).sqrt()
