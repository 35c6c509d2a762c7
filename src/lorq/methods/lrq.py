"""LRQ: what each weight is divided by before it is rounded, learned against the output of a whole decoder block."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.checks import Range, check_settings
from lorq.core.codes import IntCodes, IntGrid
from lorq.core.descent import Descent, LossWeights, block_loss, layer_loss, minimise
from lorq.core.half import LARGEST_HALF, SMALLEST_SCALE
from lorq.core.problem import BlockOutput, Problem
from lorq.core.rounding import clip, nearest
from lorq.core.stats import InputStats, PreparedHessian
from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.methods.common import SEARCHES, Bits, GroupSize, Search, assemble, layer_grid, needed, preset


class FakeQuantize(torch.autograd.Function):
    """Quantize a weight and decode it again.

        W^ = s (q - z),    q = clamp(round(W / (s e) + z), 0, 2^bits - 1),    e = exp(E)

    The scale ``s`` is ``exp`` of its logarithm rounded to float16, as it is stored. Both roundings pass gradients on
    unchanged; with ``M`` for what lies inside the range,

        dW^ / dE = - (W / e) M,    dW^ / d log s = W^ - (W / e) M,  summed over the group

    One operation instead of a dozen: the backward pass keeps two matrices.

    Source:
        LRQ, arXiv:2407.11534, eq. 2 with the straight-through estimator. That the scale is float16 inside is ours: the
        paper's fake-quantized weights are stored as floats.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, exponent: Tensor, log_scale: Tensor, zero_point: Tensor, grid: IntGrid
    ) -> Tensor:
        scaled = torch.exp(-exponent).mul_(weight)  # W / e
        scale = stored_scale(log_scale)
        s, z = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
        codes = (grid.grouped(scaled) / s).add_(z).round_()
        inside = (codes >= 0) & (codes <= grid.top)
        decoded = codes.clamp_(0, grid.top).sub_(z).mul_(s).flatten(1)
        scaled.mul_(inside.flatten(1))
        ctx.grid = grid
        ctx.save_for_backward(scaled, decoded)
        return decoded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scaled, decoded = ctx.saved_tensors
        gradient = gradients[0]
        of_scale = ctx.grid.grouped((decoded - scaled).mul_(gradient)).sum(-1)
        return None, (scaled * gradient).neg_(), of_scale, None, None


def stored_scale(log_scale: Tensor) -> Tensor:
    """``exp`` of the logarithms, as float16 has it; never zero, never infinite."""
    return log_scale.exp().clamp(SMALLEST_SCALE, LARGEST_HALF).to(torch.float16).to(log_scale.dtype)


