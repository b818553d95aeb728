"""Layers: the gradient is the function's, and a backward pass leaves the rows that functional gradient descent adds."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pizoo.functional import F00, unit
from pizoo.nn import InfPiInput, InfPiLinear, PiLinear, projection_basis

R, R_OUT = 5, 3


def make_layer(layernorm: bool = False, dtype: torch.dtype = torch.float64, seed: int = 0, **options) -> InfPiLinear:
    torch.manual_seed(seed)
    layer = InfPiLinear(R, R_OUT, role="readout", layernorm=layernorm, dtype=dtype, **options)
    layer.set_rows(torch.randn(9, R_OUT), unit(torch.randn(9, R))[0], torch.randn(9))
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def points(n: int = 4, seed: int = 1, dtype: torch.dtype = torch.float64, width: int = R) -> Tensor:
    return torch.randn(n, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def definition(layer: InfPiLinear, g: Tensor) -> Tensor:
    """The layer as its formula, by autograd through ``acos``: right away from q = ±1."""
    s = g.norm(dim=1, keepdim=True)
    q = g / s @ layer.B.T
    kernel = (torch.sqrt(1 - q * q) + q * torch.acos(-q)) / (2 * math.pi)
    out = kernel * (1 if layer.layernorm else s) @ (layer.amult[:, None] * layer.A)
    return layer.alpha * (out + (0 if layer.bias is None else layer.bias_alpha * layer.bias))


# ------------------------------------------------------------------ the function and its gradient


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), layernorm=st.booleans(), decay=st.floats(0.1, 1))
def test_a_growing_layer_and_its_gradient_equal_their_definition(seed: int, layernorm: bool, decay: float) -> None:
    layer = make_layer(layernorm, seed=seed, alpha=0.7, bias_alpha=0.4)
    layer.decay = decay
    g, delta = points(seed=seed + 1).requires_grad_(), points(seed=seed + 2, width=R_OUT)
    torch.testing.assert_close(layer(g), definition(layer, g), rtol=1e-9, atol=1e-12)
    (found,), (wanted,) = (torch.autograd.grad((f * delta).sum(), g) for f in (layer(g), definition(layer, g)))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("layernorm", [False, True])
def test_the_gradient_is_the_numerical_gradient(layernorm: bool) -> None:
    layer = make_layer(layernorm, alpha=0.5)
    assert torch.autograd.gradcheck(layer, (points().requires_grad_(),), atol=1e-6)


@pytest.mark.parametrize("layernorm", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_gradient_where_a_sample_meets_a_row_is_the_limit_beside_it(sign: float, layernorm: bool) -> None:
    layer = make_layer(layernorm)
    met = 2 * sign * layer.B.detach()[:3]
    beside = met + 1e-7 * points(3)
    gradients = []
    for g in (met, beside):
        g.requires_grad_()
        gradients.append(torch.autograd.grad(layer(g).sum(), g)[0])
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)


def test_at_identity_init_the_gradient_on_an_axis_is_one_half_of_its_row() -> None:
    """g = e_0 meets row 0 (F11(1) = 1/2, F02(1) = 0) and is orthogonal to the others (F11(0) = 1/4, F02(0) = 1/2π)."""
    layer = InfPiLinear(R, R, identity_init=True, dtype=torch.float64)
    g = torch.eye(R, dtype=torch.float64)[:1].requires_grad_()
    (gradient,) = torch.autograd.grad(layer(g).sum(), g)
    wanted = torch.full((1, R), 0.25, dtype=torch.float64)
    wanted[0, 0] = 0.5 + (R - 1) / (2 * math.pi)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layernorm", [False, True])
def test_a_zero_input_gives_finite_output_gradient_and_rows(layernorm: bool, dtype: torch.dtype) -> None:
    layer = make_layer(layernorm, dtype)
    g = torch.cat([torch.zeros(1, R, dtype=dtype), points(2, dtype=dtype)]).requires_grad_()
    out = layer(g)
    out.sum().backward()
    assert out.isfinite().all() and g.grad.isfinite().all() and layer.A.grad.isfinite()
    if not layernorm:
        torch.testing.assert_close(out[0], layer.bias)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16])
def test_short_rows_under_float32_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    layer = make_layer(dtype=torch.float32)
    layer.to_rows_dtype(dtype)
    assert layer.bias.dtype == torch.float32
    rounded = copy.deepcopy(layer)
    rounded.to_rows_dtype(torch.float32)
    g = points(dtype=torch.float32)
    assert layer(g).dtype == torch.float32
    torch.testing.assert_close(layer(g), rounded(g), rtol=1e-6, atol=1e-6)


def test_autocast_does_not_reach_into_a_growing_layer() -> None:
    layer, g = make_layer(dtype=torch.float32), points(dtype=torch.float32)
    results = []
    for enabled in (False, True):
        x = g.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = layer(x)
            out.square().sum().backward()
        results.append((out, x.grad, layer.A.grad.A))
        layer.zero_grad()
    for plain, autocast in zip(*results, strict=True):
        assert torch.equal(plain, autocast)


def test_a_finite_layer_under_autocast_has_gradients_of_its_parameters_dtype() -> None:
    layer, x = PiLinear(R, 12), points(dtype=torch.float32).requires_grad_()
    basis = projection_basis(points(12, dtype=torch.float32, width=2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, basis)
    out.float().square().sum().backward()
    found = layer.weight.grad.clone()
    layer.zero_grad()
    layer(x, basis).square().sum().backward()
    assert out.dtype == torch.bfloat16 and found.dtype == x.grad.dtype == torch.float32
    torch.testing.assert_close(found, layer.weight.grad, rtol=0.05, atol=0.1)


def test_inputs_need_not_be_contiguous() -> None:
    layer, g = make_layer(), points(R, width=4).T
    assert not g.is_contiguous()
    torch.testing.assert_close(layer(g), layer(g.contiguous()))
    input_layer, finite = InfPiInput(R, 4, dtype=torch.float64), PiLinear(R, 4, dtype=torch.float64)
    for other in (input_layer, finite):
        torch.testing.assert_close(other(g), other(g.contiguous()))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_order_of_rows_does_not_matter(seed: int) -> None:
    layer, g = make_layer(seed=seed), points(seed=seed + 1)
    before = layer(g)
    order = torch.randperm(layer.count, generator=torch.Generator().manual_seed(seed))
    layer.set_rows(layer.A.data[order], layer.B.data[order], layer.amult[order])
    torch.testing.assert_close(layer(g), before, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ the rows a backward pass leaves


@pytest.mark.parametrize("layernorm", [False, True])
def test_pending_rows_are_delta_times_s_at_unit_inputs(layernorm: bool) -> None:
    layer, g, delta = make_layer(layernorm, alpha=0.5), points(), points(seed=3, width=R_OUT)
    (layer(g) * delta).sum().backward()
    gbar, s = unit(g)
    torch.testing.assert_close(layer.A.grad.A, 0.5 * delta * (1 if layernorm else s))
    torch.testing.assert_close(layer.A.grad.B, gbar)


@pytest.mark.parametrize("layernorm", [False, True])
def test_appended_rows_move_the_function_along_its_gradient_in_function_space(layernorm: bool) -> None:
    """f(g') changes by -lr Σ_i K(g', g_i) δ_i, exactly, since a layer is linear in its rows."""
    layer, g, other = make_layer(layernorm), points(), points(6, seed=7)
    target = points(seed=3, width=R_OUT)
    out = layer(g)
    (0.5 * (out - target) ** 2).sum().backward()
    with torch.no_grad():
        before = layer(other)
        layer.append(layer.A.grad.A, layer.A.grad.B, -0.1)
        change = layer(other) - before
    (a, sa), (b, sb) = unit(other), unit(g)
    kernel = F00(a @ b.T) * (1 if layernorm else sa * sb.T)
    torch.testing.assert_close(change, -0.1 * kernel @ (out - target).detach())


def test_the_squared_norm_of_pending_rows_is_the_rate_at_which_they_lower_the_loss() -> None:
    layer, g, target = make_layer(), points(), points(seed=3, width=R_OUT)

    def loss() -> Tensor:
        return 0.5 * (layer(g) - target).square().sum()

    before = loss()
    before.backward()
    pending, step = layer.A.grad, 1e-6
    layer.append(pending.A, pending.B, -step)
    torch.testing.assert_close((before - loss()) / step, pending.norm() ** 2, rtol=1e-4, atol=0)


def test_backward_passes_add_up() -> None:
    whole, halves, g = make_layer(), make_layer(), points(8)
    whole(g).square().sum().backward()
    for half in g.split(4):
        halves(half).square().sum().backward()
    for name in ("A", "B"):
        torch.testing.assert_close(getattr(halves.A.grad, name), getattr(whole.A.grad, name))
    torch.testing.assert_close(halves.bias.grad, whole.bias.grad)


def frozen(layer: InfPiLinear, g: Tensor) -> None:
    layer.requires_grad_(False)
    layer(g).sum().backward()


def evaluating(layer: InfPiLinear, g: Tensor) -> None:
    layer.eval()
    layer(g).sum().backward()


def without_gradients(layer: InfPiLinear, g: Tensor) -> None:
    with torch.no_grad():
        out = layer(g)
    assert not out.requires_grad


def in_inference_mode(layer: InfPiLinear, g: Tensor) -> None:
    with torch.inference_mode():
        layer(g)


def gradient_of_inputs(layer: InfPiLinear, g: Tensor) -> None:
    (gradient,) = torch.autograd.grad(layer(g).sum(), g)
    assert gradient.abs().sum() > 0


def backward_to_inputs(layer: InfPiLinear, g: Tensor) -> None:
    layer(g).sum().backward(inputs=[g])
    assert g.grad.abs().sum() > 0


def gradient_of_bias(layer: InfPiLinear, g: Tensor) -> None:
    torch.autograd.grad(layer(g).sum(), layer.bias)


NO_ROWS = [
    frozen, evaluating, without_gradients, in_inference_mode, gradient_of_inputs, backward_to_inputs, gradient_of_bias
]  # fmt: skip


@pytest.mark.parametrize("use", NO_ROWS, ids=lambda use: use.__name__)
def test_only_training_the_layer_records_rows(use) -> None:
    layer = make_layer()
    use(layer, points().requires_grad_())
    assert layer.A.grad is None
    layer.train().requires_grad_(True)
    layer(points()).sum().backward()
    assert len(layer.A.grad) == 4


class OwnNet(nn.Module):
    """A user's own module around pizoo's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, R, dtype=torch.float64)
        self.growing = make_layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.growing(self.stem(x))


