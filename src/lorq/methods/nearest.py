"""Rounding to nearest: the baseline that needs no calibration."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.checks import check_settings
from lorq.core.codes import Codes, LevelFormat, LevelGrid
from lorq.core.problem import Problem
from lorq.core.rounding import clip, nearest, nearest_levels
from lorq.core.stats import InputStats, PreparedHessian
from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.methods.common import SEARCHES, Bits, GroupSize, Search, assemble, layer_grid


@dataclass(frozen=True)
class Nearest:
    """Round every weight to the nearest value of its group's grid.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: input columns that share a scale; -1 for one group per row.
        symmetric: no zero points. Always so on the normal-float grid.
        range_search: "none" takes each group's full range; "saturate" and "scale" look for the range with
            the least squared error of the weights. Both are one on the normal-float grid.
        grid: "integer", equally spaced values; "normal-float", quantiles of the normal distribution.
    """

    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    range_search: Search = "none"
    grid: Literal["integer", "normal-float"] = "integer"

    scope: ClassVar[str] = "layer"
    needs_stats: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings(self)

    def solve(self, problem: Problem) -> dict[str, QuantizedWeight]:
        """Round each weight; statistics only serve the record."""
        return {name: self._solve(weight, problem.stats.get(name)) for name, weight in problem.weights.items()}

    def _solve(self, weight: Float[Tensor, "out in"], stats: InputStats | None) -> QuantizedWeight:
        grid = layer_grid(weight.shape[1], self.bits, self.group_size, self.symmetric)
        search = SEARCHES[self.range_search]
        rounded: Codes
        plain: Codes | None = None
        if self.grid != "integer":
            shares = search.shares() if search else [1.0]
            rounded = nearest_levels(weight, LevelGrid(self.bits, self.grid), grid.group_size, shares=tuple(shares))
        elif search is None:
            rounded = plain = nearest(weight, None, grid)
        else:
            white = PreparedHessian(torch.eye(weight.shape[1], device=weight.device), damping=0.0)
            rounded = clip(weight, white, grid, search)
        return assemble(weight, rounded, None, stop="none", stats=stats, plain=plain)

    def largest(self, out: int, in_: int) -> LayerFormat:
        """Every layer gets this format."""
        codes = layer_grid(in_, self.bits, self.group_size, self.symmetric)
        return LayerFormat(codes if self.grid == "integer" else LevelFormat(self.bits, self.grid, codes.group_size))
