"""The growing layer's ops against their definition, over shapes, dtypes and scales.

Errors are relative Frobenius errors against the reference in float64 on the same rounded inputs. The fused kernels run
natively where there is a CUDA device, else in Triton's interpreter, in a process of its own: it must be chosen before
Triton is imported for the first time.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import runpy
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy
import pytest
import torch
from packaging.version import Version

from pizoo import ops
from pizoo.functional import unit
from pizoo.nn import InfPiLinear
from pizoo.ops import batched, blocked, eight_bit, hopper, jacobian, nvrtc, reference
from pizoo.rows import converted

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
OPS = ("growing_forward", "growing_backward", "growing_forward_jacobian")
# Coefficients are rounded to the rows' dtype (for int8 to float16), sums are float32.
TOLERANCE = {
    torch.int8: 2e-3,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
    torch.float32: 1e-5,
    torch.float64: 1e-12,
}


SHARED = 232_448  # bytes of shared memory that a program gets on an H100 or H200


class Case(NamedTuple):
    """Shapes, dtype and scales of one comparison."""

    M: int
    r: int
    r_out: int
    b: int
    dtype: torch.dtype = torch.float16
    amult: float = 1.0
    A: float = 1.0
    unused: int = 0  # rows of capacity beyond those in use, filled with NaN (of int8 rows: the multipliers)
    stride: int = 0  # columns in memory, at least r_out


def rows(case: Case, device: torch.device = DEVICE, seed: int = 0) -> tuple:
    """Random gbar, A, B, amult, delta, count and bmult of a case."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    capacity, short = case.M + case.unused, torch.promote_types(case.dtype, torch.float32)
    gbar = unit(normal(case.b, case.r).to(short))[0]
    A = normal(capacity, max(case.stride, case.r_out)) * case.A
    B = unit(normal(capacity, case.r))[0]
    amult = (normal(capacity) * case.amult).to(short)
    A, B, amult, *bmult = converted(A, B, amult, case.dtype)
    for part in (A, B, amult, *bmult):
        part[case.M :] = torch.nan if part.is_floating_point() else 127
    A[:, case.r_out :] = torch.nan if A.is_floating_point() else 127
    count = torch.tensor([case.M], device=device) if case.unused else None
    bmult = bmult[0] if bmult else None
    return gbar, A[:, : case.r_out], B, amult, normal(case.b, case.r_out).to(short), count, bmult


def call(module, op: str, gbar, A, B, amult, delta, count, bmult) -> tuple[torch.Tensor, ...]:
    inputs = (gbar, A, B, amult, delta) if op == "growing_backward" else (gbar, A, B, amult)
    result = getattr(module, op)(*inputs, count=count, bmult=bmult)
    return result if isinstance(result, tuple) else (result,)


def expected(op: str, gbar, A, B, amult, delta, count, bmult) -> tuple[torch.Tensor, ...]:
    gbar, A, B, amult, delta = (part.double() for part in (gbar, A, B, amult, delta))
    return call(reference, op, gbar, A, B, amult, delta, count, None if bmult is None else bmult.double())


def error(result: tuple[torch.Tensor, ...], op: str, gbar, A, B, amult, delta, count, bmult) -> float:
    """Largest relative error; infinite if anything is not finite.

    A result whose terms cancel by chance is measured against what terms of that size add up to as a rule.
    """
    errors = []
    exact = expected(op, gbar, A, B, amult, delta, count, bmult)
    sizes = expected(op, gbar, A.abs(), B, amult.abs(), delta.abs(), count, bmult)
    for x, y, size in zip(result, exact, sizes, strict=True):
        scale = torch.maximum(y.norm(), size.norm() / (len(A) * A.shape[1]) ** 0.5).clamp(min=1e-30)
        errors.append(float((x.double() - y).norm() / scale))
    return max(errors) if all(e == e for e in errors) else float("inf")


def ops_of(module, gbar, A, B, *_) -> list[str]:
    """What a module covers; the Jacobian is for few outputs, and its fused kernel for GPUs."""
    supports = getattr(module, "supports", lambda op, b, A, B: op != OPS[2] or A.shape[1] <= 16)
    return [op for op in OPS if supports(op, len(gbar), A, B)]


