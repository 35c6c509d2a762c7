"""Rounding to nearest, and the value that every rounding returns."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.grids import IntGrid


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
        """The fields of `lorq.weight.QuantizedWeight` that this fills."""
        return {
            "codes": self.codes.to(torch.uint8),
            "scale": self.scale.to(torch.float16),
            "zero_point": None if self.grid.symmetric else self.zero_point.to(torch.uint8),
            "bits": self.grid.bits,
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
