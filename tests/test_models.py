"""Networks and regressors: finite nets approach the infinite one, states load or leave the net alone, kernels predict."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import Tensor, nn

from pizoo import functional, kernels
from pizoo.config import describe
from pizoo.files import CheckpointError
from pizoo.models import FinPiMLP, InfPiMLP, MuMLP, NNGPRegressor, NTKRegressor, PiNet
from pizoo.optim import PiSGD, clip_grad_norm_, param_groups

D, CLASSES, R, WIDTH = 6, 3, 4, 20
F64 = torch.float64


def data(n: int = 8, seed: int = 1, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator, dtype=dtype), torch.randint(CLASSES, (n,), generator=generator)


def make(kind: type[PiNet], seed: int = 0, **options) -> PiNet:
    torch.manual_seed(seed)
    sizes = {InfPiMLP: {"r": R}, FinPiMLP: {"r": R, "width": WIDTH}, MuMLP: {"width": WIDTH}}[kind]
    return kind(**{"d_in": D, "d_out": CLASSES, "dtype": F64, **sizes, **options})


def train(net: PiNet, steps: int = 3, lr: float = 0.3, dtype: torch.dtype = F64, **multipliers: float) -> None:
    optimizer = PiSGD(param_groups(net, lr, **multipliers), lr)
    x, y = data(dtype=dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()


def copied_state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


KINDS = pytest.mark.parametrize("kind", [InfPiMLP, FinPiMLP, MuMLP], ids=lambda kind: kind.__name__)


# ------------------------------------------------------------------ timm's conventions


@KINDS
def test_a_net_is_its_read_out_on_its_features_under_timms_names(kind):
    net = make(kind)
    x = data()[0]
    features = net.forward_features(x)
    assert features.shape == (8, net.num_features) and net.get_classifier() is net.all_layers[-1]
    assert torch.equal(net.forward_head(features), net(x)) and net.num_classes == CLASSES
    assert net.forward_head(features, pre_logits=True) is features


@KINDS
def test_without_a_classifier_a_net_gives_its_features_until_it_is_given_one(kind):
    net = make(kind, hidden_layers=1)
    x = data()[0]
    features = net.features(x)
    net.reset_classifier(0)
    assert net.num_classes == 0 and torch.equal(net(x), features)
    with pytest.raises(CheckpointError, match="without a read-out cannot be saved"):
        describe(net)
    net.reset_classifier(7)
    assert net(x).shape == (8, 7) and torch.equal(net.features(x), features)
    assert net(x).dtype == F64 and sum(p.numel() for p in net.get_classifier().parameters())
    for wrong in (-1, 2.0, True, False):
        with pytest.raises(ValueError, match=f"num_classes is {wrong}; it must be a positive integer"):
            net.reset_classifier(wrong)


# ------------------------------------------------------------------ finite and infinite nets


def test_sampled_nets_approach_the_infinite_net_as_one_over_the_root_of_the_width() -> None:
    """Before training, and after the same steps of projected training of both: error ~ n^-1/2."""
    draws_at = {500: 100, 1000: 60, 2000: 30, 4000: 16, 8000: 4}  # the square of one error scatters by its own size
    multipliers = {"first_layer_lr_mult": 0.5, "last_layer_lr_mult": 2.0, "bias_lr_mult": 0.5}
    infinite = make(InfPiMLP, bias_alpha=0.5, dtype=torch.float32)
    nn.init.normal_(infinite.input.bias)
    trained = copy.deepcopy(infinite)
    train(trained, dtype=torch.float32, **multipliers)
    x, _ = data(32, seed=5, dtype=torch.float32)
    moved = (trained(x) - infinite(x)).norm().item()
    errors: dict[str, list[float]] = {"sampled": [], "trained": []}
    for width, draws in draws_at.items():
        squares = dict.fromkeys(errors, 0.0)
        for seed in range(draws):
            torch.manual_seed(3 * width + seed)
            finite = infinite.sample(width)
            with torch.no_grad():
                squares["sampled"] += (finite(x) - infinite(x)).square().sum().item() / draws
            train(finite, dtype=torch.float32, **multipliers)
            with torch.no_grad():
                squares["trained"] += (finite(x) - trained(x)).square().sum().item() / draws
        for key, value in squares.items():
            errors[key].append(math.sqrt(value))
    weights = torch.tensor(list(draws_at.values()), dtype=F64).sqrt()[:, None]
    logs = torch.tensor(list(draws_at), dtype=F64).log()[:, None]
    for key, values in errors.items():
        target = torch.tensor(values, dtype=F64).log()[:, None]
        line = torch.linalg.lstsq(weights * torch.cat([logs, torch.ones_like(logs)], 1), weights * target).solution
        slope = line[0].item()
        assert abs(slope + 0.5) < 0.2, f"{key}: errors {values} at widths {list(draws_at)}, slope {slope:.2f}"
    assert errors["trained"][-1] < 0.2 * moved  # the widest net followed the training, it did not merely stay close


def test_projected_training_keeps_weights_in_the_span_of_the_samples() -> None:
    spans = {}
    for projected in (True, False):
        net = make(FinPiMLP, hidden_layers=3, projected=projected)
        train(net, steps=5)
        outside = []
        for l, layer in enumerate(net.layers[:-1]):
            basis = torch.linalg.qr(getattr(net.omega, str(l)))[0]
            for value in (layer.weight, layer.bias[:, None]):
                outside.append(((value - basis @ (basis.T @ value)).norm() / value.norm()).item())
        spans[projected] = outside
    assert max(spans[True]) < 1e-12
    assert min(spans[False]) > 1e-3


def test_torchs_own_clipping_measures_projected_gradients() -> None:
    net = make(FinPiMLP)
    x, y = data()
    nn.functional.cross_entropy(net(x), y).backward()
    for l, layer in enumerate(net.layers[:-1]):
        basis = net.basis(l)
        torch.testing.assert_close(basis @ (basis.T @ layer.weight.grad), layer.weight.grad)
    ours = clip_grad_norm_(net, None)
    torch.testing.assert_close(nn.utils.clip_grad_norm_(net.parameters(), 0.1), ours)
    torch.testing.assert_close(clip_grad_norm_(net, None), torch.tensor(0.1, dtype=F64), rtol=1e-4, atol=0)


def test_a_sample_is_decided_by_its_omegas() -> None:
    net = make(InfPiMLP, hidden_layers=3)
    train(net)
    omegas = [torch.randn(WIDTH, R, dtype=F64) for _ in range(3)]
    one, other = net.sample(WIDTH, omegas), net.sample(WIDTH, [omega.clone() for omega in omegas])
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert {name for name in one.state_dict() if name.startswith("omega")} == {"omega.0", "omega.1", "omega.2"}
    weight = omegas[0] @ net.input.A.T / math.sqrt(WIDTH)
    torch.testing.assert_close(one.layers[0].weight.detach(), weight.detach())


def test_sampling_makes_no_other_infinite_net_and_may_leave_gradients_unprojected(monkeypatch) -> None:
    net, (x, y) = make(InfPiMLP), data()

    def refuse(*args, **kwargs):
        raise AssertionError("a fresh infinite net was made")

    monkeypatch.setattr("pizoo.models.finite.infinite_layers", refuse)
    omegas = [torch.randn(WIDTH, R, dtype=F64) for _ in range(2)]
    projected, plain = (net.sample(WIDTH, omegas, projected=choice) for choice in (True, False))
    torch.testing.assert_close(projected.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert (projected.hparams["projected"], plain.hparams["projected"]) == (True, False)
    for finite in (projected, plain):
        nn.functional.cross_entropy(finite(x), y).backward()
    grad = plain.layers[0].weight.grad
    wanted = omegas[0] @ torch.linalg.solve(omegas[0].T @ omegas[0], omegas[0].T @ grad)
    assert (grad - wanted).norm() > 0.1 * grad.norm()
    torch.testing.assert_close(projected.layers[0].weight.grad, wanted)


def test_the_basis_spans_the_stored_omegas_whatever_dtypes_they_went_through() -> None:
    net = make(FinPiMLP)
    for convert in (lambda: net.half().float(), lambda: net.bfloat16().double(), lambda: net.to(torch.float32)):
        convert()
        exact = net.layers[0].weight.dtype
        for l in range(2):
            basis, omega = net.basis(l), getattr(net.omega, str(l))
            assert basis.dtype == exact
            tolerance = 20 * torch.finfo(exact).eps
            eye = torch.eye(R, dtype=exact)
            torch.testing.assert_close(basis.T @ basis, eye, rtol=0, atol=tolerance)
            torch.testing.assert_close(basis @ (basis.T @ omega), omega, rtol=0, atol=tolerance)


# ------------------------------------------------------------------ what all nets share


@KINDS
def test_images_are_flattened_channel_first(kind: type[PiNet]) -> None:
    net, images = make(kind, d_in=12), torch.randn(2, 3, 2, 2, dtype=F64)
    torch.testing.assert_close(net(images), net(images.reshape(2, 12)))
    torch.testing.assert_close(net.features(images), net.features(images.reshape(2, 12)))


@KINDS
def test_a_net_is_rebuilt_from_plain_json_and_its_state(kind: type[PiNet]) -> None:
    net = make(kind, bias_alpha=0.5, last_bias_alpha=0.0, last_layer_alpha=2.0, hidden_layers=3)
    train(net)
    rebuilt = kind(**json.loads(json.dumps(net.hparams)), dtype=F64)
    rebuilt.load_state_dict(net.state_dict())
    x, _ = data()
    torch.testing.assert_close(rebuilt(x), net(x), rtol=0, atol=0)
    train(net)
    train(rebuilt)
    torch.testing.assert_close(rebuilt(x), net(x), rtol=1e-12, atol=1e-12)


@KINDS
def test_copies_and_conversions_keep_the_function(kind: type[PiNet]) -> None:
    net, (x, _) = make(kind), data()
    train(net)
    torch.testing.assert_close(copy.deepcopy(net)(x), net(x), rtol=0, atol=0)
    wanted = net(x).detach()
    torch.testing.assert_close(copy.deepcopy(net).float()(x.float()).double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(net).half()(x.half()).double(), wanted, rtol=0.05, atol=0.05)


def test_state_keys_are_the_documented_ones() -> None:
    infinite = make(InfPiMLP, hidden_layers=3)
    rows = ("A", "B", "amult", "bias")
    layers = ("hidden.0", "hidden.1", "output")
    wanted = {"input.A", "input.bias", *(f"{layer}.{part}" for layer in layers for part in rows)}
    assert set(infinite.state_dict()) == wanted
    without = set(make(InfPiMLP, hidden_layers=3, bias_alpha=0.0).state_dict())
    assert without == {key for key in wanted if not key.endswith("bias")}
    finite = {f"layers.{l}.{part}" for l in range(3) for part in ("weight", "bias")}
    assert set(make(MuMLP).state_dict()) == finite
    assert set(make(FinPiMLP).state_dict()) == finite | {"omega.0", "omega.1"}


def test_the_alphas_multiply_whole_layers_and_biases() -> None:
    net = make(InfPiMLP, bias_alpha=0.5, last_bias_alpha=3.0, first_layer_alpha=0.25, last_layer_alpha=2.0)
    for bias in (net.input.bias, net.hidden[0].bias, net.output.bias):
        nn.init.normal_(bias)
    x, _ = data()
    g = 0.25 * (x @ net.input.A + 0.5 * net.input.bias)
    g = functional.relu_kernel(g, net.hidden[0].B) @ net.hidden[0].A + 0.5 * net.hidden[0].bias
    out = 2 * (functional.relu_kernel(g, net.output.B) @ net.output.A + 3 * net.output.bias)
    torch.testing.assert_close(net(x), out)
    torch.testing.assert_close(net.features(x), g)
    torch.testing.assert_close(net.sample(WIDTH).layers[2].bias, net.output.bias)


def test_with_layernorm_the_scale_of_the_input_does_not_matter() -> None:
    net, (x, _) = make(InfPiMLP, layernorm=True, bias_alpha=0.0), data()
    torch.testing.assert_close(net(7 * x), net(x))


def test_mu_nets_start_with_variance_two_over_fan_in() -> None:
    torch.manual_seed(0)
    net = MuMLP(400, 50, 300)
    for layer in net.layers:
        assert abs(layer.weight.std().item() / math.sqrt(2 / layer.in_features) - 1) < 0.03 and not layer.bias.any()
    assert not MuMLP(400, 50, 300, readout_zero_init=True).layers[-1].weight.any()


def test_a_zero_readout_starts_at_zero_and_learns() -> None:
    net, (x, _) = make(InfPiMLP, readout_zero_init=True), data()
    assert net.output.count == 1 and not net(x).any()
    train(net)
    assert net.output.count == 1 + 3 * 8 and net(x).abs().max() > 0.01


@KINDS
def test_feature_kernels_are_kernels(kind: type[PiNet]) -> None:
    net, (x, _) = make(kind), data()
    features = net.features(x)
    kernel = net.feature_kernel(features, features)
    torch.testing.assert_close(kernel, kernel.T)
    torch.testing.assert_close(kernel.diagonal(), torch.full((8,), 0.5, dtype=F64), atol=1e-6, rtol=0)
    assert torch.linalg.eigvalsh(kernel).min() > -1e-9


def test_the_feature_kernel_of_a_wide_sample_is_that_of_the_infinite_net() -> None:
    net, (x, _) = make(InfPiMLP), data()
    wide = net.sample(4000)
    infinite, finite = net.features(x), wide.features(x)
    torch.testing.assert_close(
        wide.feature_kernel(finite, finite), net.feature_kernel(infinite, infinite), atol=0.03, rtol=0
    )


# ------------------------------------------------------------------ states that do not fit


def other_state(net: PiNet, case: str) -> dict[str, Tensor]:
    state = copied_state(net)
    growing = isinstance(net, InfPiMLP)
    last = "output" if growing else "layers.2"
    if case == "another kind":
        return copied_state(make(MuMLP if growing else InfPiMLP))
    if case == "another rank or width":
        return copied_state(make(type(net), **({"r": R + 1} if growing else {"width": WIDTH + 1})))
    if case == "more layers":
        return copied_state(make(type(net), hidden_layers=3))
    if case == "more classes":
        return copied_state(make(type(net), d_out=CLASSES + 1))
    if case == "a key missing":
        del state[f"{last}.bias"]
    if case == "a key too many":
        state["extra"] = torch.zeros(1)
    if case == "rows that differ":
        part = "output.B" if growing else "layers.2.weight"
        state[part] = state[part][:-1]
    return state


WORDS = {
    "another kind": ["missing keys", "unexpected keys"],
    "another rank or width": ["must be ["],
    "more layers": [],
    "more classes": ["4", "must be ["],
    "a key missing": ["missing keys", "bias"],
    "a key too many": ["unexpected keys ['extra']"],
    "rows that differ": ["must be ["],
}


@pytest.mark.parametrize("case", WORDS)
@KINDS
def test_a_state_that_does_not_fit_leaves_the_net_as_it_was(kind: type[PiNet], case: str) -> None:
    net = make(kind, seed=1)
    before = copied_state(net)
    with pytest.raises(RuntimeError) as caught:
        net.load_state_dict(other_state(make(kind), case))
    for word in [f"{kind.__name__} cannot load this state", *WORDS[case]]:
        assert word in str(caught.value)
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


def test_a_state_of_rows_that_do_not_belong_together_is_named() -> None:
    net = make(InfPiMLP)
    with pytest.raises(RuntimeError, match=r"output\.A \[4, 3\], output\.B \[3, 4\], output\.amult \[4\]; .* one M"):
        net.load_state_dict(other_state(net, "rows that differ"))


# ------------------------------------------------------------------ kernel regressors


@pytest.mark.parametrize("kind", [NNGPRegressor, NTKRegressor])
def test_a_regressor_is_kernel_ridge_regression(kind) -> None:
    regressor, (x, y), (x_test, _) = kind(D, CLASSES, depth=3, var_w=1.5, var_b=0.1, ridge=1e-2), data(), data(5, 2)
    function = {NNGPRegressor: functional.nngp, NTKRegressor: functional.ntk}[kind]
    targets = nn.functional.one_hot(y, CLASSES).double() - 0.5
    kernel = function(x, x, 3, 1.5, 0.1) + 1e-2 * torch.eye(8, dtype=F64)
    wanted = function(x_test, x, 3, 1.5, 0.1) @ torch.linalg.solve(kernel, targets)
    assert regressor.fit(x, y) is regressor
    torch.testing.assert_close(regressor(x_test), wanted)
    torch.testing.assert_close(regressor(x_test.float()), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(regressor(x_test.view(5, 1, 2, 3)), wanted)


def test_the_ntk_regressor_passes_on_all_parameters_of_its_kernel() -> None:
    options = {"first_layer_lr_mult": 0.5, "last_layer_lr_mult": 2.0, "bias_lr_mult": 0.3, "form": "textbook"}
    regressor, (x, _) = NTKRegressor(D, CLASSES, depth=2, var_w=1.2, var_b=0.1, **options), data()
    torch.testing.assert_close(regressor.kernel_matrix(x, x), functional.ntk(x, x, 2, 1.2, 0.1, **options))


def test_a_kernel_is_the_same_in_whatever_blocks_it_is_computed(monkeypatch) -> None:
    regressor, (x_test, _) = NNGPRegressor(D, CLASSES, depth=2).fit(*data(20)), data(7, 2)
    whole, scores = regressor.kernel_matrix(x_test, regressor.train_x), regressor(x_test)
    monkeypatch.setattr("pizoo.kernels.BLOCK_ROWS", 3)
    monkeypatch.setattr("pizoo.kernels.BLOCK_ENTRIES", {"cpu": 12})
    shapes = [tuple(block.shape) for _, _, block in kernels.blocks(regressor._function, x_test, regressor.train_x)]
    assert shapes == 2 * 5 * [(3, 4)] + 5 * [(1, 4)]
    torch.testing.assert_close(regressor.kernel_matrix(x_test, regressor.train_x), whole)
    torch.testing.assert_close(regressor(x_test), scores)


def test_the_scores_are_a_sum_over_training_inputs() -> None:
    regressor, (x_test, _) = NTKRegressor(D, CLASSES, depth=2).fit(*data(20)), data(7, 2)
    first = regressor.scores(x_test, regressor.train_x[:9])
    torch.testing.assert_close(first, regressor.kernel_matrix(x_test, regressor.train_x[:9]) @ regressor.dual[:9])
    rest = regressor.kernel_matrix(x_test, regressor.train_x[9:]) @ regressor.dual[9:]
    torch.testing.assert_close(first + rest, regressor(x_test))


def test_with_a_small_ridge_the_training_labels_are_recovered() -> None:
    x, y = data(20)
    assert torch.equal(NNGPRegressor(D, CLASSES, ridge=1e-8).fit(x, y)(x).argmax(1), y)


def test_a_loaded_regressor_predicts_once_it_has_its_training_inputs() -> None:
    (x, y), (x_test, _) = data(), data(5, 2)
    fitted = NTKRegressor(D, CLASSES, depth=2).fit(x, y)
    assert list(fitted.state_dict()) == ["dual"]
    loaded = NTKRegressor(**json.loads(json.dumps(fitted.hparams)))
    loaded.load_state_dict(fitted.state_dict())
    with pytest.raises(RuntimeError, match=r"NTKRegressor predicts from its training inputs: call attach"):
        loaded(x_test)
    for wrong in (x.flip(0), x + 1e-9, x[:-1]):
        with pytest.raises(ValueError, match=r"train_x .* has fingerprint .* fitted on 8 inputs with fingerprint"):
            loaded.attach(wrong)
    assert loaded.attach(x) is loaded
    torch.testing.assert_close(loaded(x_test), fitted(x_test), rtol=1e-12, atol=1e-12)


def test_loading_another_fit_forgets_the_training_inputs() -> None:
    one, other = (NNGPRegressor(D, CLASSES).fit(*data(seed=seed)) for seed in (1, 2))
    one.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="attach"):
        one(data()[0])


# ------------------------------------------------------------------ bad input

X, Y = data()
REFUSED = {
    "d_in": (lambda: InfPiMLP(0, CLASSES, R), ["d_in is 0", "positive integer"]),
    "d_out": (lambda: MuMLP(D, -1, WIDTH), ["d_out is -1", "positive integer"]),
    "r": (lambda: InfPiMLP(D, CLASSES, 0), ["r is 0", "positive integer"]),
    "r of a finite net": (lambda: FinPiMLP(D, CLASSES, WIDTH, 0), ["r is 0", "positive integer"]),
    "width": (lambda: MuMLP(D, CLASSES, 2.5), ["width is 2.5", "positive integer"]),
    "hidden layers": (lambda: InfPiMLP(D, CLASSES, R, hidden_layers=0), ["hidden_layers is 0", "positive integer"]),
    "alpha": (lambda: InfPiMLP(D, CLASSES, R, bias_alpha=math.inf), ["bias_alpha is inf", "finite"]),
    "width below r": (lambda: FinPiMLP(D, CLASSES, 3, R), ["width is 3", "at least r = 4"]),
    "sample below r": (lambda: make(InfPiMLP).sample(3), ["width is 3", "at least r = 4"]),
    "omegas too few": (lambda: make(InfPiMLP).sample(5, [torch.randn(5, R)]), ["omegas", "[[5, 4]]", "2 of [5, 4]"]),
    "omegas transposed": (
        lambda: make(InfPiMLP).sample(5, [torch.randn(R, 5)] * 2), ["omegas", "[[4, 5], [4, 5]]", "2 of [5, 4]"]
    ),
    "sample of layernorm": (lambda: make(InfPiMLP, layernorm=True).sample(9), ["layernorm=True", "finite"]),
    "input too wide": (lambda: make(InfPiMLP)(X.repeat(1, 2)), ["x has shape [8, 12]", "[B, 6]", "C*H*W = 6"]),
    "one sample alone": (lambda: make(MuMLP)(X[0]), ["x has shape [6]", "[B, 6]"]),
    "empty batch": (lambda: make(InfPiMLP)(X[:0]), ["x has shape [0, 6]", "empty batch"]),
    "empty batch, finite": (lambda: make(FinPiMLP)(X[:0]), ["x has shape [0, 6]", "empty batch"]),
    "depth": (lambda: NNGPRegressor(D, CLASSES, depth=0), ["depth is 0", "positive integer"]),
    "ridge": (lambda: NNGPRegressor(D, CLASSES, ridge=-1.0), ["ridge is -1.0", "positive"]),
    "label too large": (lambda: NNGPRegressor(D, CLASSES).fit(X, Y + 1), ["y has labels", "to 3", "0 to 2"]),
    "label negative": (lambda: NNGPRegressor(D, CLASSES).fit(X, Y - 1), ["y has labels from -1", "0 to 2"]),
    "labels too few": (lambda: NNGPRegressor(D, CLASSES).fit(X, Y[:3]), ["y has shape [3]", "[8]"]),
    "no labels": (lambda: NNGPRegressor(D, CLASSES).fit(X, Y[:0]), ["y has shape [0]", "[8]"]),
    "labels of floats": (lambda: NNGPRegressor(D, CLASSES).fit(X, Y.float()), ["torch.float32", "torch.int64"]),
    "regressor input": (lambda: NNGPRegressor(D, CLASSES).fit(X[:, :4], Y), ["x has shape [8, 4]", "[n, 6]"]),
    "regressor without inputs": (lambda: NNGPRegressor(D, CLASSES).fit(X[:0], Y[:0]), ["x has shape [0, 6]", "at least 1"]),
    "attach of another size": (
        lambda: NNGPRegressor(D, CLASSES).fit(X, Y).attach(X[:, :4]), ["x has shape [8, 4]", "[n, 6]"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_argument_what_it_got_and_what_it_wants(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


@KINDS
def test_inputs_of_another_dtype_are_refused(kind: type[PiNet]) -> None:
    for x in (X.float(), X.long()):
        with pytest.raises(TypeError, match=rf"x has dtype {x.dtype}; it must be torch\.float64"):
            make(kind)(x)
