"""GPTQ: round one column at a time and let the columns to come make up for the error."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.codes import IntCodes, IntGrid, LevelGrid
from lorq.core.rounding.clip import RangeSearch, search_range
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
    codes = torch.empty_like(columns)
    scale = columns.new_empty(width // size, columns.shape[1])
    zero = torch.empty_like(scale)

    def encode(i: int, column: Tensor) -> tuple[Tensor, Tensor]:
        group = i // size
        if i % size == 0:
            part = columns[i : i + size].T
            inner = hessian.matrix[i : i + size, i : i + size]
            s, z = search_range(part, inner, grid, search) if search else grid.fit(part)
            scale[group], zero[group] = s[:, 0], z[:, 0]
        s, z = scale[group], zero[group]
        code = grid.encode(column, s, z)
        return code, grid.decode(code, s, z)

    feed_back(columns, codes, hessian.inverse_factor, column_blocks(width, size), encode)
    return IntCodes.of(codes.T.contiguous(), scale.T.contiguous(), zero.T.contiguous(), grid)


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
    diagonal = upper.diagonal().tolist()
    for start, end in blocks:
        errors = columns.new_empty(end - start, columns.shape[1])
        rows = columns[start:end].unbind()  # views, cheaper to make at once
        for i, column in enumerate(rows, start):
            codes[i], value = encode(i, column)
            error = torch.sub(column, value, out=errors[i - start]).div_(diagonal[i])
            columns[i + 1 : end].addr_(upper[i, i + 1 : end], error, alpha=-1)
        columns[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)


def column_blocks(width: int, size: int) -> Iterator[tuple[int, int]]:
    """Blocks of at most ``_BLOCK`` columns: several whole groups, or a part of one group.

    So every group has received all earlier errors when its range is fitted at its first column.
    """
    whole = (_BLOCK // size) * size  # several small groups in one block
    step = whole if whole else size
    for start in range(0, width, step):
        for inner in range(start, min(start + step, width), _BLOCK):
            yield inner, min(inner + _BLOCK, start + step, width)
