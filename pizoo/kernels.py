"""Kernels between many inputs: block by block, refused where they do not fit, and the regressions on them.

A kernel function takes two sets of vectors, [n, d] and [m, d], to [n, m] (:func:`pizoo.functional.nngp` with its parameters,
the feature kernel of a net with its features).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pizoo.functional import solve_ridge
from pizoo.memory import NotEnoughMemory, free_memory

KernelFunction = Callable[[Tensor, Tensor], Tensor]

# A kernel is computed block by block. In float64 a block, of which there are a dozen at a time on the way, is 4 MB on a CPU, to
# stay in its cache, and 256 MB on a GPU, to keep it busy.
BLOCK_ENTRIES = {"cpu": 2**19, "cuda": 2**25}
BLOCK_ROWS = 1024
BLOCKS_AT_ONCE = 12
EIGEN_FROM = 20  # ridges: an eigendecomposition, which serves all, takes as long as so many Cholesky decompositions
FACTORED = 2  # matrices at a time: a kernel and its factor
DECOMPOSED = 4  # the kernel, its eigenvectors, and twice that to find them
TOLERANCE = 1e-6  # of iterative solutions: their residual, relative to the targets
LANDMARKS = 2000  # of the preconditioner
JITTER = 1e-9  # of the kernel between landmarks, relative to its diagonal: some may coincide


def blocks(function: KernelFunction, x: Tensor, y: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """The kernel between x [n, d] and y [m, d], as rows, columns and what stands there."""
    height = min(BLOCK_ROWS, len(x))
    width = max(1, _block_entries(x.device) // height)
    for i in range(0, len(x), height):
        rows = slice(i, min(i + height, len(x)))
        for j in range(0, len(y), width):
            columns = slice(j, min(j + width, len(y)))
            yield rows, columns, function(x[rows], y[columns])


@torch.no_grad()
def matrix(function: KernelFunction, x: Tensor, y: Tensor) -> Tensor:
    """The kernel [n, m] in x's dtype, and memory for little more than that."""
    out = x.new_empty(len(x), len(y))
    for rows, columns, block in blocks(function, x, y):
        out[rows, columns] = block
    return out


