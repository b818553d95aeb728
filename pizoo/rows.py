"""Rows: what a growing layer is made of, and the only thing training adds to it.

A growing layer stores M rows ``(A_m, B_m, amult_m)``. Training appends rows and never changes those stored, apart from
weight decay (one running factor for all of them) and momentum (which moves ``amult``). Room is reserved ahead, so that
appending b rows costs b rows however many there are.

Rows in int8 hold ``A / max|A| * 127`` and ``B / max|B| * 127``, rounded. What ``A`` was divided by is part of ``amult``, where
it costs nothing. ``B`` is known to have norm 1, so its integers say it all: they stand for ``bmult B`` with bmult one over
their norm, which is derived from them wherever rows come from, and never saved.

Processes that train together (:mod:`pizoo.processes`) may each hold a share of a layer's rows (:class:`Share`). Rows are
numbered in the order in which they were appended, however many processes hold them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pizoo import processes
from pizoo.functional import relu_kernel_of_gram
from pizoo.memory import empty_on_host, to_host

Place = Literal["device", "host"]

NO_TENSOR = (
    "the gradient of a growing layer is not a tensor but the rows that a step appends; step with pizoo.optim.PiSGD, clip with "
    "pizoo.optim.clip_grad_norm_"
)
DTYPES = (torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = torch.iinfo(torch.int8).max
CONVERTED_AT_ONCE = 65_536  # rows: those of another dtype pass through float32
GROWTH = 1.5  # room made at once when nothing was reserved: appending stays linear in the rows appended


@dataclass(frozen=True)
class Share:
    """Which rows of a layer are held here: of all its rows 0, 1, ..., those whose number is ``index`` modulo ``of``.

    Appended rows are dealt in turn: shares differ by one row at most, whatever the batch size.
    """

    index: int = 0
    of: int = 1

    def count(self, total):
        """How many of ``total`` rows (int, or an integer tensor) are held here."""
        return total if self.of == 1 else (total - self.index + self.of - 1) // self.of

    def first(self, total):
        """Of rows that come after ``total`` others, the first held here; every ``of``-th after it is too."""
        return (self.index - total) % self.of

    def room(self, total: int) -> int:
        """Rows to reserve for a share of ``total``: one more than it holds where a step writes as many in every process."""
        return total if self.of == 1 else self.count(total) + 1


WHOLE = Share()


class Reserved:
    """A tensor that grows along its first dimension inside storage reserved ahead.

    With ``on_host`` the storage is host memory that a GPU reads directly (:func:`pizoo.memory.empty_on_host`).
    """

    def __init__(self, data: Tensor, on_host: bool = False):
        self.storage = data
        self.count = len(data)
        self.on_host = on_host

    @property
    def used(self) -> Tensor:
        """The part in use, a view [count, ...]."""
        return self.storage[: self.count]

    @property
    def capacity(self) -> int:
        return len(self.storage)

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` rows in all; what is there is copied once. Less room than there is changes nothing."""
        if capacity > self.capacity:
            self.storage = self._copied(capacity, self.storage.device, self.on_host)

    def moved(self, device: torch.device, on_host: bool) -> Reserved:
        """The same elsewhere, with its room."""
        moved = Reserved(self._copied(self.capacity, device, on_host), on_host)
        moved.count = self.count
        return moved

    def _copied(self, capacity: int, device: torch.device, on_host: bool) -> Tensor:
        shape, dtype = (capacity, *self.storage.shape[1:]), self.storage.dtype
        storage = empty_on_host(shape, dtype) if on_host else empty_rows(shape, dtype, device)
        storage[: self.count] = self.used
        return storage

    def append(self, rows: Tensor) -> None:
        needed = self.count + len(rows)
        if needed > self.capacity:
            self.reserve(max(needed, int(GROWTH * self.capacity)))
        # A copy from a GPU to the host waits until it is done: whoever reads next, on either side, finds the rows.
        self.storage[self.count : needed] = rows
        self.count = needed


