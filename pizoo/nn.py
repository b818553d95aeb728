"""Layers of π-nets, for anyone's own network.

An infinite net is an :class:`InfPiInput`, any number of hidden :class:`InfPiLinear` and a read-out
``InfPiLinear(role="readout")``. What passes between them is g [b, r], the coordinates of a pre-activation ``g.Z`` in the
probability space Z ~ N(0, I_r): the ReLU is inside the growing layer, so nothing is put between the layers.
A finite π-net is made of :class:`PiLinear` with a ReLU between.

Source: Yang, Santacroce, Hu (ICLR 2022), sections 2 and 3.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pizoo.functional import feature_kernel_from_preactivations, relu_kernel, unit
from pizoo.ops import growing_backward, growing_forward
from pizoo.rows import Rows, converted

Role = Literal["input", "hidden", "readout"]
# Rows of a compact net are large and cancel, so that products of 16 bits lose a hundredth of its logits: so few are read in 32.
FEW_ROWS = 1 << 16
LARGEST = 1e18  # of multipliers: torch takes no integers from 2**63 on, and float32 no products of larger ones


class InfPiInput(nn.Module):
    """First layer of an infinite π-net: ``g = alpha (x A + bias_alpha bias)``. It does not grow.

    Args:
        d: input dimension.
        r: rank of the probability space.
        bias_alpha: multiplier of the bias; 0 leaves the bias out.
        alpha: multiplier of the whole output (the paper's first-layer alpha).
        device, dtype: as everywhere in torch.

    Initially the columns of ``A`` [d, r] are random with norm 1 (the identity matrix if d == r) and ``bias`` [r] is 0.

    Raises:
        ValueError: d or r not positive.
        TypeError: a dtype that is not floating-point.
    """

    role: Role = "input"

    def __init__(self, d: int, r: int, bias_alpha: float = 1.0, alpha: float = 1.0, device=None, dtype=None):
        super().__init__()
        check_positive(d=d, r=r)
        self.bias_alpha, self.alpha = bias_alpha, alpha
        factory = {"device": device, "dtype": floating(dtype or torch.get_default_dtype())}
        if d == r:
            A = torch.eye(d, **factory)
        else:
            A = torch.randn(d, r, device=device)
            A = (A / torch.linalg.vector_norm(A, dim=0)).to(**factory)
        self.A = nn.Parameter(A)
        self.bias = nn.Parameter(torch.zeros(r, **factory)) if bias_alpha else None

    def forward(self, x: Tensor) -> Tensor:
        """[b, d] -> [b, r]."""
        check_input(x, self.A.shape[0], self.A.dtype)
        g = x @ self.A
        if self.bias is not None:
            g = g + self.bias_alpha * self.bias
        return self.alpha * g

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """How much a gradient step at inputs y moves the output at x: ``x yᵀ``. [..., n, d], [..., m, d] -> [..., n, m]."""
        return x @ y.mT

    def extra_repr(self) -> str:
        return f"d={self.A.shape[0]}, r={self.A.shape[1]}, bias_alpha={self.bias_alpha}, alpha={self.alpha}"


class InfPiLinear(Rows):
    """A growing layer: ``alpha (s F00(gbar Bᵀ) (amult A) + bias_alpha bias)`` with s = |g|, gbar = g / s.

    In training mode each backward pass leaves in ``A.grad`` the rows that the step will append
    (:class:`pizoo.rows.PendingRows`); in eval mode, without gradients, when the layer is frozen, and when gradients are asked
    for inputs alone, it leaves none.

    Args:
        r: rank of the probability space.
        out_features: r again for a hidden layer, the number of outputs for a read-out.
        bias_alpha: multiplier of the bias; 0 leaves the bias out.
        alpha: multiplier of the whole output (the paper's last-layer alpha).
        layernorm: take s = 1, in the forward pass, the backward pass and the appended rows.
        role: "hidden" or "readout": decides initial values and learning-rate multiplier.
        zero_init: start with a single row that contributes nothing.
        identity_init: start from identity matrices (what the paper does when d == r); a read-out starts at zero.
        device, dtype: of bias and rows (``amult`` in at least float32).

    Raises:
        ValueError: r or out_features not positive; a hidden layer with out_features other than r.
        TypeError: a dtype that is not floating-point.
    """

    def __init__(
        self,
        r: int,
        out_features: int,
        bias_alpha: float = 1.0,
        alpha: float = 1.0,
        layernorm: bool = False,
        role: Literal["hidden", "readout"] = "hidden",
        zero_init: bool = False,
        identity_init: bool = False,
        device=None,
        dtype=None,
    ):
        check_positive(r=r, out_features=out_features)
        if role not in ("hidden", "readout"):
            raise ValueError(f"role is {role!r}; it must be 'hidden' or 'readout'")
        if role == "hidden" and out_features != r:
            raise ValueError(f"out_features is {out_features}; a hidden layer has r = {r}, a read-out role='readout'")
        factory = {"device": device, "dtype": floating(dtype or torch.get_default_dtype())}
        count = 1 if zero_init else r
        B = torch.eye(r, device=device) if identity_init and not zero_init else torch.randn(count, r, device=device)
        B = B / torch.linalg.vector_norm(B, dim=1, keepdim=True)
        if zero_init or (identity_init and role == "readout"):
            A = torch.zeros(count, out_features, device=device)
        elif identity_init:
            A = torch.eye(r, out_features, device=device)
        else:
            A = torch.randn(count, out_features, device=device) / (r if role == "readout" else math.sqrt(r))
        amult = torch.zeros(count, device=device) if zero_init else torch.ones(count, device=device)
        super().__init__(A.to(**factory), B.to(**factory), amult)
        self.role: Role = role
        self.bias_alpha, self.alpha, self.layernorm = bias_alpha, alpha, layernorm
        self.bias = nn.Parameter(torch.zeros(out_features, **factory)) if bias_alpha else None

    def forward(self, g: Tensor) -> Tensor:
        """[b, r] -> [b, out_features], in g's dtype."""
        check_input(g, self.B.shape[1], name="g")
        gbar, s = unit(g.detach().to(torch.promote_types(g.dtype, torch.float32)))
        rows = (self.A.detach(), self.B.detach(), self.stored_amult, self.bmult)
        out = _Growing.apply(g, gbar, s, *rows, self.shared, self.decay, self.layernorm)
        if self.training and self.A.requires_grad and torch.is_grad_enabled():
            # The rows to come contribute nothing yet; their gradient is what they will be.
            scale = gbar.new_ones(()) if self.layernorm else s
            out = out + _NewRows.apply(self.A.leaf, self, gbar, scale, out.dtype)
        return self.finish(out)

    def finish(self, out: Tensor) -> Tensor:
        """What comes after the sum over rows [b, out_features]: ``alpha (out + bias_alpha bias)``."""
        if self.bias is not None:
            out = out + self.bias_alpha * self.bias
        return self.alpha * out if self.alpha != 1 else out

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """How much rows with inputs y move the output at x: the ReLU kernel, of unit vectors under layernorm.

        [..., n, r], [..., m, r] -> [..., n, m].
        """
        return feature_kernel_from_preactivations(x, y) if self.layernorm else relu_kernel(x, y)

    def extra_repr(self) -> str:
        return (
            f"r={self.B.shape[1]}, out_features={self.A.shape[1]}, rows={self.count}, role={self.role}, "
            f"bias_alpha={self.bias_alpha}, alpha={self.alpha}, layernorm={self.layernorm}"
        )


class _Growing(torch.autograd.Function):
    """What the stored rows contribute, with the gradient written out (see ``pizoo.ops.reference``).

    Autocast does not reach inside: the arc-cosine kernels are steep at q = ±1 and need correlations in float32.
    """

    @staticmethod
    def forward(ctx, g, gbar, s, A, B, amult, bmult, shared, decay, layernorm):
        ctx.save_for_backward(gbar, s)
        # Rows stay out of save_for_backward: appending to the storage behind them does not change them.
        ctx.rows, ctx.options = (A, B, amult), {"bmult": bmult, "shared": shared}
        ctx.decay, ctx.layernorm = decay, layernorm
        if A.is_cuda and len(A) <= FEW_ROWS and A.dtype.itemsize < 4:
            (A, B, amult), bmult = converted(A, B, amult, torch.float32), None
        with torch.autocast(g.device.type, enabled=False):
            out = growing_forward(gbar, A, B, amult, bmult=bmult, shared=shared)
        return (out * (decay if layernorm else s * decay)).to(g.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, delta):
        gbar, s = ctx.saved_tensors
        with torch.autocast(delta.device.type, enabled=False):
            dg = growing_backward(gbar, *ctx.rows, delta.to(gbar.dtype) * ctx.decay, **ctx.options)
        if ctx.layernorm:
            dg = dg - (dg * gbar).sum(1, keepdim=True) * gbar
            dg = dg / torch.where(s > 0, s, torch.ones_like(s))
        return (dg.to(delta.dtype), *[None] * 9)


class _NewRows(torch.autograd.Function):
    """Zeros [b, r_out] in the forward pass; the backward pass records ``A_new = δ s``, ``B_new = gbar``.

    Autograd runs it only when gradients of the layer's ``A`` are wanted, not for ``torch.autograd.grad(loss, inputs)``.
    """

    @staticmethod
    def forward(ctx, leaf: Tensor, layer: Rows, gbar: Tensor, s: Tensor, dtype: torch.dtype):
        ctx.weight = layer.A
        ctx.save_for_backward(gbar, s)
        return torch.zeros((), dtype=dtype, device=gbar.device).expand(len(gbar), layer.A.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, delta):
        gbar, s = ctx.saved_tensors
        ctx.weight.record(delta.to(gbar.dtype) * s, gbar)
        return None, None, None, None, None


class PiLinear(nn.Linear):
    """A linear layer of a finite π-net whose gradient is projected onto the span of Ω: ``.grad`` is already projected.

    ``alpha (x Wᵀ + bias_alpha b)``; with a projection, ``G ← Ω (ΩᵀΩ)^{-1} Ωᵀ G`` for the gradients of weight and bias, while
    the gradient passed on to the input is the plain one.

    Args:
        in_features, out_features: n_in and n_out.
        bias_alpha: multiplier of the bias; 0 leaves the bias out.
        alpha: multiplier of the whole output.
        role: "input", "hidden" or "readout": decides the learning-rate multiplier.
        device, dtype: as everywhere in torch.

    Initially normal weights with variance ``2 / in_features`` and zero biases (the paper's μ-net).

    Raises:
        ValueError: a width not positive.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias_alpha: float = 1.0,
        alpha: float = 1.0,
        role: Role = "hidden",
        device=None,
        dtype=None,
    ):
        check_positive(in_features=in_features, out_features=out_features)
        super().__init__(in_features, out_features, bias=bool(bias_alpha), device=device, dtype=dtype)
        self.bias_alpha, self.alpha, self.role = bias_alpha, alpha, role

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=math.sqrt(2 / self.in_features))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, basis: Tensor | None = None) -> Tensor:
        """[b, in_features] -> [b, out_features].

        Args:
            x: inputs.
            basis: orthonormal columns [out_features, r] spanning the Ω to project gradients onto
                (:func:`projection_basis`); None: no projection.
        """
        check_input(x, self.in_features, self.weight.dtype)
        bias = None if self.bias is None else self.bias_alpha * self.bias
        if basis is None:
            out = nn.functional.linear(x, self.weight, bias)
        else:
            out = _ProjectedLinear.apply(x, self.weight, bias, basis)
        return self.alpha * out if self.alpha != 1 else out

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """As :meth:`InfPiInput.kernel`."""
        return x @ y.mT


class _ProjectedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, basis):
        ctx.save_for_backward(x, weight, basis)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, delta):
        x, weight, basis = ctx.saved_tensors
        delta, x = delta.to(weight.dtype), x.to(weight.dtype)  # other than weight's under autocast
        # Projecting δ costs n r b operations, projecting the weight gradient n r d; the result is the same.
        projected = (delta @ basis) @ basis.T
        grad_x = delta @ weight if ctx.needs_input_grad[0] else None
        grad_weight = projected.T @ x if ctx.needs_input_grad[1] else None
        grad_bias = projected.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None


def projection_basis(omega: Tensor) -> Tensor:
    """Orthonormal columns Q [n, r] with ``Q Qᵀ = Ω (ΩᵀΩ)^{-1} Ωᵀ`` for Ω [n, r]; decomposed in float64 on the CPU, of Ω's
    dtype and device.

    Raises:
        ValueError: Ω has fewer rows than columns, or its columns are not linearly independent.
    """
    n, r = omega.shape
    if n < r:
        raise ValueError(f"omega has shape [{n}, {r}]; the width must be at least the rank to project onto its span")
    # The same bits whatever Ω's device; and loading a GPU's solver takes longer than this does.
    exact = omega.double() if omega.is_meta else omega.double().cpu()
    q, upper = torch.linalg.qr(exact)
    if not omega.is_meta and upper.diagonal().abs().min() <= 1e-10 * upper.diagonal().abs().max():
        raise ValueError(f"omega [{n}, {r}] has linearly dependent columns; it must have full column rank")
    return q.to(omega)


def check_positive(**sizes: int) -> None:
    """Raise ValueError for the first of these that is not a positive integer."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a positive integer")


def check_finite(**values: float) -> None:
    """Raise ValueError for the first of these that is not a finite number."""
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) <= LARGEST:
            raise ValueError(f"{name} is {value!r}; it must be a finite number, at most {LARGEST:g}")


def floating(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself; TypeError unless it is a floating-point one."""
    if not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}; it must be a floating-point dtype (rows alone may be int8: to_rows_dtype)")
    return dtype


def check_input(x: Tensor, width: int, dtype: torch.dtype | None = None, name: str = "x") -> None:
    """Raise unless x is a non-empty [b, width] of floats (of ``dtype``, outside autocast).

    Raises:
        ValueError: another shape, or an empty batch.
        TypeError: another dtype.
    """
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be [batch, {width}]")
    if len(x) == 0:
        raise ValueError(f"{name} has shape {list(x.shape)}: an empty batch; it must hold at least one sample")
    autocast = torch.is_autocast_enabled(x.device.type)
    if not x.is_floating_point() or (dtype is not None and x.dtype != dtype and not autocast):
        raise TypeError(f"{name} has dtype {x.dtype}; it must be {dtype or 'a floating-point dtype'}")
