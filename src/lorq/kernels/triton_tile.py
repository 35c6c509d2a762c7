"""The kernels for CUDA devices, in Triton: packed codes become tiles of weights in registers, and those products.

What: every kernel walks the columns in tiles of ``K``. A tile of ``N`` rows is read as the words it is stored in
(`lorq.packing`), each word once, and spread in registers::

    2, 4, 8 bits   a word holds 32 / bits codes:   word -> [word >> 0, word >> bits, ...] & mask
    3, 6 bits      three words hold four fields of 24 bits:
                   a = words 0, 1, 2   ->   a0,  a0 >> 24 | a1 << 8,  a1 >> 16 | a2 << 16,  a2 >> 8
                   and a field holds 24 / bits codes

so that no code is looked for by itself, and one that straddles two words costs a shift for its whole field.

Why so: the weight is the left factor of ``weight x^T``. Tensor cores of sm_90 take their left factor from registers,
where the weight is made, and only their right one must come from shared memory, where the input arrives by itself.

What is given up: the number of tokens of a tile is a power of two from 16 on, so that two tokens cost as much as
sixteen do; a single one has a path of its own, and many are torch's to multiply (`decode`).

Whole numbers become floating point by writing them into a mantissa: a conversion would run at a quarter of the rate of
the operations that replace it. In the highest bits of that of 1 they are ``1 + code / 2^bits``, which one multiply-add
takes to ``(code - zero_point) scale`` exactly; for one token they stay where they are (`_one_token`).
"""

from typing import Any, no_type_check

try:
    import triton
    import triton.language as tl
except ImportError:  # nobody calls what is below then; the file can still be read and collected
    triton, tl = None, None

constexpr = Any if tl is None else tl.constexpr


def jit(function: Any) -> Any:
    """`triton.jit` where there is the package."""
    return function if triton is None else triton.jit(function)