def test_zero_grad_of_a_users_module_clears_pending_rows() -> None:
    net, x = OwnNet(), points(width=6)
    for set_to_none in (True, False):
        net(x).sum().backward()
        assert len(net.growing.A.grad) == 4 and net.stem.weight.grad.abs().sum() > 0
        net.zero_grad(set_to_none=set_to_none)
        assert (net.growing.A.grad is None) == set_to_none
        assert set_to_none or (len(net.growing.A.grad) == 0 and net.stem.weight.grad.abs().sum() == 0)


def test_gradients_of_what_lies_below_pass_through_a_growing_layer() -> None:
    net, x = OwnNet(), points(width=6)
    net(x).square().sum().backward()
    wanted = torch.autograd.grad(definition(net.growing, net.stem(x)).square().sum(), net.stem.weight)[0]
    torch.testing.assert_close(net.stem.weight.grad, wanted, rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------ initial values


def test_initial_values_are_those_of_the_paper() -> None:
    torch.manual_seed(0)
    first, hidden, readout = InfPiInput(30, 200), InfPiLinear(200, 200), InfPiLinear(200, 10, role="readout")
    torch.testing.assert_close(first.A.norm(dim=0), torch.ones(200))
    for layer, std in ((hidden, 200**-0.5), (readout, 1 / 200)):
        torch.testing.assert_close(layer.B.norm(dim=1), torch.ones(200))
        assert layer.count == 200 and torch.equal(layer.amult, torch.ones(200)) and not layer.bias.any()
        assert abs(layer.A.std().item() / std - 1) < 0.06


def test_identity_and_zero_initialisation() -> None:
    eye = torch.eye(4)
    assert torch.equal(InfPiInput(4, 4).A, eye)
    hidden = InfPiLinear(4, 4, identity_init=True)
    assert torch.equal(hidden.A.detach(), eye) and torch.equal(hidden.B.detach(), eye)
    readout = InfPiLinear(4, 2, role="readout", identity_init=True)
    assert torch.equal(readout.B.detach(), eye) and not readout.A.detach().any()
    zero = InfPiLinear(4, 2, role="readout", zero_init=True)
    assert zero.count == 1 and not zero.amult.any() and not zero.A.detach().any()
    torch.testing.assert_close(zero.B.detach().norm(dim=1), torch.ones(1))


def test_a_bias_multiplier_of_zero_leaves_the_bias_out() -> None:
    layers = (InfPiInput(4, 3, bias_alpha=0), InfPiLinear(4, 4, bias_alpha=0), PiLinear(4, 3, bias_alpha=0))
    assert all(layer.bias is None and "bias" not in layer.state_dict() for layer in layers)


# ------------------------------------------------------------------ the projected linear layer


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(3, 12), r=st.integers(1, 3), bias_alpha=st.sampled_from([0.0, 0.7]))
def test_gradients_of_a_finite_layer_are_projected_and_its_inputs_are_not(seed: int, n: int, r: int, bias_alpha: float):
    torch.manual_seed(seed)
    layer = PiLinear(R, n, bias_alpha=bias_alpha, alpha=0.5, dtype=torch.float64)
    omega, x, delta = points(n, seed, width=r), points(seed=seed + 1), points(seed=seed + 2, width=n)
    parameters = list(layer.parameters())
    x.requires_grad_()
    plain = torch.autograd.grad((layer(x) * delta).sum(), [x, *parameters])
    found = torch.autograd.grad((layer(x, projection_basis(omega)) * delta).sum(), [x, *parameters])
    projector = omega @ torch.linalg.inv(omega.T @ omega) @ omega.T
    torch.testing.assert_close(layer(x, projection_basis(omega)), layer(x))
    torch.testing.assert_close(found[0], plain[0])
    for f, p in zip(found[1:], plain[1:], strict=True):
        torch.testing.assert_close(f, projector @ p, rtol=1e-6, atol=1e-8)


