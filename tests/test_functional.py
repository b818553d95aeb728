"""The kernels are the expectations they are named after, finite where ``acos`` is not, and refuse what they cannot mean."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pizoo import functional, kernels
from pizoo.functional import F00, F02, F11

SEEDS = st.integers(0, 2**32 - 1)
SAMPLES = 200_000


def gaussian_pairs(c: float, n: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """n pairs of standard normals with correlation c."""
    u, w = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return u, c * u + math.sqrt(1 - c * c) * w


def assert_is_mean(value: Tensor, samples: Tensor, bias: float = 0.0) -> None:
    """``value`` is the mean of ``samples`` within 5 standard errors (20 events where there are hardly any) and a ``bias``."""
    n, error = len(samples), (samples.mean() - value).abs()
    assert error <= 5 * samples.std() / math.sqrt(n) + 20 / n + bias


def random_points(seed: int, *sizes: int, d: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, dtype=torch.float64, generator=generator) for n in sizes]


# ------------------------------------------------------------------ arc-cosine kernels


@settings(max_examples=25, deadline=None)
@given(c=st.floats(-1, 1))
def test_F00_and_F11_are_relu_expectations(c: float) -> None:
    u, v = gaussian_pairs(c)
    at = torch.tensor(c, dtype=torch.float64)
    assert_is_mean(F00(at), u.relu() * v.relu())
    assert_is_mean(F11(at), ((u > 0) & (v > 0)).double())


@settings(max_examples=25, deadline=None)
@given(c=st.floats(-0.95, 0.95))
def test_F02_is_the_expectation_of_relu_times_a_delta(c: float) -> None:
    u, v = gaussian_pairs(c)
    width = 0.05  # relu'' is a unit mass at 0: a box of this half-width, biased in the second order
    delta = (v.abs() < width).double() / (2 * width)
    assert_is_mean(F02(torch.tensor(c, dtype=torch.float64)), u.relu() * delta, bias=width**2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_are_exact_at_their_ends(dtype: torch.dtype) -> None:
    ends = torch.tensor([-1.0, 0.0, 1.0], dtype=dtype)
    torch.testing.assert_close(F00(ends), torch.tensor([0, 1 / (2 * math.pi), 0.5], dtype=dtype))
    torch.testing.assert_close(F11(ends), torch.tensor([0, 0.25, 0.5], dtype=dtype))
    torch.testing.assert_close(F02(ends), torch.tensor([0, 1 / (2 * math.pi), 0], dtype=dtype))


@settings(max_examples=30, deadline=None)
@given(c=st.floats(-0.99, 0.99))
def test_the_derivative_of_F00_is_its_numerical_derivative(c: float) -> None:
    c = torch.tensor([c], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(F00, (c,), eps=1e-6, atol=1e-6)
    assert torch.autograd.gradgradcheck(F00, (c,), eps=1e-6, atol=1e-5)


def test_the_derivative_of_F00_at_its_ends_is_its_limit() -> None:
    ends = torch.tensor([-1.0, 1.0], dtype=torch.float64, requires_grad=True)
    F00(ends).sum().backward()
    torch.testing.assert_close(ends.grad, torch.tensor([0.0, 0.5], dtype=torch.float64))
    near = torch.tensor([-1 + 1e-10, 1 - 1e-10], dtype=torch.float64, requires_grad=True)
    F00(near).sum().backward()
    torch.testing.assert_close(near.grad, ends.grad, atol=1e-4, rtol=0)


def test_a_zero_vector_has_norm_and_direction_zero() -> None:
    direction, norm = functional.unit(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    torch.testing.assert_close(direction, torch.tensor([[0.0, 0.0], [0.6, 0.8]]))
    torch.testing.assert_close(norm, torch.tensor([[0.0], [5.0]]))


# ------------------------------------------------------------------ kernels between points


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, n=st.integers(1, 12), scale=st.floats(1e-3, 1e3))
def test_the_relu_kernel_is_symmetric_positive_and_homogeneous(seed: int, n: int, scale: float) -> None:
    (x,) = random_points(seed, n)
    x = torch.cat([x, x[:1], -x[:1], 0 * x[:1]])  # a repeated, an opposite and a zero point
    kernel = functional.relu_kernel(x, x)
    torch.testing.assert_close(kernel, kernel.T)
    assert torch.linalg.eigvalsh(kernel).min() >= -1e-9 * kernel.diagonal().max()
    torch.testing.assert_close(kernel.diagonal(), x.square().sum(1) / 2)
    torch.testing.assert_close(functional.relu_kernel(scale * x, x), scale * kernel)


def test_the_relu_kernel_is_the_covariance_of_relus() -> None:
    x, y = random_points(0, 2, 3)
    z = torch.randn(400_000, x.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    kernel = functional.relu_kernel(x, y)
    for i in range(len(x)):
        for j in range(len(y)):
            assert_is_mean(kernel[i, j], (z @ x[i]).relu() * (z @ y[j]).relu())


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, depth=st.integers(1, 6), var_w=st.floats(0.1, 3), var_b=st.floats(0, 2))
def test_nngp_and_textbook_ntk_are_positive_kernels(seed: int, depth: int, var_w: float, var_b: float) -> None:
    x, y = random_points(seed, 6, 3)
    for function, options in ((functional.nngp, {}), (functional.ntk, {"form": "textbook"})):
        kernel = function(x, x, depth, var_w, var_b, **options)
        torch.testing.assert_close(kernel, kernel.T)
        assert torch.linalg.eigvalsh(kernel).min() >= -1e-9 * kernel.diagonal().max()
        torch.testing.assert_close(
            function(x, y, depth, var_w, var_b, **options), function(y, x, depth, var_w, var_b, **options).T
        )


class WideNet:
    """A random ReLU MLP: ``h ← relu(sqrt(var_w) (W h / sqrt(fan_in) + β) + b)``, one output ``W h / sqrt(width) + β``.

    Weights are standard normal, b has variance ``var_b``, and β, the trained part of the bias, is zero.
    """

    def __init__(self, d: int, depth: int, var_w: float, var_b: float, seed: int, width: int = 4096):
        generator = torch.Generator().manual_seed(seed)
        self.var_w = var_w
        sizes = [d, *[width] * depth, 1]
        self.weights = [torch.randn(n, m, generator=generator).requires_grad_() for m, n in pairwise(sizes)]
        self.offsets = [torch.randn(n, generator=generator) * math.sqrt(var_b) for n in sizes[1:-1]]
        self.biases = [torch.zeros(n, requires_grad=True) for n in sizes[1:]]

    def features(self, x: Tensor) -> Tensor:
        for W, bias, offset in zip(self.weights[:-1], self.biases[:-1], self.offsets, strict=True):
            x = torch.relu(math.sqrt(self.var_w) * (x @ W.T / math.sqrt(W.shape[1]) + bias) + offset)
        return x

    def tangent_kernel(self, x: Tensor, lr_mults: list[float], bias_lr_mult: float) -> Tensor:
        """``Σ_p lr_p ∂f(x)/∂p ∂f(y)/∂p`` over all pairs of rows of x."""
        W = self.weights[-1]
        out = self.features(x) @ W.T / math.sqrt(W.shape[1]) + self.biases[-1]
        parameters = self.weights + self.biases
        gradients = [torch.autograd.grad(value, parameters, retain_graph=True) for value in out[:, 0]]
        total = torch.zeros(len(x), len(x))
        for share, parts in zip(
            lr_mults + [bias_lr_mult] * len(self.biases), zip(*gradients, strict=True), strict=True
        ):
            stacked = torch.stack([part.flatten() for part in parts])
            total += share * stacked @ stacked.T
        return total


@pytest.mark.parametrize("depth", [1, 2])
def test_nngp_is_the_covariance_of_a_wide_random_net(depth: int) -> None:
    x = random_points(3, 4)[0].float()
    features = [WideNet(5, depth, var_w=1.5, var_b=0.3, seed=seed).features(x).detach() for seed in range(4)]
    estimate = torch.cat(features, 1) @ torch.cat(features, 1).T / (4 * 4096)
    torch.testing.assert_close(estimate, functional.nngp(x, x, depth, var_w=1.5, var_b=0.3), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_textbook_ntk_is_the_tangent_kernel_of_a_wide_random_net(depth: int) -> None:
    x = random_points(4, 3)[0].float()
    wanted = functional.ntk(x, x, depth, 1.5, 0.3, 0.5, 2.0, bias_lr_mult=0.7, form="textbook")
    lr_mults = [0.5, *[1.0] * (depth - 1), 2.0]
    nets = (WideNet(5, depth, var_w=1.5, var_b=0.3, seed=seed) for seed in range(4))
    estimate = sum(net.tangent_kernel(x, lr_mults, 0.7) for net in nets) / 4
    torch.testing.assert_close(estimate, wanted, rtol=0.05, atol=0.02)
    wrong = functional.ntk(x, x, depth, 1.5, 0.3, 0.5, 2.0, bias_lr_mult=0.7)
    assert (wrong / estimate).min() > 1.1  # the reference form is another kernel


def test_the_reference_ntk_transforms_correlations_once_more_and_leaves_out_a_half() -> None:
    x, y = random_points(5, 3, 4)
    rho = (x @ y.T) / (x.norm(dim=1)[:, None] * y.norm(dim=1))
    wanted = (x @ y.T / 5 + 1) * (2 * F11(2 * F00(rho))) + functional.nngp(x, y, 1) + 1
    torch.testing.assert_close(functional.ntk(x, y, 1), wanted)


def test_kernels_at_a_zero_input_are_finite() -> None:
    x = torch.cat([torch.zeros(1, 5, dtype=torch.float64), *random_points(6, 2)])
    for kernel in (functional.nngp(x, x, 3), functional.ntk(x, x, 3), functional.relu_kernel(x, x)):
        assert kernel.isfinite().all()


def test_feature_kernels_ignore_the_scale_of_features() -> None:
    x, y = (points.abs() for points in random_points(7, 3, 4))
    for kernel in (functional.feature_kernel_from_preactivations, functional.feature_kernel_from_postactivations):
        torch.testing.assert_close(kernel(3 * x, y / 7), kernel(x, y))
        torch.testing.assert_close(
            kernel(x, x).diagonal(), torch.full((3,), 0.5, dtype=torch.float64), atol=1e-7, rtol=0
        )


def test_ridge_regression_solves_its_normal_equations() -> None:
    x, targets = random_points(8, 12, 12)
    kernel = functional.relu_kernel(x, x)
    for ridge in (0.1, 0.3):
        before = kernel.clone()
        dual = functional.solve_ridge(kernel, targets, ridge)
        torch.testing.assert_close(kernel @ dual + ridge * dual, targets)
        assert torch.equal(kernel, before)
    assert functional.solve_ridge(kernel.float(), targets.float(), 0.1).dtype == torch.float64


# In a process of its own: what this one has freed would hide what a solution takes.
PEAK = """
import torch
from memory import forget_peak, peak
from pizoo import functional, kernels

