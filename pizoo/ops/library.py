"""The ops as torch operators, which ``torch.compile`` leaves whole inside what it fuses around them."""

from __future__ import annotations

import torch
from torch import Tensor

from pizoo import ops
from pizoo.ops import dense
from pizoo.ops.reference import accumulate_dtype


@torch.library.custom_op("pizoo::growing_forward", mutates_args=())
def growing_forward(
    gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, count: Tensor, bmult: Tensor | None, shared: bool
) -> Tensor:
    return ops.growing_forward(gbar, A, B, amult, count, bmult, shared)


@growing_forward.register_fake
def _(gbar, A, B, amult, count, bmult, shared):
    return gbar.new_empty(len(gbar), A.shape[1], dtype=accumulate_dtype(A.dtype))


@torch.library.custom_op("pizoo::growing_backward", mutates_args=())
def growing_backward(
    gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, delta: Tensor, count: Tensor, bmult: Tensor | None, shared: bool
) -> Tensor:
    return ops.growing_backward(gbar, A, B, amult, delta, count, bmult, shared)


@growing_backward.register_fake
def _(gbar, A, B, amult, delta, count, bmult, shared):
    return gbar.new_empty(len(gbar), B.shape[1], dtype=accumulate_dtype(A.dtype))


@torch.library.custom_op("pizoo::growing_forward_jacobian", mutates_args=())
def growing_forward_jacobian(
    gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, count: Tensor, bmult: Tensor | None, shared: bool
) -> tuple[Tensor, Tensor]:
    # Views into one buffer, as summing leaves them, are more than torch allows an operator to return.
    out, jacobian = ops.growing_forward_jacobian(gbar, A, B, amult, count, bmult, shared)
    return (out.clone(), jacobian.clone()) if shared else (out, jacobian)


@growing_forward_jacobian.register_fake
def _(gbar, A, B, amult, count, bmult, shared):
    b, r_out, r = len(gbar), A.shape[1], B.shape[1]
    dtype = accumulate_dtype(A.dtype)
    return gbar.new_empty(b, r_out, dtype=dtype), gbar.new_empty(b, r_out, r, dtype=dtype)


@torch.library.custom_op("pizoo::product", mutates_args=())
def product(x: Tensor, weight: Tensor) -> Tensor:
    return dense.product(x, weight)


@product.register_fake
def _(x, weight):
    return x.new_empty(len(x), weight.shape[1], dtype=accumulate_dtype(weight.dtype))
