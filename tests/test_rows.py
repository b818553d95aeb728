"""Rows keep torch's contract for parameters while they grow."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pizoo
from pizoo.functional import relu_kernel, unit
from pizoo.models import InfPiMLP
from pizoo.nn import InfPiLinear
from pizoo.rows import NO_TENSOR, PendingRows, Reserved, Rows, row_scale

R, R_OUT = 4, 3


def make_rows(count: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(count, R_OUT, generator=generator), torch.randn(count, R, generator=generator)
    return Rows(A.to(dtype), unit(B)[0].to(dtype), torch.rand(count, generator=generator) + 0.5)


def new_rows(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(count, R_OUT, generator=generator), torch.randn(count, R, generator=generator)
    return A, unit(B)[0]


def function(rows: Rows) -> Tensor:
    """The layer's kernel expansion at a few fixed points, in float64."""
    g = torch.randn(6, R, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return relu_kernel(g, rows.B.detach().double()) @ (rows.amult.double()[:, None] * rows.A.detach().double())


def assert_same_rows(found: Rows, wanted: Rows) -> None:
    for name in ("A", "B", "amult"):
        assert torch.equal(getattr(found, name).detach(), getattr(wanted, name).detach()), name


def saved_size(state: object) -> int:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.tell()


# ------------------------------------------------------------------ appending


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), max_size=8), capacity=st.integers(0, 40))
def test_appended_rows_follow_those_stored_whatever_was_reserved(sizes: list[int], capacity: int) -> None:
    rows = make_rows()
    wanted = {name: getattr(rows, name).detach().clone() for name in ("A", "B", "amult")}
    rows.reserve(capacity)
    for i, size in enumerate(sizes):
        A, B = new_rows(size, seed=i)
        rows.append(A, B, -0.5)
        for name, part in (("A", A), ("B", B), ("amult", torch.full((size,), -0.5))):
            wanted[name] = torch.cat([wanted[name], part])
    assert rows.count == len(wanted["A"]) <= rows.capacity
    for name, part in wanted.items():
        assert torch.equal(getattr(rows, name).detach(), part)


def test_within_the_reserve_appending_moves_nothing_and_the_parameter_stays_itself() -> None:
    rows = make_rows()
    weight = rows.A
    rows.reserve(100)
    address = rows.A.data_ptr()
    rows.append(*new_rows(95), -1.0)
    assert rows.A is weight and rows.A.data_ptr() == address and rows.capacity == 100
    rows.append(*new_rows(1), -1.0)
    assert rows.A is weight and rows.count == 101
    assert rows.capacity == 150  # grown by half: appending stays linear


def test_reserving_less_than_there_is_changes_nothing() -> None:
    reserved = Reserved(torch.arange(6.0))
    reserved.reserve(3)
    assert reserved.capacity == 6 and torch.equal(reserved.used, torch.arange(6.0))


@pytest.mark.parametrize(
    ("columns", "of_2_bytes", "of_1"), [(250, 256, 252), (401, 408, 404), (400, 400, 400), (30, 30, 30), (10, 10, 10)]
)
def test_reserved_rows_start_where_kernels_want_them_where_that_costs_little(columns, of_2_bytes, of_1) -> None:
    for dtype, stride in ((torch.float16, of_2_bytes), (torch.float32, columns), (torch.int8, of_1)):
        rows = torch.arange(5.0 * columns).remainder(100).view(5, columns).to(dtype)
        reserved = Reserved(rows)
        reserved.reserve(9)
        assert reserved.storage.shape == (9, columns) and reserved.storage.stride() == (stride, 1)
        assert torch.equal(reserved.used, rows)