def errors_of(module, case: Case) -> dict[str, float]:
    inputs = rows(case)
    return {op: error(call(module, op, *inputs), op, *inputs) for op in ops_of(module, *inputs)}


def fused_errors(case: Case) -> dict[str, float]:
    from pizoo.ops import triton

    return errors_of(triton, case)


def fused_met_again(r: int, r_out: int) -> float:
    """Error where samples meet their own row (q = 1), its opposite (q = -1) and orthogonal ones."""
    from pizoo.ops import triton

    eye = torch.eye(r, device=DEVICE)
    torch.manual_seed(0)
    A, amult, delta = (torch.randn(*shape, device=DEVICE) for shape in ((2 * r, r_out), (2 * r,), (r, r_out)))
    errors = []
    for dtype in (torch.float16, torch.int8):
        A_met, B, multipliers, *bmult = converted(A, torch.cat([eye, -eye]), amult, dtype)
        inputs = (eye, A_met, B, multipliers, delta, None, bmult[0] if bmult else None)
        errors += [error(call(triton, op, *inputs), op, *inputs) for op in ops_of(triton, *inputs)]
    return max(errors)


def fused_beside_zeros(dtype: torch.dtype) -> float:
    """Error where rows far smaller than 1 stand beside rows of zeros, of as large a learning rate."""
    from pizoo.ops import triton

    layer = InfPiLinear(48, 16, bias_alpha=0.0, role="readout")
    layer.to_rows_dtype(dtype)
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(64, n, generator=generator) for n in (16, 48))
    A *= 1e-6
    A[::16] = 0
    layer.set_rows(*(part[:1] for part in (layer.A.data, layer.B.data)), torch.zeros(1))
    layer.append(A, unit(B)[0], -1.0)
    layer.to(DEVICE)
    gbar, delta = unit(torch.randn(8, 48, device=DEVICE))[0], torch.randn(8, 16, device=DEVICE)
    inputs = (gbar, layer.A.data, layer.B.data, layer.stored_amult, delta, None, layer.bmult)
    return max(error(call(triton, op, *inputs), op, *inputs) for op in OPS[:2])


def fused_is_deterministic(case: Case) -> bool:
    from pizoo.ops import triton

    inputs = rows(case)
    return all(
        torch.equal(x, y)
        for op in ops_of(triton, *inputs)
        for x, y in zip(call(triton, op, *inputs), call(triton, op, *inputs), strict=True)
    )


@pytest.fixture(scope="module")
def fused():
    """Call a function of this module where the fused kernels run."""
    if CUDA:
        yield lambda function, *args: function(*args)
        return
    triton = pytest.importorskip("triton")
    if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        pytest.skip("Triton 3.6 interprets nothing on NumPy 2.4: it converts arrays of one element to Python numbers")
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(os.getpid).result()
        os.environ.pop("TRITON_INTERPRET") if before is None else os.environ.update(TRITON_INTERPRET=before)
        yield lambda function, *args: pool.submit(function, *args).result()