@dataclass(frozen=True)
class Scaling:
    """What is learned of one layer; thrown away once the codes are made, but for the scale.

        E = L U + r + c  (low-rank),    E = S + r  (full)

    Attributes:
        log_scale: logarithm of each group's scale.
        zero_point: of each group; stays as it is.
        rows: r.
        columns: c; None with a full S.
        left: L; or S, where there is no ``right``.
        right: U, or None.
    """

    weight: Float[Tensor, "out in"]
    log_scale: Float[Tensor, "out groups"]
    zero_point: Float[Tensor, "out groups"]
    grid: IntGrid
    rows: Float[Tensor, "out 1"]
    columns: Float[Tensor, "1 in"] | None
    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in"] | None

    @classmethod
    def start(
        cls, weight: Float[Tensor, "out in"], initial: IntCodes, *, rank: int | None, generator: torch.Generator
    ) -> "Scaling":
        """Parameters with which `quantized` is ``initial``, exactly: E is 0.

        Args:
            initial: rounding to nearest of W on some grid.
            rank: of L U; None for a full S.
            generator: of U, which is uniform within ``+- 1 / sqrt(in)`` while L is 0 (Kaiming's with a = sqrt 5).
        """
        (out, in_), zeros = weight.shape, weight.new_zeros
        left, right, columns = zeros(out, in_), None, None
        if rank is not None:
            bound = 1 / math.sqrt(in_)
            left, columns = zeros(out, rank), zeros(1, in_)
            right = torch.rand(rank, in_, generator=generator, device=weight.device, dtype=weight.dtype)
            right = right.mul_(2 * bound).sub_(bound)
        log_scale, zero_point = initial.scale.to(weight.dtype).log(), initial.zero_points(weight.dtype)
        found = cls(weight, log_scale, zero_point, initial.format, zeros(out, 1), columns, left, right)
        for parameter in found.parameters():
            parameter.requires_grad_(True)
        return found

    def parameters(self) -> list[Tensor]:
        """What is learned."""
        learned = (self.log_scale, self.rows, self.columns, self.left, self.right)
        return [tensor for tensor in learned if tensor is not None]

    def exponent(self) -> Float[Tensor, "out in"]:
        """E."""
        if self.right is None:
            return self.left + self.rows
        assert self.columns is not None
        return torch.addmm(self.rows + self.columns, self.left, self.right)

    def quantized(self) -> Float[Tensor, "out in"]:
        """W^, differentiable in the parameters."""
        weight = FakeQuantize.apply(self.weight, self.exponent(), self.log_scale, self.zero_point, self.grid)
        assert isinstance(weight, Tensor)
        return weight

    @torch.no_grad()
    def rounded(self) -> IntCodes:
        """The codes and scales that `quantized` decodes."""
        scale = stored_scale(self.log_scale)
        scaled = self.grid.grouped(torch.exp(-self.exponent()).mul_(self.weight))
        codes = self.grid.encode(scaled, scale.unsqueeze(-1), self.zero_point.unsqueeze(-1)).flatten(1)
        return IntCodes.of(codes, scale, self.zero_point, self.grid)


