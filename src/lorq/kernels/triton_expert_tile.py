"""The kernel of packed experts for CUDA devices: the tiles of `lorq.kernels.triton_tile`, each of one expert."""

from typing import no_type_check

from lorq.kernels.triton_tile import _low_rank, _sums, constexpr, jit, tl


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
