"""The Triton kernels of growing layers: what a program does with its blocks of rows. :mod:`pizoo.ops.triton` launches them.

Columns are cut into pieces whose widths are powers of two (400 = 256 + 128 + 16). Samples stand first and rows or columns
second in every product: then one copy of a tile of rows, loaded asynchronously, serves both products with it.

Coefficients are rounded to the dtype of the rows (int8 rows become float16, exactly) before a product with them. They are
scaled by powers of two, exactly, so that neither tiny multipliers nor tiny rows underflow in half precision.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    TURNS: tl.constexpr = 0.15915494309189535
    acos = tl.sqrt(1 - x) * poly * TURNS
    F11 = tl.where(q > 0, 0.5 - acos, acos)
    F02 = tl.sqrt((1 - x) * (1 + x)) * TURNS
    return F02 + q * F11, F11, F02


@triton.jit
def _power_of_two(x):
    """The power of two at or below x, and its inverse; x in float32, at least 0."""
    bits = tl.minimum(tl.maximum(x, 1e-37), 1e37).to(tl.int32, bitcast=True) & 0x7F800000
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def _rescale(unit, top, largest):
    """Choose the unit in which the next block is summed: a power of two near its largest coefficient.

    It follows the blocks down to 2^-40 of the largest so far and no further, so that sums in it cannot overflow.

    Returns:
        The new unit, one over it, the largest so far, and the factor from old units to new.
    """
    top = tl.maximum(top, largest)
    new, inverse = _power_of_two(tl.maximum(largest, top * 9.094947e-13))
    return new, inverse, top, unit * inverse


@triton.jit
def _rows_in_use(count, M):
    """All M rows, or as many as the device says."""
    if count is not None:
        M = tl.minimum(tl.load(count), M)
    return tl.cast(M, tl.int32)


@triton.jit
def _load(pointer, i, j, stride: tl.constexpr, rows, columns, eviction: tl.constexpr):
    """The elements (i, j), zero outside ``rows`` x ``columns``."""
    return tl.load(pointer + i * stride + j, mask=(i < rows) & (j < columns), other=0.0, eviction_policy=eviction)


@triton.jit
def _columns(start: tl.constexpr, width: tl.constexpr):
    return start + tl.arange(0, width)


@triton.jit
def _zeros(rows: tl.constexpr, WIDTHS: tl.constexpr):
    """Zeros [rows, width] of every piece."""
    pieces = ()
    for k in tl.static_range(len(WIDTHS)):
        pieces += (tl.full((rows, WIDTHS[k]), 0, tl.float32),)
    return pieces


@triton.jit
def _load_rows(
    pointer,
    block,
    count,
    r: tl.constexpr,
    stride: tl.constexpr,
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    eviction: tl.constexpr,
):
    """A block of rows in pieces [ROWS, width] of ``dtype``, zero beyond ``count``."""
    pointer += tl.cast(block, tl.int64) * ROWS * stride
    row = tl.arange(0, ROWS)[:, None]
    pieces = ()
    for k in tl.static_range(len(WIDTHS)):
        column = _columns(STARTS[k], WIDTHS[k])[None, :]
        tile = _load(pointer, row, column, stride, count - block * ROWS, r, eviction)
        pieces += (tile.to(dtype),)
    return pieces


@triton.jit
def _load_multipliers(multipliers, block, count, ROWS: tl.constexpr):
    """Multipliers of a block, loaded by hand one block ahead: tiles take what asynchronous buffers there are."""
    row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
    return tl.load(multipliers + row, mask=row < count, other=0.0)


@triton.jit
def _load_inputs(pointer, sample, b, r: tl.constexpr, STARTS: tl.constexpr, WIDTHS: tl.constexpr):
    """Inputs, or gradients at outputs: pieces [samples, width] in float32."""
    pieces = ()
    for k in tl.static_range(len(WIDTHS)):
        pieces += (_load(pointer, sample[:, None], _columns(STARTS[k], WIDTHS[k])[None, :], r, b, r, ""),)
    return pieces


@triton.jit
def _multiply(pieces, factor, dtype: tl.constexpr):
    """Pieces times a factor that broadcasts, rounded to ``dtype``."""
    new = ()
    for k in tl.static_range(len(pieces)):
        new += ((pieces[k] * factor).to(dtype),)
    return new


@triton.jit
def _contract(inputs, tiles, PRECISION: tl.constexpr):
    """``inputs tiles^T`` over all columns: pieces [samples, columns], [rows, columns] -> [samples, rows]."""
    total = tl.dot(inputs[0], tiles[0].T, input_precision=PRECISION)
    for k in tl.static_range(1, len(tiles)):
        total = tl.dot(inputs[k], tiles[k].T, total, input_precision=PRECISION)
    return total


@triton.jit
def _accumulate(sums, factor, coefficients, tiles, PRECISION: tl.constexpr):
    """``sums factor + coefficients tiles``: pieces [samples, columns], [samples, rows], pieces [rows, columns]."""
    new = ()
    for k in tl.static_range(len(tiles)):
        new += (tl.dot(coefficients, tiles[k], sums[k] * factor, input_precision=PRECISION),)
    return new


@triton.jit
def _store(
    pointer, row, rows, stride: tl.constexpr, r: tl.constexpr, sums, unit, STARTS: tl.constexpr, WIDTHS: tl.constexpr
):
    """Write sums, pieces [rows, width] in ``unit``."""
    for k in tl.static_range(len(WIDTHS)):
        column = _columns(STARTS[k], WIDTHS[k])[None, :]
        tl.store(pointer + row[:, None] * stride + column, sums[k] * unit, mask=(row[:, None] < rows) & (column < r))


@triton.jit(do_not_specialize=["M", "b"])
def forward_kernel(
    gbar,
    A,
    B,
    amult,
    bmult,
    count,
    partial,
    M,
    b,
    r: tl.constexpr,
    r_out: tl.constexpr,
    stride_A: tl.constexpr,
    stride_B: tl.constexpr,
    line: tl.constexpr,
    B_STARTS: tl.constexpr,
    B_WIDTHS: tl.constexpr,
    A_STARTS: tl.constexpr,
    A_WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``partial[program]``, [b, line]: ``Σ F00(q) amult A`` over this program's rows."""
    program, programs = tl.program_id(1), tl.num_programs(1)
    count = _rows_in_use(count, M)
    blocks = tl.cdiv(count, ROWS)
    if program < blocks:
        sample = tl.program_id(0) * BATCH + tl.arange(0, BATCH)
        dtype: tl.constexpr = tl.float16 if A.dtype.element_ty == tl.int8 else A.dtype.element_ty
        inputs = _multiply(_load_inputs(gbar, sample, b, r, B_STARTS, B_WIDTHS), 1.0, dtype)
        sums, unit, top = _zeros(BATCH, A_WIDTHS), 1.0, 0.0
        multipliers = _load_multipliers(amult, program, count, ROWS)
        if bmult is not None:
            norms = _load_multipliers(bmult, program, count, ROWS)
        for block in tl.range(program, blocks, programs, num_stages=STAGES):
            B_tiles = _load_rows(B, block, count, r, stride_B, dtype, ROWS, B_STARTS, B_WIDTHS, "")
            A_tiles = _load_rows(A, block, count, r_out, stride_A, dtype, ROWS, A_STARTS, A_WIDTHS, "")
            next_multipliers = _load_multipliers(amult, block + programs, count, ROWS)
            q = _contract(inputs, B_tiles, PRECISION)
            if bmult is not None:
                q *= norms[None, :]
                norms = _load_multipliers(bmult, block + programs, count, ROWS)
            F00, _, _ = _arc_cosine_kernels(q)
            unit, inverse, top, factor = _rescale(unit, top, tl.max(tl.abs(multipliers)))
            coefficients = (F00 * (multipliers * inverse)[None, :]).to(dtype)
            sums = _accumulate(sums, factor, coefficients, A_tiles, PRECISION)
            multipliers = next_multipliers
        partial += program.to(tl.int64) * b * line
        _store(partial, sample, b, line, r_out, sums, unit, A_STARTS, A_WIDTHS)


