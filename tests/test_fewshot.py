"""Few-shot learning: adapting is training on the support set, the outer gradient is a gradient, tasks keep to themselves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from pizoo.models import FinPiMLP, InfPiMLP, MuMLP, NNGPLearner, NNGPRegressor, NTKLearner
from pizoo.optim import PiSGD, param_groups
from pizoo.training.fewshot import FewShotBatch, meta_loss, meta_step

D, WAYS, R, WIDTH = 6, 3, 5, 12
ALPHAS = {"bias_alpha": 1.3, "last_bias_alpha": 0.7, "first_layer_alpha": 0.9, "last_layer_alpha": 0.6}
KINDS = ("infpi", "finpi", "mu")


def net(kind: str, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    options = {**ALPHAS, **options, "dtype": torch.float64}
    if kind == "infpi":
        return InfPiMLP(D, WAYS, R, **options)
    return FinPiMLP(D, WAYS, WIDTH, R, **options) if kind == "finpi" else MuMLP(D, WAYS, WIDTH, **options)


def tasks(count: int = 4, shots: int = 1, queries: int = 4, seed: int = 1) -> FewShotBatch:
    generator = torch.Generator().manual_seed(seed)
    support_y = torch.stack([torch.randperm(WAYS, generator=generator) for _ in range(count)]).repeat(1, shots)
    query_y = torch.randint(WAYS, (count, queries), generator=generator)
    x = torch.randn(count, WAYS * shots + queries, D, generator=generator, dtype=torch.float64)
    return FewShotBatch(x[:, : WAYS * shots], support_y, x[:, WAYS * shots :], query_y)


def trained(model: nn.Module, x: Tensor, y: Tensor, step_size: float, steps: int, layers: str) -> nn.Module:
    """A copy of the net trained on a support set by the ordinary loop."""
    model = copy.deepcopy(model).train()
    if layers == "readout":
        model.requires_grad_(False)
        model.readout.requires_grad_(True)
    optimizer = PiSGD(param_groups(model, step_size), step_size)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("layers", ["readout", "all"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_net_is_the_net_trained_on_the_support_set(kind: str, steps: int, layers: str) -> None:
    model, batch = net(kind), tasks(shots=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    predictor = model.adapt(batch.support_x, batch.support_y, 0.3, steps, layers)
    logits = predictor(batch.query_x)
    for t in range(len(logits)):
        x, y = batch.support_x[t], batch.support_y[t]
        wanted = trained(model, x, y, 0.3, steps, layers)(batch.query_x[t])
        torch.testing.assert_close(logits[t], wanted)
        torch.testing.assert_close(model.adapt(x, y, 0.3, steps, layers)(batch.query_x[t]), wanted)
        torch.testing.assert_close(predictor.losses[t], nn.functional.cross_entropy(model(x), y))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(param.grad is None for param in model.parameters())


def test_layernorm_adapts_as_it_trains() -> None:
    model, batch = net("infpi", layernorm=True), tasks()
    logits = model.adapt(batch.support_x, batch.support_y, 0.3, 2, "all")(batch.query_x)
    wanted = trained(model, batch.support_x[0], batch.support_y[0], 0.3, 2, "all")(batch.query_x[0])
    torch.testing.assert_close(logits[0], wanted)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_outer_gradient_is_the_derivative_of_the_outer_loss(kind: str, steps: int) -> None:
    """Second order included; without a read-out bias, whose inner step is a constant by definition in infinite nets."""
    model, batch = net(kind, last_bias_alpha=0 if kind == "infpi" else 0.7), tasks(count=2)

    def loss(support_x: Tensor, query_x: Tensor) -> Tensor:
        return meta_loss(model, FewShotBatch(support_x, batch.support_y, query_x, batch.query_y), 0.4, steps=steps)

    support_x, query_x = (x.clone().requires_grad_() for x in (batch.support_x, batch.query_x))
    assert torch.autograd.gradcheck(loss, (support_x, query_x))
    loss(support_x, query_x).backward()
    assert support_x.grad.norm() > 1e-3 * query_x.grad.norm()


@pytest.mark.parametrize("layers", ["readout", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_order_gradient_is_that_of_the_adapted_net(kind: str, layers: str) -> None:
    """Taken at the adapted parameters, for the stored ones: what training the adapted copy on the queries would record."""
    model, batch = net(kind), tasks(count=1)
    x, y = batch.query_x[0], batch.query_y[0]
    adapted = trained(model, batch.support_x[0], batch.support_y[0], 0.3, 2, layers).requires_grad_(True)
    loss = nn.functional.cross_entropy(adapted(x), y)
    adapted.zero_grad()
    loss.backward()
    found = meta_loss(model, batch, 0.3, first_order=True, steps=2, layers=layers)
    found.backward()
    torch.testing.assert_close(found, loss)
    for (name, param), wanted in zip(model.named_parameters(), adapted.parameters(), strict=True):
        if name.endswith(".A") and name != "input.A":
            torch.testing.assert_close(param.grad.A, wanted.grad.A)
            torch.testing.assert_close(param.grad.B, wanted.grad.B)
            assert len(param.grad) == len(x)  # queries alone
        elif param.requires_grad:
            torch.testing.assert_close(param.grad, wanted.grad)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_outer_step_is_the_sum_over_its_tasks_whatever_their_order(kind: str, first_order: bool) -> None:
    model, batch, probe = net(kind), tasks(count=4), torch.randn(7, D, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    parts = (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
    shuffled = FewShotBatch(*(part[order] for part in parts))
    alone = [FewShotBatch(*(part[t : t + 1] for part in parts)) for t in range(4)]
    losses = [meta_loss(model, b, 0.3, first_order).item() for b in (batch, shuffled, *alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) == pytest.approx(sum(losses[2:]), rel=1e-12)
    moved = []
    for b in (batch, shuffled):
        copied = copy.deepcopy(model)
        optimizer = PiSGD(param_groups(copied, 0.2), 0.2)
        results = meta_step(copied, optimizer, b, 0.3, max_norm=0.5, first_order=first_order)
        moved.append((copied(probe).detach(), results))
    torch.testing.assert_close(moved[0][0], moved[1][0])
    for found, wanted in zip(moved[1][1], moved[0][1], strict=True):
        torch.testing.assert_close(found, wanted[order])
    assert not torch.allclose(moved[0][0], model(probe))


@pytest.mark.parametrize("layers", ["readout", "all"])
@pytest.mark.parametrize(("kind", "dtype"), [*((kind, torch.bfloat16) for kind in KINDS), ("infpi", torch.int8)])
def test_short_numbers_lose_digits_not_the_gradient(kind: str, dtype: torch.dtype, layers: str) -> None:
    """Short rows or weights, as the zoo's nets have float16 ones on a GPU: inner steps are float32 all the same."""
    exact, batch = net(kind, last_bias_alpha=0), tasks()
    short = copy.deepcopy(exact)
    if kind == "infpi":
        short.float()
        for layer in short.growing_layers.values():
            layer.to_rows_dtype(dtype)
    else:
        short.to(dtype)
    losses = []
    for model in (exact, short):
        inputs = next(model.parameters()).dtype
        loss = meta_loss(model, batch.to(inputs), 0.3, first_order=layers == "all", layers=layers)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    parameter = "input.A" if kind == "infpi" else "layers.0.weight"
    gradients = [dict(model.named_parameters())[parameter].grad.double().flatten() for model in (exact, short)]
    assert nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def test_a_read_out_with_multiplier_zero_stays_and_does_not_count_in_clipping() -> None:
    model, batch = net("infpi", last_bias_alpha=0), tasks()
    optimizer = PiSGD(param_groups(model, 1.0, last_layer_lr_mult=0.0), 1.0)
    before = model.output.count, model.input.A.detach().clone()
    meta_step(model, optimizer, batch, 0.3, max_norm=0.01)
    assert model.output.count == before[0]
    clipped = (model.input.A, model.input.bias, model.hidden[0].A, model.hidden[0].bias)
    norms = [param.grad.norm().item() for param in clipped]
    assert math.hypot(*norms) == pytest.approx(0.01)
    torch.testing.assert_close(model.input.A, before[1] - model.input.A.grad)


