"""The growing layer fused: rows are read once, correlations never leave the chip.

Same functions and signatures as ``pizoo.ops.reference``, for CUDA devices from compute capability 8.0.

A fixed grid of programs walks over blocks of rows; each keeps its share of the result in registers and writes it out
once, and a second kernel adds the shares in the order of the programs. No atomics: two runs give the same bits. The
number of rows in use is read on the device, so that one captured launch serves a layer while it grows.

Everything is computed transposed, rows first: a block of rows [rows, r] times inputs [r, samples], because tensor cores
want 64 or more along the first dimension and as few as 16 along the second, and a batch is short. Columns are cut into
pieces whose widths are powers of two (400 = 256 + 128 + 16).

Half-precision products are scaled by powers of two, exactly, so that neither tiny multipliers nor tiny rows underflow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pizoo.ops.reference import accumulate_dtype


def pieces(n: int, smallest: int, largest: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cut n columns into power-of-two pieces that cover them: their first columns and their widths."""
    starts, widths, left = [], [], -(-n // smallest) * smallest
    while left:
        starts.append(sum(widths))
        widths.append(min(largest, 1 << (left.bit_length() - 1)))
        left -= widths[-1]
    return tuple(starts), tuple(widths)


@triton.jit
def _arc_cosine_kernels(q):
    """F00, F11 and F02 of correlations q (float32); acos by Abramowitz and Stegun 4.4.46, error 2e-8."""
    q = tl.minimum(tl.maximum(q, -1.0), 1.0)
    x = tl.abs(q)
    poly = -0.0012624911
    poly = poly * x + 0.0066700901
    poly = poly * x - 0.0170881256
    poly = poly * x + 0.0308918810
    poly = poly * x - 0.0501743046
    poly = poly * x + 0.0889789874
    poly = poly * x - 0.2145988016
    poly = poly * x + 1.5707963050
    acos = tl.sqrt(1 - x) * poly
    TURNS: tl.constexpr = 0.15915494309189535
    F11 = tl.where(q > 0, 0.5 - acos * TURNS, acos * TURNS)
    F02 = tl.sqrt((1 - x) * (1 + x)) * TURNS
    return F02 + q * F11, F11, F02


@triton.jit
def _power_of_two(x):
    """The power of two at or below x, and its inverse; x in float32, at least 0."""
    bits = tl.minimum(tl.maximum(x, 1e-37), 1e37).to(tl.int32, bitcast=True) & 0x7F800000
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def _rows(count, M):
    """Rows in use: all M of them, or as many as the device says."""
    if count is None:
        return M
    return tl.minimum(tl.load(count).to(tl.int32), M)


@triton.jit
def _load(pointer, i, j, stride: tl.constexpr, rows, columns):
    """The elements (i, j), zero outside ``rows`` x ``columns``."""
    return tl.load(pointer + i * stride + j, mask=(i < rows) & (j < columns), other=0.0)


@triton.jit
def _load_pieces(pointer, i, stride: tl.constexpr, rows, columns, STARTS: tl.constexpr, WIDTHS: tl.constexpr):
    tiles = ()
    for k in tl.static_range(len(WIDTHS)):
        tiles += (_load(pointer, i[:, None], _columns(STARTS[k], WIDTHS[k])[None, :], stride, rows, columns),)
    return tiles


@triton.jit
def _load_weights(amult, block, ROWS: tl.constexpr, count):
    """Multipliers of a block. Loaded by hand one block ahead: in registers, the tiles fill shared memory to the brim."""
    row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
    return tl.load(amult + row, mask=row < count, other=0.0)


@triton.jit
def _columns(start: tl.constexpr, width: tl.constexpr):
    return start + tl.arange(0, width)


@triton.jit
def _zeros(rows: tl.constexpr, columns: tl.constexpr):
    return tl.zeros((rows, columns), tl.float32)


@triton.jit
def _dot(x, y, PRECISION: tl.constexpr):
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def _inputs(pointer, samples, b, r: tl.constexpr, dtype: tl.constexpr, STARTS: tl.constexpr, WIDTHS: tl.constexpr):
    """gbar transposed, in pieces [width, samples] of the rows' dtype."""
    tiles = ()
    for k in tl.static_range(len(WIDTHS)):
        tile = _load(pointer, samples[None, :], _columns(STARTS[k], WIDTHS[k])[:, None], r, b, r)
        tiles += (tile.to(dtype),)
    return tiles


@triton.jit
def _forward_kernel(
    gbar,
    A,
    B,
    amult,
    count,
    partial,
    M,
    b,
    r: tl.constexpr,
    r_out: tl.constexpr,
    stride_A: tl.constexpr,
    stride_B: tl.constexpr,
    B_STARTS: tl.constexpr,
    B_WIDTHS: tl.constexpr,
    A_STARTS: tl.constexpr,
    A_WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``partial[program] = Σ F00(q) amult A`` over this program's rows, [b, r_out]."""
    program, programs = tl.program_id(1), tl.num_programs(1)
    dtype: tl.constexpr = A.dtype.element_ty
    count = _rows(count, M)
    blocks = tl.cdiv(count, ROWS)
    if program < blocks:
        samples = tl.program_id(0) * BATCH + tl.arange(0, BATCH)
        row = tl.arange(0, ROWS)
        inputs = _inputs(gbar, samples, b, r, dtype, B_STARTS, B_WIDTHS)
        outs = ()
        for k in tl.static_range(len(A_WIDTHS)):
            outs += (_zeros(BATCH, A_WIDTHS[k]),)
        weight = _load_weights(amult, program, ROWS, count)
        for block in tl.range(program, blocks, programs, num_stages=STAGES):
            first = tl.cast(block, tl.int64) * ROWS
            left = count - block * ROWS
            B_tiles = _load_pieces(B + first * stride_B, row, stride_B, left, r, B_STARTS, B_WIDTHS)
            A_tiles = _load_pieces(A + first * stride_A, row, stride_A, left, r_out, A_STARTS, A_WIDTHS)
            next_weight = _load_weights(amult, block + programs, ROWS, count)
            q = _dot(B_tiles[0], inputs[0], PRECISION)
            for k in tl.static_range(1, len(B_WIDTHS)):
                q += _dot(B_tiles[k], inputs[k], PRECISION)
            F00, _, _ = _arc_cosine_kernels(q)
            scale, inverse = _power_of_two(tl.max(tl.abs(weight)))
            coefficients = (F00 * (weight * inverse)[:, None]).to(dtype).T
            sums = ()
            for k in tl.static_range(len(A_WIDTHS)):
                sums += (outs[k] + _dot(coefficients, A_tiles[k], PRECISION) * scale,)
            outs, weight = sums, next_weight
        partial += program.to(tl.int64) * b * r_out
        for k in tl.static_range(len(A_WIDTHS)):
            _store(partial, samples, _columns(A_STARTS[k], A_WIDTHS[k]), r_out, b, r_out, outs[k])


@triton.jit
def _store(pointer, samples, columns, stride: tl.constexpr, rows, width: tl.constexpr, values):
    mask = (samples[:, None] < rows) & (columns[None, :] < width)
    tl.store(pointer + samples[:, None] * stride + columns[None, :], values, mask=mask)


@triton.jit
def _backward_kernel(
    gbar,
    A,
    B,
    amult,
    delta,
    count,
    partial,
    M,
    b,
    r: tl.constexpr,
    r_out: tl.constexpr,
    stride_A: tl.constexpr,
    stride_B: tl.constexpr,
    B_STARTS: tl.constexpr,
    B_WIDTHS: tl.constexpr,
    A_STARTS: tl.constexpr,
    A_WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``partial[program]``, [b, r + 1]: ``Σ dγ F11(q) B`` over this program's rows, and in the last column ``Σ dγ F02(q)``."""
    program, programs = tl.program_id(1), tl.num_programs(1)
    dtype: tl.constexpr = A.dtype.element_ty
    count = _rows(count, M)
    blocks = tl.cdiv(count, ROWS)
    if program < blocks:
        samples = tl.program_id(0) * BATCH + tl.arange(0, BATCH)
        row = tl.arange(0, ROWS)
        inputs = _inputs(gbar, samples, b, r, dtype, B_STARTS, B_WIDTHS)
        largest = tl.zeros((BATCH,), tl.float32)
        for k in tl.static_range(len(A_WIDTHS)):
            tile = _load(delta, samples[None, :], _columns(A_STARTS[k], A_WIDTHS[k])[:, None], r_out, b, r_out)
            largest = tl.maximum(largest, tl.max(tl.abs(tile), 0))
        delta_scale, inverse = _power_of_two(largest)
        deltas = ()
        for k in tl.static_range(len(A_WIDTHS)):
            tile = _load(delta, samples[None, :], _columns(A_STARTS[k], A_WIDTHS[k])[:, None], r_out, b, r_out)
            deltas += ((tile * inverse[None, :]).to(dtype),)
        grads = ()
        for k in tl.static_range(len(B_WIDTHS)):
            grads += (_zeros(BATCH, B_WIDTHS[k]),)
        along = tl.zeros((ROWS, BATCH), tl.float32)
        weight = _load_weights(amult, program, ROWS, count)
        for block in tl.range(program, blocks, programs, num_stages=STAGES):
            first = tl.cast(block, tl.int64) * ROWS
            left = count - block * ROWS
            B_tiles = _load_pieces(B + first * stride_B, row, stride_B, left, r, B_STARTS, B_WIDTHS)
            A_tiles = _load_pieces(A + first * stride_A, row, stride_A, left, r_out, A_STARTS, A_WIDTHS)
            next_weight = _load_weights(amult, block + programs, ROWS, count)
            q = _dot(B_tiles[0], inputs[0], PRECISION)
            for k in tl.static_range(1, len(B_WIDTHS)):
                q += _dot(B_tiles[k], inputs[k], PRECISION)
            dgamma = _dot(A_tiles[0], deltas[0], PRECISION)
            for k in tl.static_range(1, len(A_WIDTHS)):
                dgamma += _dot(A_tiles[k], deltas[k], PRECISION)
            _, F11, F02 = _arc_cosine_kernels(q)
            dgamma *= weight[:, None]
            along += dgamma * F02
            coefficients = dgamma * F11
            scale, inverse = _power_of_two(tl.max(tl.abs(coefficients), 0))
            coefficients = (coefficients * inverse[None, :]).to(dtype).T
            sums = ()
            for k in tl.static_range(len(B_WIDTHS)):
                sums += (grads[k] + _dot(coefficients, B_tiles[k], PRECISION) * scale[:, None],)
            grads, weight = sums, next_weight
        partial += program.to(tl.int64) * b * (r + 1)
        for k in tl.static_range(len(B_WIDTHS)):
            _store(partial, samples, _columns(B_STARTS[k], B_WIDTHS[k]), r + 1, b, r, grads[k] * delta_scale[:, None])
        tl.store(partial + samples * (r + 1) + r, tl.sum(along, 0) * delta_scale, mask=samples < b)


@triton.jit
def _jacobian_kernel(
    gbar,
    A,
    B,
    amult,
    count,
    partial,
    M,
    b,
    r: tl.constexpr,
    r_out: tl.constexpr,
    stride_A: tl.constexpr,
    stride_B: tl.constexpr,
    B_STARTS: tl.constexpr,
    B_WIDTHS: tl.constexpr,
    A_STARTS: tl.constexpr,
    A_WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``partial[program]``, [b r_out, r + 2]: ``Σ F11(q) w_o B``, ``Σ F00(q) w_o``, ``Σ F02(q) w_o`` with w = amult A."""
    program, programs = tl.program_id(1), tl.num_programs(1)
    dtype: tl.constexpr = A.dtype.element_ty
    count = _rows(count, M)
    blocks = tl.cdiv(count, ROWS)
    if program < blocks:
        first_sample = tl.program_id(0) * BATCH
        row = tl.arange(0, ROWS)
        # Tensor cores take 16 samples at least: the second half holds what rounding took from the first.
        both = tl.arange(0, 2 * BATCH)
        samples = first_sample + both % BATCH
        inputs = ()
        for k in tl.static_range(len(B_WIDTHS)):
            tile = _load(gbar, samples[None, :], _columns(B_STARTS[k], B_WIDTHS[k])[:, None], r, b, r)
            rounded = tile.to(dtype)
            inputs += (tl.where(both[None, :] < BATCH, rounded, (tile - rounded.to(tl.float32)).to(dtype)),)
        outputs = tl.arange(0, 16)
        jacobians = ()
        for k in tl.static_range(len(B_WIDTHS)):
            for o in tl.static_range(len(A_WIDTHS)):
                jacobians += (_zeros(BATCH * A_WIDTHS[o], B_WIDTHS[k]),)
        sums = tl.zeros((16, 2 * BATCH), tl.float32)
        weight = _load_weights(amult, program, ROWS, count)
        for block in tl.range(program, blocks, programs, num_stages=STAGES):
            first = tl.cast(block, tl.int64) * ROWS
            left = count - block * ROWS
            B_tiles = _load_pieces(B + first * stride_B, row, stride_B, left, r, B_STARTS, B_WIDTHS)
            A_tiles = _load_pieces(A + first * stride_A, row, stride_A, left, r_out, A_STARTS, A_WIDTHS)
            A_tile = _load(A + first * stride_A, row[:, None], outputs[None, :], stride_A, left, r_out)
            next_weight = _load_weights(amult, block + programs, ROWS, count)
            q = _dot(B_tiles[0], inputs[0], PRECISION)
            for k in tl.static_range(1, len(B_WIDTHS)):
                q += _dot(B_tiles[k], inputs[k], PRECISION)
            F00, F11, F02 = _arc_cosine_kernels(tl.sum(q.reshape(ROWS, 2, BATCH), 1))
            w = A_tile.to(tl.float32) * weight[:, None]
            scale, inverse = _power_of_two(tl.max(tl.abs(w)))
            both_F = tl.join(F00, F02).reshape(ROWS, 2 * BATCH).to(dtype)
            sums += _dot((w * inverse).to(dtype).T, both_F, PRECISION) * scale
            weight *= inverse
            new = ()
            for k in tl.static_range(len(B_WIDTHS)):
                for o in tl.static_range(len(A_WIDTHS)):
                    product = F11[:, :, None] * (A_tiles[o].to(tl.float32) * weight[:, None])[:, None, :]
                    product = product.to(dtype).reshape(ROWS, BATCH * A_WIDTHS[o]).T
                    new += (jacobians[k * len(A_WIDTHS) + o] + _dot(product, B_tiles[k], PRECISION) * scale,)
            jacobians, weight = new, next_weight
        partial += program.to(tl.int64) * b * r_out * (r + 2)
        for k in tl.static_range(len(B_WIDTHS)):
            for o in tl.static_range(len(A_WIDTHS)):
                n = tl.arange(0, BATCH * A_WIDTHS[o])
                sample, output = first_sample + n // A_WIDTHS[o], A_STARTS[o] + n % A_WIDTHS[o]
                # An output beyond the last is sent beyond the last sample, which is not stored.
                pair = tl.where(output < r_out, sample * r_out + output, b * r_out)
                _store(partial, pair, _columns(B_STARTS[k], B_WIDTHS[k]), r + 2, b * r_out, r, jacobians[k * len(A_WIDTHS) + o])
        pair = (first_sample + both // 2)[None, :] * r_out + outputs[:, None]
        mask = (outputs < r_out)[:, None] & (first_sample + both // 2 < b)[None, :]
        tl.store(partial + pair * (r + 2) + r + (both % 2)[None, :], sums, mask=mask)


@triton.jit
def _reduce_kernel(
    partial,
    gbar,
    out,
    count,
    M,
    programs,
    length,
    columns: tl.constexpr,
    r: tl.constexpr,
    group: tl.constexpr,
    ALONG: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """``out [length, columns]``: partial sums [programs, length, columns (+ 1)] added in the order of the programs.

    With ``ALONG`` the last column of the sums multiplies gbar and is added to the first r columns.
    """
    i = tl.program_id(0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    program = tl.arange(0, PROGRAMS)
    active = tl.minimum(programs, tl.cdiv(_rows(count, M), ROWS))
    stride: tl.constexpr = columns + ALONG
    pointer = partial + (program * length + i).to(tl.int64) * stride
    mask = program < active
    terms = tl.load(pointer[:, None] + column[None, :], mask=mask[:, None] & (column < columns)[None, :], other=0.0)
    total = tl.sum(terms, 0)
    if ALONG:
        along = tl.sum(tl.load(pointer + columns, mask=mask, other=0.0), 0)
        total += along * tl.load(gbar + (i // group) * r + column, mask=column < r, other=0.0)
    tl.store(out + i * columns + column, total, mask=column < columns)


class Launch(NamedTuple):
    """How an op is cut into programs: rows of a block, samples of a tile, warps, buffers, programs a multiprocessor."""

    rows: int
    batch: int
    warps: int
    stages: int
    per_sm: int


def growing_forward(gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, count: Tensor | None = None) -> Tensor:
    """``F00(q) (amult A)``; see :func:`pizoo.ops.reference.growing_forward`."""
    columns = A.shape[1]
    return _run(_forward_kernel, _launch("forward", gbar, A), gbar, A, B, amult, (), count, len(gbar), columns, False)


def growing_backward(
    gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, delta: Tensor, count: Tensor | None = None
) -> Tensor:
    """The gradient with respect to g; see :func:`pizoo.ops.reference.growing_backward`."""
    b, r = gbar.shape
    delta = delta.to(torch.float32).contiguous()
    return _run(_backward_kernel, _launch("backward", gbar, A), gbar, A, B, amult, (delta,), count, b, r, True)


def growing_forward_jacobian(
    gbar: Tensor, A: Tensor, B: Tensor, amult: Tensor, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and Jacobian in one pass; see :func:`pizoo.ops.reference.growing_forward_jacobian`."""
    (b, r), r_out = gbar.shape, A.shape[1]
    launch = _launch("jacobian", gbar, A)
    both = _run(_jacobian_kernel, launch, gbar, A, B, amult, (), count, b * r_out, r + 1, True).view(b, r_out, r + 1)
    return both[:, :, r], both[:, :, :r]


def _launch(op: str, gbar: Tensor, A: Tensor) -> Launch:
    return Launch(64, 8 if op == "jacobian" else 16, 4, 2, 1)


def _run(kernel, launch, gbar, A, B, amult, delta, count, length: int, columns: int, along: bool) -> Tensor:
    (b, r), (M, r_out) = gbar.shape, A.shape
    jacobian = kernel is _jacobian_kernel
    gbar = gbar.to(torch.float32).contiguous()
    A, B = (part if part.stride(1) == 1 else part.contiguous() for part in (A, B))
    tiles = triton.cdiv(b, launch.batch)
    programs = max(1, multiprocessors(A.device) * launch.per_sm // tiles)
    partial = gbar.new_empty(programs, length, columns + along)
    out = gbar.new_empty(length, columns)
    B_starts, B_widths = pieces(r, 16, 256)
    A_starts, A_widths = pieces(r_out, 1, 8) if jacobian else pieces(r_out, 16, 256)
    kernel[(tiles, programs)](
        gbar, A, B, amult.contiguous(), *delta, count, partial, M, b, r, r_out, A.stride(0), B.stride(0),
        B_starts, B_widths, A_starts, A_widths, launch.rows, launch.batch, launch.stages,
        "tf32x3" if A.dtype == torch.float32 else "ieee", num_warps=launch.warps,
    )
    width = 32
    _reduce_kernel[(length, triton.cdiv(columns, width))](
        partial, gbar, out, count, M, programs, length, columns, r, r_out if jacobian else 1, along,
        launch.rows, triton.next_power_of_2(programs), width, num_warps=8,
    )
    return out


def multiprocessors(device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