@torch.no_grad()
def product(function: KernelFunction, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """The kernel times v [m, k]: [n, k], in v's dtype; the kernel is never held as a whole."""
    out = v.new_zeros(len(x), v.shape[1])
    for rows, columns, block in blocks(function, x, y):
        out[rows] += block @ v[columns]
    return out


def kernel_bytes(n: int, m: int, itemsize: int, device: torch.device, copies: int = 1) -> int:
    """What ``copies`` matrices [n, m] take, and the blocks that they are made of."""
    return itemsize * (copies * n * m + BLOCKS_AT_ONCE * min(n * m, _block_entries(device)))


def check_memory(
    n: int, m: int, itemsize: int, device: torch.device, copies: int = 1, remedy: str = "", taken: int = 0
) -> None:
    """Raise NotEnoughMemory, with the size, unless ``copies`` kernels between n and m inputs fit.

    Args:
        copies: 1, or what a regression takes: :data:`FACTORED`, :data:`DECOMPOSED`.
        remedy: what else could be done, for the message.
        taken: bytes of what is free now that something else will have by then.
    """
    needed, free = kernel_bytes(n, m, itemsize, device, copies), max(0, free_memory(device) - taken)
    if needed > free:
        fitting = _fitting(free // itemsize, device, copies)
        beside = {1: "", FACTORED: ", and its factor beside it,", DECOMPOSED: ", and its eigendecomposition,"}[copies]
        raise NotEnoughMemory(
            f"the kernel between {n:,} and {m:,} inputs{beside} takes {needed / 2**30:.1f} GiB in float{8 * itemsize}; "
            f"{free / 2**30:.1f} GiB are free on {device}. One between {fitting:,} would fit{remedy}"
        )


def _fitting(entries: int, device: torch.device, copies: int) -> int:
    """Between how many inputs a kernel is whose ``copies``, and the blocks they are made of, hold so many numbers at most."""
    beside_blocks = entries - BLOCKS_AT_ONCE * _block_entries(device)  # where the kernel is larger than a block
    return math.isqrt(max(beside_blocks // copies, entries // (copies + BLOCKS_AT_ONCE)))


# ---------------------------------------------------------------------------------------------------- regression


def solve_ridges(kernel: Tensor, targets: Tensor, ridges: Sequence[float]) -> list[Tensor]:
    """Dual coefficients of kernel ridge regression with each of several ridges, in float64.

    A few ridges take a Cholesky decomposition each; many, one eigendecomposition for all, which costs some twenty of those.

    Args:
        kernel: [n, n], symmetric positive semi-definite; afterwards as it was.
        targets: [n, k].
        ridges: added to the diagonal, positive.

    Returns:
        one [n, k] a ridge.

    Raises:
        ValueError: as :func:`pizoo.functional.solve_ridge`.
    """
    check_ridges(ridges)
    if len(ridges) < EIGEN_FROM:
        return [solve_ridge(kernel, targets, ridge) for ridge in ridges]
    values, vectors = torch.linalg.eigh(kernel.double())
    if (smallest := values[0].item()) + min(ridges) <= 0:
        raise ValueError(
            f"kernel + {min(ridges)} I is not positive definite (eigenvalue {smallest:.3g}); it needs a larger ridge"
        )
    rotated = vectors.T @ targets.double()
    return [vectors @ (rotated / (values + ridge)[:, None]) for ridge in ridges]


def check_solving(n: int, ridges: int, device: torch.device, remedy: str = "", taken: int = 0) -> None:
    """Raise NotEnoughMemory unless :func:`solve_ridges` fits on a kernel between n inputs with so many ridges."""
    check_memory(n, n, 8, device, FACTORED if ridges < EIGEN_FROM else DECOMPOSED, remedy, taken)


def check_ridges(ridges: Sequence[float]) -> None:
    """Raise ValueError unless there are ridges, all of them positive and finite."""
    if not ridges:
        raise ValueError("ridges are []; there must be one or more")
    for ridge in ridges:
        if not 0 < ridge < math.inf:
            raise ValueError(f"ridge is {ridge}; it must be positive")


def check_tolerance(tolerance: float) -> None:
    """Raise ValueError unless a relative residual is positive and finite."""
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance is {tolerance}; it must be positive and finite")


def solve_iteratively(
    function: KernelFunction,
    x: Tensor,
    targets: Tensor,
    ridge: float,
    tolerance: float = TOLERANCE,
    iterations: int = 1000,
    landmarks: int = LANDMARKS,
) -> tuple[Tensor, int]:
    """Dual coefficients of kernel ridge regression on inputs whose kernel does not fit: preconditioned conjugate gradients.

    The kernel is computed anew, block by block, in every iteration. Preconditioner: the kernel's Nyström approximation from
    randomly chosen inputs, its inverse by Woodbury's formula (Rudi, Carratino, Rosasco 2017).

    Args:
        x: [n, d], float64.
        targets: [n, k].
        tolerance: of every column's residual, relative to the column.
        iterations: most of them.
        landmarks: how many inputs.

    Returns:
        [n, k] in float64, and how many iterations it took.

    Raises:
        ValueError: a ridge or tolerance not positive, no convergence within ``iterations``.
    """
    check_ridges([ridge])
    check_tolerance(tolerance)
    x, targets = x.double(), targets.double()
    precondition = _nystrom(function, x, ridge, min(landmarks, len(x)))

    def apply(v: Tensor) -> Tensor:
        return product(function, x, x, v) + ridge * v

    return conjugate_gradients(apply, targets, precondition, tolerance, iterations)


def _nystrom(function: KernelFunction, x: Tensor, ridge: float, landmarks: int) -> Callable[[Tensor], Tensor]:
    """``v -> (C W⁻¹ Cᵀ + ridge I)⁻¹ v`` with C the kernel between x and landmarks among them, W that between landmarks."""
    generator = torch.Generator().manual_seed(0)
    chosen = x[torch.randperm(len(x), generator=generator)[:landmarks].to(x.device)]
    among = matrix(function, chosen, chosen)
    among.diagonal().add_(JITTER * among.diagonal().mean())
    # C L⁻ᵀ with W = L Lᵀ: products of C itself would square the condition of W.
    root = torch.linalg.solve_triangular(
        torch.linalg.cholesky(among).T, matrix(function, x, chosen), upper=True, left=False
    )
    inner = root.T @ root
    inner.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(inner)

    def precondition(v: Tensor) -> Tensor:
        return (v - root @ torch.cholesky_solve(root.T @ v, factor)) / ridge

    return precondition


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    targets: Tensor,
    precondition: Callable[[Tensor], Tensor],
    tolerance: float,
    iterations: int,
) -> tuple[Tensor, int]:
    """Solve ``apply(solution) = targets`` [n, k], column by column, for a symmetric positive definite ``apply``.

    Returns:
        the solution, and how many iterations it took.

    Raises:
        ValueError: no convergence within ``iterations``.
    """
    solution, residual = torch.zeros_like(targets), targets.clone()
    wanted = tolerance * torch.linalg.vector_norm(targets, dim=0)
    direction = torch.zeros_like(targets)
    before = targets.new_ones(targets.shape[1])
    for iteration in range(iterations + 1):
        norms = torch.linalg.vector_norm(residual, dim=0)
        if (norms <= wanted).all():
            return solution, iteration
        ahead = precondition(residual)
        inner = (residual * ahead).sum(0)
        direction = ahead + direction * (inner / before)
        moved = apply(direction)
        curvature = (direction * moved).sum(0)
        step = torch.where(curvature > 0, inner / curvature, 0)  # 0: a column that is solved to the last bit
        solution += step * direction
        residual -= step * moved
        before = torch.where(inner > 0, inner, 1)
    worst = (norms / torch.linalg.vector_norm(targets, dim=0)).max().item()
    raise ValueError(
        f"conjugate gradients are at a residual of {worst:.1g} after {iterations} iterations, {tolerance:g} is wanted: a "
        "larger ridge or more landmarks would help"
    )


def _block_entries(device: torch.device) -> int:
    return BLOCK_ENTRIES.get(device.type, BLOCK_ENTRIES["cpu"])