def test_the_nearest_neighbour_predictor_gives_the_label_of_the_most_similar_support_sample() -> None:
    for kind in KINDS:
        model, batch = net(kind), tasks(count=3, shots=2)
        scores = model.nearest_neighbour(batch.support_x, batch.support_y)(batch.query_x)
        for t in range(3):
            a, b = model.preactivation(batch.query_x[t]), model.preactivation(batch.support_x[t])
            nearest = nn.functional.cosine_similarity(a[:, None], b[None], dim=2).argmax(1)
            assert torch.equal(scores[t].argmax(1), batch.support_y[t][nearest])


@pytest.mark.parametrize("learner", [NNGPLearner, NTKLearner])
def test_a_kernel_learner_descends_in_function_space(learner) -> None:
    """Several steps: each moves the logits at x by ``-step_size K(x, support) (softmax - onehot) / N``."""
    model, batch = learner(D, WAYS, var_b=0.5), tasks(count=2, shots=2)
    function, options = model.readout.function, model.readout.hparams
    x, y, q = batch.support_x[0], batch.support_y[0], batch.query_x[0]
    at_support, at_query = torch.zeros(len(x), WAYS).double(), torch.zeros(len(q), WAYS).double()
    for _ in range(3):
        delta = (at_support.softmax(1) - nn.functional.one_hot(y, WAYS)) / len(x)
        at_support, at_query = (
            at_support - 0.4 * function(x, x, **options) @ delta,
            at_query - 0.4 * function(q, x, **options) @ delta,
        )
    for layers in ("readout", "all"):
        predictor = model.adapt(batch.support_x, batch.support_y, 0.4, 3, layers)
        torch.testing.assert_close(predictor(batch.query_x)[0], at_query)
    assert not model(q).any()