torch.set_num_threads(1)
small = torch.eye(100, dtype=torch.float64)
kernels.solve_ridges(small, small, [1.0]), kernels.solve_ridges(small, small, [1.0] * kernels.EIGEN_FROM)  # what is loaded once
x = torch.randn(1000, 20, dtype=torch.float64)
targets = x[:, :2].clone()
for ridges in 1, kernels.EIGEN_FROM:
    kernel = functional.relu_kernel(x, x)
    before = forget_peak()
    kernels.solve_ridges(kernel, targets, [1.0] * ridges)
    print(1 + (peak() - before) / kernel.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' count of memory")
def test_a_regression_takes_as_many_matrices_as_are_checked_for() -> None:
    tests = Path(__file__).parent
    path = os.pathsep.join((str(tests), str(tests.parent)))
    # What is freed goes back to the system, whatever its size.
    environment = {**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536"}
    ran = subprocess.run([sys.executable, "-c", PEAK], env=environment, capture_output=True, text=True, check=True)
    factored, decomposed = map(float, ran.stdout.split())
    assert factored == pytest.approx(kernels.FACTORED, abs=0.2)
    assert decomposed == pytest.approx(kernels.DECOMPOSED, abs=0.4)


# ------------------------------------------------------------------ bad input

X = torch.zeros(3, 5)
REFUSED = {
    "widths differ": (lambda: functional.nngp(X, X[:, :4], 1), ["x and y", "(3, 5)", "(3, 4)", "[n, d] and [m, d]"]),
    "not matrices": (lambda: functional.ntk(X[0], X, 1), ["x and y", "(5,)", "[n, d] and [m, d]"]),
    "depth 0": (lambda: functional.nngp(X, X, 0), ["depth", "0", "at least 1"]),
    "depth 1.5": (lambda: functional.ntk(X, X, 1.5), ["depth", "1.5", "integer"]),
    "form": (lambda: functional.ntk(X, X, 1, form="other"), ["form", "'other'", "'reference' or 'textbook'"]),
    "ridge 0": (lambda: functional.solve_ridge(torch.eye(3), X, 0.0), ["ridge", "0.0", "positive"]),
    "ridge nan": (lambda: functional.solve_ridge(torch.eye(3), X, math.nan), ["ridge", "nan", "positive"]),
    "kernel not square": (lambda: functional.solve_ridge(X, X, 1.0), ["kernel and targets", "[3, 5]", "[n, n]"]),
    "too few targets": (lambda: functional.solve_ridge(torch.eye(3), X[:2], 1.0), ["targets", "[2, 5]", "[n, k]"]),
    "not positive": (lambda: functional.solve_ridge(-torch.eye(3), X, 0.5), ["0.5", "not positive definite", "ridge"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_argument_what_it_got_and_what_it_wants(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(ValueError) as error:
        call()
    for word in words:
        assert word in str(error.value)
