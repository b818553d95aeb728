"""The optimizer appends what functional gradient descent appends, and behaves as torch's optimizers do."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pizoo.models import FinPiMLP, InfPiMLP
from pizoo.nn import InfPiLinear
from pizoo.optim import FOLD_DECAY_BELOW, PiSGD, clip_grad_norm_, clip_threshold, named_roles, param_groups

D, CLASSES, R = 6, 3, 4
F64 = torch.float64
MULTIPLIERS = {"first_layer_lr_mult": 0.5, "last_layer_lr_mult": 3.0, "bias_lr_mult": 0.25}


def make_net(seed: int = 0, dtype: torch.dtype = F64, **options) -> InfPiMLP:
    torch.manual_seed(seed)
    return InfPiMLP(D, CLASSES, R, **{"hidden_layers": 3, "dtype": dtype, **options})


def data(n: int = 8, seed: int = 1, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator, dtype=dtype), torch.randint(CLASSES, (n,), generator=generator)


def backward(net: nn.Module, seed: int = 1, dtype: torch.dtype = F64) -> Tensor:
    x, y = data(seed=seed, dtype=dtype)
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    return loss.detach()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, seeds, dtype: torch.dtype = F64) -> None:
    for seed in seeds:
        backward(net, seed, dtype)
        clip_grad_norm_(net, 0.5)
        optimizer.step()
        optimizer.zero_grad()


def assert_same_state(found: nn.Module, wanted: nn.Module, **tolerance: float) -> None:
    torch.testing.assert_close(dict(found.state_dict()), dict(wanted.state_dict()), **tolerance)


# ------------------------------------------------------------------ the step


def test_groups_carry_the_multipliers_of_their_layers() -> None:
    net = make_net()
    groups = {group["role"]: group for group in param_groups(net, 0.1, weight_decay=0.2, **MULTIPLIERS)}
    assert [(role, group["lr_mult"]) for role, group in groups.items()] == [
        ("input", 0.5), ("hidden", 1.0), ("readout", 3.0), ("bias", 0.25)
    ]  # fmt: skip
    assert groups["input"]["params"] == [net.input.A] and groups["readout"]["params"] == [net.output.A]
    assert {id(p) for p in groups["bias"]["params"]} == {id(p) for n, p in net.named_parameters() if "bias" in n}
    assert all(group["weight_decay_mult"] == group["lr_mult"] for group in groups.values())
    kept = param_groups(net, 0.1, apply_lr_mult_to_wd=False, **MULTIPLIERS)
    assert all(group["weight_decay_mult"] == 1 for group in kept)


def test_layers_of_a_users_module_are_told_apart_by_role() -> None:
    net = nn.Sequential(nn.Linear(D, R), InfPiLinear(R, R), InfPiLinear(R, CLASSES, role="readout"))
    assert {name: role for name, role, _ in named_roles(net)} == {
        "0.weight": "hidden", "0.bias": "bias", "1.A": "hidden", "1.bias": "bias", "2.A": "readout", "2.bias": "bias"
    }  # fmt: skip


@pytest.mark.parametrize("keep", [True, False])
def test_a_step_decays_what_is_stored_and_appends_the_pending_rows(keep: bool) -> None:
    net = make_net()
    lr, wd = 0.1, 0.3
    optimizer = PiSGD(param_groups(net, lr, wd, apply_lr_mult_to_wd=keep, **MULTIPLIERS), lr)
    backward(net)
    before, pending = copy.deepcopy(net.state_dict()), net.output.A.grad
    gradient = net.input.A.grad.clone()
    optimizer.step()
    after = net.state_dict()

    def factor(multiplier: float) -> float:
        return 1 - lr * wd * (multiplier if keep else 1)

    torch.testing.assert_close(after["input.A"], factor(0.5) * before["input.A"] - lr * 0.5 * gradient)
    torch.testing.assert_close(after["output.A"], torch.cat([before["output.A"], pending.A]))
    torch.testing.assert_close(after["output.B"], torch.cat([before["output.B"], pending.B]))
    new = torch.full((8,), -lr * 3, dtype=F64)
    torch.testing.assert_close(after["output.amult"], torch.cat([factor(3) * before["output.amult"], new]))
    new = torch.full((8,), -lr, dtype=F64)
    torch.testing.assert_close(after["hidden.0.amult"], torch.cat([factor(1) * before["hidden.0.amult"], new]))


def test_a_small_step_lowers_the_loss_by_lr_times_the_squared_gradient_norms() -> None:
    net, lr = make_net(), 1e-6
    optimizer = PiSGD(param_groups(net, lr, **MULTIPLIERS), lr)
    loss = backward(net)
    norms = clip_grad_norm_(net, None, per_param=True)
    multipliers = {"input": 0.5, "hidden": 1.0, "readout": 3.0, "bias": 0.25}
    rate = sum(multipliers[role] * norms[name] ** 2 for name, role, _ in named_roles(net))
    optimizer.step()
    x, y = data()
    torch.testing.assert_close((loss - nn.functional.cross_entropy(net(x), y)) / lr, rate, rtol=1e-4, atol=0)


@settings(max_examples=15, deadline=None)
@given(
    momentum=st.floats(0.1, 0.95),
    dampening=st.floats(0, 0.9),
    wd=st.floats(0, 0.5),
    lrs=st.lists(st.floats(0, 0.2), min_size=1, max_size=5),
)
def test_momentum_keeps_one_velocity_per_row(momentum: float, dampening: float, wd: float, lrs: list[float]) -> None:
    """Against the recurrence written down row by row, at any schedule, also one that starts from lr = 0."""
    layer = InfPiLinear(R, CLASSES, role="readout", bias_alpha=0, dtype=F64)
    groups = [{"params": [layer.A], "lr_mult": 2.0}]
    optimizer = PiSGD(groups, 0.1, momentum=momentum, dampening=dampening, weight_decay=wd)
    amult, velocity = [1.0] * R, [wd] * R
    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        layer(torch.randn(2, R, dtype=F64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        velocity = [momentum * v + (1 - dampening) * wd * a for v, a in zip(velocity, amult, strict=True)]
        amult = [a - 2 * lr * v for v, a in zip(velocity, amult, strict=True)]
        velocity += [1 - dampening] * 2
        amult += [-2 * lr * (1 - dampening)] * 2
    torch.testing.assert_close(layer.amult, torch.tensor(amult, dtype=F64))


def test_momentum_of_dense_parameters_dampens_the_first_step_too() -> None:
    param = nn.Parameter(torch.tensor([2.0], dtype=F64))
    optimizer = PiSGD([param], 0.1, momentum=0.5, dampening=0.2, weight_decay=0.3)
    value, velocity = 2.0, 0.0
    for gradient in (1.0, -3.0):
        param.grad = torch.tensor([gradient], dtype=F64)
        optimizer.step()
        velocity = 0.5 * velocity + 0.8 * (gradient + 0.3 * value)
        value -= 0.1 * velocity
        assert param.item() == pytest.approx(value)


def test_a_layer_whose_multiplier_is_zero_gets_no_rows() -> None:
    for momentum in (0.0, 0.9):
        net = make_net()
        optimizer = PiSGD(param_groups(net, 0.1, last_layer_lr_mult=0.0), 0.1, momentum=momentum)
        train(net, optimizer, range(3))
        assert net.output.count == R and net.hidden[0].count == R + 3 * 8


def test_frozen_parts_stay_as_they_are() -> None:
    net = make_net()
    net.hidden[0].requires_grad_(False)
    net.input.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    train(net, PiSGD(param_groups(net, 0.1, weight_decay=0.1), 0.1), range(2))
    for name, tensor in net.state_dict().items():
        if name.startswith(("input", "hidden.0")):
            assert torch.equal(tensor, before[name])
        else:
            assert tensor.shape != before[name].shape or not torch.equal(tensor, before[name])


def test_decay_over_many_steps_is_that_of_a_number_per_row() -> None:
    """The running factor is folded into the rows before float32 suffers."""
    layer = InfPiLinear(R, R, bias_alpha=0)
    optimizer = PiSGD([layer.A], 0.1, weight_decay=1.0)
    smallest = 1.0
    for _ in range(300):
        layer(torch.randn(1, R)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        smallest = min(smallest, layer.decay)
    wanted = torch.cat([torch.full((R,), 0.9**300, dtype=F64), -0.1 * 0.9 ** torch.arange(299, -1, -1, dtype=F64)])
    torch.testing.assert_close(layer.amult.double(), wanted, rtol=1e-5, atol=0)
    assert FOLD_DECAY_BELOW <= smallest < 2 * FOLD_DECAY_BELOW


# ------------------------------------------------------------------ the loop everybody knows


def test_half_batches_accumulate_to_the_whole_batch() -> None:
    nets = make_net(), make_net()
    x, y = data()
    for net, parts in zip(nets, (1, 2), strict=True):
        optimizer = PiSGD(param_groups(net, 0.5, 0.1, **MULTIPLIERS), 0.5)
        for _ in range(3):
            for part, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (nn.functional.cross_entropy(net(part), labels) / parts).backward()
            clip_grad_norm_(net, 0.3, per_param=True)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_state(*nets, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cleared_by", ["model", "optimizer"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_cleared_gradients_add_no_rows(cleared_by: str, momentum: float) -> None:
    net = make_net()
    optimizer = PiSGD(param_groups(net, 0.1), 0.1, momentum=momentum)
    owner = net if cleared_by == "model" else optimizer
    for set_to_none in (True, False):
        backward(net)
        owner.zero_grad(set_to_none=set_to_none)
        assert all((p.grad is None) == set_to_none for _, _, p in named_roles(net))
        before = copy.deepcopy(net.state_dict())
        optimizer.step()
        torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
        backward(net)  # a cleared gradient takes up rows again
        assert len(net.output.A.grad) == 8
        owner.zero_grad()


def test_torchs_schedulers_drive_learning_rate_and_clipping() -> None:
    net = make_net()
    optimizer = PiSGD(param_groups(net, 0.8, **MULTIPLIERS), 0.8)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.25, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4),
        ],
        milestones=[2],
    )
    lrs = []
    for _ in range(6):
        lrs.append(optimizer.param_groups[0]["lr"])
        assert clip_threshold(optimizer, 0.4) == pytest.approx(0.4 * lrs[-1] / 0.8)
        backward(net)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    wanted = [0.2, 0.5] + [0.4 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]
    assert lrs == pytest.approx(wanted)
    steps = net.output.amult[R:].view(6, 8)
    torch.testing.assert_close(steps, -3 * torch.tensor(wanted, dtype=F64)[:, None].expand(6, 8))


def test_at_a_learning_rate_of_zero_no_gradient_enters_the_velocity() -> None:
    """A threshold of 0 would mean no clipping: what momentum then remembers would move the net later, unclipped."""
    net = make_net()
    optimizer = PiSGD(param_groups(net, lr=0.1), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    threshold = clip_threshold(optimizer, 0.5)
    assert 0 < threshold < 1e-30
    backward(net)
    for norm in clip_grad_norm_(net, threshold, per_param=True).values():
        assert norm > 0
    optimizer.step()
    scheduler.step()
    assert optimizer.state[net.input.A]["velocity"].abs().max() < 1e-30
    assert clip_grad_norm_(net, threshold) < 1e-30
    assert clip_threshold(optimizer, 0) == 0  # no clipping stays no clipping


def test_without_a_schedule_the_threshold_is_the_threshold() -> None:
    for lr in (0.1, 0.3, 0.0):
        assert clip_threshold(PiSGD([nn.Parameter(torch.ones(1))], lr), 0.4) == 0.4


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("rows_dtype", [torch.float64, torch.float16], ids=["float64", "float16"])
def test_training_resumed_from_states_continues_identically(momentum: float, rows_dtype: torch.dtype) -> None:
    dtype = torch.float32 if rows_dtype == torch.float16 else F64

    def start(seed: int) -> tuple[InfPiMLP, PiSGD, torch.optim.lr_scheduler.LRScheduler]:
        net = make_net(seed, dtype, rows_dtype=rows_dtype)
        groups = param_groups(net, 0.3, weight_decay=0.01, **MULTIPLIERS)
        optimizer = PiSGD(groups, 0.3, momentum=momentum, dampening=0.1)
        return net, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    parts = start(0)
    net, optimizer, schedule = parts
    train(net, optimizer, range(3), dtype)
    schedule.step()
    states = copy.deepcopy([part.state_dict() for part in parts])
    resumed = start(5)
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    for net, optimizer, schedule in (parts, resumed):
        train(net, optimizer, range(3, 6), dtype)
        schedule.step()
        train(net, optimizer, range(6, 8), dtype)
    if momentum:
        velocity = resumed[1].state[resumed[0].output.A]["velocity"]
        assert velocity.dtype == resumed[0].output.amult.dtype
        assert_same_state(resumed[0], parts[0], rtol=0, atol=0)
    else:  # the state holds amult with the decay factor multiplied in: equal to rounding
        rtol, atol = (2**-10, 1e-4) if rows_dtype == torch.float16 else (1e-9, 1e-12)
        assert_same_state(resumed[0], parts[0], rtol=rtol, atol=atol)


def test_a_net_and_its_optimizer_copied_together_train_together() -> None:
    net = make_net()
    optimizer = PiSGD(param_groups(net, 0.1), 0.1, momentum=0.9)
    train(net, optimizer, range(2))
    for order in ((0, 1), (1, 0)):
        pair = (net, optimizer)
        copies = copy.deepcopy([pair[i] for i in order])
        other, its = (copies[order.index(i)] for i in (0, 1))
        original = copy.deepcopy(net)
        train(other, its, range(2, 4))
        assert other.output.count == R + 4 * 8
        assert_same_state(net, original)
    train(net, optimizer, range(2, 4))
    assert_same_state(other, net)


@pytest.mark.parametrize(("short", "rounding"), [(torch.float16, 2e-3), (torch.int8, 2e-2)], ids=["float16", "int8"])
def test_short_rows_with_momentum_follow_float64_rows(short: torch.dtype, rounding: float) -> None:
    """What a tiny row is divided by moves into amult; its velocity moves with it."""
    changes = []
    for dtype in (short, F64):
        layer = InfPiLinear(R, CLASSES, role="readout", zero_init=True, bias_alpha=0, dtype=F64)
        layer.to_rows_dtype(dtype)
        optimizer = PiSGD([layer.A], 0.1, momentum=0.9, weight_decay=0.1)
        g = torch.randn(6, R, dtype=F64, generator=torch.Generator().manual_seed(0))
        for _ in range(4):
            (1e-7 * layer(g).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        changes.append(layer(g).detach())
    assert changes[1].abs().max() < 1e-5
    assert (changes[0] - changes[1]).norm() <= rounding * changes[1].norm()


def test_finite_nets_train_with_torchs_own_optimizer_as_with_ours() -> None:
    torch.manual_seed(0)
    net = FinPiMLP(D, CLASSES, 20, R, dtype=F64)
    other = copy.deepcopy(net)
    for model, optimizer in (
        (net, PiSGD(param_groups(net, 0.1), 0.1)),
        (other, torch.optim.SGD(other.parameters(), 0.1)),
    ):
        for seed in range(3):
            backward(model, seed)
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_state(net, other)


# ------------------------------------------------------------------ clipping


def norms_of(net: nn.Module) -> dict[str, Tensor]:
    return clip_grad_norm_(net, None, per_param=True)


def test_global_clipping_scales_all_gradients_by_one_factor() -> None:
    net = make_net()
    backward(net)
    before = norms_of(net)
    total = clip_grad_norm_(net, 0.1)
    torch.testing.assert_close(total, torch.stack(list(before.values())).norm())
    assert total > 0.1
    for name, norm in norms_of(net).items():
        torch.testing.assert_close(norm, before[name] * 0.1 / total)
    torch.testing.assert_close(clip_grad_norm_(net, 1.0), torch.tensor(0.1, dtype=F64))
    torch.testing.assert_close(clip_grad_norm_(net, None), torch.tensor(0.1, dtype=F64))


def test_per_parameter_clipping_scales_only_what_is_too_long() -> None:
    net = make_net()
    backward(net)
    before = norms_of(net)
    limit = float(torch.stack(list(before.values())).median())
    assert clip_grad_norm_(net, limit, per_param=True).keys() == before.keys()
    for name, norm in norms_of(net).items():
        torch.testing.assert_close(norm, before[name].clamp(max=limit))


def test_the_excluded_readout_is_neither_measured_nor_scaled() -> None:
    net = make_net()
    backward(net)
    before = norms_of(net)
    rest = torch.stack([norm for name, norm in before.items() if name != "output.A"]).norm()
    torch.testing.assert_close(clip_grad_norm_(net, 0.01, exclude_readout=True), rest)
    torch.testing.assert_close(norms_of(net)["output.A"], before["output.A"])
    torch.testing.assert_close(norms_of(net)["output.bias"], before["output.bias"] * 0.01 / rest)


@pytest.mark.parametrize("max_norm", [None, 0, math.inf])
def test_no_threshold_measures_only(max_norm: float | None) -> None:
    net = make_net()
    backward(net)
    before = norms_of(net)
    clip_grad_norm_(net, max_norm)
    clip_grad_norm_(net, max_norm, per_param=True)
    torch.testing.assert_close(norms_of(net), before, rtol=0, atol=0)


@pytest.mark.parametrize("per_param", [False, True])
def test_a_zero_norm_leaves_its_tensor_alone(per_param: bool) -> None:
    net = make_net()
    (0 * net(data()[0]).sum()).backward()
    clip_grad_norm_(net, 0.1, per_param=per_param)
    assert all(norm == 0 for norm in norms_of(net).values())
    assert all(layer.A.grad.isfinite() for layer in net.growing_layers.values())


# ------------------------------------------------------------------ bad input


def after_raising_lr() -> None:
    net = make_net()
    optimizer = PiSGD(param_groups(net, 0.1, weight_decay=2.0), 0.1)
    backward(net)
    optimizer.param_groups[1]["lr"] = 0.5
    before = copy.deepcopy(net.state_dict())
    try:
        optimizer.step()
    finally:
        torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def with_another_nets_rows() -> None:
    net = make_net()
    optimizer = PiSGD(param_groups(net, 0.1), 0.1, momentum=0.9)
    train(net, optimizer, range(1))
    net.load_state_dict(make_net().state_dict())
    train(net, optimizer, range(1))


def clip(max_norm: float) -> None:
    net = make_net()
    backward(net)
    clip_grad_norm_(net, max_norm)


REFUSED = {
    "negative lr": (lambda: param_groups(make_net(), -0.1), ["lr is -0.1", "at least 0"]),
    "lr nan": (lambda: PiSGD(make_net().parameters(), math.nan), ["lr is nan", "finite"]),
    "weight decay": (lambda: param_groups(make_net(), 0.1, -1.0), ["weight_decay is -1.0", "at least 0"]),
    "multiplier": (
        lambda: param_groups(make_net(), 0.1, bias_lr_mult=-2.0), ["bias_lr_mult is -2.0", "at least 0"]
    ),
    "momentum": (lambda: PiSGD(make_net().parameters(), 0.1, momentum=-0.5), ["momentum is -0.5", "at least 0"]),
    "lr * wd of 1": (
        lambda: PiSGD(make_net().parameters(), 0.5, weight_decay=2.0), ["lr * weight_decay", "0.5 * 2.0", "below 1"]
    ),
    "lr * wd * multiplier over 1": (
        lambda: PiSGD(param_groups(make_net(), 0.5, 1.0, last_layer_lr_mult=4.0), 0.5), ["0.5 * 1.0 * 4.0", "below 1"]
    ),
    "lr * wd raised by a schedule": (after_raising_lr, ["0.5 * 2.0", "below 1"]),
    "decay kept from multipliers under momentum": (
        lambda: PiSGD(param_groups(make_net(), 0.1, 0.1, 0.5, apply_lr_mult_to_wd=False), 0.1, momentum=0.9),
        ["momentum", "apply_lr_mult_to_wd=False"],
    ),
    "velocity of other rows": (with_another_nets_rows, ["4 rows", "velocity 12", "together with the model's"]),
    "negative clip": (lambda: clip(-1.0), ["max_norm is -1.0", "positive"]),
    "clip nan": (lambda: clip(math.nan), ["max_norm is nan", "positive"]),
    "clip before backward": (lambda: clip_grad_norm_(make_net(), 1.0), ["no gradients", "after backward"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_argument_what_it_got_and_what_it_wants(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