def test_a_net_given_other_ways_adapts_to_them() -> None:
    model = net("infpi", readout_zero_init=True)
    model.reset_classifier(5)
    x = torch.randn(10, D, dtype=torch.float64)
    logits = model.adapt(x, torch.arange(5).repeat(2), 1.0)(x)
    assert logits.shape == (10, 5)


# Refusals

X, Y = torch.rand(WAYS, D, dtype=torch.float64), torch.arange(WAYS)
REFUSED = {
    "a class without support": (lambda m: m.adapt(X, Y.clamp(max=1), 0.1), ["support_y", "no sample of class 2"]),
    "in a later task": (
        lambda m: m.adapt(torch.stack([X, X]), torch.stack([Y, Y.clamp(min=1)]), 0.1),
        ["support_y of task 1", "no sample of class 0"],
    ),
    "a label out of range": (lambda m: m.adapt(X, Y + 1, 0.1), ["support_y", "1 to 3", "0 to 2"]),
    "a negative label": (lambda m: m.adapt(X, Y - 1, 0.1), ["support_y", "-1 to 1", "0 to 2"]),
    "too few labels": (lambda m: m.adapt(X, Y[:2], 0.1), ["support_y", "[1, 2]", "[1, 3]"]),
    "labels of another dtype": (lambda m: m.adapt(X, Y.float(), 0.1), ["support_y", "torch.float32", "torch.int64"]),
    "labels that are no list": (lambda m: m.adapt(X, torch.tensor(1), 0.1), ["support_y", "shape []"]),
    "images of another size": (
        lambda m: m.adapt(torch.rand(3, 1, 2, 2), Y, 0.1),
        ["support_x", "[3, 1, 2, 2]", "[N, 6]"],
    ),
    "integer images": (lambda m: m.adapt(torch.ones(3, 6, dtype=torch.uint8), Y, 0.1), ["support_x", "torch.uint8"]),
    "queries of another size": (lambda m: m.adapt(X, Y, 0.1)(torch.rand(2, 5)), ["x has shape [2, 5]", "[N, 6]"]),
    "queries of other tasks": (
        lambda m: m.adapt(X[None], Y[None], 0.1)(torch.stack([X, X])),
        ["x has 2 tasks", "adapted to 1"],
    ),
    "a step size of 0": (lambda m: m.adapt(X, Y, 0.0), ["step_size is 0.0", "positive"]),
    "a step size that is no number": (lambda m: m.adapt(X, Y, math.nan), ["step_size is nan", "positive"]),
    "no steps": (lambda m: m.adapt(X, Y, 0.1, steps=0), ["steps is 0", "at least 1"]),
    "unknown layers": (lambda m: m.adapt(X, Y, 0.1, layers="last"), ["layers is 'last'", "'readout' or 'all'"]),
    "all layers at second order": (
        lambda m: meta_loss(m, tasks(), 0.1, layers="all"),
        ["layers is 'all'", "first_order=True", "no rows"],
    ),
    "a batch of another width": (
        lambda m: meta_loss(m, FewShotBatch(X[None, :, :4], Y[None], X[None, :, :4], Y[None]), 0.1),
        ["support_x", "[1, 3, 4]", "[T, N, 6]"],
    ),
    "a batch's label out of range": (
        lambda m: meta_loss(m, FewShotBatch(X[None], Y[None], X[None], Y[None] + 1), 0.1),
        ["query_y", "1 to 3", "0 to 2"],
    ),
    "a batch's parts of several sizes": (
        lambda m: FewShotBatch(X[None], Y[None], torch.stack([X, X]), torch.stack([Y, Y])),
        ["[1, 3, 6] and [2, 3, 6]", "agree in T and d"],
    ),
    "a batch without tasks": (
        lambda m: FewShotBatch(X[:0, None], Y[:0, None], X[:0, None], Y[:0, None]),
        ["support_x", "[0, 1, 6]"],
    ),
    "a batch's labels of another shape": (
        lambda m: FewShotBatch(X[None], Y, X[None], Y[None]),
        ["support_y", "[3]", "[1, 3]"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_argument_what_it_got_and_what_it_wants(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(ValueError) as error:
        call(net("infpi"))
    for word in words:
        assert word in str(error.value)


def test_what_has_no_read_out_to_adapt_is_refused() -> None:
    batch = tasks()
    for model in (nn.Linear(D, WAYS), NNGPRegressor(D, WAYS)):
        with pytest.raises(TypeError, match=rf"{type(model).__name__}, whose read-out cannot be adapted.*InfPiMLP"):
            meta_loss(model, batch, 0.1)