def test_a_state_is_contiguous_where_rows_take_more_than_their_columns() -> None:
    layer = InfPiMLP(4, 250, 30).half().output
    layer.reserve(40)
    layer.append(torch.randn(10, 250), unit(torch.randn(10, 30))[0], 1.0)
    assert layer.count == layer.capacity and layer.A.stride() == (256, 1)
    state = layer.state_dict()
    assert state["A"].is_contiguous() and torch.equal(state["A"], layer.A.detach())


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 1e5])
def test_float16_rows_lose_nothing_but_their_rounding(scale: float) -> None:
    half, full = make_rows(dtype=torch.float16), make_rows(dtype=torch.float64)
    full.A.data.copy_(half.A.data)
    full.B.data.copy_(half.B.data)
    before = function(full)
    A, B = new_rows(7)
    B = B.half()  # representable, so that only A is rounded
    for rows in (half, full):
        rows.append((scale * A).to(torch.promote_types(rows.A.dtype, torch.float32)), B, -1.0)
    difference = (function(half) - function(full)).abs().max()
    assert difference <= 2**-10 * (function(full) - before).abs().max()
    # The function's change, not only the function: at 1e-7 float16 alone would have stored zeros.
    assert (half.A[-7:].abs().amax(1) >= 1).all() and (half.A[-7:].abs().amax(1) <= 2).all()


def test_row_scales_are_powers_of_two_and_none_of_what_is_nothing() -> None:
    A = torch.tensor([[0.3, -0.1], [-5.0, 1.0], [0.0, 0.0], [torch.inf, 1.0], [torch.nan, 1.0]])
    assert row_scale(A).tolist() == [0.25, 4.0, 0.0, 1.0, 1.0]
    smallest = torch.finfo(torch.float32).tiny
    assert row_scale(torch.tensor([[smallest], [smallest / 2], [smallest / 2**20]])).tolist() == [smallest, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16], ids=str)
def test_rows_of_zeros_are_multiplied_by_zero_whatever_the_learning_rate(dtype) -> None:
    """Kernels sum in a unit near the largest multiplier: that of a row of zeros would drown all others."""
    rows = make_rows(dtype=torch.float32)
    rows.to_rows_dtype(dtype)
    A, B = new_rows(4)
    A *= torch.tensor([1e-6, 0.0, 1e-42, 1e-6])[:, None]
    rows.append(A, B, -1.0)
    assert rows.amult[-4:].ne(0).tolist() == [True, False, False, True]
    assert rows.A[-3:-1].float().eq(0).all()
    stored = rows.amult[-4:, None] * rows.A[-4:].float()
    torch.testing.assert_close(stored, -A, rtol=0.02, atol=1e-8)


# ------------------------------------------------------------------ the decay factor


def test_decay_applies_to_stored_rows_and_not_to_new_ones() -> None:
    rows = make_rows()
    before = rows.amult
    rows.decay *= 0.25
    rows.append(*new_rows(2), -1.0)
    torch.testing.assert_close(rows.amult, torch.cat([0.25 * before, torch.full((2,), -1.0)]))


def test_folding_the_decay_does_not_change_the_function() -> None:
    rows = make_rows()
    rows.decay = 0.3
    before, state = function(rows), rows.state_dict()
    rows.fold_decay()
    assert rows.decay == 1
    torch.testing.assert_close(function(rows), before, rtol=1e-6, atol=0)
    torch.testing.assert_close(rows.state_dict(), state)


# ------------------------------------------------------------------ torch's contract


def grown(seed: int = 0) -> Rows:
    """Rows with reserve, decay and pending rows: what copies and states must not trip over."""
    rows = make_rows(seed=seed)
    rows.reserve(1000)
    rows.decay = 0.5
    rows.append(*new_rows(3), -1.0)
    rows.A.record(*new_rows(2))
    return rows


def test_the_state_holds_the_rows_alone() -> None:
    rows = grown()
    state = rows.state_dict()
    assert list(state) == ["A", "B", "amult"] and [len(part) for part in state.values()] == [8, 8, 8]
    assert all(type(part) is Tensor for part in state.values())
    torch.testing.assert_close(state["amult"], rows.amult)
    tight = make_rows()
    tight.append(*new_rows(3), -1.0)
    assert saved_size(state) == saved_size(tight.state_dict())
    copies = [part.clone() for part in state.values()]
    assert saved_size(list(state.values())) == saved_size(copies)


