"""Few rows that compute what many do: landmarks, ridge regression, distillation.

A growing layer is a kernel machine ``s F00(ḡ Bᵀ) A``. With rows B at landmarks of what enters the layer, the best A is a
ridge regression (Nyström approximation; Williams and Seeger, 2001). Landmarks are spherical k-means (Zhang, Tsang, Kwok,
2008: Nyström's error is bounded by the quantisation error). After that A and B of all layers learn together, by
distillation, to give the full net's logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pizoo.data import epoch_order
from pizoo.functional import F00, unit
from pizoo.nn import InfPiLinear
from pizoo.rows import row_scale

KMEANS_ROUNDS = 6
RIDGES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
JITTER = 1e-12  # of the mean diagonal: two landmarks may coincide
SAMPLES_AT_ONCE = 4096
DISTILLATION_BATCH = 500
LEARNING_RATE = 0.005  # of each tensor's root mean square
WARM_UP = 50  # steps
WHITENING = 1e-6  # directions of features that vary less than this share of the mean are not blown up further
FIXED_POINT = 2.0**40

Pair = tuple[Tensor, Tensor]


def landmarks(g: Tensor, count: int, seed: int, rounds: int = KMEANS_ROUNDS) -> Tensor:
    """Unit vectors [count, r] at the centres of clusters of the directions of g [n, r]: spherical k-means.

    With ``rounds=0`` directions of g drawn at random.

    Raises:
        ValueError: more landmarks than inputs.
    """
    if count > len(g):
        raise ValueError(
            f"{count:,} rows are asked for, with {len(g):,} inputs to fit to; a row needs an input of its own"
        )
    gbar = unit(g)[0]
    centres = gbar[epoch_order(len(g), seed, 0)[:count].to(g.device)]
    for _ in range(rounds):
        nearest = torch.cat([(part @ centres.T).argmax(1) for part in gbar.split(SAMPLES_AT_ONCE)])
        # Sums of whole numbers do not depend on their order, in which a GPU adds them as it likes.
        sums = torch.zeros(centres.shape, dtype=torch.int64, device=g.device)
        sums.index_add_(0, nearest, (gbar * FIXED_POINT).to(torch.int64))
        moved, length = unit(sums.double())
        centres = torch.where(length > 0, moved.to(g.dtype), centres)
    return centres


def row_features(g: Tensor, B: Tensor, layernorm: bool) -> Tensor:
    """What rows B [M, r] of any length give on g [n, r], before A: ``s F00(ḡ B̄ᵀ)`` [n, M], without s under layernorm."""
    gbar, s = unit(g)
    features = F00((gbar @ unit(B)[0].T).clamp(-1, 1))
    return features if layernorm else s * features


class FewRows:
    """A growing layer on landmarks: its A by ridge regression, then A and B to be trained.

    Gradient descent on A and B themselves hardly moves: features are nearly collinear. So A = P C with P whitening the
    features, B = unit(Z S) with S whitening (halfway) the directions that enter, and C, Z are what is trained.

    Args:
        layer: the layer to give rows to; its bias and multipliers stay.
        B: landmarks [M, r].
        fit: what enters the layer [n, r], and what the full layer then gives [n, r_out].
        held_out: the same for other inputs, by which the ridge is chosen.

    Attributes:
        ridge: the one of ``RIDGES`` with the least error on ``held_out``.
        error: that error, relative.
    """

    @torch.no_grad()
    def __init__(self, layer: InfPiLinear, B: Tensor, fit: Pair, held_out: Pair):
        self.layer = layer
        gram, A, self.ridge, self.error = self._regress(B, fit, held_out)
        gram.diagonal().add_(WHITENING * gram.diagonal().mean())
        factor = torch.linalg.cholesky(gram)
        del gram
        self.C = (factor.T @ A).float()
        identity = torch.eye(len(B), dtype=factor.dtype, device=factor.device)
        self.P = torch.linalg.solve_triangular(factor.T, identity, upper=True).float()
        gbar = unit(fit[0])[0].double()
        values, vectors = torch.linalg.eigh(gbar.T @ gbar / len(gbar))
        values += values.mean()
        self.S = ((vectors * values.rsqrt()) @ vectors.T).float()
        self.Z = (B.double() @ (vectors * values.sqrt()) @ vectors.T).float()

    def _regress(self, B: Tensor, fit: Pair, held_out: Pair) -> tuple[Tensor, Tensor, float, float]:
        """Minimise |features A - target|² / n + ridge tr(Aᵀ K A), K the kernel of the rows, in float64."""
        M, (g, target) = len(B), (fit[0], self._before_finish(fit[1]))
        gram = torch.zeros(M, M, dtype=torch.float64, device=B.device)
        moment = torch.zeros(M, target.shape[1], dtype=torch.float64, device=B.device)
        for g_part, target_part in zip(g.split(SAMPLES_AT_ONCE), target.split(SAMPLES_AT_ONCE), strict=True):
            features = row_features(g_part.double(), B.double(), self.layer.layernorm)
            gram.addmm_(features.T, features, alpha=1 / len(g))
            moment.addmm_(features.T, target_part.double(), alpha=1 / len(g))
        kernel, scale = row_features(B.double(), B.double(), True), gram.diagonal().mean()
        best = (math.inf, math.nan, torch.empty(0))
        for ridge in RIDGES:
            system = gram + ridge * scale / kernel.diagonal().mean() * kernel
            system.diagonal().add_(JITTER * scale)
            factor, info = torch.linalg.cholesky_ex(system)
            if info.item() == 0:
                A = torch.cholesky_solve(moment, factor)
                best = min(best, (self._error(B, A, held_out), ridge, A), key=lambda found: found[0])
        error, ridge, A = best
        return gram, A, ridge, error

    def _error(self, B: Tensor, A: Tensor, held_out: Pair) -> float:
        g, out = held_out
        return relative_error(in_parts(lambda part: self._output(part, A.float(), B), g), out)

    def _before_finish(self, out: Tensor) -> Tensor:
        """What the rows must sum to for the layer to give ``out``."""
        return (out - self.layer.finish(torch.zeros_like(out[:1]))) / self.layer.alpha

    def _output(self, g: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return self.layer.finish(row_features(g, B, self.layer.layernorm) @ A)

    def __call__(self, g: Tensor) -> Tensor:
        """[n, r] -> [n, r_out], differentiable with respect to g, C and Z."""
        return self._output(g, self.P @ self.C, self.Z @ self.S)

    @torch.no_grad()
    def store(self) -> None:
        """Put the rows into the layer, in its dtype."""
        A, B = self.P @ self.C, unit(self.Z @ self.S)[0]
        scale = row_scale(A)
        self.layer.set_rows(A / scale[:, None], B, scale)


def distil(
    layers: Sequence[FewRows],
    g: Tensor,
    logits: Tensor,
    steps: int,
    seed: int,
    track: Callable[[Iterable[int]], Iterable[int]],
) -> None:
    """Train the rows of all layers to give ``logits`` [n, classes] where g [n, r] enters the first: Adam, cosine schedule."""
    trained = [tensor.requires_grad_() for layer in layers for tensor in (layer.C, layer.Z)]
    groups = [{"params": [t], "lr": LEARNING_RATE * t.detach().square().mean().sqrt().item()} for t in trained]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    batches = _batches(len(g), seed)
    variance = logits.square().mean()
    with torch.enable_grad():
        for _ in track(range(steps)):
            batch = next(batches).to(g.device)
            out = g[batch]
            for layer in layers:
                out = layer(out)
            optimizer.zero_grad()
            ((out - logits[batch]).square().mean() / variance).backward(inputs=trained)
            optimizer.step()
            schedule.step()
    for tensor in trained:
        tensor.requires_grad_(False)


def _batches(n: int, seed: int):
    epoch = 0
    while True:
        yield from epoch_order(n, seed, epoch).split(DISTILLATION_BATCH)
        epoch += 1


def in_parts(function: Callable[[Tensor], Tensor], g: Tensor) -> Tensor:
    """``function`` over g part by part, joined."""
    return torch.cat([function(part) for part in g.split(SAMPLES_AT_ONCE)])


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """``|found - wanted| / |wanted|``."""
    return ((found - wanted).double().norm() / wanted.double().norm()).item()
