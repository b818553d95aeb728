"""The growing layer's forward and backward: one function that picks the implementation.

``reference`` says what is computed; ``blocked`` (plain torch, little memory) and ``triton`` (fused, CUDA) compute the
same, and ``streamed`` hands them rows that stay in host memory. The choice follows device, dtype and shape.
Everything computed here is a sum over rows: where processes hold a share of them each (``shared``), what each has computed is
summed over all processes, which must see the same ``gbar`` and ``delta``, and all have the result.
``PIZOO_OPS=reference|blocked|triton`` forces one for a process, :func:`use` for a block of code.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from pizoo import processes

__all__ = ["fused", "growing_backward", "growing_forward", "growing_forward_jacobian", "use"]

IMPLEMENTATIONS = ("reference", "blocked", "triton")

# A plain global, not a context variable: autograd calls backward passes from threads of its own.
_forced: str | None = os.environ.get("PIZOO_OPS") or None
_failed = False


def growing_forward(
    gbar: Tensor,
    A: Tensor,
    B: Tensor,
    amult: Tensor,
    count: Tensor | None = None,
    bmult: Tensor | None = None,
    shared: bool = False,
) -> Tensor:
    """``F00(gbar Bᵀ) (amult A)``, [b, r_out]; see :func:`pizoo.ops.reference.growing_forward`."""
    return _run("growing_forward", shared, gbar, A, B, amult, count=count, bmult=bmult)


def growing_backward(
    gbar: Tensor,
    A: Tensor,
    B: Tensor,
    amult: Tensor,
    delta: Tensor,
    count: Tensor | None = None,
    bmult: Tensor | None = None,
    shared: bool = False,
) -> Tensor:
    """Gradient at the layer's input, [b, r]; see :func:`pizoo.ops.reference.growing_backward`."""
    if delta.shape != (len(gbar), A.shape[-1]):
        raise ValueError(f"delta has shape {tuple(delta.shape)}; it must be [b, r_out] = {(len(gbar), A.shape[-1])}")
    return _run("growing_backward", shared, gbar, A, B, amult, delta, count=count, bmult=bmult)


def growing_forward_jacobian(
    gbar: Tensor,
    A: Tensor,
    B: Tensor,
    amult: Tensor,
    count: Tensor | None = None,
    bmult: Tensor | None = None,
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output [b, r_out] and Jacobian [b, r_out, r] in one pass over the rows, for narrow layers (a read-out).

    See :func:`pizoo.ops.reference.growing_forward_jacobian`.
    """
    return _run("growing_forward_jacobian", shared, gbar, A, B, amult, count=count, bmult=bmult)


@contextmanager
def use(implementation: str | None) -> Iterator[None]:
    """Within this context every op runs the named implementation; ``None`` returns to the automatic choice.

    Raises:
        ValueError: a name that is not one of ``reference``, ``blocked``, ``triton``.
    """
    global _forced
    before, _forced = _forced, _check_name(implementation)
    try:
        yield
    finally:
        _forced = before


def fused(b: int, A: Tensor, B: Tensor, op: str = "growing_forward") -> bool:
    """Whether ``op`` on b samples runs as a fused kernel, which reads ``count`` on the device; of rows A [M, r_out], B [M, r],
    M may be 0."""
    can = _check_name(_forced) is None and A.is_cuda and not _failed and _fused(A.device)
    return can and _module("triton").supports(op, b, A, B)


def _run(op: str, shared: bool, gbar: Tensor, *rows: Tensor, **options: Tensor | None):
    found = _run_here(op, gbar, *rows, **options)
    if not shared:
        return found
    return processes.summed(*found) if isinstance(found, tuple) else processes.summed(found)[0]


def _run_here(op: str, gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, *delta: Tensor, **options: Tensor | None):
    """``op`` on the rows of this process."""
    _check_rows(gbar, A, B, amult, options["bmult"])
    forced = _check_name(_forced)
    if A.device.type == "cpu" and gbar.device.type != "cpu":
        return getattr(_module("streamed"), op)(gbar, A, B, amult, *delta, **options)
    if len(A) and fused(len(gbar), A, B, op):  # a share of few rows may be none
        try:
            return getattr(_module("triton"), op)(gbar, A, B, amult, *delta, **options)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # whatever keeps a kernel from being compiled: no compiler, too small a GPU
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                # The capture is lost, and says nothing about the kernel.
                error.add_note(
                    "Call the op once before capturing it: kernels are compiled and loaded by their first call."
                )
                raise
            _fall_back(f"{type(error).__name__}: {error}")
    return getattr(_module(forced or "blocked"), op)(gbar, A, B, amult, *delta, **options)


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


@cache
def _fused(device: torch.device) -> bool:
    """Whether fused kernels run on a CUDA device."""
    try:
        reason = _module("triton").unavailable(device)
    except ImportError as error:
        reason = str(error)
    if reason:
        _fall_back(reason)
    return not reason


def _fall_back(reason: str) -> None:
    """Turn the fused kernels off for this process, with a warning the first time."""
    global _failed
    if not _failed:
        warnings.warn(f"no fused kernels, plain torch runs instead: {reason}", RuntimeWarning, stacklevel=5)
    _failed = True


def _check_name(implementation: str | None) -> str | None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation (or PIZOO_OPS) is {implementation!r}; it must be one of {IMPLEMENTATIONS}")
    return implementation


def _check_rows(gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, bmult: Tensor | None) -> None:
    shapes = [tuple(part.shape) for part in (gbar, A, B, amult)]
    fit = [len(shape) for shape in shapes] == [2, 2, 2, 1] and shapes[0][1] == shapes[2][1]
    if not (fit and shapes[1][0] == shapes[2][0] == shapes[3][0] and A.dtype == B.dtype):
        raise ValueError(
            f"gbar, A, B, amult have shapes {shapes} and rows {A.dtype}, {B.dtype}; "
            "they must be [b, r], [M, r_out], [M, r], [M], and the rows of one dtype"
        )
    found = None if bmult is None else tuple(bmult.shape)
    if found != (wanted := shapes[3] if B.dtype == torch.int8 else None):
        raise ValueError(
            f"bmult is {found and f'of shape {found}'}; with rows {B.dtype} {shapes[2]} it must be {wanted}"
        )
