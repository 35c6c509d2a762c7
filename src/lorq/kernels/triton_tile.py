"""The kernels for CUDA devices, in Triton: tiles of weights (`lorq.kernels.triton_codes`), and their products.

Every kernel walks the columns in tiles of ``K``. The weight is the left factor of ``weight x^T``: tensor cores of sm_90
take their left factor from registers, where the weight is made. Given up: two tokens cost as much as sixteen do.
"""

from typing import no_type_check

from lorq.kernels.triton_codes import (
    _fields,
    _left_tile,
    _over,
    _repeated,
    _steps,
    _stored,
    _trellis_weights,
    _weights,
    constexpr,
    jit,
    tl,
)


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
    and its input is multiplied by ``2^(80 - position)``. The products of a field are summed as they are, then scaled,
    and the zero point is taken from the sum of the field's inputs. Inputs of 2^48 (3e14) and more are so made infinite
    ones, and what is below 2^-57 (7e-18) loses bits.
    """
    SIZE: tl.constexpr = 32 if 32 % BITS == 0 else 24
    PER: tl.constexpr = SIZE // BITS
    F: tl.constexpr = K // PER
    PARTS: tl.constexpr = 1 if GROUP % K == 0 else K // GROUP if K % GROUP == 0 else F
    groups = in_features // GROUP
    position = BITS * (tl.arange(0, K) % (PER // 2))
    mask = (((1 << BITS) - 1) << position).to(tl.uint32)
    power = ((207 - position) << 23).to(tl.float32, bitcast=True)
    sums = tl.zeros((N, F), tl.float32)
    for k0 in tl.range(first, last, K, num_stages=STAGES):
        k = k0 + tl.arange(0, K)
        fields = _fields(packed, row, inside, k0, words, BITS, N, K)
        values = tl.load(x + k, k < in_features, 0.0).to(tl.float32)
        halves = tl.reshape(tl.join(fields, fields >> (SIZE // 2)), (N, 2 * F))
        codes = _repeated(halves, PER // 2, N, K) & mask[None, :]
        products = codes.to(tl.float32, bitcast=True) * (values * power)[None, :]
        step, start = _steps(scale, zero, row, inside, k0, groups, BITS, GROUP, K, PARTS)
        sums += tl.sum(tl.reshape(products, (N, F, PER)), 2) * _over(step * 2.0**69, PARTS, N, F)
        sums -= tl.sum(tl.reshape(values, (F, PER)), 1)[None, :] * _over(start, PARTS, N, F)
    return tl.sum(sums, 1)[:, None]


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
def trellis_products(x, to, z, left, left_scale, packed, scale, ring, tokens, out_features, in_features, rank, span,
                     BITS: constexpr, WINDOW: constexpr, E4M3: constexpr, WHOLE: constexpr, T: constexpr, N: constexpr,
             K: constexpr, R: constexpr, STAGES: constexpr):  # fmt: skip
    """``to[split, token, row]``, sums over one span of the columns; of all of them with ``left z^T`` (``WHOLE``).

    For few tokens and trellis codes; ``to`` is the output itself where there is one span.
    """
    row, split, token = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1), tl.arange(0, T)
    inside, real = row < out_features, token < tokens
    first = split * span
    last = tl.minimum(first + span, in_features)
    if T == 1:
        sums = tl.zeros((N, K), tl.float32)
    else:
        sums = tl.zeros((N, T), tl.float32)
    for k0 in tl.range(first, last, K, num_stages=STAGES):
        k = k0 + tl.arange(0, K)
        w = _trellis_weights(packed, scale, ring, row, inside, k, in_features, BITS, WINDOW)
        if T == 1:
            sums += w * tl.load(x + k, k < in_features, 0.0).to(tl.float32)[None, :]
        else:
            from_ = x + token[:, None] * in_features + k[None, :]
            values = tl.load(from_, real[:, None] & (k < in_features)[None, :], 0.0)
            sums = tl.dot(w.to(values.dtype), tl.trans(values), sums, input_precision="ieee")
    if T == 1:
        total = tl.sum(sums, 1)[:, None]
    else:
        total = sums
    if WHOLE and left is not None:
        total = _low_rank(total, left, left_scale, z, token * rank, real, row, inside, rank, E4M3, T, R)
    at = to + (split * tokens + token)[None, :] * out_features + row[:, None]
    tl.store(at, total.to(to.dtype.element_ty), inside[:, None] & real[None, :])


@jit
@no_type_check
def trellis_decode(to, packed, scale, ring, first, last, in_features, BITS: constexpr, WINDOW: constexpr, N: constexpr,
           K: constexpr):  # fmt: skip
    """Rows ``first .. last - 1`` of the weight into ``to``, (rows, in), in its dtype."""
    row, k = first + tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1) * K + tl.arange(0, K)
    inside = row < last
    w = _trellis_weights(packed, scale, ring, row, inside, k, in_features, BITS, WINDOW)
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


@jit
@no_type_check
def experts(x, y, chosen, order, plan, packed, scale, zero, levels, book, book_scale, left, left_scale, z, cells,
            places, tiles, count, out_features, in_features, words, zero_size, grid_rows, rank, BITS: constexpr,
            VECTOR: constexpr, GROUP: constexpr, BOOK_ROWS: constexpr, BOOK_COLUMNS: constexpr, E4M3: constexpr,
            T: constexpr, N: constexpr, K: constexpr, R: constexpr, STAGES: constexpr):  # fmt: skip
    """A tile of ``y^T = weight x^T + left z^T``, (N, T), for pairs of one expert, over all columns.

    Pair ``p`` reads row ``p // places`` of ``x``. The plan tells each tile its expert and which pairs of the order are
    its own (`lorq.kernels.triton_experts.plan_tiles`); tiles of one pair need none.
    """
    tile, row = tl.program_id(0), tl.program_id(1) * N + tl.arange(0, N)
    inside = row < out_features
    if plan is None:
        expert = tl.load(chosen + tile).to(tl.int32)
        pair = tile.to(tl.int64) + tl.arange(0, T)
        real = pair >= 0
    else:
        expert = tl.load(plan + tile)
        at = tl.load(plan + tiles + tile) + tl.arange(0, T)
        real = at < tl.load(plan + 2 * tiles + tile)
        pair = tl.load(order + at, real, 0)
    if expert >= count:  # a tile that nobody needs, or a pair without an expert
        return
    token = pair // places
    own = expert.to(tl.int64)
    packed += own * (out_features * words)
    scale += own * (out_features * (in_features // GROUP))
    if zero is not None:
        zero += own * zero_size
    if book is not None:
        books = (out_features // BOOK_ROWS) * (in_features // BOOK_COLUMNS)
        book += own * (books << (BITS * VECTOR))
        book_scale += own * books
    sums = _sums(
        x, token, real, packed, scale, zero, levels, None, None, book, book_scale, row, inside, 0, in_features,
        in_features, words, 0, BITS, VECTOR, GROUP, BOOK_ROWS, BOOK_COLUMNS, 0, T, N, K, STAGES,
    )  # fmt: skip
    if left is not None:
        grid_row = tl.load(cells + 2 * expert).to(tl.int32)
        grid_column = tl.load(cells + 2 * expert + 1).to(tl.int32)
        scales = left_scale
        if left_scale is not None:
            scales = left_scale + grid_column * rank
        sums = _low_rank(
            sums, left + grid_column * out_features * rank, scales, z, (token * grid_rows + grid_row) * rank, real,
            row, inside, rank, E4M3, T, R,
        )  # fmt: skip
    to = y + pair[None, :] * out_features + row[:, None]
    tl.store(to, sums.to(y.dtype.element_ty), inside[:, None] & real[None, :])
