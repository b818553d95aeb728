"""The parameters of a growing layer: they may be integers, and that of ``A`` has pending rows for a gradient."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pizoo.rows.pending import PendingRows

if TYPE_CHECKING:
    from pizoo.rows.module import Rows


class RowsParameter(nn.Parameter):
    """A parameter that may hold integers. torch lets these require no gradient: ``requires_grad`` is then kept here."""

    _integers_require_grad = False

    def __new__(cls, data: Tensor, requires_grad: bool = True):
        parameter = super().__new__(cls, data, requires_grad=False)
        parameter.requires_grad = requires_grad
        return parameter

    @property
    def requires_grad(self) -> bool:
        return Tensor.requires_grad.__get__(self) if self.is_floating_point() else self._integers_require_grad

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        if self.is_floating_point():
            Tensor.requires_grad.__set__(self, requires_grad)
        else:
            self._integers_require_grad = requires_grad

    def requires_grad_(self, requires_grad: bool = True) -> RowsParameter:
        self.requires_grad = requires_grad
        return self

    def hold(self, data: Tensor) -> None:
        """Make ``data`` what it holds; between integers and floats too, which torch refuses where gradients are required."""
        if data.is_floating_point() == self.is_floating_point():
            self.data = data
            return
        requires_grad, self.requires_grad = self.requires_grad, False
        self.data = data
        self.requires_grad = requires_grad

    def __reduce_ex__(self, protocol):
        return type(self), (self.detach().clone(), self.requires_grad)


class GrowingWeight(RowsParameter):
    """The ``A`` of a growing layer: a parameter [M, r_out] whose ``grad`` is :class:`PendingRows` or None.

    ``rows`` is the layer it belongs to, where an optimizer appends.
    """

    _pending: PendingRows | None = None
    rows: Rows

    @property
    def leaf(self) -> Tensor:
        """What stands for it in autograd's graph: itself, or for integers an empty tensor that can require gradients."""
        if self.is_floating_point():
            return self
        return torch.empty(0, device=self.device, requires_grad=self.requires_grad)

    @property
    def grad(self) -> PendingRows | None:
        return self._pending

    @grad.setter
    def grad(self, pending: PendingRows | None) -> None:
        if pending is not None and not isinstance(pending, PendingRows):
            raise TypeError(f"the gradient of a growing layer is PendingRows or None; got {type(pending).__name__}")
        self._pending = pending

    def record(self, A: Tensor, B: Tensor) -> None:
        """Add rows to the gradient: A [b, r_out], B [b, r]."""
        if self._pending is None:
            self._pending = PendingRows(A, B)
        else:
            self._pending.extend(A, B)

    def __deepcopy__(self, memo):
        """With its layer, so that a net and its optimizer copied together stay together."""
        if id(self) not in memo:
            memo[id(self)] = copy.deepcopy(self.rows, memo).A if hasattr(self, "rows") else super().__deepcopy__(memo)
        return memo[id(self)]
