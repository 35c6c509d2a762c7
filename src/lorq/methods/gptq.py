"""GPTQ: error feedback with token-weighted, shrunk Hessians and range search; the calibrated baseline."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from lorq.core import rounding
from lorq.core.checks import check_settings
from lorq.core.codes import Codes, GgufGrid, IntGrid
from lorq.core.problem import Problem
from lorq.core.stats import InputStats
from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.methods.common import (
    SEARCHES,
    WIDTHS,
    Bits,
    Damping,
    GgufType,
    GroupSize,
    Search,
    Share,
    assemble,
    gguf_choices,
    gguf_grid,
    layer_grid,
    needed,
)  # fmt: skip


@dataclass(frozen=True)
class GPTQ:
    """Round column by column, later columns making up for the error.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: input columns that share a scale; -1 for one group per row.
        symmetric: no zero points.
        range_search: how each group's range is found: "none" is the full range, as in the paper.
        shrinkage: how far the Hessian moves towards its diagonal, 0 to 1.
        damping: share of the mean diagonal added to the diagonal.
        grid: "integer", equally spaced values; or a block type of GGUF, which llama.cpp decodes to the very same
            weights: it says bits and groups by itself, and ``bits``, ``group_size``, ``symmetric`` and
            ``range_search`` do not matter.
    """

    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    range_search: Search = "scale"
    shrinkage: Share = 0.2
    damping: Damping = 0.01
    grid: Literal["integer", GgufType] = "integer"

    scope: ClassVar[str] = "layer"
    needs_stats: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def choices(self) -> dict[str, tuple[Any, ...]]:
        """Widths, or GGUF types."""
        return {"bits": WIDTHS["scalar"]} if self.grid == "integer" else gguf_choices(self.grid)

    def solve(self, problem: Problem) -> dict[str, QuantizedWeight]:
        """Round each weight under its inputs' Hessian."""
        return {name: self._solve(weight, problem.stats.get(name)) for name, weight in problem.weights.items()}

    def _solve(self, weight: Float[Tensor, "out in"], stats: InputStats | None) -> QuantizedWeight:
        stats = needed(stats)
        hessian = stats.prepared(shrinkage=self.shrinkage, damping=self.damping)
        grid = self._codes(weight.shape[1])
        rounded: Codes
        if isinstance(grid, GgufGrid):
            rounded = rounding.gguf(weight, hessian, grid)
        else:
            rounded = rounding.gptq(weight, hessian, grid, SEARCHES[self.range_search])
        return assemble(weight, rounded, None, stop="none", stats=stats)

    def largest(self, out: int, in_: int) -> LayerFormat:
        """Every layer gets this format."""
        return LayerFormat(self._codes(in_))

    def _codes(self, in_: int) -> IntGrid | GgufGrid:
        return gguf_grid(in_, self.grid) or layer_grid(in_, self.bits, self.group_size, self.symmetric)
