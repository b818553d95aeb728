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

from pizoo.functional import relu_kernel, unit
from pizoo.models import InfPiMLP
from pizoo.nn import InfPiLinear
from pizoo.rows import PendingRows, Reserved, Rows, row_scale

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


def test_row_scales_are_powers_of_two_and_leave_zeros_and_infinities_alone() -> None:
    A = torch.tensor([[0.3, -0.1], [-5.0, 1.0], [0.0, 0.0], [torch.inf, 1.0]])
    assert row_scale(A).tolist() == [0.25, 4.0, 1.0, 1.0]


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
    with pytest.raises(
        (AttributeError, TypeError), match=r"pizoo\.optim\.PiSGD, clip with pizoo\.optim\.clip_grad_norm_"
    ):
        use(net.parameters(), 1.0).step()
    assert copy.deepcopy(net.output.A.grad).A.equal(net.output.A.grad.A)