half, single, brain, byte = torch.float16, torch.float32, torch.bfloat16, torch.int8
# Pairwise over r, r_out, batch, M and dtype; scales, unused capacity and padding spread over them.
CASES = [
    Case(1, 400, 400, 8, half),
    Case(63, 401, 10, 1, half, stride=16),
    Case(64, 7, 250, 80, half, amult=1e-6),
    Case(65, 200, 1, 33, half, A=1e-6),
    Case(4097, 100, 400, 16, half, amult=4.0),
    Case(1, 1, 10, 16, half),
    Case(63, 400, 250, 8, half, amult=1e-6, A=1e-6, unused=70),
    Case(64, 200, 400, 80, half, unused=1),
    Case(65, 401, 250, 33, half, amult=4.0),
    Case(4097, 400, 10, 8, half, A=1e-6, unused=3, stride=16),
    Case(64, 100, 10, 1, half, amult=1e-6, A=1e-6),
    Case(65, 1, 1, 8, half, unused=64),
    Case(63, 7, 1, 16, half, amult=4.0, A=1e-6),
    Case(1, 400, 10, 8, single),
    Case(63, 400, 400, 16, single, unused=1),
    Case(64, 401, 400, 33, single, A=1e-6),
    Case(65, 7, 10, 80, single, amult=1e-6, stride=16),
    Case(4097, 1, 250, 1, single),
    Case(64, 200, 250, 8, single, unused=66),
    Case(65, 100, 1, 8, single, amult=4.0),
    Case(1, 400, 400, 8, byte),
    Case(63, 401, 10, 1, byte, A=1e-6, stride=16),
    Case(64, 7, 250, 33, byte, amult=1e-6, A=1e-6),
    Case(65, 100, 250, 80, byte, amult=4.0, unused=1),
    Case(513, 100, 10, 16, byte, unused=66),
    Case(63, 1, 1, 8, byte, amult=1e-6, unused=3),
]
GRID = [
    Case(M, r, r_out, b, dtype, unused=M % 3)
    for i, M in enumerate((1, 63, 64, 65, 4097))
    for j, r in enumerate((1, 7, 100, 200, 400, 401))
    for k, r_out in enumerate((1, 10, 250, 400))
    for l, b in enumerate((1, 8, 16, 33, 80))
    for n, dtype in enumerate((half, brain, single, byte))
    if (i + 2 * j + 4 * k + 5 * l + 7 * n) % 9 == 0
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_ops_match_the_definition(fused, case):
    assert max(fused(fused_errors, case).values()) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("dtype", [half, byte], ids=str)
def test_rows_of_zeros_do_not_drown_those_beside_them(fused, dtype):
    assert fused(fused_beside_zeros, dtype) <= TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("r", [1, 7, 100, 200, 400, 401])
def test_fused_ops_match_the_definition_on_the_grid(r):
    for case in GRID:
        if case.r == r:
            assert max(fused_errors(case).values()) <= TOLERANCE[case.dtype], case


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("r", [8, 64, 200, 400, 408])
def test_fused_jacobian_matches_the_definition_on_the_grid(r):
    from pizoo.ops import triton

    checked = 0
    for r_out, b, M, dtype in itertools.product((1, 2, 7, 10), (1, 8, 9, 16), (1, 64, 65, 30_000), (half, brain, byte)):
        inputs = rows(Case(M, r, r_out, b, dtype, amult=4.0, unused=M % 3))
        if triton.supports(OPS[2], b, *inputs[1:3]):
            worst = error(call(triton, OPS[2], *inputs), OPS[2], *inputs)
            assert worst <= TOLERANCE[dtype], (r_out, b, M, dtype)
            checked += 1
    assert checked or torch.cuda.get_device_capability() < (9, 0)


@pytest.mark.parametrize("shape", [(400, 10), (408, 10), (64, 10), (8, 1), (512, 8), (448, 10), (200, 7)], ids=str)
def test_the_jacobian_kernel_compiles_and_keeps_its_sums_in_registers(shape):
    pytest.importorskip("cuda.bindings.nvrtc", reason="comes with PyTorch for CUDA")
    r, r_out = shape
    for dtype in (half, brain, byte) if 128 < r <= 448 else (half, brain):
        constants = jacobian.constants_of(r, r_out, r_out + r_out % 2, dtype, SHARED)
        code, log = nvrtc.compile_source("jacobian.cu", constants, (9, 0), jacobian.headers(r_out, dtype))
        assert code.startswith(b"\x7fELF")
        assert "0 bytes spill stores, 0 bytes spill loads" in log, log
        assert "wgmma.mma_async instructions are serialized" not in log, log


def lying(A: torch.Tensor, B: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The same rows, as they may lie in memory."""

    def beside(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view(rows.shape)

    padded = torch.nn.functional.pad(A, (0, 16 - A.shape[1])), torch.nn.functional.pad(B, (0, 1))
    return {
        "one after the other": (A, B),
        "padded": (padded[0][:, : A.shape[1]], padded[1][:, : B.shape[1]]),
        "columns first": (A.T.contiguous().T, B.T.contiguous().T),
        "at odd places": (beside(A), beside(B)),
    }


@pytest.mark.parametrize("shape", [(1, 10), (5, 10), (5, 7), (5, 1)], ids=str)
def test_the_jacobian_kernel_finds_rows_aligned_however_they_lie(shape):
    M, r_out = shape
    for dtype in (half, byte):
        wanted_A, wanted_B = (torch.randn(M, n).mul(40).to(dtype) for n in (r_out, 16))
        for name, found in lying(wanted_A, wanted_B).items():
            A, B = jacobian.aligned(*found)
            assert torch.equal(A[:, :r_out], wanted_A) and torch.equal(B, wanted_B), name
            assert A.stride(1) == 1 and A.data_ptr() % (4 if dtype == half else 16) == 0, name
            assert M == 1 or (A.stride(0) % 2 == 0 if dtype == half else A.stride(0) == r_out + r_out % 2), name
            assert hopper.fetchable(B) if dtype == half else B.is_contiguous() and B.data_ptr() % 16 == 0, name


def test_the_jacobian_kernel_takes_rows_of_8_bits_where_they_lie_without_gaps():
    """Their number of columns need not be a multiple of 16: a copy of all rows at every step would go unnoticed."""
    for r in (132, 200, 392, 400):
        A, B = torch.zeros(64, 10, dtype=byte), torch.zeros(64, r, dtype=byte)
        assert all(found is rows for found, rows in zip(jacobian.aligned(A, B), (A, B), strict=True)), r
    for single in (torch.zeros(10, 5, dtype=byte).T[:1], torch.zeros(5, 400, dtype=byte)[:1, :10]):
        A, _ = jacobian.aligned(single, B[:1])
        assert dict(jacobian.constants_of(400, 10, A.stride(0), byte, SHARED))["STRIDE_A"] == 10


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(700, 10, 8), (700, 7, 8), (700, 400, 80)], ids=str)
def test_fused_ops_take_rows_however_they_lie_and_any_integer_for_the_number_in_use(shape):
    from pizoo.ops import triton

    M, r_out, b = shape
    gbar, A, B, amult, delta, *_ = rows(Case(M, 400, r_out, b))
    count = torch.tensor([M - 70], device=DEVICE)
    for name, stored in lying(A, B).items() if r_out <= 16 else {"columns first": (A.T.contiguous().T, B)}.items():
        for kind in (torch.int64, torch.int32):
            inputs = (gbar, *stored, amult, delta, count.to(kind), None)
            for op in ops_of(triton, *inputs):
                assert error(call(triton, op, *inputs), op, *inputs) <= TOLERANCE[half], (name, kind, op)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("b", [8, 80])
def test_fused_ops_run_in_a_thread_that_has_not_used_the_gpu(b):
    from pizoo.ops import triton

    inputs = rows(Case(700, 400, 10, b, stride=16))
    for op in ops_of(triton, *inputs):
        here = call(triton, op, *inputs)  # leaves memory behind, so that the thread need not ask the driver for any
        with ThreadPoolExecutor(1) as pool:
            there = pool.submit(call, triton, op, *inputs).result()
        assert all(torch.equal(x, y) for x, y in zip(here, there, strict=True)), op


def test_kernels_in_cuda_are_for_where_bindings_compiler_and_driver_are(monkeypatch):
    bindings = pytest.importorskip("cuda.bindings", reason="comes with PyTorch for CUDA")
    from cuda.bindings import driver
    from cuda.bindings import nvrtc as compiler

    def available(compiler_version=13, driver_version=13_000) -> bool:
        monkeypatch.setattr(compiler, "nvrtcVersion", lambda: (0, compiler_version, 2))
        monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (0, driver_version))
        return nvrtc.available.__wrapped__()

    def missing(*_):
        raise RuntimeError("no such library")

    monkeypatch.setattr(sys, "platform", "linux")
    assert available() and available(12, 13_000)
    assert not available(11, 13_000), "a compiler that does not know Hopper"
    assert not available(13, 12_090), "a driver older than the code"
    monkeypatch.setattr(driver, "cuDriverGetVersion", missing)
    assert not nvrtc.available.__wrapped__()
    monkeypatch.setitem(sys.modules, bindings.__name__, None)
    assert not nvrtc.available.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "win32")
    assert not nvrtc.available.__wrapped__()


EIGHT_BIT = [
    (8, 400, 400, 400),
    (8, 400, 10, 12),
    (1, 4, 4, 4),
    (16, 200, 250, 252),
    (8, 408, 400, 400),
    (32, 400, 400, 400),
]


@pytest.mark.parametrize("shape", EIGHT_BIT, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_kernel_for_rows_of_8_bits_compiles_and_keeps_its_sums_in_registers(shape, backward):
    pytest.importorskip("cuda.bindings.nvrtc", reason="comes with PyTorch for CUDA")
    b, r, r_out, stride = shape
    constants = eight_bit.constants_of(b, r, r_out, stride, r, backward, r + 4 if backward else r_out, SHARED)
    code, log = nvrtc.compile_source("eight_bit.cu", constants, (9, 0))
    assert code.startswith(b"\x7fELF")
    assert "0 bytes spill stores, 0 bytes spill loads" in log, log


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(400, 400), (400, 12), (200, 252), (100, 4), (8, 64), (256, 512)], ids=str)
def test_the_kernel_for_rows_of_8_bits_matches_the_definition_on_the_grid(shape):
    from pizoo.ops import triton

    r, r_out = shape
    for b, M, scale in itertools.product((1, 8, 9, 16, 25), (1, 15, 16, 17, 4097, 30_001), (1e-6, 4.0)):
        for columns in (r_out, r_out - 2):  # the last ones stand in memory, but not in the layer
            case = Case(M, r, columns, b, byte, amult=scale, A=1 / scale, unused=M % 3, stride=r_out)
            inputs = rows(case)
            for op in OPS[:2]:
                if hopper.present(DEVICE) and r_out <= 1.25 * columns:
                    assert eight_bit.supports(b, *inputs[1:3], op == OPS[1])
                assert error(call(triton, op, *inputs), op, *inputs) <= TOLERANCE[byte], (case, op)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_gradient_that_is_not_finite_stays_visible_in_rows_of_8_bits():
    from pizoo.ops import triton

    gbar, A, B, amult, delta, count, bmult = rows(Case(300, 400, 400, 8, byte))
    for bad in (torch.nan, torch.inf):
        delta[2, 5] = bad
        result = triton.growing_backward(gbar, A, B, amult, delta, count, bmult)
        assert result.isfinite().all(1).tolist() == [i != 2 for i in range(8)]


BATCHES = [(80, 400, 400, half), (80, 384, 384, half), (80, 400, 400, brain), (80, 100, 1, half), (17, 100, 400, half)]
BATCHES += [(16, 200, 250, half), (9, 400, 10, half)]


@pytest.mark.parametrize("shape", BATCHES, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_kernel_for_batches_compiles_and_keeps_its_sums_in_registers(shape, backward):
    pytest.importorskip("cuda.bindings.nvrtc", reason="comes with PyTorch for CUDA")
    b, r, r_out, dtype = shape
    constants = batched.constants_of(b, r, r_out, backward, r + 4 if backward else r_out, dtype, SHARED)
    header = hopper.headers((dict(constants)["SAMPLES"],), dtype)
    code, log = nvrtc.compile_source("batched.cu", constants, (9, 0), header)
    assert code.startswith(b"\x7fELF")
    assert "0 bytes spill stores, 0 bytes spill loads" in log, log
    assert "wgmma.mma_async instructions are serialized" not in log, log


def test_batches_go_to_the_kernel_for_them_where_it_can_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(nvrtc, "available", lambda: True)
    monkeypatch.setattr(hopper, "properties", lambda device: SimpleNamespace(shared_memory_per_block_optin=SHARED))

    def supports(b=80, r=400, r_out=400, dtype=half, stride=None, backward=True, offset=0) -> bool:
        memory = torch.zeros(64 * 600, dtype=dtype)[offset:]
        A, B = (memory.as_strided((64, n), (stride or -(-n // 8) * 8, 1)).as_subclass(LikeOnAGpu) for n in (r_out, r))
        return batched.supports(b, A, B, backward)

    assert supports() and supports(dtype=brain) and supports(9) and supports(160) and supports(r=7, r_out=1)
    assert not supports(8), "Triton keeps up with few samples"
    assert not supports(dtype=byte) and not supports(dtype=single)
    assert not supports(stride=401) and not supports(offset=4), "rows must start at multiples of 16 bytes"
    assert not supports(r_out=500, backward=False) and not supports(r=512), "sums or inputs do not fit"
    for capability in ((8, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert not supports()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU")
@pytest.mark.parametrize("b", [9, 16, 17, 33, 40, 64, 65, 80, 96])
@pytest.mark.parametrize("shape", [(400, 400), (200, 250), (200, 400), (400, 10)], ids=str)
def test_the_kernel_for_batches_matches_the_definition_on_the_grid(b, shape, monkeypatch):
    from pizoo.ops import triton

    calls, partial_sums = [], batched.partial_sums
    monkeypatch.setattr(batched, "partial_sums", lambda *args: calls.append(b) or partial_sums(*args))
    r, r_out = shape
    scales = ((1.0, 1.0), (1e-6, 1e-6), (4.0, 1.0))
    for M, unused, dtype, (amult, A) in itertools.product((1, 63, 64, 65, 4097), (0, 70), (half, brain), scales):
        inputs = rows(Case(M, r, r_out, b, dtype, amult, A, unused, stride=-(-r_out // 16) * 16))
        for op in OPS[:2]:
            result = call(triton, op, *inputs)
            assert error(result, op, *inputs) <= TOLERANCE[dtype], (M, unused, dtype, amult, A, op)
            assert torch.equal(result[0], call(triton, op, *inputs)[0])
    assert len(calls) == 5 * 2 * 2 * 3 * 4


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e-6, 1.0), (4.0, 1.0), (1.0, 1e-6), (1e-6, 1e-6)])
@pytest.mark.parametrize("r_out", [10, 400])
@pytest.mark.parametrize("dtype", [half, byte], ids=str)
def test_a_million_short_rows(dtype, r_out, scales):
    from pizoo.ops import triton

    amult, A = scales
    inputs = rows(Case(1_000_000, 400, r_out, 8, dtype, amult=amult, A=A, unused=100, stride=-(-r_out // 16) * 16))
    gbar, *stored, delta, _, bmult = inputs
    for op in ops_of(triton, *inputs):
        blocks = zip(*(part[:1_000_000].split(100_000) for part in stored), strict=True)
        bmults = [None] * 10 if bmult is None else bmult[:1_000_000].split(100_000)
        sums = [expected(op, gbar, *block, delta, None, b) for block, b in zip(blocks, bmults, strict=True)]
        for x, parts in zip(call(triton, op, *inputs), zip(*sums, strict=True), strict=True):
            exact = torch.stack(parts).sum(0)
            assert (x - exact).norm() <= 1e-3 * exact.norm()


def test_gradients_are_finite_where_a_sample_meets_its_own_row(fused):
    assert fused(fused_met_again, 16, 10) <= TOLERANCE[half]


def test_fused_ops_are_deterministic(fused):
    assert fused(fused_is_deterministic, Case(300, 40, 10, 8))


@pytest.mark.parametrize("dtype", [byte, half, brain, single, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (33000, 20, 10, 8), (8192, 7, 3, 33)], ids=str)
def test_blocked_ops_match_the_definition(shape, dtype):
    errors = errors_of(blocked, Case(*shape, dtype, unused=5, stride=16))
    assert max(errors.values()) <= TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory from /proc")
def test_on_a_cpu_the_default_op_takes_no_longer_than_the_reference_and_a_block_of_memory():
    cpu = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "cpu.py"))
    M, columns, b = 50_000, 400, 8
    for dtype, op in itertools.product((single, half), ("forward", "backward")):
        times = cpu["seconds"](op, cpu["layer"](M, columns, b, dtype))
        assert times["default"] <= 1.1 * times["reference"], (dtype, op, times)  # idle: 0.1 to 0.8
    block = blocked.CPU_BLOCK * (columns + cpu["RANK"]) * 4
    assert cpu["grown_bytes"]("forward", "default", M, columns, b, half) <= 2 * block < M * (columns + cpu["RANK"]) * 4


@pytest.mark.parametrize("module", [reference, blocked])
def test_backward_is_the_gradient_of_forward(module):
    _, A, B, amult, delta, *_ = rows(Case(50, 5, 3, 4, torch.float64), torch.device("cpu"))
    g = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    gbar, norm = unit(g)
    for bmult in (None, torch.rand(50, dtype=torch.float64)):
        g.grad = None
        (norm * reference.growing_forward(gbar, A, B, amult, bmult=bmult)).backward(delta, retain_graph=True)
        torch.testing.assert_close(module.growing_backward(gbar.detach(), A, B, amult, delta, bmult=bmult), g.grad)


@pytest.mark.parametrize("module", [reference, blocked])
def test_jacobian_contracted_with_delta_is_backward(module):
    gbar, A, B, amult, delta, *_ = rows(Case(50, 5, 3, 4, torch.float64), torch.device("cpu"))
    for bmult in (None, torch.rand(50, dtype=torch.float64)):
        out, jacobian = module.growing_forward_jacobian(gbar, A, B, amult, bmult=bmult)
        torch.testing.assert_close(out, reference.growing_forward(gbar, A, B, amult, bmult=bmult))
        expected = reference.growing_backward(gbar, A, B, amult, delta, bmult=bmult)
        torch.testing.assert_close(torch.einsum("bo,bor->br", delta, jacobian), expected)


def test_use_forces_an_implementation(monkeypatch):
    inputs = rows(Case(20, 5, 3, 4, single), torch.device("cpu"))[:4]
    monkeypatch.setattr(reference, "growing_forward", lambda *args, **kwargs: "reference")
    with ops.use("reference"):
        assert ops.growing_forward(*inputs) == "reference"
        with ops.use(None):
            assert ops.growing_forward(*inputs) is not None
    with pytest.raises(ValueError, match="must be one of"), ops.use("cuda"):
        pass


def test_without_kernels_plain_torch_runs_after_one_warning(monkeypatch):
    from pizoo.ops import triton

    monkeypatch.setattr(ops, "_failed", False)
    monkeypatch.setattr(triton, "unavailable", lambda device: "no GPU")
    ops._fused.cache_clear()
    with pytest.warns(RuntimeWarning, match="plain torch runs instead: no GPU") as warned:
        assert not ops._fused(torch.device("cuda", 0)) and not ops._fused(torch.device("cuda", 1))
    assert len(warned) == 1
    ops._fused.cache_clear()


class LikeOnAGpu(torch.Tensor):
    """A CPU tensor that is taken for one on a GPU when an implementation is chosen."""

    is_cuda = property(lambda self: True)


def old_gpu(monkeypatch):
    from pizoo.ops import triton

    unavailable = triton.unavailable
    monkeypatch.setattr(triton, "unavailable", lambda device: unavailable(torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")


def no_triton(monkeypatch):
    monkeypatch.delitem(sys.modules, "pizoo.ops.triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)  # what an import of a missing module finds


def no_compiler(monkeypatch):
    from pizoo.ops import triton

    monkeypatch.setattr(triton, "unavailable", lambda device: None)  # and then the launch fails: there is no driver


@pytest.mark.parametrize(
    ("hinder", "reason"),
    [
        (lambda monkeypatch: None, "is not an NVIDIA GPU in reach"),
        (old_gpu, "Tesla T4 is older than compute capability 8.0"),
        (no_triton, "triton"),
        (no_compiler, "Error: "),
    ],
    ids=["no GPU", "old GPU", "no Triton", "Triton fails to compile"],
)
def test_whatever_keeps_kernels_from_running_is_one_warning_and_the_same_results(monkeypatch, hinder, reason):
    pytest.importorskip("triton")
    monkeypatch.setattr(ops, "_failed", False)
    inputs = rows(Case(200, 5, 3, 4, half, unused=7), torch.device("cpu"))
    like_on_a_gpu = [part if part is None else part.as_subclass(LikeOnAGpu) for part in inputs]
    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning) as warned:
        ops._module.cache_clear(), ops._fused.cache_clear()
        hinder(patch)
        results = {op: call(ops, op, *like_on_a_gpu) for _ in range(2) for op in OPS}
    ops._module.cache_clear(), ops._fused.cache_clear()
    (warning,) = warned
    assert re.search(f"no fused kernels, plain torch runs instead: .*{reason}", str(warning.message))
    for op, result in results.items():
        assert error(result, op, *inputs) <= TOLERANCE[single]
        assert all(torch.equal(x, y) for x, y in zip(result, call(blocked, op, *inputs), strict=True))


def test_a_kernel_that_fails_while_a_graph_is_captured_is_not_given_up(monkeypatch):
    triton = pytest.importorskip("pizoo.ops.triton")

    def unloadable(*args, **kwargs):
        raise RuntimeError("not while a graph is captured")

    gbar, A, B, amult, *_ = rows(Case(20, 5, 3, 4, half), torch.device("cpu"))
    monkeypatch.setattr(ops, "_failed", False)
    monkeypatch.setattr(triton, "growing_forward", unloadable)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(ops, "_fused", lambda device: True)
    with pytest.raises(RuntimeError, match="not while") as raised:
        ops.growing_forward(gbar, A.as_subclass(LikeOnAGpu), B, amult)
    assert "once before capturing" in raised.value.__notes__[0] and not ops._failed


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_kernel_that_does_not_compile_is_replaced(monkeypatch):
    from pizoo.ops import triton

    def broken(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(ops, "_failed", False)
    monkeypatch.setattr(triton, "growing_forward", broken)
    gbar, A, B, amult, *_ = rows(Case(20, 5, 3, 4, single))
    with pytest.warns(RuntimeWarning, match="no compiler"):
        out = ops.growing_forward(gbar, A, B, amult)
    torch.testing.assert_close(out, reference.growing_forward(gbar, A, B, amult))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_captured_launch_serves_a_growing_layer():
    gbar, A, B, amult, delta, *_ = rows(Case(5000, 100, 50, 8))
    count = torch.tensor([700], device=DEVICE)
    ops.growing_backward(gbar, A, B, amult, delta, count)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = ops.growing_backward(gbar, A, B, amult, delta, count)
    for rows_in_use in (700, 5000, 1):
        count.fill_(rows_in_use)
        graph.replay()
        assert error((result,), "growing_backward", gbar, A, B, amult, delta, count, None) <= TOLERANCE[half]


@pytest.mark.parametrize("wrong", ["B", "delta"])
def test_wrong_shapes_are_named(wrong):
    gbar, A, B, amult, delta, *_ = rows(Case(20, 5, 3, 4, single), torch.device("cpu"))
    if wrong == "B":
        B = B[:, 1:]
    else:
        delta = delta[:, 1:]
    with pytest.raises(ValueError, match=wrong):
        ops.growing_backward(gbar, A, B, amult, delta)


def test_int8_rows_come_with_the_multipliers_of_their_norms_and_no_others_do():
    for dtype, wanted in ((byte, r"must be \(20,\)"), (single, "must be None")):
        gbar, A, B, amult, *_ = rows(Case(20, 5, 3, 4, dtype), torch.device("cpu"))
        for bmult in {byte: (None, amult[1:]), single: (amult,)}[dtype]:
            with pytest.raises(ValueError, match=f"bmult is .*{wanted}"):
                ops.growing_forward(gbar, A, B, amult, bmult=bmult)