def test_a_state_does_not_change_with_later_training() -> None:
    for reserve in (0, 50):
        rows = make_rows()
        rows.reserve(reserve)
        state = rows.state_dict()
        before = {name: part.clone() for name, part in state.items()}
        rows.decay *= 0.5
        rows.append(*new_rows(3), -1.0)
        rows.fold_decay()
        torch.testing.assert_close(state, before)


@pytest.mark.parametrize("count", [1, 5, 17])
def test_a_state_of_any_number_of_rows_loads(count: int) -> None:
    source, target = make_rows(count), grown(seed=3)
    weight = target.A
    target.load_state_dict(source.state_dict())
    assert_same_rows(target, source)
    assert target.A is weight and target.decay == 1
    target.append(*new_rows(1), -1.0)
    assert source.count == count  # nothing is shared


def test_loading_with_assign_takes_the_tensors_of_the_state() -> None:
    with torch.device("meta"):
        target = InfPiLinear(R, R)
    state = InfPiLinear(R, R, dtype=torch.float64).state_dict()
    target.load_state_dict(state, assign=True)
    assert target.A.dtype == target.bias.dtype == target.amult.dtype == torch.float64
    assert target.A.device == target.B.device == target.amult.device == torch.device("cpu")
    assert target.A.data_ptr() == state["A"].data_ptr()


def test_missing_and_unexpected_keys_are_reported_as_torch_does() -> None:
    rows, state = make_rows(), make_rows().state_dict()
    amult = state.pop("amult")
    with pytest.raises(RuntimeError, match=r"Missing key.*amult"):
        rows.load_state_dict(state)
    assert rows.load_state_dict(state, strict=False).missing_keys == ["amult"]
    assert_same_rows(rows, make_rows())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        rows.load_state_dict({**state, "amult": amult, "other": amult})


def test_parameters_are_A_and_B_and_B_is_not_trained() -> None:
    layer = InfPiLinear(R, R)
    assert [name for name, _ in layer.named_parameters()] == ["A", "B", "bias"]
    assert [p.requires_grad for p in layer.parameters()] == [True, False, True]
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in layer.parameters())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda rows: pickle.loads(pickle.dumps(rows))], ids=["copy", "pickle"])
def test_a_copy_has_the_rows_and_neither_reserve_nor_pending_rows(how) -> None:
    rows = grown()
    rows.A.requires_grad_(False)
    other = how(rows)
    assert_same_rows(other, rows)
    assert other.decay == rows.decay == 0.5
    assert other.capacity == other.count == 8 and other.A.grad is None and not other.A.requires_grad
    other.append(*new_rows(1), -1.0)
    assert rows.count == 8 and len(rows.A.grad) == 2 and rows.A.rows is rows and other.A.rows is other
    assert len(pickle.dumps(rows)) < 10_000 < 1000 * (R + R_OUT) * 4


def test_a_pickled_state_loads_without_executing_code() -> None:
    rows, buffer = grown(), io.BytesIO()
    torch.save(rows.state_dict(), buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=True), rows.state_dict())


@pytest.mark.parametrize(
    ("convert", "dtype", "amult_dtype"),
    [
        (lambda rows: rows.half(), torch.float16, torch.float32),
        (lambda rows: rows.to(torch.bfloat16), torch.bfloat16, torch.float32),
        (lambda rows: rows.to(torch.float32), torch.float32, torch.float32),
        (lambda rows: rows.double(), torch.float64, torch.float64),
    ],
    ids=["half", "bfloat16", "float", "double"],
)
def test_conversion_casts_rows_and_keeps_multipliers_and_gradients_precise(convert, dtype, amult_dtype) -> None:
    rows, wanted = grown(), function(grown())
    weight = rows.A
    assert convert(rows) is rows
    assert rows.A is weight and rows.A.dtype == rows.B.dtype == dtype
    assert rows.amult.dtype == rows.state_dict()["amult"].dtype == amult_dtype
    assert rows.A.grad.A.dtype == rows.A.grad.B.dtype == amult_dtype and len(rows.A.grad) == 2
    assert rows.capacity == 1000 and rows.decay == 0.5
    torch.testing.assert_close(function(rows), wanted, rtol=0, atol=3e-2 if dtype.itemsize < 4 else 1e-6)
    rows.append(*new_rows(1), -1.0)
    assert rows.A.rows is rows and rows.count == 9