def stored_columns(columns: int, dtype: torch.dtype) -> int:
    """Columns that a row takes in reserved storage: kernels for GPUs want rows of 2 bytes an entry to start at multiples of 16
    bytes, of 1 byte at multiples of 4, and get that where it costs at most a twentieth."""
    unit = {1: 4, 2: 8}.get(dtype.itemsize, 1)
    aligned = -(-columns // unit) * unit
    return aligned if aligned <= 1.05 * columns else columns


def empty_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised storage [M] or [M, columns]; a view where rows take more than their columns."""
    rows, *columns = shape
    storage = torch.empty(rows, *(stored_columns(n, dtype) for n in columns), dtype=dtype, device=device)
    return storage[:, : columns[0]] if columns else storage


class _NoTensorError(TypeError, AttributeError):
    """What torch's functions raise that are given pending rows; its attributes too, for which ``hasattr`` is then False."""


class PendingRows(Tensor):
    """The gradient of a growing layer: the rows that the next step will append, before learning rate and multiplier.

    It stands in ``layer.A.grad`` and is treated as a gradient is: several backward passes add up (their rows are joined),
    clipping scales it, either ``zero_grad`` removes it. A tensor in name alone: so that torch's own optimizers and clipping ask
    what it can do, and are refused in a sentence, by TypeError.

    Attributes:
        A: ``δ s`` [k, r_out], in float32 or float64.
        B: unit inputs ``gbar`` [k, r], same dtype.
    """

    grad_fn = None  # nn.Module.zero_grad asks for it
    A: Tensor
    B: Tensor

    def __new__(cls, A: Tensor, B: Tensor):
        pending = cls._make_subclass(cls, torch.empty(0))
        pending.A, pending.B = A, B
        return pending

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise _NoTensorError(NO_TENSOR)

    def __len__(self) -> int:
        return len(self.A)

    def __reduce_ex__(self, protocol):
        return type(self), (self.A, self.B)

    def __deepcopy__(self, memo):
        return self.apply(lambda t: copy.deepcopy(t, memo))

    def extend(self, A: Tensor, B: Tensor) -> None:
        self.A, self.B = torch.cat([self.A, A]), torch.cat([self.B, B])

    def norm(self) -> Tensor:
        """:func:`rows_norm` of these rows, 0-d."""
        return rows_norm(self.A, self.B)

    @property
    def device(self) -> torch.device:
        """Where they are: on the layer's device, wherever its rows are kept."""
        return self.A.device

    def mul_(self, factor: Tensor | float) -> PendingRows:
        self.A = self.A * factor
        return self

    def isfinite(self) -> Tensor:
        """0-d bool: whether every entry is finite."""
        return self.A.isfinite().all() & self.B.isfinite().all()

    def apply(self, fn) -> PendingRows:
        return PendingRows(fn(self.A), fn(self.B))

    def __getattr__(self, name: str):
        if hasattr(Tensor, name):
            raise _NoTensorError(NO_TENSOR)
        raise AttributeError(f"PendingRows has no {name!r}: {NO_TENSOR}")

    def __repr__(self, **_: Any) -> str:
        return f"PendingRows({len(self)} rows: {NO_TENSOR})"

    __format__, __dir__ = object.__format__, object.__dir__

    # What nn.Module.zero_grad(set_to_none=False) does to a gradient.
    def requires_grad_(self, requires_grad: bool = True) -> PendingRows:
        return self

    def zero_(self) -> PendingRows:
        self.A, self.B = self.A[:0], self.B[:0]
        return self


class RowsParameter(nn.Parameter):
    """A parameter that may hold integers. torch lets these require no gradient: ``requires_grad`` is then kept here."""

    _integers_require_grad = False

    def __new__(cls, data: Tensor, requires_grad: bool = True):
        parameter = super().__new__(cls, data, requires_grad=False)
        parameter.requires_grad = requires_grad
        return parameter

    @property
    def requires_grad(self) -> bool:
        return Tensor.requires_grad.__get__(self) if self.is_floating_point() else self._integers_require_grad

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        if self.is_floating_point():
            Tensor.requires_grad.__set__(self, requires_grad)
        else:
            self._integers_require_grad = requires_grad

    def requires_grad_(self, requires_grad: bool = True) -> RowsParameter:
        self.requires_grad = requires_grad
        return self

    def hold(self, data: Tensor) -> None:
        """Make ``data`` what it holds; between integers and floats too, which torch refuses where gradients are required."""
        if data.is_floating_point() == self.is_floating_point():
            self.data = data
            return
        requires_grad, self.requires_grad = self.requires_grad, False
        self.data = data
        self.requires_grad = requires_grad

    def __reduce_ex__(self, protocol):
        return type(self), (self.detach().clone(), self.requires_grad)


class GrowingWeight(RowsParameter):
    """The ``A`` of a growing layer: a parameter [M, r_out] whose ``grad`` is :class:`PendingRows` or None.

    ``rows`` is the layer it belongs to, where an optimizer appends.
    """

    _pending: PendingRows | None = None
    rows: Rows

    @property
    def leaf(self) -> Tensor:
        """What stands for it in autograd's graph: itself, or for integers an empty tensor that can require gradients."""
        if self.is_floating_point():
            return self
        return torch.empty(0, device=self.device, requires_grad=self.requires_grad)

    @property
    def grad(self) -> PendingRows | None:
        return self._pending

    @grad.setter
    def grad(self, pending: PendingRows | None) -> None:
        if pending is not None and not isinstance(pending, PendingRows):
            raise TypeError(f"the gradient of a growing layer is PendingRows or None; got {type(pending).__name__}")
        self._pending = pending

    def record(self, A: Tensor, B: Tensor) -> None:
        """Add rows to the gradient: A [b, r_out], B [b, r]."""
        if self._pending is None:
            self._pending = PendingRows(A, B)
        else:
            self._pending.extend(A, B)

    def __deepcopy__(self, memo):
        """With its layer, so that a net and its optimizer copied together stay together."""
        if id(self) not in memo:
            memo[id(self)] = copy.deepcopy(self.rows, memo).A if hasattr(self, "rows") else super().__deepcopy__(memo)
        return memo[id(self)]


class Rows(nn.Module):
    """M rows of a growing layer: ``A`` [M, r_out], ``B`` [M, r] of unit rows, ``amult`` [M] in float32 or float64.

    ``A`` and ``B`` are parameters (frozen by ``requires_grad_(False)``, moved and cast as usual; ``B`` has no gradient of
    its own). ``amult`` is kept in at least float32 whatever ``.half()`` does to the rest; what :attr:`amult` and
    ``state_dict`` give includes the decay factor.

    Rows may be int8 (:meth:`to_rows_dtype`): ``A`` then holds integers that ``amult`` multiplies, ``B`` integers that
    :attr:`bmult` brings to norm 1. As torch has it, ``.half()`` and the like leave integers alone.

    With ``rows_on`` "host" (:meth:`keep_rows_on`), ``A`` and ``B`` stay in host memory, page-locked, and the ops stream them
    to the device; ``amult``, the bias and pending rows are on the device. ``.to(device)`` moves those alone.

    After :meth:`share_rows` these are a share of the rows; ``count`` and what rows are numbered by go on meaning all of them,
    and so do :meth:`reserve`, :meth:`append`, :meth:`put`, :meth:`grown` and ``load_state_dict``.

    ``load_state_dict`` accepts any number of rows. ``state_dict`` shares memory with the rows only when no room is
    reserved behind or beside them; else it copies, so that saving it does not save the empty room.
    """

    rows_on: Place = "device"
    share: Share = WHOLE
    _count: int  # of all rows, where a share is held

    def __init__(self, A: Tensor, B: Tensor, amult: Tensor):
        super().__init__()
        self.A = GrowingWeight(A)
        self.B = RowsParameter(B, requires_grad=False)
        self.set_rows(A, B, amult)

    # ------------------------------------------------------------------ the rows

    @property
    def count(self) -> int:
        """M, the number of rows, those that other processes hold included."""
        return self._amult.count if self.share == WHOLE else self._count

    @property
    def shared(self) -> bool:
        """Whether other processes hold rows of this layer, so that what the ops compute has to be summed."""
        return self.share != WHOLE

    @property
    def capacity(self) -> int:
        """How many rows fit into the storage reserved here."""
        return min(part.capacity for part in self._parts)

    @property
    def device(self) -> torch.device:
        """Where the layer computes, and where ``amult`` is."""
        return self.A.device if self.rows_on == "device" else self._amult.storage.device

    @property
    def amult(self) -> Tensor:
        """Row multipliers [M] with weight decay applied (a copy)."""
        return self._amult.used * self.decay

    @property
    def stored_amult(self) -> Tensor:
        """Row multipliers [M] as stored: to be multiplied by :attr:`decay`. In-place changes change the layer."""
        return self._amult.used

    @property
    def bmult(self) -> Tensor | None:
        """Of int8 rows, one over the norm of each row of ``B`` [M], float32; None for all others."""
        return None if self._bmult is None else self._bmult.used

    def set_rows(self, A: Tensor, B: Tensor, amult: Tensor, decay: float = 1.0) -> None:
        """Replace all rows; the tensors become the storage, converted where the layer's dtype or device differs.

        Raises:
            ValueError: shapes other than [M, r_out], [M, r], [M].
            TypeError: rows of a dtype that is none of theirs.
        """
        self._store(A, B, amult, decay, self.A.dtype)

    def _store(self, A: Tensor, B: Tensor, amult: Tensor, decay: float, dtype: torch.dtype) -> None:
        if problem := rows_problem(
            A, B, amult, r=self.B.shape[1], r_out=self.A.shape[1], at_least=0 if self.shared else 1
        ):
            raise ValueError(problem)
        check_rows_dtype(dtype)
        device = self.device
        A, B, amult, *bmult = converted(A.detach(), B.detach(), amult.detach(), dtype)
        self._A, self._B = self._placed(A, dtype, device), self._placed(B, dtype, device)
        self._amult = Reserved(amult.to(device, torch.promote_types(dtype, torch.float32)))
        self._bmult = Reserved(bmult[0].to(device)) if bmult else None
        self.decay = decay
        self._point()

    def _placed(self, part: Tensor, dtype: torch.dtype, device: torch.device) -> Reserved:
        if self.rows_on == "host":
            return Reserved(to_host(part, dtype), on_host=True)
        return Reserved(part.to(device, dtype))

    @property
    def _parts(self) -> tuple[Reserved, ...]:
        parts = (self._A, self._B, self._amult)
        return parts if self._bmult is None else (*parts, self._bmult)

    def keep_rows_on(self, place: Place) -> Rows:
        """Keep ``A`` and ``B`` on the "device" of the layer, or on the "host" whatever device the layer is moved to.

        Moves what is there and what is reserved. Returns the layer.

        Raises:
            ValueError: another place.
        """
        check_place(place)
        if place != self.rows_on:
            device, self.rows_on = self.device, place
            self._A = self._A.moved(device, place == "host")
            self._point()  # lets go of the old storage before the next part is moved
            self._B = self._B.moved(device, place == "host")
            self._point()
        return self

    def to_rows_dtype(self, dtype: torch.dtype) -> None:
        """Cast ``A`` and ``B`` alone, to int8 or a floating-point dtype; the bias keeps its dtype.

        Raises:
            TypeError: another dtype.
        """
        self._store(self.A.data, self.B.data, self.stored_amult, self.decay, dtype)

    @torch.no_grad()
    def share_rows(self) -> None:
        """Keep this process's share of the rows, of which every process has all. Where there is one process, it keeps all.

        Raises:
            RuntimeError: they are shared already.
        """
        if self.shared:
            raise RuntimeError(f"this layer holds share {self.share.index} of {self.share.of} already")
        share = Share(processes.index(), processes.count())
        if share == WHOLE:
            return
        count, device, dtype = self.count, self.device, self.A.dtype
        self._count, self.share = count, share
        for name in ("_A", "_B"):
            own = getattr(self, name).used[share.index :: share.of].clone()
            setattr(self, name, self._placed(own, dtype, device))
            self._point()  # lets go of the old storage before the next part is copied
        self._amult = Reserved(self._amult.used[share.index :: share.of].clone())
        if self._bmult is not None:
            self._bmult = Reserved(self._bmult.used[share.index :: share.of].clone())

    def gathered(self, numbers: Tensor) -> Tensor:
        """Numbers of all rows [M], in their order, from those of the rows held here. Every process must ask."""
        return processes.interleaved(numbers, self.count) if self.shared else numbers

    def dealt(self, numbers: Tensor) -> Tensor:
        """Of numbers of all rows [M, ...] those of the rows held here."""
        return numbers[self.share.index :: self.share.of]

    def reserve(self, capacity: int) -> None:
        """Reserve storage for ``capacity`` rows in all, so that appending up to there moves nothing."""
        self._reserve_here(self.share.room(capacity))

    def _reserve_here(self, capacity: int) -> None:
        for part in self._parts:
            part.reserve(capacity)
            self._point()  # lets go of the old storage before the next part is copied

    @torch.no_grad()
    def append(self, A: Tensor, B: Tensor, amult: Tensor | float) -> Tensor:
        """Append k rows: A [k, r_out], B [k, r], ``amult`` a number or [k].

        Rows shorter than float32 are stored with A's largest entry in [1, 2), of int8 rows at 127, and the factor that this
        takes moved into ``amult``: only the product counts, and float16 would lose the small ones.

        Returns:
            that factor of each row held here (1 for float32 and float64), for whoever keeps numbers per row beside these.

        Raises:
            ValueError: shapes other than these; nothing is appended.
        """
        (r_out, r), k = (self.A.shape[1], self.B.shape[1]), len(A)
        numbers = amult.shape if isinstance(amult, Tensor) and amult.ndim else (k,)
        if A.shape != (k, r_out) or B.shape != (k, r) or numbers != (k,):
            raise ValueError(
                f"new rows have shapes A {list(A.shape)}, B {list(B.shape)}, amult {list(numbers)}; "
                f"they must be [k, {r_out}], [k, {r}], [k] with one k"
            )
        if self.shared:
            own = slice(self.share.first(self.count), None, self.share.of)
            A, B = A[own], B[own]
            amult = amult[own] if isinstance(amult, Tensor) and amult.ndim else amult
            self._count += k
        (A, scale), (B, *bmult) = scaled(A, self.A.dtype), directed(B, self.A.dtype)
        for part, new in zip(self._parts, (A, B, scale * (amult / self.decay), *bmult), strict=True):
            part.append(new)
        self._point()
        return scale

    def put(self, first: int, A: Tensor, B: Tensor, amult: Tensor, step: int = 1) -> None:
        """Write k rows of any dtype over every ``step``-th from ``first`` on, or into the room behind them.

        Those in the room behind are none before :meth:`grown` counts them. Of a share, those not held here are left out.
        """
        index, of = self.share.index, self.share.of
        period = of // math.gcd(step, of)
        for j in range(min(period, len(A))):
            if (first + j * step) % of == index:
                new = converted(A[j::period], B[j::period], amult[j::period], self.A.dtype)
                begin, stride = (first + j * step) // of, step * period // of
                for storage, part in zip(self.storages, new, strict=True):
                    storage[begin : begin + stride * len(part) : stride] = part

    @property
    def storages(self) -> tuple[Tensor, ...]:
        """``A``, ``B``, stored ``amult``, and of int8 rows :attr:`bmult`, with the reserved room behind them."""
        return tuple(part.storage for part in self._parts)

    def grown(self, count: int, decay: float) -> None:
        """Take note of rows written into :attr:`storages`: ``count`` are in use, under this decay factor."""
        if self.shared:
            self._count = count
        for part in self._parts:
            part.count = self.share.count(count)
        self.decay = decay
        self._point()

    def fold_decay(self) -> None:
        """Multiply the decay factor into ``amult`` (after many steps it would otherwise underflow)."""
        self._amult.used.mul_(self.decay)
        self.decay = 1.0

    def _point(self) -> None:
        self.A.rows = self
        self.A.hold(self._A.used)
        self.B.hold(self._B.used)

    # ------------------------------------------------------------------ torch's contract

    def _apply(self, fn, recurse=True):
        pending, self.A.grad = self.A.grad, None
        if self.rows_on == "host":
            self._apply_around_rows(fn, recurse)
        else:
            amult, capacity = self._amult.used, self.capacity
            A_trained, B_trained = self.A.requires_grad, self.B.requires_grad
            # On some conversions torch makes a new Parameter, which it refuses of integers that require a gradient.
            self.A.requires_grad = self.B.requires_grad = False
            try:
                super()._apply(fn, recurse)
            finally:
                if not isinstance(self.A, GrowingWeight):
                    self.A, self.B = GrowingWeight(self.A.data), RowsParameter(self.B.data)
                self.A.requires_grad, self.B.requires_grad = A_trained, B_trained
            self.set_rows(self.A.data, self.B.data, amult, self.decay)
            self._reserve_here(capacity)
        if pending is not None:
            device = self.device
            self.A.grad = pending.apply(lambda t: t.to(device, torch.promote_types(self.A.dtype, torch.float32)))
        return self

    def _apply_around_rows(self, fn, recurse: bool) -> None:
        """``_apply`` of rows on the host: to ``amult`` and bias; of what it does to ``A`` and ``B``, their dtype alone."""
        parameters, capacity = self._parameters, self.capacity
        empty = fn(torch.empty(0, dtype=self.A.dtype, device=self.device))
        self._parameters = {name: value for name, value in parameters.items() if name not in ("A", "B")}
        super()._apply(fn, recurse)
        self._parameters = parameters | self._parameters
        self._amult.storage = self._amult.storage.to(empty.device, torch.promote_types(empty.dtype, torch.float32))
        if self._bmult is not None:
            self._bmult.storage = self._bmult.storage.to(empty.device)
        if empty.dtype != self.A.dtype:
            self.to_rows_dtype(empty.dtype)
            self._reserve_here(capacity)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.shared:
            raise RuntimeError(
                f"{prefix or 'this layer '}holds {len(self.A)} of its {self.count} rows, other processes the rest: load all of "
                "them from the training's checkpoint (pizoo.load)"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, part in (("A", self._A), ("B", self._B)):
            if (part.capacity > part.count or not part.used.is_contiguous()) and not keep_vars:
                destination[prefix + name] = part.used.clone()
        destination[prefix + "amult"] = self.amult

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        rows = {name: state_dict.get(prefix + name) for name in ("A", "B", "amult")}
        if any(part is None for part in rows.values()):
            missing_keys.extend(prefix + name for name, part in rows.items() if part is None and strict)
        elif problem := rows_problem(**rows, r=self.B.shape[1], r_out=self.A.shape[1], prefix=prefix):
            errors.append(problem)
        else:
            if self.shared:
                self._count = len(rows["amult"])
                rows = {name: self.dealt(part) for name, part in rows.items()}
            if local_metadata.get("assign_to_params_buffers", False):  # as torch: the state's dtype and device
                self.A = GrowingWeight(rows["A"].detach(), self.A.requires_grad)
                self.B = RowsParameter(rows["B"].detach(), self.B.requires_grad)
                self.set_rows(**rows)
            else:
                self.set_rows(**{name: part.detach().clone() for name, part in rows.items()})
        rest = {key: value for key, value in state_dict.items() if key not in {prefix + name for name in rows}}
        # torch loads what is left (the bias) by its own rules; it would insist on the old number of rows.
        parameters = self._parameters
        self._parameters = {name: value for name, value in parameters.items() if name not in rows}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)
        self._parameters = parameters | self._parameters

    def __getstate__(self) -> dict[str, Any]:
        """Without reserved room and pending rows: copies and pickles hold the rows alone."""
        state = {k: v for k, v in self.__dict__.items() if k not in ("_A", "_B", "_amult", "_bmult")}
        state["_parameters"] = dict(self._parameters)
        state["_parameters"]["A"] = GrowingWeight(self._A.used.clone(), self.A.requires_grad)
        state["_parameters"]["B"] = RowsParameter(self._B.used.clone(), self.B.requires_grad)
        return {**state, "_amult": self._amult.used.clone()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        amult = state.pop("_amult")
        super().__setstate__(state)
        self._amult = Reserved(amult)
        self.set_rows(self.A.data, self.B.data, amult, self.decay)


def growing_layers(model: nn.Module) -> dict[str, Rows]:
    """The modules of a net that hold rows, by their names in it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Rows)}


def rows_norm(A: Tensor, B: Tensor) -> Tensor:
    """Norm of rows in function space, ``|Δ|² = Σ_ij (a_i . a_j) K(b_i, b_j)`` with K the zero-mean ReLU kernel; 0-d."""
    return rows_norm_of_grams(A @ A.T, B @ B.T)


def rows_norm_of_grams(A: Tensor, B: Tensor) -> Tensor:
    """:func:`rows_norm` from the inner products of the rows' two parts, [..., n, n] each: [...]."""
    return product_norm_of_grams(A, relu_kernel_of_gram(B))


def product_norm_of_grams(A: Tensor, B: Tensor) -> Tensor:
    """Norm of ``XᵀY`` for X [n, ...], Y [n, ...] from their inner products [..., n, n] each: [...]."""
    return (A * B).sum((-2, -1)).clamp(min=0).sqrt()


def converted(A: Tensor, B: Tensor, amult: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Rows of any of ``DTYPES`` as those of one of them, the same function within rounding.

    Args:
        A: [k, r_out].
        B: [k, r] of norm 1, or int8.
        amult: [k].

    Returns:
        ``A``, ``B``, ``amult``, and of int8 rows ``bmult`` [k].
    """
    bmult: tuple[Tensor, ...] = ()
    if dtype == torch.int8 != A.dtype:
        A, scale = _in_blocks(lambda part: scaled(part, dtype), A)
        amult = amult * scale.to(amult.device)
    if B.dtype == dtype == torch.int8:
        bmult = _in_blocks(lambda part: directed(part, dtype)[1:], B)
    elif torch.int8 in (B.dtype, dtype):
        B, *bmult = _in_blocks(lambda part: directed(part, dtype), B)
    return A.to(dtype), B.to(dtype), amult, *bmult


def _in_blocks(function: Callable[[Tensor], tuple[Tensor, ...]], rows: Tensor) -> tuple[Tensor, ...]:
    """What ``function`` makes of blocks of rows, joined."""
    return tuple(torch.cat(parts) for parts in zip(*map(function, rows.split(CONVERTED_AT_ONCE)), strict=True))


def scaled(A: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [k, r_out] as rows of ``dtype`` hold it, up to a cast, and what each row was divided by [k], in at least float32.

    int8 rows are rounded to nearest, and zero where they were smaller than float32 tells apart. What is not finite leaves a
    scale that is not.
    """
    if dtype != torch.int8:
        scale = row_scale(A) if dtype.itemsize < 4 else A.new_ones(len(A))
        return A / scale[:, None], scale
    A = A.to(torch.promote_types(A.dtype, torch.float32))
    scale = A.abs().amax(1) / LARGEST
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1, scale)
    return (A / scale[:, None]).round().to(dtype), scale


def directed(B: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Directions B [k, r] as rows of ``dtype`` hold them, up to a cast; for int8 also one over their norms [k], float32."""
    if torch.int8 not in (B.dtype, dtype):
        return (B,)
    if B.dtype != torch.int8:
        B, _ = scaled(B, torch.int8)
    # In float64 the sum is exact and the rest is rounded alike by every device: nobody has to keep these numbers.
    bmult = (1 / B.double().square().sum(1).clamp(min=1).sqrt()).float()
    return (B, bmult) if dtype == torch.int8 else (B * bmult[:, None],)


def row_scale(A: Tensor) -> Tensor:
    """The power of two per row [k] that brings the largest entry of each row of A [k, r_out] into [1, 2).

    One for rows that are zero, not finite, or below float32's normal numbers: dividing by those overflows where devices flush
    them to zero.
    """
    largest = A.abs().amax(1)
    exponent = torch.frexp(largest).exponent - 1
    usable = (largest >= torch.finfo(torch.float32).tiny) & largest.isfinite()
    return torch.ldexp(torch.ones_like(largest), torch.where(usable, exponent, 0))


def check_rows_dtype(dtype: torch.dtype) -> None:
    """Raise TypeError unless rows can be of this dtype."""
    if dtype not in DTYPES:
        raise TypeError(f"rows have dtype {dtype}; it must be one of {', '.join(map(str, DTYPES))}")


def check_place(place: str, *more: str) -> None:
    """Raise ValueError unless ``place`` is where rows can be kept, or one of ``more``."""
    if place not in (places := (*get_args(Place), *more)):
        raise ValueError(f"rows_on is {place!r}; it must be one of {', '.join(map(repr, places))}")


def rows_problem(
    A: Tensor, B: Tensor, amult: Tensor, r: int, r_out: int, prefix: str = "", at_least: int = 1
) -> str | None:
    """What is wrong with these as the rows of a layer from rank ``r`` to ``r_out``, in words; None if nothing is."""
    shapes = f"{prefix}A {list(A.shape)}, {prefix}B {list(B.shape)}, {prefix}amult {list(amult.shape)}"
    wanted = f"[M, {r_out}], [M, {r}], [M] with one M of at least {at_least}"
    fits = A.ndim == B.ndim == 2 and A.shape[1] == r_out and B.shape[1] == r and amult.ndim == 1
    if not fits or not len(A) == len(B) == len(amult) >= at_least:
        return f"rows have shapes {shapes}; they must be {wanted}"
    return None
