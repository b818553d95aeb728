"""Few rows that compute what many do: landmarks, ridge regression, and rounding that makes up for itself.

A growing layer is a kernel machine ``s F00(ḡ Bᵀ) A``. With rows B at landmarks of what enters the layer, the best A is a
ridge regression on what the full layer gives (Nyström approximation; Williams and Seeger, 2001). Its rows are large and cancel,
so that rounding each to nearest costs far more than the few bits it drops; rounded one after the other, each row makes up
for the errors of those before (nearest plane; Babai, 1986), and 8 bits do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pizoo.data import epoch_order
from pizoo.functional import F00, solve_factored, unit
from pizoo.nn import InfPiLinear
from pizoo.ops.reference import correlations
from pizoo.rows import directed, scaled

RIDGES = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
NEARLY = 1.02
JITTER = 1e-12  # of the mean diagonal: two landmarks may coincide
SAMPLES_AT_ONCE = 4096
BLOCK = 128  # rows rounded before the errors they leave are spread to all others

Pair = tuple[Tensor, Tensor]


class Fit(NamedTuple):
    """How a layer was fitted: the ridge, of :data:`RIDGES`, and the relative error on held-out inputs, after rounding."""

    ridge: float
    error: float


@torch.no_grad()
def fit_rows(layer: InfPiLinear, count: int, fit: Pair, held_out: Pair, seed: int) -> Fit:
    """Give a layer ``count`` rows with which it computes, as nearly as they can, what a layer of more rows does.

    Minimises ``|features A - target|² / n + ridge tr(Aᵀ K A)`` in float64, K being the kernel of the rows, then rounds A to
    the dtype of the layer's rows. The layer's bias and multipliers stay.

    Args:
        layer: its rows are replaced.
        fit: what enters the layer [n, r], and what the full layer then gives [n, r_out].
        held_out: the same for other inputs. The largest ridge is taken that does nearly as well there as the best, what
            rounding will cost included: rows that cancel less lose less to it, here and in what computes with them.
        seed: of the landmarks.

    Raises:
        ValueError: more rows than inputs.
    """
    dtype = layer.A.dtype
    B, *bmult = directed(landmarks(fit[0], count, seed), dtype)
    B = B.to(dtype)
    along = B.double() if not bmult else B.double() * bmult[0].double()[:, None]
    gram, moment = _moments(layer, along, fit)
    directions = unit(along)[0]  # rounded rows are not quite of norm 1, and without it this is not quite symmetric
    kernel, scale = row_features(directions, directions, True), gram.diagonal().mean()

    def factor(ridge: float) -> Tensor | None:
        system = gram + ridge * scale / kernel.diagonal().mean() * kernel
        system.diagonal().add_(JITTER * scale)
        lower, info = torch.linalg.cholesky_ex(system)
        return None if info.item() else lower

    features, wanted = row_features(held_out[0].double(), along, layer.layernorm), _summed(layer, held_out[1])
    solved, errors, size = {}, {}, wanted.norm().item() or 1.0
    for ridge in RIDGES:
        if (lower := factor(ridge)) is not None:
            solved[ridge] = solve_factored(lower, moment)
            lost = rounding_loss(solved[ridge], lower, dtype) * len(wanted)
            errors[ridge] = math.hypot(relative_error(features @ solved[ridge], wanted), lost**0.5 / size)
    if not any(error < math.inf for error in errors.values()):
        raise ValueError(
            "what the full net gives for x, or what enters its layers, is not finite: no rows can be fitted to it"
        )
    ridge = max(ridge for ridge, error in errors.items() if error <= NEARLY * min(errors.values()))
    A, amult = rounded(solved[ridge], factor(ridge), dtype)  # factors are too large to keep one a ridge
    layer.set_rows(A, B, amult)
    return Fit(ridge, relative_error(in_parts(layer, held_out[0]), held_out[1]))


def landmarks(g: Tensor, count: int, seed: int) -> Tensor:
    """Directions of ``count`` of the inputs g [n, r], drawn at random: [count, r].

    Raises:
        ValueError: more landmarks than inputs.
    """
    check_inputs(count, len(g))
    return unit(g[epoch_order(len(g), seed, 0)[:count].to(g.device)])[0]


def check_inputs(rows: int, inputs: int) -> None:
    """Raise ValueError unless every row can have an input of its own for its landmark."""
    if rows > inputs:
        raise ValueError(
            f"{rows:,} rows are asked for, with {inputs:,} inputs to fit to; a row needs an input of its own"
        )


def row_features(g: Tensor, B: Tensor, layernorm: bool) -> Tensor:
    """What rows B [M, r], of norm 1, give on g [n, r] before A: ``s F00(ḡ Bᵀ)`` [n, M], without s under layernorm."""
    gbar, s = unit(g)
    features = F00(correlations(gbar, B))
    return features if layernorm else s * features


def rounded(A: Tensor, factor: Tensor, dtype: torch.dtype) -> Pair:
    """Rows like A [M, n] that ``dtype`` holds, so that ``tr(Eᵀ H E)`` of what is lost, E, stays small.

    One row after the other, from the last: each is moved to where it makes up for the errors so far, then rounded.

    Args:
        factor: the lower Cholesky factor of H [M, M].

    Returns:
        the rows as stored, and what each of them is multiplied by [M]: ``A`` and ``amult`` of a growing layer.
    """
    held, amult = torch.empty_like(A, dtype=dtype), A.new_empty(len(A))
    error, diagonal = torch.zeros_like(A), factor.diagonal()[:, None]
    for stop in range(len(A), 0, -BLOCK):
        first = max(0, stop - BLOCK)
        wanted = A[first:stop] + factor[stop:, first:stop].T @ error[stop:] / diagonal[first:stop]
        for i in reversed(range(first, stop)):
            row = wanted[i - first] + factor[i + 1 : stop, i] @ error[i + 1 : stop] / diagonal[i]
            values, by = scaled(row[None], dtype)
            held[i], amult[i] = values[0], by[0]
            error[i] = A[i] - held[i].to(A.dtype) * amult[i]
    return held, amult


def rounding_loss(A: Tensor, factor: Tensor, dtype: torch.dtype) -> float:
    """About what ``tr(Eᵀ H E)`` is after :func:`rounded`: of each row, what those before it cannot make up for."""
    held, amult = scaled(A, dtype)
    error = A - held.to(dtype).to(A.dtype) * amult[:, None]
    return (factor.diagonal()[:, None] * error).square().sum().item()


def _moments(layer: InfPiLinear, B: Tensor, fit: Pair) -> Pair:
    """Mean products of the features of rows B with themselves [M, M], and with what A must make of them [M, r_out]."""
    g, out = fit
    gram, moment = B.new_zeros(len(B), len(B)), B.new_zeros(len(B), out.shape[1])
    for g_part, out_part in zip(g.split(SAMPLES_AT_ONCE), out.split(SAMPLES_AT_ONCE), strict=True):
        features = row_features(g_part.double(), B, layer.layernorm)
        gram.addmm_(features.T, features, alpha=1 / len(g))
        moment.addmm_(features.T, _summed(layer, out_part), alpha=1 / len(g))
    return gram, moment


def _summed(layer: InfPiLinear, out: Tensor) -> Tensor:
    """What the rows must sum to for the layer to give ``out``, in float64."""
    return ((out - layer.finish(torch.zeros_like(out[:1]))) / layer.alpha).double()


def in_parts(layer: InfPiLinear, g: Tensor, track: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter) -> Tensor:
    """A layer's output on g [n, r], part by part (rows on the host stream once for each), in float32."""
    return torch.cat([layer(part).float() for part in track(g.split(SAMPLES_AT_ONCE))])


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """``|found - wanted| / |wanted|``; where nothing is wanted, ``|found|``."""
    size = wanted.double().norm().item()
    return (found - wanted).double().norm().item() / (size or 1.0)
