"""LoRDS: a scale for every weight, low rank as a matrix, fitted to the weight and then to the block's output."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.checks import Range, check_settings
from lorq.core.codes import LevelCodes, LevelFormat, LevelGrid, LowRankScale, level_values, start_block
from lorq.core.descent import Descent, LossWeights, block_loss, minimise
from lorq.core.problem import BlockOutput, Problem
from lorq.core.rounding import gptq_levels
from lorq.core.scale_factors import (
    block_scales,
    fit_gradient,
    fit_least_squares,
    parity_rank,
    store_scale,
    truncated,
)
from lorq.core.stats import InputStats
from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.methods.common import Bits, Damping, GroupSize, Share, assemble, needed, preset

# What is tried of a block's covering scale before the fit: 1, 0.95, ... 0.3. Two bits want about half.
_SHARES = tuple(1 - i / 20 for i in range(15))


class ScaledLevels(torch.autograd.Function):
    """``V o (B A)`` with ``V = levels[codes]`` and B, A as float16 stores them.

    That rounding passes gradients on unchanged; with ``G`` the gradient of the product,

        dB = (G o V) A^T,    dA = B^T (G o V)

    Kept for the backward pass: the factors and the codes, a byte each.

    Source:
        LoRDS, arXiv:2601.22716, the gradients of its multiplicative fine-tuning.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, codes: Tensor, grid: LevelGrid) -> Tensor:
        left, right = left.to(torch.float16).to(left.dtype), right.to(torch.float16).to(right.dtype)
        ctx.grid = grid
        ctx.save_for_backward(left, right, codes)
        return (left @ right).mul_(level_values(codes, grid.kind, grid.bits, dtype=left.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        left, right, codes = ctx.saved_tensors
        slope = level_values(codes, ctx.grid.kind, ctx.grid.bits, dtype=left.dtype).mul_(gradients[0])
        return slope @ right.T, left.T @ slope, None, None


@dataclass(frozen=True)
class Refined:
    """What is learned of one layer while its codes stay: B and A over a unit, a power of two near their size.

    With the unit taken out, one learning rate serves layers of all sizes.
    """

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in"]
    unit: float
    start: LevelCodes

    @classmethod
    def of(cls, start: LevelCodes) -> "Refined":
        """Parameters with which `weight` is what ``start`` stores, exactly."""
        scale = start.scale
        assert isinstance(scale, LowRankScale)
        left, right = scale.left.float(), scale.right.float()
        size = float((left.square().mean() * right.square().mean()).sqrt().sqrt())
        unit = 2.0 ** round(math.log2(max(size, 2.0**-24)))
        left, right = ((part / unit).requires_grad_(True) for part in (left, right))
        return cls(left, right, unit, start)

    def weight(self) -> Float[Tensor, "out in"]:
        """W^, differentiable in the factors."""
        left, right = self.left * self.unit, self.right * self.unit
        weight = ScaledLevels.apply(left, right, self.start.codes, self.start.format.grid)
        assert isinstance(weight, Tensor)
        return weight

    @torch.no_grad()
    def rounded(self) -> LevelCodes:
        """The codes, under the factors that `weight` computes with."""
        left, right = ((part * self.unit).to(torch.float16) for part in (self.left, self.right))
        return replace(self.start, scale=LowRankScale(left, right))


@dataclass(frozen=True)
class LoRDS:
    """Round to fixed levels under a scale of low rank; then learn the scale against the block's output.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: the rank is such that scales take no more bits than one for each so many columns would; need not
            divide the width. -1 for one per row.
        rank: of the matrix of scales; -1 for the one of ``group_size``.
        grid: the levels: "normal-float", quantiles of the normal distribution; "integer", equally spaced.
        range_search: "scale" looks for the scale of each block that the fit starts from, "none" covers the block.
        weighting: what a weight's squared error costs in the fit: "diagonal", the mean square of its input; "none", 1.
        solver: of the fit: "least-squares" or "gradient".
        steps: of the fit: sweeps, or gradient steps.
        learning_rate: of gradient steps.
        rounding: how codes are chosen at last: "gptq" passes errors on to later columns.
        shrinkage: how far the Hessian moves towards its diagonal, 0 to 1.
        damping: share of the mean diagonal added to the diagonal.
        refine_steps: gradient steps on the scales of a whole block against its output, codes fixed; 0 leaves that out.
        refine_rate: of the first of these, relative to the factors' size; it falls to 0.
        batch: calibration windows of such a step, at most all.
        loss_weights: "equal" lets each token of the block's output count the same there, "plain" sums squares.
    """

    bits: Bits = 4
    group_size: GroupSize = 128
    rank: Annotated[int, Range(1, 1 << 16, "the one of group_size")] = -1
    grid: Literal["normal-float", "integer"] = "normal-float"
    range_search: Literal["none", "scale"] = "scale"
    weighting: Literal["none", "diagonal"] = "diagonal"
    solver: Literal["least-squares", "gradient"] = "least-squares"
    steps: Annotated[int, Range(0, 1_000_000)] = 10
    learning_rate: Annotated[float, Range(0, 1)] = 1e-3
    rounding: Literal["nearest", "gptq"] = "gptq"
    shrinkage: Share = 0.2
    damping: Damping = 0.01
    refine_steps: Annotated[int, Range(0, 1_000_000)] = 0
    refine_rate: Annotated[float, Range(0, 1)] = 1e-2
    batch: Annotated[int, Range(1, 1 << 16)] = 2
    loss_weights: LossWeights = "equal"

    block_settings: ClassVar[tuple[str, ...]] = ("refine_steps", "refine_rate", "batch", "loss_weights")

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def scope(self) -> str:
        """Layers are on their own unless scales are refined."""
        return "block" if self.refine_steps else "layer"

    @property
    def needs_stats(self) -> bool:
        """Only a plain fit with nearest codes does without."""
        return self.weighting != "none" or self.rounding == "gptq" or self.refine_steps > 0

    def solve(self, problem: Problem) -> dict[str, QuantizedWeight]:
        """Of each layer, fit the scale, choose the codes; in a block, then refine the scales of all together."""
        if problem.block is not None:
            return self._refine(problem, problem.block)
        return {name: self._solve_alone(w, problem.stats.get(name)) for name, w in problem.weights.items()}

    def _solve_alone(self, weight: Float[Tensor, "out in"], stats: InputStats | None) -> QuantizedWeight:
        return assemble(weight, self._rounded(weight, stats), None, stop="given", stats=stats)

    def _refine(self, problem: Problem, block: BlockOutput) -> dict[str, QuantizedWeight]:
        """Each layer with its own settings, but for those of the refinement, which are this object's.

        Raises:
            ArithmeticError: if the loss is not finite.

        Source:
            Ours: the loop of LRQ, arXiv:2407.11534, on the scales of LoRDS.
        """
        layers = {
            name: Refined.of(problem.methods.get(name, self)._rounded(weight, problem.stats.get(name)))
            for name, weight in problem.weights.items()
        }
        loss = block_loss(block, lambda: {name: layer.weight() for name, layer in layers.items()}, self.loss_weights)
        parameters = [part for layer in layers.values() for part in (layer.left, layer.right)]
        descent = Descent(self.refine_steps, self.refine_rate, self.batch)
        order = problem.generator(next(iter(layers)))
        outcome = minimise(parameters, loss, len(block.targets), descent, generator=order)
        note = f"block: {outcome}"
        return {
            name: assemble(weight, layers[name].rounded(), None, stop="given", stats=problem.stats[name], note=note)
            for name, weight in problem.weights.items()
        }

    def _rounded(self, weight: Float[Tensor, "out in"], stats: InputStats | None) -> LevelCodes:
        """Codes under a fitted scale. The codes are chosen under the factors as they are stored."""
        out, in_ = weight.shape
        grid, rank = LevelGrid(self.bits, self.grid), self._rank(out, in_)
        importance = weight.new_ones(in_)
        if self.weighting == "diagonal":
            diagonal = needed(stats).hessian.diagonal()
            # A channel that was never active still gets a scale.
            importance = (diagonal / diagonal.mean().clamp(min=1e-30)).clamp(min=1e-6)
        block = start_block(in_, rank)
        shares = _SHARES if self.range_search == "scale" else (1.0,)
        start = block_scales(weight, grid, block, importance=importance, shares=shares)
        left, right = truncated(start, in_, rank)
        if self.solver == "least-squares":
            left, right, _ = fit_least_squares(weight, left, right, grid, importance=importance, sweeps=self.steps)
        else:
            left, right, _ = fit_gradient(
                weight, left, right, grid, importance=importance, steps=self.steps, learning_rate=self.learning_rate
            )
        scale = store_scale(left, right)
        if self.rounding == "gptq":
            prepared = needed(stats).prepared(shrinkage=self.shrinkage, damping=self.damping)
            codes = gptq_levels(weight, scale.dense(), grid, upper=prepared.inverse_factor)
        else:
            codes = grid.encode(weight, scale.dense())
        return LevelCodes(codes.to(torch.uint8), scale, self._format(out, in_))

    def _rank(self, out: int, in_: int) -> int:
        """The rank of the scales of a layer of this shape.

        Raises:
            ValueError: if it exceeds the layer's sides.
        """
        if self.rank == -1:
            return min(out, in_, parity_rank(out, in_, in_ if self.group_size == -1 else self.group_size))
        if self.rank > min(out, in_):
            raise ValueError(
                f"rank of the scales must be at most min(out, in) = {min(out, in_)} for a layer of shape {(out, in_)}, "
                f"got {self.rank}; lower it, or take -1 for the one of group_size"
            )
        return self.rank

    def largest(self, out: int, in_: int) -> LayerFormat:
        """Every layer of this shape gets this format."""
        return LayerFormat(self._format(out, in_))

    def _format(self, out: int, in_: int) -> LevelFormat:
        return LevelFormat(self.bits, self.grid, in_, self._rank(out, in_))


@preset
class LoRDSPaper(LoRDS):
    """LoRDS with the settings of its paper and its authors' code; see LoRDS for what each one does.

    Looks at weights only.

    Source:
        LoRDS, arXiv:2601.22716, by the code of its line of work; the authors' own was not to be had. Deviations:

        - The best factors of the fit are kept, not the last, and the codes are chosen again under them as float16 has
          them; in the code they are those of the step before.
        - Scales may change sign, where the code clamps them or takes ``|B A|``: it costs no operation when the layer
          runs, and codes are the nearest under either sign.
        - Here are the paper's 500 steps, at the code's 1e-3 on the norm. A version of the code for PEFT balances the
          factors by a Hadamard matrix and does not refine them; others step at 1e-2 to 5e-2 on the mean square. Of a
          made-up matrix in NF4 0.85 of the start's error is left here, 0.79 at 1e-2, and 0.76 by ten sweeps of least
          squares, the default of `LoRDS`.
        - 3 bits have 8 NormalFloat levels, and budgets choose widths; the paper's 3, 2.5 and 2.25 bits mix layers of 4
          and 2.
    """

    range_search = "none"
    weighting = "none"
    solver = "gradient"
    steps = 500
    rounding = "nearest"
    refine_steps = 0
