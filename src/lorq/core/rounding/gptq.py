"""GPTQ: round one column at a time and let the columns to come make up for the error."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.codes import IntCodes, IntGrid, LevelGrid
from lorq.core.rounding.clip import RangeSearch, search_range, search_shares
from lorq.core.stats import PreparedHessian

# Columns whose mutual updates are done one by one; all later columns are updated once per block, as one
# matrix product.
_BLOCK = 128


def gptq(
    target: Float[Tensor, "out in"],
    hessian: PreparedHessian,
    grid: IntGrid,
    search: RangeSearch | None = None,
) -> IntCodes:
    """Codes that keep ``tr[(T - Q) H (T - Q)^T]`` small by passing errors on.

    With ``H^-1 = U^T U``, ``U`` upper triangular, column ``i`` is rounded to ``q_i`` and every later column
    ``j`` moves by ``- (t_i - q_i) U_ij / U_ii``. Where a group begins, its range is fitted to what earlier
    errors have made of its columns.

    Args:
        target: what is to be rounded; unchanged.
        hessian: of the inputs; damped in ``U``, as it is for the range search.
        search: range search for each group; None takes the full range.

    Raises:
        ValueError: if the damped Hessian is not positive definite.

    Source:
        GPTQ, arXiv:2210.17323, with lazy blocks. Deviation: the range search inside, on the group's block of
        the Hessian.
    """
    width, size = target.shape[1], grid.group_size
    grid.grouped(target)  # refuses a group size that does not divide
    # (in, out): a column of the weight is contiguous. Of a single row `contiguous` would be the target itself.
    columns = target.T.clone(memory_format=torch.contiguous_format)
    codes = torch.empty_like(columns, dtype=torch.uint8)
    scale = columns.new_empty(width // size, columns.shape[1])
    zero = torch.empty_like(scale)
    upper, matrix = hessian.inverse_factor, hessian.matrix
    how = grid.bits, grid.symmetric, size, search.shares() if search else [], bool(search and search.mode == "saturate")
    for start, end in column_blocks(width, size):
        groups, block = slice(start // size, -(-end // size)), slice(start, end)
        if wide := size > _BLOCK:  # a group of several blocks is searched at its first
            if start % size == 0:
                group = slice(start, start + size)
                part = columns[group].T
                s, z = search_range(part, matrix[group, group], grid, search) if search else grid.fit(part)
                scale[groups], zero[groups] = s.T, z.T
        given = (scale[groups], zero[groups]) if wide else (scale[:0], zero[:0])
        codes[block], own_scale, own_zero, errors = encode_integers(
            columns[block], upper[block, block].contiguous(), matrix[block, block].contiguous(), *given, *how
        )
        if not wide:
            scale[groups], zero[groups] = own_scale, own_zero
        columns[end:].addmm_(upper[block, end:].T, errors, alpha=-1)
    return IntCodes.of(codes.T.contiguous(), scale.T.contiguous(), zero.T.contiguous(), grid)


def encode_integers_reference(
    columns: Tensor, upper: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool,
    group_size: int, shares: list[float], saturate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes of a block of columns, each passing its error on to the later ones of the block.

    Args:
        columns: (count, rows) float32: whole groups, or a part of one.
        upper, hessian: (count, count) float32, the block's own part of the factor of the inverse Hessian and of the
            Hessian, of which the groups' blocks are read.
        scale, zero: (groups, rows) float32, where they are known; else without groups, and each group's range is
            fitted when its turn comes.
        shares, saturate: of `RangeSearch`; no shares take the full range.

    Returns:
        The codes (count, rows), uint8; scale and zero point (groups, rows); and what each column missed, when its turn
        came, over the diagonal of ``upper``.
    """
    grid, columns = IntGrid(bits, group_size, symmetric), columns.clone()
    count, rows = columns.shape
    codes, errors = torch.empty_like(columns, dtype=torch.uint8), torch.empty_like(columns)
    groups, known = -(-count // group_size), len(scale) > 0
    scale, zero = (t.clone() if known else columns.new_empty(groups, rows) for t in (scale, zero))

    def encode(i: int, column: Tensor) -> tuple[Tensor, Tensor]:
        group = i // group_size
        if i % group_size == 0 and not known:
            own = slice(i, i + group_size)
            part = columns[own].T
            s, z = search_shares(part, hessian[own, own], grid, shares, saturate) if shares else grid.fit(part)
            scale[group], zero[group] = s[:, 0], z[:, 0]
        code = grid.encode(column, scale[group], zero[group])
        return code, grid.decode(code, scale[group], zero[group])

    feed_back_block(columns, codes, errors, upper, encode)
    return codes, scale, zero, errors


# The function keeps its name, as the kernels' reference.
encode_integers = torch.library.custom_op("lorq::encode_integers", encode_integers_reference, mutates_args=())


def gptq_levels(
    target: Float[Tensor, "out in"],
    scale: Float[Tensor, "out in"],
    grid: LevelGrid,
    *,
    upper: Float[Tensor, "in in"],
) -> Float[Tensor, "out in"]:
    """Codes, as floats, on fixed levels under a given scale of each weight, by the same passing on of errors.

    Args:
        target: what is to be rounded; unchanged.
        scale: of each weight, of either sign.
        upper: ``U`` of `gptq`, that is `lorq.core.stats.PreparedHessian.inverse_factor`; a diagonal one gives
            nearest codes.

    Source:
        GPTQ, arXiv:2210.17323; the scale is there before the first column, so that nothing is fitted on the way.
    """
    columns, scales = target.T.clone(memory_format=torch.contiguous_format), scale.T.contiguous()
    codes = torch.empty_like(columns)

    def encode(i: int, column: Tensor) -> tuple[Tensor, Tensor]:
        code = grid.encode(column, scales[i])
        return code, grid.decode(code, scales[i])

    width = len(columns)
    feed_back(columns, codes, upper, column_blocks(width, width), encode)
    return codes.T.contiguous()


def feed_back(
    columns: Float[Tensor, "in out"],
    codes: Float[Tensor, "in out"],
    upper: Float[Tensor, "in in"],
    blocks: Iterator[tuple[int, int]],
    encode: Callable[[int, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Round the weight's columns one by one, in place in ``codes``; ``columns`` become what was rounded.

    ``encode`` makes a column's codes of its number and content, and what they stand for.
    """
    for start, end in blocks:
        block = slice(start, end)
        errors = columns.new_empty(end - start, columns.shape[1])

        def own(i: int, column: Tensor, start: int = start) -> tuple[Tensor, Tensor]:
            return encode(start + i, column)

        feed_back_block(columns[block], codes[block], errors, upper[block, block], own)
        columns[end:].addmm_(upper[block, end:].T, errors, alpha=-1)


def feed_back_block(
    columns: Float[Tensor, "count out"],
    codes: Tensor,
    errors: Float[Tensor, "count out"],
    upper: Float[Tensor, "count count"],
    encode: Callable[[int, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """`feed_back` within a block; ``errors`` become what each column missed over the diagonal of ``upper``."""
    diagonal = upper.diagonal().tolist()
    for i, column in enumerate(columns.unbind()):  # views, cheaper to make at once
        codes[i], value = encode(i, column)
        error = torch.sub(column, value, out=errors[i]).div_(diagonal[i])
        columns[i + 1 :].addr_(upper[i, i + 1 :], error, alpha=-1)


def column_blocks(width: int, size: int) -> Iterator[tuple[int, int]]:
    """Blocks of at most ``_BLOCK`` columns: several whole groups, or a part of one group.

    So every group has received all earlier errors when its range is fitted at its first column.
    """
    whole = (_BLOCK // size) * size  # several small groups in one block
    step = whole if whole else size
    for start in range(0, width, step):
        for inner in range(start, min(start + step, width), _BLOCK):
            yield inner, min(inner + _BLOCK, start + step, width)
