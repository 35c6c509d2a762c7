"""Rounding to nearest, and the value that every rounding returns."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.grids import IntGrid, LevelGrid
from lorq.core.scale_factors import LowRankScale, block_scales


@dataclass(frozen=True)
class Rounded:
    """Codes and the grid they are on, all float32 holding whole numbers but for the scale.

    Attributes:
        codes: (out, in).
        scale: (out, groups), exactly representable in float16.
        zero_point: (out, groups).
        grid: bits, group size, symmetry.
    """

    codes: Float[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero_point: Float[Tensor, "out groups"]
    grid: IntGrid

    def dense(self) -> Float[Tensor, "out in"]:
        """``(codes - zero_point) * scale``."""
        grid = self.grid
        return grid.decode(grid.grouped(self.codes), self.scale.unsqueeze(-1), self.zero_point.unsqueeze(-1)).flatten(1)

    @property
    def plain_grid(self) -> IntGrid:
        """What plain rounding to nearest would use."""
        return self.grid

    def stored(self) -> dict[str, Any]:
        """The fields of `lorq.core.weight.QuantizedWeight` that this fills."""
        return {
            "codes": self.codes.to(torch.uint8),
            "scale": self.scale.to(torch.float16),
            "zero_point": None if self.grid.symmetric else self.zero_point.to(torch.uint8),
            "bits": self.grid.bits,
        }


@dataclass(frozen=True)
class LevelRounded:
    """Codes of fixed levels and the scale they are under.

    Attributes:
        codes: (out, in), float32 holding whole numbers.
        scale: of each group, (out, groups), exactly representable in float16; or one of low rank for each weight.
        grid: the levels.
        group_size: columns of a group; for a scale of low rank, of the groups it is measured against.
    """

    codes: Float[Tensor, "out in"]
    scale: Float[Tensor, "out groups"] | LowRankScale
    grid: LevelGrid
    group_size: int

    def dense(self) -> Float[Tensor, "out in"]:
        """``levels[codes] * scale``."""
        if isinstance(self.scale, LowRankScale):
            return self.grid.decode(self.codes, self.scale.dense())
        groups = self.codes.unflatten(1, (-1, self.group_size))
        return self.grid.decode(groups, self.scale.unsqueeze(-1)).flatten(1)

    @property
    def plain_grid(self) -> IntGrid:
        """What plain rounding to nearest would use: equally spaced values, a range for each group."""
        return IntGrid(self.grid.bits, self.group_size, symmetric=True)

    def stored(self) -> dict[str, Any]:
        """The fields of `lorq.core.weight.QuantizedWeight` that this fills."""
        low_rank = isinstance(self.scale, LowRankScale)
        return {
            "codes": self.codes.to(torch.uint8),
            "scale": None if isinstance(self.scale, LowRankScale) else self.scale.to(torch.float16),
            "zero_point": None,
            "bits": self.grid.bits,
            "grid": self.grid.kind,
            "scale_factors": self.scale if low_rank else None,
        }


def encode_on(
    target: Float[Tensor, "out in"],
    scale: Float[Tensor, "out groups"],
    zero_point: Float[Tensor, "out groups"],
    grid: IntGrid,
) -> Rounded:
    """Nearest codes of ``target`` on a given grid."""
    codes = grid.encode(grid.grouped(target), scale.unsqueeze(-1), zero_point.unsqueeze(-1)).flatten(1)
    return Rounded(codes, scale, zero_point, grid)


def nearest(
    target: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"] | None,
    grid: IntGrid,
    *,
    search: object = None,
    damping: float = 0.0,
) -> Rounded:
    """Each group's full range, each weight to its nearest value. Looks at no inputs.

    Example:
        >>> nearest(torch.tensor([[-1.0, 0.4, 1.9, 2.0]]), None, IntGrid(bits=2, group_size=4)).dense()
        tensor([[-1.,  0.,  2.,  2.]])
    """
    return encode_on(target, *grid.fit(target), grid)


def nearest_levels(
    target: Float[Tensor, "out in"],
    grid: LevelGrid,
    group_size: int,
    *,
    shares: tuple[float, ...] = (1.0,),
) -> LevelRounded:
    """Nearest levels under one scale for each group, see `lorq.core.scale_factors.block_scales`.

    Args:
        target: what is to be rounded.
        grid: the levels.
        group_size: columns that share a scale; must divide the width.
        shares: of the range that covers the group, to try.

    Raises:
        ValueError: if a scale exceeds what float16 holds.

    Source:
        NormalFloat of QLoRA, arXiv:2305.14314, without its double quantization.
    """
    scale = block_scales(target, grid, group_size, shares=shares)
    largest = float(scale.max())
    if not largest <= torch.finfo(torch.float16).max:
        raise ValueError(
            f"a scale must fit float16 (at most 65504), got {largest:.4g}; "
            "the weights are too large to be stored, check the checkpoint"
        )
    scale = scale.to(torch.float16).to(target.dtype)
    codes = grid.encode(target.unflatten(1, (-1, group_size)), scale.unsqueeze(-1)).flatten(1)
    return LevelRounded(codes, scale, grid, group_size)
