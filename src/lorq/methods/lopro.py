"""LoPRo: permuted block rotation of the residual, error-passing rounding or vector codebooks, low-rank factors."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.basis import WHOLE, Basis, check_block, largest_block
from lorq.core.checks import Range, check_settings
from lorq.core.codes import Codes, CodesFormat, TrellisGrid, VectorGrid
from lorq.core.codes.vectors import VECTOR_LENGTHS
from lorq.core.linalg import shrink
from lorq.core.low_rank import FactorType, LowRank, Metric, r1svd
from lorq.core.problem import Problem
from lorq.core.rounding import ROUNDINGS, gptvq, trellis
from lorq.core.sketch import SketchForm
from lorq.core.stats import InputStats, PreparedHessian
from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.methods.common import (
    SEARCHES,
    WIDTHS,
    Damping,
    GroupSize,
    Search,
    Share,
    Window,
    activation_scale,
    assemble,
    check_codebook,
    layer_grid,
    missed,
    needed,
    preset,
    row_weights,
)  # fmt: skip

# GPTVQ's sizes of one codebook.
_CODEBOOK_WEIGHTS = {2: 65536, 3: 32768, 4: 65536}
_CODEBOOK_COLUMNS = 256


@dataclass(frozen=True)
class LoPRo:
    """The inputs permuted and rotated in blocks, the weight rounded there, and factors of fixed rank.

    Attributes:
        bits: stored bits of a code per weight: 2 to 8, with vector codebooks 2 to 4, with trellis codes 1 to 6.
        group_size: input columns that share a scale; -1 for one group per row. Vector codebooks do not use it:
            with them each row has one scale.
        symmetric: no zero points (single weights only).
        codebook: what codes stand for: "scalar" values of an integer grid, "vector" entries of codebooks, or "trellis"
            values computed from the last bits of a stream (QTIP), with which bits may be 1 to 6.
        rounding: "gptq" passes errors on (with vector codebooks that is GPTVQ), "clip" and "nearest" do not;
            "clip" is for single weights.
        rotation: which columns are rotated: "full" all, in blocks; "partial" all but the first, in blocks (the paper);
            "whole" all by one random Hadamard matrix (the paper's "full", for comparison: no kernel does it); "none".
        block: columns of a Walsh-Hadamard block, a power of two; -1 for the largest that fits, up to 256.
        skip: columns that "partial" leaves alone; -1 for one block.
        importance: what the columns are ordered by, the first being the most important: "log" is
            mean|R| / (log2 H - min log2 H + 1) (the code), "ratio" is mean|R| / H (the paper), "hessian" is H,
            "residual" is mean|R|, "none" keeps the model's order. Columns that are always zero come first (the code).
        order: which part is fitted first in each pass; the paper's takes the low rank out of the weight.
        metric: what the low-rank part serves: "hessian" whitens with the Cholesky factor of the Hessian,
            "activation" scales columns by a power of their mean magnitude (the paper).
        exponent: of the activation scale.
        rank: factor pairs; at most the smaller side of a matrix.
        sketch: "block" starts the pairs from one sketch, "rank1" each from a random vector (the paper); "svd" from the
            exact decomposition, slow, to compare with.
        iterations: power iterations of the sketch; the authors' code has 8.
        factor_type: how factors are stored: "int8" or "e4m3" with a scale per vector, or "float16".
        epochs: rounds of refitting both parts.
        range_search: how each group's range is found (single weights only): "none" is the full range.
        vector: weights that share a code of a vector codebook; -1 for 4 at 2 bits and 2 above.
        codebook_columns: columns that share a codebook; -1 for the most that fit, up to 256.
        codebook_rows: rows that share a codebook; -1 for what makes 65536 weights (32768 at 3 bits).
        kmeans_iterations: steps of k-means for each codebook.
        window: bits of the stream that a trellis value depends on, nothing of a text; each more doubles the time and
            gains a little.
        shrinkage: how far the Hessian moves towards its diagonal, 0 to 1.
        damping: share of the mean diagonal added to the diagonal, where the Hessian is factorised.
    """

    bits: Annotated[int, Range(1, 8)] = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    codebook: Literal["scalar", "vector", "trellis"] = "scalar"
    rounding: Literal["gptq", "clip", "nearest"] = "gptq"
    rotation: Literal["full", "partial", "whole", "none"] = "full"
    block: Annotated[int, Range(1, 1 << 16, "the largest that fits, up to 256")] = -1
    skip: Annotated[int, Range(0, 1 << 20, "one block")] = -1
    importance: Literal["log", "ratio", "hessian", "residual", "none"] = "none"
    order: Literal["codes-then-low-rank", "low-rank-then-codes"] = "codes-then-low-rank"
    metric: Literal["hessian", "activation"] = "hessian"
    exponent: Annotated[float, Range(0, 8)] = 2.4
    rank: Annotated[int, Range(0, 1 << 16)] = 16
    sketch: SketchForm = "block"
    iterations: Annotated[int, Range(0, 64)] = 2
    factor_type: FactorType = "int8"
    epochs: Annotated[int, Range(0, 1000)] = 1
    range_search: Search = "scale"
    vector: Annotated[int, Range(2, 8, "4 at 2 bits and 2 above")] = -1
    codebook_columns: Annotated[int, Range(1, 1 << 20, "the most that fit, up to 256")] = -1
    codebook_rows: Annotated[int, Range(1, 1 << 20, "what makes 65536 weights")] = -1
    kmeans_iterations: Annotated[int, Range(0, 1000)] = 10
    window: Window = 12
    shrinkage: Share = 0.2
    damping: Damping = 0.01

    scope: ClassVar[str] = "input"
    needs_stats: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self)
        if self.codebook == "vector" and (self.rounding == "clip" or self.symmetric):
            raise ValueError(
                "vector codebooks have no ranges to clip and no zero points, got "
                f"rounding {self.rounding!r}, symmetric {self.symmetric}; leave symmetric away and take gptq or nearest"
            )
        check_codebook(self)

    @property
    def choices(self) -> dict[str, tuple[Any, ...]]:
        """Each width without factors and with them."""
        return {"bits": WIDTHS[self.codebook], "rank": tuple(dict.fromkeys((0, self.rank)))}

    def solve(self, problem: Problem) -> dict[str, QuantizedWeight]:
        """The weights of the layers that read one input, in one basis, so that it is rotated once for all.

        Source:
            The paper permutes each matrix for itself; ``mean|R|`` is the sum over the matrices here.
        """
        weights = problem.weights
        stats = {name: needed(problem.stats.get(name)) for name in weights}
        residuals = [
            weight - self._low_rank_first(weight, stats[name], problem.generator(name))
            for name, weight in weights.items()
        ]
        first = stats[next(iter(weights))]
        basis = self._basis(sum((r.abs().sum(0) for r in residuals), torch.zeros_like(first.mean_abs)), first)
        hessians: dict[int, PreparedHessian] = {}
        for own in stats.values():
            if id(own) not in hessians:
                rotated = basis.rotate_hessian(shrink(own.hessian, self.shrinkage))
                hessians[id(own)] = PreparedHessian(rotated, self.damping)
        return {
            name: self._solve_in(basis, hessians[id(stats[name])], weight, stats[name], problem.generator(name))
            for name, weight in weights.items()
        }

    def _low_rank_first(self, weight: Tensor, stats: InputStats, generator: torch.Generator) -> Tensor | float:
        """What the paper takes out of the weight before it orders the columns."""
        if self.order == "codes-then-low-rank" or self.importance in ("hessian", "none"):
            return 0.0
        low_rank = self._fit(weight, Metric.activation(activation_scale(stats, self.exponent)), generator)
        return low_rank.dense() if low_rank else 0.0

    def _basis(self, magnitude: Float[Tensor, "in"], stats: InputStats) -> Basis:
        """T: the columns by importance, then rotated."""
        width = magnitude.shape[0]
        # A channel that is always zero has no logarithm: the authors' code takes 1, and 0 for its residual.
        h = stats.hessian.diagonal()
        dead = h <= 0
        h = torch.where(dead, torch.ones_like(h), h)
        scores = {
            "log": magnitude / (h.log2() - h.log2().min() + 1),
            "ratio": magnitude / h,
            "hessian": -h,
            "residual": magnitude,
        }
        if self.importance == "none":
            return Basis(None, *self._rotation(width))
        order = scores[self.importance].masked_fill(dead, -math.inf).argsort(stable=True)
        return Basis(order, *self._rotation(width))

    def _rotation(self, width: int) -> tuple[int, int]:
        """Size of the blocks, or `WHOLE`, and the columns before them."""
        if self.rotation == "none":
            return 0, 0
        if self.rotation == "whole":
            check_block(width, WHOLE, 0)
            return WHOLE, 0
        skip, block = 0 if self.rotation == "full" else self.skip, self.block
        if block == -1:
            block = largest_block(width - max(skip, 0))
            if skip == -1 and block == width:  # one block is left alone, one at least is not
                block //= 2
        skip = block if skip == -1 else skip
        check_block(width, block, skip)
        return block, skip

    def _solve_in(
        self, basis: Basis, hessian: PreparedHessian, weight: Tensor, stats: InputStats, generator: torch.Generator
    ) -> QuantizedWeight:
        """Codes and factors of a weight in a basis, in turns. The best pair is kept; 1024 rows of tall layers tell."""
        target = basis.rotate(weight)
        metric = self._metric(basis, hessian, stats)
        codes_part, low_rank_part = torch.zeros_like(target), torch.zeros_like(target)
        best: tuple[float, Codes, LowRank | None] | None = None
        rounds = 1 + self.epochs if self.rank else 1
        for _ in range(rounds):
            for step in self.order.split("-then-"):
                if step == "low-rank":
                    low_rank = self._fit(target - codes_part, metric, generator)
                    low_rank_part = low_rank.dense() if low_rank else torch.zeros_like(target)
                else:
                    rounded = self._round(target - low_rank_part, hessian, row_weights(stats))
                    codes_part = rounded.decode()
            error = 0.0 if rounds == 1 else missed(target - codes_part - low_rank_part, hessian.matrix)
            if best is None or error < best[0]:
                best = (error, rounded, low_rank)
        assert best is not None
        _, rounded, low_rank = best
        return assemble(weight, rounded, low_rank, stop="given", stats=stats, basis=self._stored(basis))

    def _stored(self, basis: Basis) -> Basis | None:
        """No basis is stored where there is none."""
        return None if self.rotation == "none" and self.importance == "none" else basis

    def _metric(self, basis: Basis, hessian: PreparedHessian, stats: InputStats) -> Metric:
        """The norm of the low-rank fit, for matrices in the basis."""
        if self.metric == "hessian":
            return Metric.hessian(hessian.factor)
        alpha = activation_scale(stats, self.exponent)
        return Metric(lambda e: basis.unrotate(e) * alpha, lambda v: basis.rotate(v / alpha))

    def _fit(self, target: Tensor, metric: Metric, generator: torch.Generator) -> LowRank | None:
        return r1svd(
            target, metric, rank=min(self.rank, *target.shape), factor_type=self.factor_type, form=self.sketch,
            iterations=self.iterations, generator=generator,
        )  # fmt: skip

    def _round(self, target: Float[Tensor, "out in"], hessian: PreparedHessian, rows: Tensor | None = None) -> Codes:
        if self.codebook == "trellis":
            return trellis(target, hessian, TrellisGrid.of(target.shape[0], self.bits, self.window), rows)
        if self.codebook == "vector":
            # Without passing errors on, only the diagonal of the metric is left.
            passing = self.rounding == "gptq"
            upper = hessian.inverse_factor if passing else hessian.matrix.diagonal().clamp(min=1e-12).rsqrt().diag()
            return gptvq(target, self._vector_grid(*target.shape), upper=upper, iterations=self.kmeans_iterations)
        grid = layer_grid(target.shape[1], self.bits, self.group_size, self.symmetric)
        return ROUNDINGS[self.rounding](target, hessian, grid, SEARCHES[self.range_search])

    def _vector_grid(self, out: int, in_: int) -> VectorGrid:
        """The sizes of vectors and codebooks for a weight of this shape."""
        vector = VECTOR_LENGTHS[self.bits] if self.vector == -1 else self.vector
        columns, rows = self.codebook_columns, self.codebook_rows
        if columns == -1:
            columns = max(
                (c for c in range(vector, min(in_, _CODEBOOK_COLUMNS) + 1, vector) if in_ % c == 0), default=in_
            )
        if rows == -1:
            wanted = _CODEBOOK_WEIGHTS[self.bits] / columns
            rows = min((r for r in range(1, out + 1) if out % r == 0), key=lambda r: abs(math.log(r / wanted)))
        grid = VectorGrid(self.bits, vector, rows, columns, in_)
        grid.check(out, in_)
        return grid

    def largest(self, out: int, in_: int) -> LayerFormat:
        """Every layer of this shape gets this format.

        Raises:
            ValueError: if a block, codebook or group does not fit.
        """
        rank = min(self.rank, out, in_)
        codes: CodesFormat
        if self.codebook == "vector":
            codes = self._vector_grid(out, in_)
        elif self.codebook == "trellis":
            codes = TrellisGrid.of(out, self.bits, self.window)
        else:
            codes = layer_grid(in_, self.bits, self.group_size, self.symmetric)
        factor_type = self.factor_type if rank else "float16"
        return LayerFormat(codes, rank, factor_type, self.importance != "none", *self._rotation(in_))


@preset
class LoPRoPaper(LoPRo):
    """LoPRo with the settings of its paper and its authors' code; see LoPRo for what each one does.

    The low rank first, from the activation-scaled weight; the columns by importance, all but the first block rotated.

    The run has plain token weights and the quantized stream, as the paper's (`lorq.pipeline.presets.PAPERS`).

    Source:
        LoPRo, arXiv:2601.19675. Deviations:

        - One order and rotation for all layers of an input, which is then rotated once (KL 0.475, 0.481 with one each).
        - alpha is divided out of the right factor before that is rounded, where the paper stores alpha apart (eq. 13):
          a vector and a product less; what the factors miss grows by 0.6 % (docs/log.md). Left vectors are fitted to
          the rounded right ones, and e4m3 with a scale for each vector stands in for e5m2: a bit more of mantissa
          (`lorq.core.low_rank.r1svd`).
        - The range search has 10 shares and the Hessian's norm, the code's 100 and the norm 2.4.
        - With ``--codebook vector``, the entry is chosen by the whole error that is passed on and rows have a scale;
          the code takes the nearest entry and has none (`lorq.core.rounding.gptvq`).
        - Its fine-tuned variant (RILQ) is left out; ``lorq tune`` trains factors of any method.
    """

    rotation = "partial"
    importance = "log"
    order = "low-rank-then-codes"
    metric = "activation"
    sketch = "rank1"
    iterations = 8
    factor_type = "e4m3"
    epochs = 0
    shrinkage = 0.0
