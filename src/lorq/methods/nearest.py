"""Rounding to nearest: the baseline that needs no calibration."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.methods.common import SEARCHES, assemble, check_choice, check_grid, layer_grid, layer_group
from lorq.rounding import clip, nearest
from lorq.stats import InputStats
from lorq.weight import LayerFormat, QuantizedWeight


@dataclass(frozen=True)
class Nearest:
    """Round every weight to the nearest value of its group's grid.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: input columns that share a scale; -1 for one group per row.
        symmetric: no zero points.
        range_search: "none" takes each group's full range; "saturate" and "scale" look for the range with
            the least squared error of the weights.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    range_search: Literal["none", "saturate", "scale"] = "none"

    scope: ClassVar[str] = "layer"
    needs_stats: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size)
        check_choice("range_search", self.range_search, SEARCHES)

    def solve(
        self, weight: Float[Tensor, "out in"], stats: InputStats | None, *, generator: torch.Generator
    ) -> QuantizedWeight:
        """Round ``weight``; ``stats`` only serve the record."""
        grid = layer_grid(weight.shape[1], bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)
        search = SEARCHES[self.range_search]
        if search is None:
            rounded = nearest(weight, None, grid)
        else:
            rounded = clip(weight, torch.eye(weight.shape[1], device=weight.device), grid, search=search)
        return assemble(weight, rounded, None, stop="none", hessian=None if stats is None else stats.hessian)

    def largest(self, out: int, in_: int) -> LayerFormat:
        """Every layer gets this format."""
        return LayerFormat(self.bits, layer_group(in_, self.group_size), self.symmetric)
