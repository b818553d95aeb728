"""Kernels of infinitely wide ReLU networks: pure functions of tensors.

Sources: Cho and Saul (2009) for the arc-cosine kernels; Lee et al. (2018) for the NNGP; Jacot et al. (2018) for the NTK;
Yang, Santacroce, Hu (ICLR 2022) for the normalisation used here (``F``: expectation over a pair of standard normals) and
for the feature kernel.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

TWO_PI = 2 * math.pi


def F11(c: Tensor) -> Tensor:
    """``E[relu'(u) relu'(v)] = acos(-c) / 2π`` for standard normals u, v with correlation c in [-1, 1]; any shape."""
    return torch.acos(-c) / TWO_PI


def F02(c: Tensor) -> Tensor:
    """``E[relu(u) relu''(v)] = sqrt(1 - c²) / 2π`` for standard normals u, v with correlation c in [-1, 1]; any shape."""
    return torch.sqrt((1 - c) * (1 + c)) / TWO_PI


class _F00(torch.autograd.Function):
    @staticmethod
    def forward(c: Tensor) -> Tensor:
        return F02(c) + c * F11(c)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (c,) = ctx.saved_tensors
        return grad * F11(c)


def F00(c: Tensor) -> Tensor:
    """``E[relu(u) relu(v)] = (sqrt(1 - c²) + c acos(-c)) / 2π`` for standard normals u, v with correlation c.

    Its derivative is ``F11(c)``, exact also at c = ±1, where differentiating through ``acos`` gives NaN.

    Args:
        c: correlations in [-1, 1], any shape, float32 or float64.
    """
    return _F00.apply(c)


def unit(g: Tensor) -> tuple[Tensor, Tensor]:
    """Split g [..., r] into its direction [..., r] and norm [..., 1]; the direction of a zero vector is zero."""
    norm = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
    return g / torch.where(norm > 0, norm, torch.ones_like(norm)), norm


def relu_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Zero-mean ReLU kernel ``E[relu(x.Z) relu(y.Z)] = |x| |y| F00(cos)`` for Z ~ N(0, I). [n, r], [m, r] -> [n, m].

    Tasks may come first: [..., n, r], [..., m, r] -> [..., n, m].
    """
    (x, norm_x), (y, norm_y) = unit(x), unit(y)
    return norm_x * norm_y.mT * F00((x @ y.mT).clamp(-1, 1))


def relu_kernel_of_gram(gram: Tensor) -> Tensor:
    """:func:`relu_kernel` of vectors with themselves, from their inner products [..., n, n]."""
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale = norm[..., :, None] * norm[..., None, :]
    return scale * F00((gram / torch.where(scale > 0, scale, 1)).clamp(-1, 1))


def nngp(x: Tensor, y: Tensor, depth: int, var_w: float = 1.0, var_b: float = 0.0) -> Tensor:
    """The NNGP kernel of an infinitely wide ReLU MLP after ``depth`` hidden layers.

    Args:
        x, y: inputs [..., n, d] and [..., m, d], the dtype of the result; what comes before (tasks) is as many in both.
        depth: number of ReLU layers, at least 1.
        var_w, var_b: variances of weights (times fan-in) and biases.

    Returns:
        [..., n, m].

    Raises:
        ValueError: ``depth`` below 1, inputs not of the shapes above.
    """
    check_kernel_inputs(x, y, depth)
    for _, _, cov in _nngp_layers(x, y, x @ y.mT / x.shape[-1], depth, var_w, var_b):  # noqa: B007 (the last is the kernel)
        pass
    return cov


def ntk(
    x: Tensor,
    y: Tensor,
    depth: int,
    var_w: float = 1.0,
    var_b: float = 0.0,
    first_layer_lr_mult: float = 1.0,
    last_layer_lr_mult: float = 1.0,
    bias_lr_mult: float = 1.0,
    form: Literal["reference", "textbook"] = "reference",
) -> Tensor:
    """The neural tangent kernel of a ReLU MLP with ``depth`` hidden layers and per-layer learning-rate multipliers.

    ``Θ_k = Θ_{k-1} J_k var_w + lr_k cov_k + bias_lr_mult`` with ``cov_k`` the NNGP after the k-th ReLU. In the ``textbook``
    form ``J_k = F11(ρ_k)``, the derivative of the layer's kernel at the correlation ρ_k that enters the ReLU. The published
    numbers come from the ``reference`` form, ``J_k = 2 F11(2 F00(ρ_k))``: the correlation is transformed once too often and
    the factor 1/2 left out.

    Args:
        x, y, depth, var_w, var_b: as for :func:`nngp`.
        first_layer_lr_mult, last_layer_lr_mult, bias_lr_mult: learning-rate multipliers of the first layer's weights, the
            read-out's weights, and every bias.
        form: ``"reference"`` or ``"textbook"``.

    Returns:
        [..., n, m].

    Raises:
        ValueError: as :func:`nngp`, or another ``form``.
    """
    if form not in ("reference", "textbook"):
        raise ValueError(f"form is {form!r}; it must be 'reference' or 'textbook'")
    check_kernel_inputs(x, y, depth)
    inputs = x @ y.mT / x.shape[-1]
    theta = first_layer_lr_mult * inputs + bias_lr_mult
    for k, (rho, after, cov) in enumerate(_nngp_layers(x, y, inputs, depth, var_w, var_b), start=1):
        derivative = F11(rho) if form == "textbook" else 2 * F11((2 * after).clamp(-1, 1))
        lr_mult = last_layer_lr_mult if k == depth else 1.0
        theta = theta * derivative * var_w + lr_mult * cov + bias_lr_mult
    return theta


