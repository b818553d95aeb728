"""Rows: what a growing layer is made of, and the only thing training adds to it.

A growing layer stores M rows ``(A_m, B_m, amult_m)``. Training appends rows and never changes those stored, apart from
weight decay (one running factor for all of them) and momentum (which moves ``amult``). Room is reserved ahead, so that
appending b rows costs b rows however many there are.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pizoo.functional import relu_kernel

NO_TENSOR = (
    "the gradient of a growing layer is not a tensor but the rows that a step appends; step with pizoo.optim.PiSGD, clip with "
    "pizoo.optim.clip_grad_norm_"
)
GROWTH = 1.5  # room made at once when nothing was reserved: appending stays linear in the rows appended


class Reserved:
    """A tensor that grows along its first dimension inside storage reserved ahead."""

    def __init__(self, data: Tensor):
        self.storage = data
        self.count = len(data)

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
            storage = self.storage.new_empty(capacity, *self.storage.shape[1:])
            storage[: self.count] = self.used
            self.storage = storage

    def append(self, rows: Tensor) -> None:
        needed = self.count + len(rows)
        if needed > self.capacity:
            self.reserve(max(needed, int(GROWTH * self.capacity)))
        self.storage[self.count : needed] = rows
        self.count = needed


class PendingRows:
    """The gradient of a growing layer: the rows that the next step will append, before learning rate and multiplier.

    It stands in ``layer.A.grad`` and is treated as a gradient is: several backward passes add up (their rows are joined),
    clipping scales it, either ``zero_grad`` removes it.

    Attributes:
        A: ``δ s`` [k, r_out], in float32 or float64.
        B: unit inputs ``gbar`` [k, r], same dtype.
    """

    grad_fn = None  # nn.Module.zero_grad asks for it

    def __init__(self, A: Tensor, B: Tensor):
        self.A, self.B = A, B

    def __len__(self) -> int:
        return len(self.A)

    def extend(self, A: Tensor, B: Tensor) -> None:
        self.A, self.B = torch.cat([self.A, A]), torch.cat([self.B, B])

    def norm(self) -> Tensor:
        """:func:`rows_norm` of these rows, 0-d."""
        return rows_norm(self.A, self.B)

    def mul_(self, factor: Tensor | float) -> PendingRows:
        self.A = self.A * factor
        return self

    def isfinite(self) -> Tensor:
        """0-d bool: whether every entry is finite."""
        return self.A.isfinite().all() & self.B.isfinite().all()

    def apply(self, fn) -> PendingRows:
        return PendingRows(fn(self.A), fn(self.B))

    def __getattr__(self, name: str):
        raise AttributeError(f"PendingRows has no {name!r}: {NO_TENSOR}")

    def __repr__(self) -> str:
        return f"PendingRows({len(self)} rows: {NO_TENSOR})"

    # What nn.Module.zero_grad(set_to_none=False) does to a gradient.
    def requires_grad_(self, requires_grad: bool = True) -> PendingRows:
        return self

    def zero_(self) -> PendingRows:
        self.A, self.B = self.A[:0], self.B[:0]
        return self


class GrowingWeight(nn.Parameter):
    """The ``A`` of a growing layer: an ordinary parameter [M, r_out] whose ``grad`` is :class:`PendingRows` or None.

    ``rows`` is the layer it belongs to, where an optimizer appends.
    """

    _pending: PendingRows | None = None
    rows: Rows

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

    def __reduce_ex__(self, protocol):
        return GrowingWeight, (self.detach().clone(), self.requires_grad)


class Rows(nn.Module):
    """M rows of a growing layer: ``A`` [M, r_out], ``B`` [M, r] of unit rows, ``amult`` [M] in float32 or float64.

    ``A`` and ``B`` are parameters (frozen by ``requires_grad_(False)``, moved and cast as usual; ``B`` has no gradient of
    its own). ``amult`` is kept in at least float32 whatever ``.half()`` does to the rest; what :attr:`amult` and
    ``state_dict`` give includes the decay factor.

    ``load_state_dict`` accepts any number of rows. ``state_dict`` shares memory with the rows only when no room is
    reserved behind them; else it copies, so that saving it does not save the empty room.
    """

    def __init__(self, A: Tensor, B: Tensor, amult: Tensor):
        super().__init__()
        self.A = GrowingWeight(A)
        self.B = nn.Parameter(B, requires_grad=False)
        self.set_rows(A, B, amult)

    # ------------------------------------------------------------------ the rows

    @property
    def count(self) -> int:
        """M, the number of rows."""
        return self._amult.count

    @property
    def capacity(self) -> int:
        """How many rows fit into the reserved storage."""
        return min(part.capacity for part in (self._A, self._B, self._amult))

    @property
    def amult(self) -> Tensor:
        """Row multipliers [M] with weight decay applied (a copy)."""
        return self._amult.used * self.decay

    @property
    def stored_amult(self) -> Tensor:
        """Row multipliers [M] as stored: to be multiplied by :attr:`decay`. In-place changes change the layer."""
        return self._amult.used

    @property
    def block(self) -> tuple[Tensor, Tensor, Tensor]:
        """``A`` [M, r_out], ``B`` [M, r] and ``amult`` [M] of all rows, weight decay applied."""
        return self.A.detach(), self.B.detach(), self.amult

    def set_rows(self, A: Tensor, B: Tensor, amult: Tensor, decay: float = 1.0) -> None:
        """Replace all rows; the tensors become the storage, converted where the layer's dtype or device differs.

        Raises:
            ValueError: shapes other than [M, r_out], [M, r], [M].
        """
        problem = rows_problem(A, B, amult, r=self.B.shape[1], r_out=self.A.shape[1])
        if problem:
            raise ValueError(problem)
        self._A = Reserved(A.detach().to(self.A.device, self.A.dtype))
        self._B = Reserved(B.detach().to(self.B.device, self.B.dtype))
        self._amult = Reserved(amult.detach().to(self.A.device, torch.promote_types(self.A.dtype, torch.float32)))
        self.decay = decay
        self._point()

    def to_rows_dtype(self, dtype: torch.dtype) -> None:
        """Cast ``A`` and ``B`` alone; the bias keeps its dtype."""
        A, B, amult = self.A.data, self.B.data, self.stored_amult
        self.A.data, self.B.data = A.to(dtype), B.to(dtype)
        self.set_rows(self.A.data, self.B.data, amult, self.decay)

    def reserve(self, capacity: int) -> None:
        """Reserve storage for ``capacity`` rows in all, so that appending up to there moves nothing."""
        for part in (self._A, self._B, self._amult):
            part.reserve(capacity)
            self._point()  # lets go of the old storage before the next part is copied

    @torch.no_grad()
    def append(self, A: Tensor, B: Tensor, amult: Tensor | float) -> Tensor:
        """Append k rows: A [k, r_out], B [k, r], ``amult`` a number or [k].

        Rows shorter than float32 are stored with A's largest entry in [1, 2) and the power of two that this takes moved
        into ``amult``: only the product counts, and float16 would lose the small ones.

        Returns:
            the power of two of each row [k] (1 for float32 and float64), for whoever keeps numbers per row beside these.

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
        scale = row_scale(A) if self.A.dtype.itemsize < 4 else A.new_ones(len(A))
        self._A.append(A / scale[:, None])
        self._B.append(B)
        self._amult.append(scale * (amult / self.decay))
        self._point()
        return scale

    @property
    def storages(self) -> tuple[Tensor, Tensor, Tensor]:
        """``A``, ``B`` and stored ``amult`` with the reserved room behind them, for what appends on the device itself."""
        return self._A.storage, self._B.storage, self._amult.storage

    def grown(self, count: int, decay: float) -> None:
        """Take note of rows written into :attr:`storages`: ``count`` are in use, under this decay factor."""
        for part in (self._A, self._B, self._amult):
            part.count = count
        self.decay = decay
        self._point()

    def fold_decay(self) -> None:
        """Multiply the decay factor into ``amult`` (after many steps it would otherwise underflow)."""
        self._amult.used.mul_(self.decay)
        self.decay = 1.0

    def _point(self) -> None:
        self.A.rows = self
        self.A.data, self.B.data = self._A.used, self._B.used

    # ------------------------------------------------------------------ torch's contract

    def _apply(self, fn, recurse=True):
        pending, self.A.grad = self.A.grad, None
        amult, capacity = self._amult.used, self.capacity
        super()._apply(fn, recurse)
        if not isinstance(self.A, GrowingWeight):  # torch makes a new Parameter on some conversions
            self.A = GrowingWeight(self.A.data, self.A.requires_grad)
        self.set_rows(self.A.data, self.B.data, amult, self.decay)
        self.reserve(capacity)
        if pending is not None:
            device = self.A.device
            self.A.grad = pending.apply(lambda t: t.to(device, torch.promote_types(self.A.dtype, torch.float32)))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, part in (("A", self._A), ("B", self._B)):
            if part.capacity > part.count and not keep_vars:
                destination[prefix + name] = part.used.clone()
        destination[prefix + "amult"] = self.amult

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        rows = {name: state_dict.get(prefix + name) for name in ("A", "B", "amult")}
        if any(part is None for part in rows.values()):
            missing_keys.extend(prefix + name for name, part in rows.items() if part is None and strict)
        elif problem := rows_problem(**rows, r=self.B.shape[1], r_out=self.A.shape[1], prefix=prefix):
            errors.append(problem)
        else:
            if local_metadata.get("assign_to_params_buffers", False):  # as torch: the state's dtype and device
                self.A = GrowingWeight(rows["A"].detach(), self.A.requires_grad)
                self.B = nn.Parameter(rows["B"].detach(), self.B.requires_grad)
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
        state = {k: v for k, v in self.__dict__.items() if k not in ("_A", "_B", "_amult")}
        state["_parameters"] = dict(self._parameters)
        state["_parameters"]["A"] = GrowingWeight(self._A.used.clone(), self.A.requires_grad)
        state["_parameters"]["B"] = nn.Parameter(self._B.used.clone(), requires_grad=self.B.requires_grad)
        return {**state, "_amult": self._amult.used.clone()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        amult = state.pop("_amult")
        super().__setstate__(state)
        self.set_rows(self.A.data, self.B.data, amult, self.decay)


def rows_norm(A: Tensor, B: Tensor) -> Tensor:
    """Norm of rows in function space, ``|Δ|² = Σ_ij (a_i . a_j) K(b_i, b_j)`` with K the zero-mean ReLU kernel; 0-d."""
    return ((A @ A.T) * relu_kernel(B, B)).sum().clamp(min=0).sqrt()


def row_scale(A: Tensor) -> Tensor:
    """The power of two per row [k] that brings the largest entry of each row of A [k, r_out] into [1, 2)."""
    largest = A.abs().amax(1)
    exponent = torch.frexp(largest).exponent - 1
    usable = (largest > 0) & largest.isfinite()
    return torch.ldexp(torch.ones_like(largest), torch.where(usable, exponent, 0))


def rows_problem(A: Tensor, B: Tensor, amult: Tensor, r: int, r_out: int, prefix: str = "") -> str | None:
    """What is wrong with these as the rows of a layer from rank ``r`` to ``r_out``, in words; None if nothing is."""
    shapes = f"{prefix}A {list(A.shape)}, {prefix}B {list(B.shape)}, {prefix}amult {list(amult.shape)}"
    wanted = f"[M, {r_out}], [M, {r}], [M] with one M of at least 1"
    fits = A.ndim == B.ndim == 2 and A.shape[1] == r_out and B.shape[1] == r and amult.ndim == 1
    if not fits or not len(A) == len(B) == len(amult) > 0:
        return f"rows have shapes {shapes}; they must be {wanted}"
    return None