def test_a_frozen_finite_layer_passes_gradients_on() -> None:
    layer, x = PiLinear(R, 6, dtype=torch.float64).requires_grad_(False), points().requires_grad_()
    layer(x, projection_basis(points(6, width=2))).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None and x.grad.abs().sum() > 0


# ------------------------------------------------------------------ bad input

F = torch.float64
X = points(2)
REFUSED = {
    "wide input": (lambda: make_layer()(points(2, width=6)), ValueError, ["g has shape [2, 6]", f"[batch, {R}]"]),
    "one sample alone": (lambda: make_layer()(X[0]), ValueError, ["g has shape [5]", f"[batch, {R}]"]),
    "nothing at all": (lambda: make_layer()(X[:0, 0]), ValueError, ["g has shape [0]", f"[batch, {R}]"]),
    "empty batch": (lambda: make_layer()(X[:0]), ValueError, ["g has shape [0, 5]", "empty batch", "at least one"]),
    "integers": (lambda: make_layer()(X.long()), TypeError, ["g has dtype torch.int64", "floating"]),
    "input: width": (lambda: InfPiInput(4, 3, dtype=F)(X), ValueError, ["x has shape [2, 5]", "[batch, 4]"]),
    "input: dtype": (lambda: InfPiInput(5, 3)(X), TypeError, ["x has dtype torch.float64", "torch.float32"]),
    "input: empty": (lambda: InfPiInput(5, 3, dtype=F)(X[:0]), ValueError, ["x has shape [0, 5]", "empty batch"]),
    "finite: width": (lambda: PiLinear(4, 3, dtype=F)(X), ValueError, ["x has shape [2, 5]", "[batch, 4]"]),
    "finite: dtype": (lambda: PiLinear(5, 3)(X), TypeError, ["x has dtype torch.float64", "torch.float32"]),
    "r = 0": (lambda: InfPiLinear(0, 3), ValueError, ["r is 0", "positive integer"]),
    "r = 1.5": (lambda: InfPiInput(3, 1.5), ValueError, ["r is 1.5", "positive integer"]),
    "d < 0": (lambda: InfPiInput(-3, 2), ValueError, ["d is -3", "positive integer"]),
    "no outputs": (lambda: InfPiLinear(3, 0, role="readout"), ValueError, ["out_features is 0", "positive integer"]),
    "hidden of another rank": (lambda: InfPiLinear(4, 3), ValueError, ["out_features is 3", "r = 4", "role='readout'"]),
    "role": (lambda: InfPiLinear(3, 3, role="output"), ValueError, ["role is 'output'", "'hidden' or 'readout'"]),
    "finite: no inputs": (lambda: PiLinear(0, 3), ValueError, ["in_features is 0", "positive integer"]),
    "omega too narrow": (lambda: projection_basis(X), ValueError, ["omega has shape [2, 5]", "at least the rank"]),
    "omega dependent": (lambda: projection_basis(torch.ones(4, 2)), ValueError, ["omega [4, 2]", "full column rank"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_argument_what_it_got_and_what_it_wants(case: str) -> None:
    call, error, words = REFUSED[case]
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
