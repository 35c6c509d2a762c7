"""Rounding to nearest."""

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.codes import IntCodes, IntGrid, LevelCodes, LevelFormat, LevelGrid
from lorq.core.half import stored_half
from lorq.core.scale_factors import block_scales
from lorq.core.stats import PreparedHessian

# Rows are rounded in slices of about this many weights, whose temporaries stay in the cache.
_SLICE = 1 << 18


def encode_on(
    target: Float[Tensor, "out in"],
    scale: Float[Tensor, "out groups"],
    zero_point: Float[Tensor, "out groups"],
    grid: IntGrid,
) -> IntCodes:
    """Nearest codes of ``target`` on a given grid."""
    codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    rows = max(1, _SLICE // target.shape[1])
    parts = (grid.grouped(target), scale.unsqueeze(-1), zero_point.unsqueeze(-1))
    for own, *given in zip(codes.split(rows), *(part.split(rows) for part in parts), strict=True):
        own.copy_(grid.encode(*given).flatten(1))
    return IntCodes.of(codes, scale, zero_point, grid)


def nearest(
    target: Float[Tensor, "out in"],
    hessian: PreparedHessian | None,
    grid: IntGrid,
    search: object = None,
) -> IntCodes:
    """Each group's full range, each weight to its nearest value. Looks at no inputs and searches no ranges.

    Example:
        >>> nearest(torch.tensor([[-1.0, 0.4, 1.9, 2.0]]), None, IntGrid(bits=2, group_size=4)).decode()
        tensor([[-1.,  0.,  2.,  2.]])
    """
    return encode_on(target, *grid.fit(target), grid)


def nearest_levels(
    target: Float[Tensor, "out in"],
    grid: LevelGrid,
    group_size: int,
    *,
    shares: tuple[float, ...] = (1.0,),
) -> LevelCodes:
    """Nearest levels under one scale for each group, as `lorq.core.scale_factors.block_scales` finds it.

    Raises:
        ValueError: if a scale exceeds what float16 holds.

    Source:
        NormalFloat of QLoRA, arXiv:2305.14314, without its double quantization.
    """
    stored = stored_half(block_scales(target, grid, group_size, shares=shares))
    scale = stored.to(target.dtype)
    codes = grid.encode(target.unflatten(1, (-1, group_size)), scale.unsqueeze(-1)).flatten(1)
    return LevelCodes(codes.to(torch.uint8), stored, LevelFormat(grid.bits, grid.kind, group_size))