# ------------------------------------------------------------------ rows in int8

BYTE = torch.int8


def layers_in(*dtypes: torch.dtype, r: int = 100, r_out: int = 50, count: int = 500) -> list[InfPiLinear]:
    """One random layer without bias in several dtypes of its rows."""
    torch.manual_seed(0)
    layer = InfPiLinear(r, r_out, role="readout", bias_alpha=0, dtype=torch.float64)
    layer.set_rows(torch.randn(count, r_out), unit(torch.randn(count, r, dtype=torch.float64))[0], torch.randn(count))
    layers = [copy.deepcopy(layer) for _ in dtypes]
    for other, dtype in zip(layers, dtypes, strict=True):
        other.to_rows_dtype(dtype)
    return layers


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def test_int8_rows_of_B_stand_for_unit_vectors() -> None:
    (layer,) = layers_in(BYTE)
    layer.append(torch.randn(3, 50), unit(torch.randn(3, 100))[0], -1.0)
    assert layer.B.dtype == BYTE and layer.bmult.dtype == torch.float32 and len(layer.bmult) == 503
    norms = (layer.bmult[:, None].double() * layer.B).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)


@pytest.mark.parametrize("r_out", [10, 400])
def test_an_int8_layer_is_within_a_hundredth_of_its_float64_rows(r_out: int) -> None:
    """Rounding to 1/127 of the largest of 400 normal numbers costs 3.1 / 127 / sqrt(12) of each; the gradient has it twice."""
    short, exact = layers_in(BYTE, torch.float64, r=400, r_out=r_out, count=1000)
    g = torch.randn(8, 400, dtype=torch.float64, requires_grad=True)
    delta = torch.randn(8, r_out, dtype=torch.float64)
    (out, grad), (wanted, wanted_grad) = (
        (layer(g).detach(), *torch.autograd.grad((layer(g) * delta).sum(), g)) for layer in (short, exact)
    )
    assert 1e-3 < relative(out, wanted) < 0.01 and 1e-3 < relative(grad, wanted_grad) < 0.0125


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_int8_rows_are_the_same_integers_after_a_round_trip_through_floats(dtype: torch.dtype) -> None:
    (layer,) = layers_in(BYTE)
    before, stored = layer.state_dict(), copy.deepcopy(layer)
    layer.to_rows_dtype(dtype)
    assert layer.bmult is None and layer.A.dtype == layer.B.dtype == dtype and layer.A.requires_grad
    g = torch.randn(4, 100, dtype=torch.float64)
    assert relative(layer(g), stored(g)) < (1e-6 if dtype.itemsize >= 4 else 5e-3)
    layer.to_rows_dtype(BYTE)
    for name, part in layer.state_dict().items():
        assert torch.equal(part, before[name]), name
    assert torch.equal(layer.bmult, stored.bmult)


def test_conversions_go_block_by_block_to_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [layer.state_dict() for layer in layers_in(BYTE, torch.float16)]
    monkeypatch.setattr(pizoo.rows.dtypes, "CONVERTED_AT_ONCE", 7)
    for layer, wanted in zip(layers_in(BYTE, torch.float16), whole, strict=True):
        torch.testing.assert_close(layer.state_dict(), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1.0, 1e5, 1e30])
def test_int8_rows_of_any_size_lose_nothing_but_their_rounding(scale: float) -> None:
    (layer,) = layers_in(BYTE)
    A, B = scale * torch.randn(3, 50), unit(torch.randn(3, 100))[0]
    layer.append(A, B, -1.0)
    stored = layer.amult[-3:, None] * layer.A[-3:]
    step = A.abs().amax(1, keepdim=True) / 127
    assert ((stored + A).abs() <= 0.5001 * step).all()
    assert (layer.A[-3:].abs().amax(1) == 127).all()


