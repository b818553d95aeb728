"""The rows of a growing layer as a module of torch's: they grow, are moved, cast and shared, saved and loaded."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pizoo import processes
from pizoo.memory import to_host
from pizoo.rows.dtypes import check_rows_dtype, converted, directed, scaled
from pizoo.rows.parameters import GrowingWeight, RowsParameter
from pizoo.rows.storage import WHOLE, Place, Reserved, Share, check_place


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