@dataclass(frozen=True)
class LRQ:
    """Learn by gradient steps what each weight is divided by before it is rounded, so that the block's output stays.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: input columns that share a scale; -1 for one group per row.
        symmetric: no zero points.
        rank: of the learned divisors' logarithms; -1 for a quarter of the layer's smaller side, at most 1024, or 2048
            from 8192 x 8192 on. Costs no bits: only codes and scales are stored.
        scaling: "low-rank" learns L U + r + c; "full" learns a whole matrix (FlexRound).
        range_search: how each group's range is found before the steps: "none" is the full range.
        steps: gradient steps for each block.
        learning_rate: of the first step; it falls to 0.
        batch: calibration windows of a step, at most all.
        loss_weights: "equal" lets each token of the block's output count the same; "plain" is the paper's sum.
    """

    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    rank: Annotated[int, Range(1, 1 << 16, "a quarter of the smaller side")] = -1
    scaling: Literal["low-rank", "full"] = "low-rank"
    range_search: Search = "scale"
    steps: Annotated[int, Range(0, 1_000_000)] = 100
    learning_rate: Annotated[float, Range(0, 1)] = 1e-2
    batch: Annotated[int, Range(1, 1 << 16)] = 2
    loss_weights: LossWeights = "equal"

    scope: ClassVar[str] = "block"
    block_settings: ClassVar[tuple[str, ...]] = ("steps", "learning_rate", "batch", "loss_weights")
    needs_stats: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self)

    def solve(self, problem: Problem) -> dict[str, QuantizedWeight]:
        """All layers of a block together, against the block's output; without a block, each against its own output."""
        if problem.block is not None:
            return self._solve_block(problem, problem.block)
        return {
            name: self._solve_alone(weight, problem.stats.get(name), problem.generator(name))
            for name, weight in problem.weights.items()
        }

    def _solve_alone(
        self, weight: Float[Tensor, "out in"], stats: InputStats | None, generator: torch.Generator
    ) -> QuantizedWeight:
        """The same parameters, ``tr[(W - W^) H (W - W^)^T]`` the loss."""
        stats = needed(stats)
        scaling = self._start(weight, stats, generator)
        loss = layer_loss(weight, stats, scaling.quantized)
        outcome = minimise(scaling.parameters(), loss, 1, self._descent, generator=generator)
        return assemble(weight, scaling.rounded(), None, stop="given", stats=stats, note=f"layer alone: {outcome}")

    def _solve_block(self, problem: Problem, block: BlockOutput) -> dict[str, QuantizedWeight]:
        """Each layer with its own settings, but for those of the steps, batches and tokens, which are this object's.

        Raises:
            ArithmeticError: if the loss is not finite.

        Source:
            LRQ, arXiv:2407.11534. Deviations: groups within a row, rank and range search as the class has them, token
            weights, the best parameters kept (`lorq.core.descent.minimise`).
        """
        generators = {name: problem.generator(name) for name in problem.weights}
        scalings = {
            name: problem.methods.get(name, self)._start(weight, needed(problem.stats.get(name)), generators[name])
            for name, weight in problem.weights.items()
        }
        loss = block_loss(block, lambda: {name: s.quantized() for name, s in scalings.items()}, self.loss_weights)
        parameters = [parameter for scaling in scalings.values() for parameter in scaling.parameters()]
        order = generators[next(iter(generators))]  # where the first layer's has got to
        outcome = minimise(parameters, loss, len(block.targets), self._descent, generator=order)
        note = f"block: {outcome}"
        return {
            name: assemble(s.weight, s.rounded(), None, stop="given", stats=problem.stats[name], note=note)
            for name, s in scalings.items()
        }

    @property
    def _descent(self) -> Descent:
        return Descent(self.steps, self.learning_rate, self.batch)

    def _start(self, weight: Tensor, stats: InputStats, generator: torch.Generator) -> Scaling:
        """The parameters before the first step: rounding to nearest."""
        grid = layer_grid(weight.shape[1], self.bits, self.group_size, self.symmetric)
        search = SEARCHES[self.range_search]
        if search is None:
            initial = nearest(weight, None, grid)
        else:
            initial = clip(weight, PreparedHessian(stats.hessian, damping=0.0), grid, search)
        rank = None if self.scaling == "full" else self._rank(*weight.shape)
        return Scaling.start(weight, initial, rank=rank, generator=generator)

    def _rank(self, out: int, in_: int) -> int:
        """The rank of a layer of this shape.

        Raises:
            ValueError: if it exceeds the layer's sides.
        """
        smaller = min(out, in_)
        if self.rank == -1:
            return max(1, min(smaller // 4, 2048 if smaller >= 8192 else 1024))
        if self.rank > smaller:
            raise ValueError(
                f"rank must be at most min(out, in) = {smaller} for a layer of shape {(out, in_)}, got {self.rank}; "
                "lower it, or take -1 for a quarter of that"
            )
        return self.rank

    def largest(self, out: int, in_: int) -> LayerFormat:
        """Every layer of this shape gets this format.

        Raises:
            ValueError: if the rank exceeds the layer, or the group size does not divide its width.
        """
        if self.scaling == "low-rank":
            self._rank(out, in_)
        return LayerFormat(layer_grid(in_, self.bits, self.group_size, self.symmetric))


@preset
class LRQPaper(LRQ):
    """LRQ with the settings of its paper and its authors' code; see LRQ for what each one does.

    One scale per row, 5000 steps; the rate is the code's for Llama-2-7B at 4 bits, where ranges are not searched.

    Source:
        LRQ, arXiv:2407.11534. Deviations:

        - The rank of layers whose smaller side is below 4096 is a quarter of that side: of 2048 x 2048 the paper's 1024
          would learn as many numbers as the matrix has.
        - The best parameters are kept, of six looks, not the last.
        - All layers have low-rank divisors. The released code has FlexRound (``--scaling full``) for those with one
          side of at most 4096 and the other above it, and for 8192 x 8192: of Llama-2-7B for gate, up and down.
        - Scales are rounded to float16 in each step, as they are stored; the code stores floats.
        - ``--activations`` are rounded within the steps, so that these make up for it; the code learns weights alone
          and rounds activations when it evaluates. Its runs with 3 bits or 8-bit activations search ranges
          before, by the norm 2.4; ``--range-search scale`` does by the Hessian.
        - Rates are the code's per model and width, 4e-4 to 9e-4; here it is one.
        - 512 windows of 1024 tokens are set by the run (`lorq.pipeline.presets.PAPERS`), the text is not: C4 there.
    """

    group_size = -1
    range_search = "none"
    steps = 5000
    learning_rate = 9e-4
    loss_weights = "plain"