def test_int8_rows_of_zeros_stay_zeros_and_what_is_not_finite_stays_visible() -> None:
    (layer,) = layers_in(BYTE)
    layer.append(torch.zeros(1, 50), torch.zeros(1, 100), -1.0)  # a zero input has the direction zero
    layer.append(torch.full((1, 50), 1e-40), unit(torch.randn(1, 100))[0], -1.0)
    g = torch.randn(4, 100, dtype=torch.float64)
    assert layer(g).isfinite().all() and not layer.A[-2:].any() and not layer.amult[-2:].any()
    for bad in (torch.nan, torch.inf):
        broken = copy.deepcopy(layer)
        broken.append(torch.full((1, 50), bad), unit(torch.randn(1, 100))[0], -1.0)
        assert not broken(g).isfinite().any()


def test_int8_rows_take_half_the_memory_of_float16() -> None:
    short, half = (sum(part.nbytes for part in layer.storages) for layer in layers_in(BYTE, torch.float16, r=400))
    assert short <= 0.51 * half


def test_int8_rows_keep_the_contract_of_a_parameter() -> None:
    (layer,) = layers_in(BYTE)
    weight, g = layer.A, torch.randn(4, 100, dtype=torch.float64)
    out = layer(g).detach()
    assert list(layer.state_dict()) == ["A", "B", "amult"]
    for trained in (False, True):
        layer.requires_grad_(trained)
        assert layer.A.requires_grad == copy.deepcopy(layer).A.requires_grad == trained
        layer(g.clone().requires_grad_()).sum().backward()
        assert (layer.A.grad is not None) == trained
    for convert in (layer.half, layer.double, layer.float):
        assert convert() is layer and layer.A is weight and layer.A.dtype == layer.B.dtype == BYTE
        assert (
            layer.amult.dtype == layer.bmult.dtype == torch.float32 and layer.A.requires_grad and len(weight.grad) == 4
        )
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_rows(other, layer)
        assert torch.equal(other(g), out) and other.A.rows is other
    assert layer.to("meta").A.dtype == BYTE and layer.A.requires_grad and layer.bmult.device.type == "meta"


@pytest.mark.parametrize("into", [BYTE, torch.float32], ids=str)
@pytest.mark.parametrize("source", [BYTE, torch.float32], ids=str)
def test_a_state_loads_into_rows_of_either_kind(source: torch.dtype, into: torch.dtype) -> None:
    (saved,) = layers_in(source, count=30)
    (target,) = layers_in(into, count=12)
    target.load_state_dict(saved.state_dict())
    assert target.count == 30 and target.A.dtype == into
    saved.to_rows_dtype(into)
    assert_same_rows(target, saved)
    with torch.device("meta"):
        assigned = InfPiLinear(100, 50, role="readout", bias_alpha=0)
    assigned.load_state_dict(saved.state_dict(), assign=True)
    assert assigned.A.dtype == into and assigned.A.data_ptr() == saved.A.data_ptr()
    g = torch.randn(4, 100, dtype=torch.float64)
    assert torch.equal(assigned(g), saved(g)) and torch.equal(target(g), saved(g))