@triton.jit(do_not_specialize=["M", "b"])
def backward_kernel(
    gbar,
    A,
    B,
    amult,
    bmult,
    delta,
    count,
    partial,
    M,
    b,
    r: tl.constexpr,
    r_out: tl.constexpr,
    stride_A: tl.constexpr,
    stride_B: tl.constexpr,
    line: tl.constexpr,
    B_STARTS: tl.constexpr,
    B_WIDTHS: tl.constexpr,
    A_STARTS: tl.constexpr,
    A_WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``partial[program]``, [b, line]: ``Σ dγ F11(q) B`` over this program's rows; column r: ``Σ dγ F02(q)``."""
    program, programs = tl.program_id(1), tl.num_programs(1)
    count = _rows_in_use(count, M)
    blocks = tl.cdiv(count, ROWS)
    if program < blocks:
        sample = tl.program_id(0) * BATCH + tl.arange(0, BATCH)
        dtype: tl.constexpr = tl.float16 if A.dtype.element_ty == tl.int8 else A.dtype.element_ty
        inputs = _multiply(_load_inputs(gbar, sample, b, r, B_STARTS, B_WIDTHS), 1.0, dtype)
        deltas = _load_inputs(delta, sample, b, r_out, A_STARTS, A_WIDTHS)
        largest = tl.max(tl.abs(deltas[0]), 1)
        for k in tl.static_range(1, len(A_WIDTHS)):
            largest = tl.maximum(largest, tl.max(tl.abs(deltas[k]), 1))
        delta_unit, inverse = _power_of_two(largest)
        deltas = _multiply(deltas, inverse[:, None], dtype)
        sums, unit, top = _zeros(BATCH, B_WIDTHS), tl.full((BATCH,), 1, tl.float32), tl.zeros((BATCH,), tl.float32)
        along = tl.zeros((BATCH, ROWS), tl.float32)
        multipliers = _load_multipliers(amult, program, count, ROWS)
        if bmult is not None:
            norms = _load_multipliers(bmult, program, count, ROWS)
        for block in tl.range(program, blocks, programs, num_stages=STAGES):
            B_tiles = _load_rows(B, block, count, r, stride_B, dtype, ROWS, B_STARTS, B_WIDTHS, "")
            B_again = B_tiles
            if bmult is not None:
                # A tile of bytes takes another place in shared memory for each product. Alike, both loads would become one,
                # which then is not asynchronous; this one comes from the cache.
                B_again = _load_rows(B, block, count, r, stride_B, dtype, ROWS, B_STARTS, B_WIDTHS, "evict_first")
            A_tiles = _load_rows(A, block, count, r_out, stride_A, dtype, ROWS, A_STARTS, A_WIDTHS, "")
            next_multipliers = _load_multipliers(amult, block + programs, count, ROWS)
            q = _contract(inputs, B_tiles, PRECISION)
            if bmult is not None:
                q *= norms[None, :]
            _, F11, F02 = _arc_cosine_kernels(q)
            dgamma = _contract(deltas, A_tiles, PRECISION) * multipliers[None, :]
            along += dgamma * F02
            coefficients = dgamma * F11
            if bmult is not None:
                coefficients *= norms[None, :]
                norms = _load_multipliers(bmult, block + programs, count, ROWS)
            unit, inverse, top, factor = _rescale(unit, top, tl.max(tl.abs(coefficients), 1))
            coefficients = (coefficients * inverse[:, None]).to(dtype)
            sums = _accumulate(sums, factor[:, None], coefficients, B_again, PRECISION)
            multipliers = next_multipliers
        partial += program.to(tl.int64) * b * line
        _store(partial, sample, b, line, r, sums, (unit * delta_unit)[:, None], B_STARTS, B_WIDTHS)
        tl.store(partial + sample * line + r, tl.sum(along, 1) * delta_unit, mask=sample < b)


@triton.jit(do_not_specialize=["M", "programs", "length"])
def reduce_kernel(
    partial,
    gbar,
    out,
    beside,
    count,
    M,
    programs,
    length,
    columns: tl.constexpr,
    line: tl.constexpr,
    r: tl.constexpr,
    group: tl.constexpr,
    ALONG: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """``out [length, columns]``: partial sums [programs, length, line] added in a fixed order.

    With ``beside`` the column after those goes there, [length]. With ``ALONG`` the column after that multiplies gbar and is
    added to the first r columns.
    """
    i = tl.program_id(0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    program = tl.arange(0, PROGRAMS)
    active = tl.minimum(programs, tl.cdiv(_rows_in_use(count, M), ROWS))
    BESIDE: tl.constexpr = beside is not None
    pointer = partial + (program.to(tl.int64) * length + i) * line
    mask = program < active
    there = column < columns + BESIDE
    terms = tl.load(pointer[:, None] + column[None, :], mask=mask[:, None] & there[None, :], other=0.0)
    total = tl.sum(terms, 0)
    if ALONG:
        along = tl.sum(tl.load(pointer + columns + BESIDE, mask=mask, other=0.0), 0)
        total += along * tl.load(gbar + (i // group) * r + column, mask=column < r, other=0.0)
    tl.store(out + i * columns + column, total, mask=column < columns)
    if BESIDE:
        tl.store(beside + i + column - columns, total, mask=column == columns)