def _nngp_layers(x: Tensor, y: Tensor, cov: Tensor, depth: int, var_w: float, var_b: float):
    """From the covariance ``x.y / d`` on, yield per ReLU layer the correlation ρ that enters it, F00(ρ), and the covariance
    after it, all [..., n, m]."""
    var_x, var_y = (torch.einsum("...nd,...nd->...n", z, z) / z.shape[-1] for z in (x, y))
    for _ in range(depth):
        var_x, var_y, cov = (v * var_w + var_b for v in (var_x, var_y, cov))
        scale = torch.sqrt(var_x[..., :, None] * var_y[..., None, :])
        rho = (cov / torch.where(scale > 0, scale, torch.ones_like(scale))).clamp(-1, 1)
        after = F00(rho)
        cov = scale * after
        var_x, var_y = var_x / 2, var_y / 2
        yield rho, after, cov


def feature_kernel_from_preactivations(x: Tensor, y: Tensor) -> Tensor:
    """Feature kernel of an infinite net, ``F00(cos(x, y))``, from last hidden pre-activations [n, r], [m, r] -> [n, m];
    tasks [..., n, r] may come first."""
    return F00((unit(x)[0] @ unit(y)[0].mT).clamp(-1, 1))


def feature_kernel_from_postactivations(x: Tensor, y: Tensor) -> Tensor:
    """Feature kernel of a finite net, ``cos(x, y) / 2``, from last hidden post-activations [n, width], [m, width]."""
    return unit(x)[0] @ unit(y)[0].T / 2


def check_kernel_inputs(x: Tensor, y: Tensor, depth: int) -> None:
    """Raise ValueError unless x [..., n, d], y [..., m, d] differ in n and m alone and ``depth`` is a positive integer."""
    if x.ndim < 2 or x.ndim != y.ndim or x.shape[-1] != y.shape[-1] or x.shape[:-2] != y.shape[:-2]:
        raise ValueError(
            f"x and y have shapes {tuple(x.shape)} and {tuple(y.shape)}; they must be [n, d] and [m, d], "
            "after the same number of tasks if there are tasks"
        )
    if not isinstance(depth, int) or depth < 1:
        raise ValueError(f"depth is {depth!r}; it must be an integer of at least 1")


def centred_one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """One-hot labels minus 0.5, the targets of kernel ridge regression: int64 [n] -> [n, num_classes]."""
    return torch.nn.functional.one_hot(labels, num_classes).to(dtype) - 0.5


def solve_ridge(kernel: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Dual coefficients ``(K + ridge I)^{-1} targets`` of kernel ridge regression, by Cholesky decomposition in float64.

    Args:
        kernel: [n, n], symmetric positive semi-definite; afterwards as it was, so that other ridges can follow. A float64
            kernel needs one more matrix of its size, its factor: 20 GB at n = 50,000.
        targets: [n, k].
        ridge: added to the diagonal, positive.

    Returns:
        [n, k], float64.

    Raises:
        ValueError: ridge not positive, shapes that do not fit, a matrix that is not positive definite with this ridge.
    """
    if not ridge > 0:
        raise ValueError(f"ridge is {ridge}; it must be positive")
    n = len(kernel)
    if kernel.shape != (n, n) or targets.ndim != 2 or len(targets) != n:
        raise ValueError(
            f"kernel and targets have shapes {list(kernel.shape)} and {list(targets.shape)}; they must be [n, n] and [n, k]"
        )
    kernel = kernel.double()
    diagonal = kernel.diagonal().clone()
    try:
        kernel.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(kernel)
    finally:
        kernel.diagonal().copy_(diagonal)
    if info.item():
        raise ValueError(f"kernel + {ridge} I is not positive definite (minor {info.item()}); it needs a larger ridge")
    return solve_factored(factor, targets.double())


def solve_factored(factor: Tensor, targets: Tensor) -> Tensor:
    """``(L Lᵀ)⁻¹ targets`` [n, k] with L [n, n] lower triangular, which ``torch.cholesky_solve`` would copy."""
    half = torch.linalg.solve_triangular(factor, targets, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)