def test_a_net_sampled_from_int8_rows_is_the_one_sampled_from_what_they_stand_for() -> None:
    torch.manual_seed(0)
    net = InfPiMLP(d_in=6, d_out=3, r=4, rows_dtype=BYTE)
    omegas = [torch.randn(9, 4) for _ in range(2)]
    found = net.sample(9, omegas).state_dict()
    for layer in net.growing_layers.values():
        layer.to_rows_dtype(torch.float32)
    torch.testing.assert_close(found, net.sample(9, omegas).state_dict(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ the pending rows as a gradient


def test_the_norm_of_pending_rows_is_the_norm_of_the_function_they_add() -> None:
    """``|Δ|² = E |Σ_i a_i relu(b_i.Z)|²`` over Z ~ N(0, I)."""
    A, B = (part.double() for part in new_rows(6))
    z = torch.randn(200_000, R, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    squares = (torch.relu(z @ B.T) @ A).square().sum(1)
    error = (PendingRows(A, B).norm() ** 2 - squares.mean()).abs()
    assert error <= 5 * squares.std() / len(z) ** 0.5


def test_pending_rows_join_scale_and_clear() -> None:
    (A, B), (A2, B2) = new_rows(3), new_rows(2, seed=2)
    rows = make_rows()
    rows.A.record(A, B)
    rows.A.record(A2, B2)
    pending = rows.A.grad
    assert len(pending) == 5
    norm = pending.norm()
    torch.testing.assert_close(pending.mul_(0.5).norm(), norm / 2)
    assert pending.isfinite()
    pending.mul_(torch.nan)
    assert not pending.isfinite()
    assert len(pending.zero_()) == 0 and pending.norm() == 0


# ------------------------------------------------------------------ bad input

A3, B3, M3 = torch.ones(3, R_OUT), torch.ones(3, R), torch.ones(3)
WANTED = f"[M, {R_OUT}], [M, {R}], [M]"
REFUSED = {
    "rows of A and B differ": (lambda rows: rows.set_rows(A3, B3[:2], M3), ValueError, ["A [3, 3]", "B [2, 4]", WANTED]),
    "rows of amult differ": (lambda rows: rows.set_rows(A3, B3, M3[:2]), ValueError, ["amult [2]", WANTED]),
    "A of wrong rank": (lambda rows: rows.set_rows(A3[0], B3, M3), ValueError, ["A [3]", WANTED]),
    "amult of wrong rank": (lambda rows: rows.set_rows(A3, B3, M3[:, None]), ValueError, ["amult [3, 1]", WANTED]),
    "A of wrong width": (lambda rows: rows.set_rows(A3[:, :2], B3, M3), ValueError, ["A [3, 2]", WANTED]),
    "B of wrong width": (lambda rows: rows.set_rows(A3, B3[:, :2], M3), ValueError, ["B [3, 2]", WANTED]),
    "no rows": (lambda rows: rows.set_rows(A3[:0], B3[:0], M3[:0]), ValueError, ["A [0, 3]", "at least 1"]),
    "appended A and B differ": (lambda rows: rows.append(A3, B3[:2], 1.0), ValueError, ["A [3, 3]", "B [2, 4]", "[k, 4]"]),
    "appended amult differs": (lambda rows: rows.append(A3, B3, M3[:2]), ValueError, ["amult [2]", "[k]"]),
    "appended A narrow": (lambda rows: rows.append(A3[:, :1], B3, 1.0), ValueError, ["A [3, 1]", "[k, 3]"]),
    "appended B flat": (lambda rows: rows.append(A3, B3[0], 1.0), ValueError, ["B [4]", "[k, 4]"]),
    "loaded rows differ": (
        lambda rows: rows.load_state_dict({"A": A3, "B": B3[:2], "amult": M3}), RuntimeError, ["B [2, 4]", WANTED]
    ),
    "a dtype of rows": (lambda rows: rows.to_rows_dtype(torch.int16), TypeError, ["torch.int16", "one of torch.int8"]),
    "a tensor as gradient": (lambda rows: setattr(rows.A, "grad", A3), TypeError, ["PendingRows or None", "Tensor"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_came_and_what_is_wanted_and_change_nothing(case: str) -> None:
    call, error, words = REFUSED[case]
    rows = make_rows()
    with pytest.raises(error) as caught:
        call(rows)
    for word in words:
        assert word in str(caught.value)
    assert_same_rows(rows, make_rows())
    assert rows.A.grad is None


@pytest.mark.parametrize(
    "use", [torch.optim.SGD, torch.optim.AdamW, nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_]
)
def test_what_takes_tensors_alone_is_told_what_takes_rows(use) -> None:
    net = InfPiMLP(4, 2, 3)
    net(torch.randn(5, 4)).sum().backward()
    with pytest.raises(TypeError) as caught:
        use(net.parameters(), 1.0).step()
    assert str(caught.value) == NO_TENSOR and "clip with pizoo.optim.clip_grad_norm_" in NO_TENSOR
    pending = net.output.A.grad
    assert copy.deepcopy(pending).A.equal(pending.A)
    assert not hasattr(pending, "shape") and "norm" in dir(pending)  # a debugger may look at them
