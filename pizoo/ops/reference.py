"""The growing layer's forward and backward in plain torch: the definition every faster op is tested against.

A growing layer is a kernel machine on the zero-mean ReLU kernel. With unit inputs ``gbar`` and unit rows ``B`` its
output is ``F00(gbar Bᵀ) (amult A)``; scale, bias and decay factor are applied around it (``pizoo.nn``).
Source: Yang, Santacroce, Hu (ICLR 2022), section 3; Table 1 of its appendix for F00, F11, F02.
"""

from __future__ import annotations

import torch
from opt_einsum import contract
from torch import Tensor

from pizoo.functional import F00, F02, F11


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows of ``dtype`` are summed: float32 for anything shorter than it, else ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def correlations(gbar: Tensor, B: Tensor, bmult: Tensor | None = None) -> Tensor:
    """``q = gbar (bmult B)ᵀ`` clamped to [-1, 1], in the accumulate dtype. Shapes [b, r], [M, r], [M] -> [b, M]."""
    dtype = accumulate_dtype(B.dtype)
    q = gbar.to(dtype) @ B.to(dtype).T
    return (q if bmult is None else q * bmult.to(dtype)).clamp(-1, 1)


def growing_forward(
    gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, count: Tensor | None = None, bmult: Tensor | None = None
) -> Tensor:
    """``F00(q) (amult A)`` with ``q = gbar Bᵀ``, or ``gbar (bmult B)ᵀ``.

    Args:
        gbar: unit inputs [b, r].
        A: rows [M, r_out], int8 or float16 to float64.
        B: rows [M, r] of norm 1 (of int8: ``bmult B`` are), same dtype as ``A``.
        amult: row multipliers [M], float32 (float64 for float64 rows).
        count: how many leading rows count, an integer tensor of one element on the same device; ``None``: all of them.
        bmult: of int8 rows, what brings those of ``B`` to norm 1 [M], float32; ``None`` for all others.

    Returns:
        [b, r_out] in the accumulate dtype (float32, or float64 for float64 rows).
    """
    A, B, amult, bmult = _leading(count, A, B, amult, bmult)
    q = correlations(gbar, B, bmult)
    return contract("bm,m,mo->bo", F00(q), amult.to(q.dtype), A.to(q.dtype))


def growing_backward(
    gbar: Tensor,
    A: Tensor,
    B: Tensor,
    amult: Tensor,
    delta: Tensor,
    count: Tensor | None = None,
    bmult: Tensor | None = None,
) -> Tensor:
    """The gradient of ``s * growing_forward(g / s, ...)`` with respect to g, where s = |g| and gbar = g / s.

    ``(dγ F11(q)) (bmult B) + (Σ_m dγ F02(q)) gbar`` with ``dγ = delta (amult A)ᵀ``: finite also at q = ±1, where the derivative
    of the arc-cosine alone is not.

    Args:
        delta: gradient at the output of ``growing_forward`` [b, r_out]; the rest as there.

    Returns:
        [b, r] in the accumulate dtype.
    """
    A, B, amult, bmult = _leading(count, A, B, amult, bmult)
    q = correlations(gbar, B, bmult)
    dgamma = contract("bo,m,mo->bm", delta.to(q.dtype), amult.to(q.dtype), A.to(q.dtype))
    along = (dgamma * F02(q)).sum(1, keepdim=True)
    return (dgamma * F11(q)) @ _unit_rows(B, bmult, q.dtype) + along * gbar.to(q.dtype)


def growing_forward_jacobian(
    gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, count: Tensor | None = None, bmult: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`growing_forward` and everything its backward needs, for layers of few columns.

    ``J[b, o] = Σ_m amult_m A_mo (F11(q_bm) bmult_m B_m + F02(q_bm) gbar_b)`` is the gradient of output o with respect to g, so
    that ``growing_backward(..., delta)`` is ``Σ_o delta_bo J_bo``, without reading the rows again.

    Args:
        As :func:`growing_forward`.

    Returns:
        Output [b, r_out] and Jacobian [b, r_out, r] in the accumulate dtype.
    """
    A, B, amult, bmult = _leading(count, A, B, amult, bmult)
    q = correlations(gbar, B, bmult)
    A, amult, gbar = (part.to(q.dtype) for part in (A, amult, gbar))
    B = _unit_rows(B, bmult, q.dtype)
    out = contract("bm,m,mo->bo", F00(q), amult, A)
    along = contract("bm,m,mo->bo", F02(q), amult, A)
    jacobian = contract("bm,m,mo,mr->bor", F11(q), amult, A, B)
    return out, jacobian + along[:, :, None] * gbar[:, None]


def _unit_rows(B: Tensor, bmult: Tensor | None, dtype: torch.dtype) -> Tensor:
    return B.to(dtype) if bmult is None else B.to(dtype) * bmult.to(dtype)[:, None]


def _leading(count: Tensor | None, *rows: Tensor | None) -> tuple[Tensor | None, ...]:
    return rows if count is None else tuple(part if part is None else part[: int(count)] for part in rows)
