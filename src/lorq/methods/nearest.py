"""Rounding to nearest: the baseline that needs no calibration."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.checks import check_settings
from lorq.core.codes import Codes, LevelFormat, LevelGrid
from lorq.core.codes.gguf_blocks import TYPES
from lorq.core.problem import Problem
from lorq.core.rounding import clip, gguf_nearest, nearest, nearest_levels
from lorq.core.stats import InputStats, PreparedHessian
from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.methods.common import (
    SEARCHES,
    WIDTHS,
    Bits,
    GgufType,
    GroupSize,
    Search,
    assemble,
    gguf_choices,
    gguf_grid,
    layer_grid,
)  # fmt: skip


@dataclass(frozen=True)
class Nearest:
    """Round every weight to the nearest value of its group's grid.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: input columns that share a scale; -1 for one group per row.
        symmetric: no zero points. Always so on the normal-float grid.
        range_search: "none" takes each group's full range; "saturate" and "scale" look for the range with
            the least squared error of the weights. Both are one on the normal-float grid.
        grid: "integer", equally spaced values; "normal-float", quantiles of the normal distribution; or a block type of
            GGUF, with the least squared error of the weights, which says bits and groups by itself: the settings above
            do not matter.
    """

    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    range_search: Search = "none"
    grid: Literal["integer", "normal-float", GgufType] = "integer"

    scope: ClassVar[str] = "layer"
    needs_stats: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def choices(self) -> dict[str, tuple[Any, ...]]:
        """Widths, or GGUF types."""
        return gguf_choices(self.grid) if self.grid in TYPES else {"bits": WIDTHS["scalar"]}

    def solve(self, problem: Problem) -> dict[str, QuantizedWeight]:
        """Round each weight; statistics only serve the record."""
        return {name: self._solve(weight, problem.stats.get(name)) for name, weight in problem.weights.items()}

    def _solve(self, weight: Float[Tensor, "out in"], stats: InputStats | None) -> QuantizedWeight:
        if (blocks := gguf_grid(weight.shape[1], self.grid)) is not None:
            return assemble(weight, gguf_nearest(weight, blocks), None, stop="none", stats=stats)
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
        if (blocks := gguf_grid(in_, self.grid)) is not None:
            return LayerFormat(blocks)
        codes = layer_grid(in_, self.bits, self.group_size, self.symmetric)
        return LayerFormat(codes if self.grid == "integer" else LevelFormat(self.bits, self.grid, codes.group_size))