@jit
@no_type_check
def _spread(fields, BITS: constexpr, PER: constexpr, N: constexpr, K: constexpr):
    """(N, K / PER) integers side by side with what is above each of their parts of ``BITS`` bits, (N, K).

    By halves, since what is joined lies in the registers of one thread: no word leaves the thread that fetched it.
    """
    if PER == 1:
        return fields
    else:
        halves = tl.reshape(tl.join(fields, fields >> (BITS * PER // 2)), (N, 2 * K // PER))
        return _spread(halves, BITS, PER // 2, N, K)


@jit
@no_type_check
def _fields(packed, rows, inside, first, words, BITS: constexpr, N: constexpr, K: constexpr):
    """What codes ``first .. first + K - 1`` of each row lie in, 32 or 24 bits to a field, (N, fields) uint32.

    ``first`` begins a word, and at 3 and 6 bits a triple of them.
    """
    if 32 % BITS == 0:
        at = first // (32 // BITS) + tl.arange(0, K * BITS // 32)
        fields = tl.load(packed + rows[:, None] * words + at[None, :], inside[:, None] & (at < words)[None, :], 0)
        return fields.to(tl.uint32, bitcast=True)
    else:
        PER: tl.constexpr = 24 // BITS
        at = (first // (4 * PER) + tl.arange(0, K // (4 * PER))) * 3
        pointers = packed + rows[:, None] * words + at[None, :]
        a = tl.load(pointers, inside[:, None] & (at < words)[None, :], 0).to(tl.uint32, bitcast=True)
        b = tl.load(pointers + 1, inside[:, None] & (at + 1 < words)[None, :], 0).to(tl.uint32, bitcast=True)
        c = tl.load(pointers + 2, inside[:, None] & (at + 2 < words)[None, :], 0).to(tl.uint32, bitcast=True)
        even = tl.join(a, (b >> 16) | (c << 16))
        odd = tl.join((a >> 24) | (b << 8), c >> 8)
        return tl.reshape(tl.join(even, odd), (N, K // PER))


@jit
@no_type_check
def _codes(packed, rows, inside, first, words, BITS: constexpr, N: constexpr, K: constexpr):
    """Codes ``first .. first + K - 1`` of each row, (N, K) uint32; ``first`` as for `_fields`."""
    PER: tl.constexpr = 32 // BITS if 32 % BITS == 0 else 24 // BITS
    fields = _fields(packed, rows, inside, first, words, BITS, N, K)
    return _spread(fields, BITS, PER, N, K) & ((1 << BITS) - 1)


@jit
@no_type_check
def _fractions(packed, rows, inside, first, words, BITS: constexpr, N: constexpr, K: constexpr):
    """``1 + code / 2^BITS`` of the same codes, (N, K) float32: codes in the highest bits of a mantissa."""
    SIZE: tl.constexpr = 32 if 32 % BITS == 0 else 24
    fields = _fields(packed, rows, inside, first, words, BITS, N, K)
    mantissa = _spread_down(fields, BITS, SIZE // BITS, SIZE, N, K) & (((1 << BITS) - 1) << (23 - BITS))
    # 1.0, but not as a constant: "and" and "or" are one operation where at most one of the others is.
    one = 0x3F800000 | (words >> 31)
    return (mantissa | one.to(tl.uint32)).to(tl.float32, bitcast=True)


@jit
@no_type_check
def _halves(fields, HALF: constexpr, END: constexpr):
    """Fields that end in bit ``END`` so that each of their halves of ``HALF`` bits ends in bit 23."""
    if END == 23:
        return fields << HALF, fields
    else:
        return fields << (23 + HALF - END), fields >> (END - 23)


@jit
@no_type_check
def _spread_down(fields, BITS: constexpr, PER: constexpr, END: constexpr, N: constexpr, K: constexpr):
    """`_spread`, but so that each part ends in bit 23; the fields end in bit ``END``, 23 or above."""
    if PER == 1:
        return fields
    else:
        lower, upper = _halves(fields, BITS * PER // 2, END)
        return _spread_down(tl.reshape(tl.join(lower, upper), (N, 2 * K // PER)), BITS, PER // 2, 23, N, K)


@jit
@no_type_check
def _zeros(zero, rows, inside, group, groups, BITS: constexpr):
    """Zero points of (rows, groups) from words down the rows, uint32; a code may straddle two words."""
    bit = rows * BITS
    pointers = zero + (bit // 32) * groups + group
    shift = (bit % 32).to(tl.uint32)
    codes = tl.load(pointers, inside, 0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        more = inside & (shift + BITS > 32)
        high = tl.load(pointers + groups, more, 0).to(tl.uint32, bitcast=True)
        codes |= tl.where(more, high << ((32 - shift) & 31), 0)
    return codes & ((1 << BITS) - 1)


@jit
@no_type_check
def _repeated(values, TIMES: constexpr, N: constexpr, K: constexpr):
    """Each number of (N, K / TIMES) as often as told, (N, K)."""
    if TIMES == 1:
        return values
    else:
        return _repeated(tl.reshape(tl.join(values, values), (N, 2 * K // TIMES)), TIMES // 2, N, K)


@jit
@no_type_check
def _entries(book, book_scale, codes, rows, inside, k0, in_features, BITS: constexpr, VECTOR: constexpr,
             BOOK_ROWS: constexpr, BOOK_COLUMNS: constexpr, N: constexpr, K: constexpr):  # fmt: skip
    """Entries of codebooks times their scales, (N, K) float32; ``book`` holds a whole entry in each integer."""
    column = k0 + VECTOR * tl.arange(0, K // VECTOR)
    tiles = in_features // BOOK_COLUMNS
    tile = (rows // BOOK_ROWS)[:, None] * tiles + (column // BOOK_COLUMNS)[None, :]
    ok = inside[:, None] & (column < in_features)[None, :]
    entry = tl.load(book + (tile << (BITS * VECTOR)) + codes.to(tl.int32), ok, 0)
    values = _spread(entry, 8, VECTOR, N, K).to(tl.int8).to(tl.float32)
    if BOOK_COLUMNS % K == 0:  # one column of codebooks for the whole tile
        at = (rows // BOOK_ROWS) * tiles + k0 // BOOK_COLUMNS
        return values * tl.load(book_scale + at, inside, 0.0).to(tl.float32)[:, None]
    else:
        return values * _repeated(tl.load(book_scale + tile, ok, 0.0).to(tl.float32), VECTOR, N, K)


@jit
@no_type_check
def _scaled(values, scale, zero, rows, inside, k0, in_features, BITS: constexpr, WHOLE: constexpr, GROUP: constexpr,
            N: constexpr, K: constexpr):  # fmt: skip
    """Values times the scales of their groups, (N, K) float32.

    Of whole numbers (``WHOLE``) the values are `_fractions`: one multiply-add takes them to ``(code - zero_point)
    scale``, and nothing is rounded, for both its products have at most 20 bits.
    """
    # Parts of the tile that share a scale: of one group, whole groups, or columns where neither divides the other.
    PARTS: tl.constexpr = 1 if GROUP % K == 0 else K // GROUP if K % GROUP == 0 else K
    step, start = _steps(scale, zero, rows, inside, k0, in_features // GROUP, BITS, GROUP, K, PARTS)
    if WHOLE:
        start = _over(start + step * (1 << BITS), PARTS, N, K)
        return values * _over(step * (1 << BITS), PARTS, N, K) - start
    else:
        return values * _over(step, PARTS, N, K)


@jit
@no_type_check
def _over(values, PARTS: constexpr, N: constexpr, K: constexpr):
    """(N, PARTS) numbers, each for its part of K columns: (N, K), or what is broadcast to it."""
    if PARTS == 1 or PARTS == K:
        return values
    else:
        return _repeated(values, K // PARTS, N, K)


@jit
@no_type_check
def _product_of_scales(scale_left, scale_right, rows, inside, k0, in_features, scale_rank, S: constexpr,
                       K: constexpr):  # fmt: skip
    """A scale for each weight, (N, K) float32: this tile's part of the product, never more of it."""
    column, s = k0 + tl.arange(0, K), tl.arange(0, S)
    ok = s < scale_rank
    l = tl.load(scale_left + rows[:, None] * scale_rank + s[None, :], inside[:, None] & ok[None, :], 0.0)
    at = scale_right + s[:, None] * in_features + column[None, :]
    return tl.dot(l, tl.load(at, ok[:, None] & (column < in_features)[None, :], 0.0), input_precision="ieee")


@jit
@no_type_check
def _weights(packed, scale, zero, levels, scale_left, scale_right, book, book_scale, rows, inside, k0, in_features,
             words, scale_rank, BITS: constexpr, VECTOR: constexpr, GROUP: constexpr,
             BOOK_ROWS: constexpr, BOOK_COLUMNS: constexpr, S: constexpr, N: constexpr,
             K: constexpr):  # fmt: skip
    """``decode(codes, scale)`` of columns ``k0 .. k0 + K - 1``, (N, K) float32; zero past the last row or column."""
    WHOLE: tl.constexpr = book is None and levels is None
    if WHOLE:
        values = _fractions(packed, rows, inside, k0, words, BITS, N, K)
    else:
        codes = _codes(packed, rows, inside, k0 // VECTOR, words, BITS * VECTOR, N, K // VECTOR)
        if book is not None:
            values = _entries(
                book, book_scale, codes, rows, inside, k0, in_features, BITS, VECTOR, BOOK_ROWS, BOOK_COLUMNS, N, K
            )
        else:
            values = tl.load(levels + codes.to(tl.int32))
    if scale_left is None:
        return _scaled(values, scale, zero, rows, inside, k0, in_features, BITS, WHOLE, GROUP, N, K)
    else:
        if WHOLE:
            values = values * (1 << BITS) - ((1 << BITS) + (1 << (BITS - 1)))
        return values * _product_of_scales(scale_left, scale_right, rows, inside, k0, in_features, scale_rank, S, K)


@jit
@no_type_check
def _stored(values, E4M3: constexpr):
    """Entries of a stored factor as float32. Bytes of e4m3 are read as such: sm_80 has no instruction for them."""
    if E4M3:
        # Sign, exponent and mantissa in float16's places, whose exponent counts from 15 and not from 7.
        bits = ((values & 0x80).to(tl.uint16) << 8) | ((values & 0x7F).to(tl.uint16) << 7)
        number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((values & 0x7F) == 0x7F, float("nan"), number)
    else:  # not left out: what follows a return is compiled all the same
        return values.to(tl.float32)


@jit
@no_type_check
def _left_tile(left, left_scale, rows, inside, r, rank, E4M3: constexpr):
    """Columns ``r`` of the left factor with their scales, (N, R) float32."""
    ok = (r < rank)[None, :]
    l = _stored(tl.load(left + rows[:, None] * rank + r[None, :], inside[:, None] & ok, 0), E4M3)
    if left_scale is not None:
        l *= tl.load(left_scale + r, r < rank, 0.0).to(tl.float32)[None, :]
    return l


@jit
@no_type_check
def project(x, right, right_scale, z, in_features, rank, E4M3: constexpr, R: constexpr, K: constexpr):
    """``z = x right^T`` for one token and ``R`` rows of ``right``."""
    token, r = tl.program_id(0).to(tl.int64), tl.program_id(1) * R + tl.arange(0, R)
    sums = tl.zeros((R, K), tl.float32)
    for k0 in range(0, in_features, K):
        k = k0 + tl.arange(0, K)
        ok = (r < rank)[:, None] & (k < in_features)[None, :]
        factor = _stored(tl.load(right + r[:, None] * in_features + k[None, :], ok, 0), E4M3)
        sums += factor * tl.load(x + token * in_features + k, k < in_features, 0.0).to(tl.float32)[None, :]
    total = tl.sum(sums, 1)
    if right_scale is not None:
        total *= tl.load(right_scale + r, r < rank, 0.0).to(tl.float32)
    tl.store(z + token * rank + r, total, r < rank)


@jit
@no_type_check
def _one_token(x, packed, scale, zero, row, inside, first, last, in_features, words, BITS: constexpr, GROUP: constexpr,
               N: constexpr, K: constexpr, STAGES: constexpr):  # fmt: skip
    """`_sums` of one token and whole numbers, (N, 1), in half the operations: no code is made a weight.

    A code that is masked where it lies in the lower bits of a word is a denormal number, ``code 2^(position - 149)``,
    and its input is multiplied by ``2^(100 - position)``. The products of a field are summed as they are, then scaled,
    and the zero point is taken from the sum of the field's inputs.
    """
    SIZE: tl.constexpr = 32 if 32 % BITS == 0 else 24
    PER: tl.constexpr = SIZE // BITS
    F: tl.constexpr = K // PER
    PARTS: tl.constexpr = 1 if GROUP % K == 0 else K // GROUP if K % GROUP == 0 else F
    groups = in_features // GROUP
    position = BITS * (tl.arange(0, K) % (PER // 2))
    mask = (((1 << BITS) - 1) << position).to(tl.uint32)
    power = ((227 - position) << 23).to(tl.float32, bitcast=True)
    sums = tl.zeros((N, F), tl.float32)
    # Without products of tiles, loads are under way early only where the loop itself says so.
    for k0 in tl.range(first, last, K, num_stages=STAGES):
        k = k0 + tl.arange(0, K)
        fields = _fields(packed, row, inside, k0, words, BITS, N, K)
        values = tl.load(x + k, k < in_features, 0.0).to(tl.float32)
        halves = tl.reshape(tl.join(fields, fields >> (SIZE // 2)), (N, 2 * F))
        codes = _repeated(halves, PER // 2, N, K) & mask[None, :]
        products = codes.to(tl.float32, bitcast=True) * (values * power)[None, :]
        step, start = _steps(scale, zero, row, inside, k0, groups, BITS, GROUP, K, PARTS)
        sums += tl.sum(tl.reshape(products, (N, F, PER)), 2) * _over(step * 2.0**49, PARTS, N, F)
        sums -= tl.sum(tl.reshape(values, (F, PER)), 1)[None, :] * _over(start, PARTS, N, F)
    return tl.sum(sums, 1)[:, None]


@jit
@no_type_check
def _steps(scale, zero, rows, inside, k0, groups, BITS: constexpr, GROUP: constexpr, K: constexpr, PARTS: constexpr):
    """Scales of the groups of ``K`` columns in equal parts, and zero points times them, (N, PARTS) float32."""
    group = ((k0 + (K // PARTS) * tl.arange(0, PARTS)) // GROUP)[None, :]
    ok = inside[:, None] & (group < groups)
    step = tl.load(scale + rows[:, None] * groups + group, ok, 0.0).to(tl.float32)
    if zero is None:
        return step, step * (1 << (BITS - 1))
    else:
        return step, step * _zeros(zero, rows[:, None], ok, group, groups, BITS).to(tl.int32).to(tl.float32)


@jit
@no_type_check
def _sums(x, at, real, packed, scale, zero, levels, scale_left, scale_right, book, book_scale, row, inside, first, last,
          in_features, words, scale_rank, BITS: constexpr, VECTOR: constexpr, GROUP: constexpr,
          BOOK_ROWS: constexpr, BOOK_COLUMNS: constexpr, S: constexpr, T: constexpr, N: constexpr,
          K: constexpr, STAGES: constexpr):  # fmt: skip
    """``weight x^T`` over columns ``first .. last - 1``, (N, T) float32; ``at`` are the rows of ``x``."""
    PER: tl.constexpr = 32 // BITS if 32 % BITS == 0 else 24 // BITS
    FIELDS: tl.constexpr = book is None and levels is None and scale_left is None and GROUP % PER == 0
    if T == 1 and FIELDS:
        return _one_token(
            x + tl.sum(at, 0) * in_features, packed, scale, zero, row, inside, first, last, in_features, words, BITS,
            GROUP, N, K, STAGES,
        )  # fmt: skip
    if T == 1:
        sums = tl.zeros((N, K), tl.float32)
    else:
        sums = tl.zeros((N, T), tl.float32)
    # Without products of tiles, loads are under way early only where the loop itself says so.
    for k0 in tl.range(first, last, K, num_stages=STAGES):
        k = k0 + tl.arange(0, K)
        w = _weights(
            packed, scale, zero, levels, scale_left, scale_right, book, book_scale, row, inside, k0, in_features,
            words, scale_rank, BITS, VECTOR, GROUP, BOOK_ROWS, BOOK_COLUMNS, S, N, K,
        )  # fmt: skip
        if T == 1:
            values = tl.load(x + tl.sum(at, 0) * in_features + k, k < in_features, 0.0)
            sums += w * values.to(tl.float32)[None, :]
        else:
            from_ = x + at[:, None] * in_features + k[None, :]
            values = tl.load(from_, real[:, None] & (k < in_features)[None, :], 0.0)
            sums = tl.dot(w.to(values.dtype), tl.trans(values), sums, input_precision="ieee")
    if T == 1:
        return tl.sum(sums, 1)[:, None]
    else:
        return sums


@jit
@no_type_check
def _low_rank(sums, left, left_scale, z, at, real, row, inside, rank, E4M3: constexpr, T: constexpr,
              R: constexpr):  # fmt: skip
    """``sums + left z^T``, (N, T) float32; ``at`` are the places in ``z`` of the tokens' first numbers."""
    for r0 in range(0, rank, R):
        r = r0 + tl.arange(0, R)
        l = _left_tile(left, left_scale, row, inside, r, rank, E4M3).to(z.dtype.element_ty)
        part = tl.load(z + at[:, None] + r[None, :], real[:, None] & (r < rank)[None, :], 0.0)
        if T == 1:
            sums += tl.sum(l.to(tl.float32) * part.to(tl.float32), 1)[:, None]
        else:
            sums = tl.dot(l, tl.trans(part), sums, input_precision="ieee")
    return sums


@jit
@no_type_check
def spans(x, partial, packed, scale, zero, levels, scale_left, scale_right, book, book_scale, tokens, out_features,
               in_features, words, scale_rank, span, BITS: constexpr, VECTOR: constexpr,
               GROUP: constexpr, BOOK_ROWS: constexpr, BOOK_COLUMNS: constexpr, S: constexpr,
               T: constexpr, N: constexpr, K: constexpr, STAGES: constexpr):  # fmt: skip
    """The sums over one span of the columns: ``partial[split, token, row]``, float32."""
    row, split = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1)
    inside, token = row < out_features, tl.arange(0, T)
    first = split * span
    sums = _sums(
        x, token, token < tokens, packed, scale, zero, levels, scale_left, scale_right, book, book_scale, row, inside,
        first, tl.minimum(first + span, in_features), in_features, words, scale_rank, BITS, VECTOR, GROUP, BOOK_ROWS,
        BOOK_COLUMNS, S, T, N, K, STAGES,
    )  # fmt: skip
    to = partial + (split * tokens + token)[None, :] * out_features + row[:, None]
    tl.store(to, sums, inside[:, None] & (token < tokens)[None, :])


@jit
@no_type_check
def finish(partial, y, z, left, left_scale, tokens, out_features, splits, rank, E4M3: constexpr,
           N: constexpr, R: constexpr):  # fmt: skip
    """``y``: the spans' sums in their order, and ``z left^T``, for one token and ``N`` rows."""
    row, token = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1)
    inside = row < out_features
    total = tl.zeros((N,), tl.float32)
    for split in range(splits):
        total += tl.load(partial + (split * tokens + token) * out_features + row, inside, 0.0)
    if left is not None:
        for r0 in range(0, rank, R):
            r = r0 + tl.arange(0, R)
            l = _left_tile(left, left_scale, row, inside, r, rank, E4M3)
            total += tl.sum(l * tl.load(z + token * rank + r, r < rank, 0.0).to(tl.float32)[None, :], 1)
    tl.store(y + token * out_features + row, total.to(y.dtype.element_ty), inside)


@jit
@no_type_check
def whole_rows(x, y, z, left, left_scale, packed, scale, zero, levels, scale_left, scale_right, book, book_scale,
                tokens, out_features, in_features, words, scale_rank, rank, BITS: constexpr,
                VECTOR: constexpr, GROUP: constexpr, BOOK_ROWS: constexpr,
                BOOK_COLUMNS: constexpr, S: constexpr, E4M3: constexpr, T: constexpr,
                N: constexpr, K: constexpr, R: constexpr, STAGES: constexpr):  # fmt: skip
    """A tile of ``y^T = weight x^T + left z^T``, (N, T), over all columns."""
    token_tiles, row_tiles = tl.cdiv(tokens, T), tl.cdiv(out_features, N)
    # Neighbouring programs share eight tiles of rows, so that what they read stays in the second-level cache.
    tile = tl.program_id(0)
    row_tile, token_tile = tl.swizzle2d(tile // token_tiles, tile % token_tiles, row_tiles, token_tiles, 8)
    row, token = row_tile * N + tl.arange(0, N), token_tile * T + tl.arange(0, T)
    inside, real, at = row < out_features, token < tokens, token.to(tl.int64)
    sums = _sums(
        x, at, real, packed, scale, zero, levels, scale_left, scale_right, book, book_scale, row, inside, 0,
        in_features, in_features, words, scale_rank, BITS, VECTOR, GROUP, BOOK_ROWS, BOOK_COLUMNS, S, T, N, K, STAGES,
    )  # fmt: skip
    if left is not None:
        sums = _low_rank(sums, left, left_scale, z, at * rank, real, row, inside, rank, E4M3, T, R)
    to = y + at[None, :] * out_features + row[:, None]
    tl.store(to, sums.to(y.dtype.element_ty), inside[:, None] & real[None, :])


@jit
@no_type_check
def decode(to, packed, scale, zero, levels, scale_left, scale_right, book, book_scale, left, left_scale, right,
           right_scale, first, last, in_features, words, scale_rank, rank, BITS: constexpr, VECTOR: constexpr,
           GROUP: constexpr, BOOK_ROWS: constexpr, BOOK_COLUMNS: constexpr, S: constexpr, E4M3: constexpr,
           N: constexpr, K: constexpr, R: constexpr):  # fmt: skip
    """Rows ``first .. last - 1`` of ``decode(codes, scale) + left right`` into ``to``, (rows, in), in its dtype."""
    row, k0 = first + tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1) * K
    inside, k = row < last, k0 + tl.arange(0, K)
    w = _weights(
        packed, scale, zero, levels, scale_left, scale_right, book, book_scale, row, inside, k0, in_features, words,
        scale_rank, BITS, VECTOR, GROUP, BOOK_ROWS, BOOK_COLUMNS, S, N, K,
    )  # fmt: skip
    if left is not None:
        for r0 in range(0, rank, R):
            r = r0 + tl.arange(0, R)
            l = _left_tile(left, left_scale, row, inside, r, rank, E4M3)
            ok = (r < rank)[:, None] & (k < in_features)[None, :]
            factor = _stored(tl.load(right + r[:, None] * in_features + k[None, :], ok, 0), E4M3)
            if right_scale is not None:
                factor *= tl.load(right_scale + r, r < rank, 0.0).to(tl.float32)[:, None]
            w = tl.dot(l.to(to.dtype.element_ty), factor.to(to.dtype.element_ty), w, input_precision="ieee")
    at = to + (row - first).to(tl.int64)[:, None] * in_features + k[None, :]
    tl.store(at, w.to(to.dtype.element_ty), inside[:, None] & (k < in_features)[None, :])


@jit
@no_type_check
def turn(x, y, permutation, in_features, skip, blocks, INVERSE: constexpr, BLOCK: constexpr,
         STEPS: constexpr, NORM: constexpr):  # fmt: skip
    """One block of one token into another basis or back; programs past the last block copy what is not mixed.

    Every step of the transform takes pairs that lie half a block apart and puts their sum and difference side by side:
    it turns the bits of the places round by one, and after all steps every place is where it was.
    """
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mixed = block < blocks
    place = tl.arange(0, BLOCK) + tl.where(mixed, skip + block * BLOCK, (block - blocks) * BLOCK)
    ok = place < tl.where(mixed, in_features, skip)
    channel = place
    if permutation is not None:
        channel = tl.load(permutation + place, ok, 0).to(tl.int32)
    source, target = channel, place
    if INVERSE:
        source, target = place, channel
    values = tl.load(x + token * in_features + source, ok, 0.0).to(tl.float32)
    turned = values
    for _ in tl.static_range(STEPS):
        a, b = tl.split(tl.trans(tl.reshape(turned, (2, BLOCK // 2))))
        turned = tl.reshape(tl.join(a + b, a - b), (BLOCK,))
    values = tl.where(mixed, turned * NORM, values)
    tl.store(y + token * in_features + target, values.to(y.dtype.element_ty), ok)
