"""Packed codes become tiles of weights in registers, in Triton (docs/kernels.md).

A tile of ``N`` rows is read as the words it is stored in (`lorq.core.packing`), each word once, and spread in
registers::

    1, 2, 4, 8 bits   a word holds 32 / bits codes
    3, 6 bits         three words a, b, c hold four fields of 24 bits, and a field holds 24 / bits codes:
                      a,  a >> 24 | b << 8,  b >> 16 | c << 16,  c >> 8
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
def _trellis_weights(packed, scale, ring, row, inside, k, in_features, BITS: constexpr,
                     WINDOW: constexpr):  # fmt: skip
    """Rows ``row``, columns ``k`` of trellis codes, float32; zero past the last of them.

    A window lies in two words, which the first-level cache holds for the rows that share them. ``ring`` tiles are a
    sequence.
    """
    tile, end = row // 16, (row % 16 + 1) * BITS
    word = (end - 1) // 16  # of the tile's strings, in which a window ends
    before = tl.where(tile % ring == 0, tile + ring - 1, tile - 1) * BITS + BITS - 1
    upper_at = tl.where(word == 0, before, tile * BITS + word - 1)
    ok = inside[:, None] & (k < in_features)[None, :]
    upper = tl.load(packed + upper_at[:, None] * in_features + k[None, :], ok, 0).to(tl.uint16, bitcast=True)
    lower = tl.load(packed + (tile * BITS + word)[:, None] * in_features + k[None, :], ok, 0).to(
        tl.uint16, bitcast=True
    )
    both = (upper.to(tl.uint32) << 16) | lower.to(tl.uint32)
    window = (both >> (16 * (word + 1) - end).to(tl.uint32)[:, None]) & ((1 << WINDOW) - 1)
    product = window * 0xC49087BF
    # Sums of two bytes in each half, then of both halves in the upper one.
    halves = (product & 0x00FF00FF) + ((product >> 8) & 0x00FF00FF)
    values = ((halves * 0x00010001) >> 16).to(tl.int32) - 510
    step = tl.load(scale + row, inside, 0.0).to(tl.float32) / 128
    return tl.where(ok, values.to(tl.float32) * step[:, None], 0.0)


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
