"""FLRQ: flexible low rank by sketches, clipping, and alternation between the two (arXiv:2601.05684)."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.basis import Basis
from lorq.core.checks import Range, check_settings
from lorq.core.codes import Codes, GgufGrid, IntGrid, TrellisGrid
from lorq.core.codes.gguf_blocks import TYPES
from lorq.core.linalg import times_lower
from lorq.core.low_rank import FactorType, LowRank, factor_bits, store_factors
from lorq.core.problem import Problem
from lorq.core.rank_choice import choose_rank, rank_cap
from lorq.core.rounding import ROUNDINGS, RangeSearch, gguf, trellis
from lorq.core.sketch import SketchForm, sketch
from lorq.core.stats import InputStats, PreparedHessian
from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.methods.common import (
    SEARCHES,
    WIDTHS,
    Damping,
    GgufType,
    GroupSize,
    Share,
    Window,
    activation_scale,
    assemble,
    check_codebook,
    gguf_choices,
    gguf_grid,
    layer_grid,
    missed,
    needed,
    preset,
    rotation,
    row_weights,
)  # fmt: skip

# The authors' code's range searches: a wide one on the first residual, a narrow one when alternating.
_SEARCHES = {"clip": (RangeSearch(steps=40, depth=0.8, mode="saturate"), SEARCHES["saturate"])}

Grid: TypeAlias = IntGrid | TrellisGrid | GgufGrid


@dataclass(frozen=True)
class FLRQ:
    """A flexible low-rank part from sketches of the scaled weight, the residual quantized under clipping.

    Attributes:
        bits: width of a code, 2 to 8, with trellis codes 1 to 6.
        codebook: what codes stand for: "scalar" values of an integer grid, or "trellis" values computed from the last
            bits of a stream, for weights that are rotated before. These have a scale for each row: ``group_size``,
            ``symmetric`` and ``rounding`` do not matter.
        window: bits of the stream that a trellis value depends on, nothing of a text; each more doubles the time and
            gains a little.
        group_size: input columns that share a scale; -1 for one group per row.
        symmetric: no zero points (the paper's text); asymmetric is what the authors' code does.
        rounding: how the residual is rounded: "clip" searches ranges and rounds to nearest (the paper),
            "nearest" takes full ranges, "gptq" passes errors on.
        order: which part is fitted first in each pass; the paper's takes the low rank out of the weight.
        metric: what the low-rank part serves: "activation" scales columns by a power of their mean
            magnitude (the paper), "hessian" whitens with the Cholesky factor of the Hessian.
        exponent: of the activation scale: 2.5 in the paper, 2.4 in the code, 1 is LQER's.
        sketch: "block" sketches all candidates at once, "rank1" one after the other (the paper); "svd" is exact and
            slow, to compare with.
        iterations: power iterations of the sketch.
        budget: of a layer's factors: how much they may add to the size of its codes, as a share (x in the paper); 0.03
            at most where bits_per_weight or size, the budgets of the whole model, choose it.
        range_measure: what a component must lower: "amax" of the matrix (the paper) or "group" ranges.
        slope_window: ranks over which the slope of the range curve is taken.
        slope_threshold: stop when the curve falls by less than this share over the window; 0 never stops there.
        min_gain: below this total share the low-rank part is dropped, rank 0.
        epochs: rounds of refitting both parts; -1 for 20 at 2 bits and 1 above, as the code.
        factor_type: how factors are stored: "float16", or 8 bits and a scale per vector: "int8", "e4m3".
        grid: "integer", equally spaced values; or a block type of GGUF, which says bits and groups by itself:
            ``bits``, ``group_size``, ``symmetric`` and ``rounding`` do not matter.
        shrinkage: how far the Hessian moves towards its diagonal, 0 to 1.
        damping: share of the mean diagonal added to the diagonal, where the Hessian is factorised.
    """

    bits: Annotated[int, Range(1, 8)] = 4
    codebook: Literal["scalar", "trellis"] = "scalar"
    window: Window = 12
    group_size: GroupSize = 128
    symmetric: bool = False
    rounding: Literal["clip", "nearest", "gptq"] = "gptq"
    order: Literal["low-rank-then-codes", "codes-then-low-rank"] = "codes-then-low-rank"
    metric: Literal["activation", "hessian"] = "hessian"
    exponent: Annotated[float, Range(0, 8)] = 2.5
    sketch: SketchForm = "block"
    iterations: Annotated[int, Range(0, 64)] = 2
    budget: Annotated[float, Range(0, 8)] = 0.2
    range_measure: Literal["amax", "group"] = "amax"
    slope_window: Annotated[int, Range(1, 1024)] = 8
    slope_threshold: Share = 0.0
    min_gain: Share = 0.0
    epochs: Annotated[int, Range(0, 1000, "20 at 2 bits and 1 above")] = 1
    factor_type: FactorType = "int8"
    grid: Literal["integer", GgufType] = "integer"
    shrinkage: Share = 0.2
    damping: Damping = 0.01

    scope: ClassVar[str] = "layer"
    needs_stats: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self)
        check_codebook(self)
        if self.codebook == "trellis" and (self.metric != "hessian" or self.range_measure != "amax"):
            raise ValueError(
                "trellis codes belong to a rotated weight, whose columns have no activations and no groups, got metric "
                f"{self.metric!r} and range_measure {self.range_measure!r}; leave them away"
            )

        if self.grid != "integer" and (self.codebook != "scalar" or self.rounding != "gptq"):
            raise ValueError(
                f"GGUF's blocks hold scalar codes and pass errors on, got grid {self.grid!r} with codebook "
                f"{self.codebook!r} and rounding {self.rounding!r}; leave these away"
            )

    @property
    def _code_bits(self) -> int:
        return self.bits if self.grid == "integer" else TYPES[self.grid].bits

    @property
    def choices(self) -> dict[str, tuple[Any, ...]]:
        """Each width without factors and with a few: if ranks are worth more than bits, the first are."""
        widths = {"bits": WIDTHS[self.codebook]} if self.grid == "integer" else gguf_choices(self.grid)
        return {**widths, "budget": tuple(dict.fromkeys((0.0, min(self.budget, 0.03))))}

    def solve(self, problem: Problem) -> dict[str, QuantizedWeight]:
        """Each weight by itself: its low rank, its codes, in turns."""
        return {
            name: self._solve(
                weight,
                self._codes(problem.height or len(weight), weight.shape[1]),
                problem.stats.get(name),
                problem.generator(name),
            )
            for name, weight in problem.weights.items()
        }

    def _solve(
        self, weight: Float[Tensor, "out in"], format: Grid, stats: InputStats | None, generator: torch.Generator
    ) -> QuantizedWeight:
        """BLC: fit the low rank to what the codes miss, the codes to what the low rank misses; keep the best.

            L R  <-  R1-FLR(W - Q),     Q  <-  round(W - L R),     E = tr[(W - Q - L R) H (W - Q - L R)^T]

        starting from ``Q = 0``.

        Source:
            Algorithm 2. The paper scores a pair before each update, the code after; here every pair competes,
            the first one too. The error comes from the Hessian instead of stored tokens, of tall layers on 1024 of
            their rows.
        """
        stats = needed(stats)
        basis = self._basis(weight.shape[1])
        target = basis.rotate(weight)
        hessian = stats.prepared(shrinkage=self.shrinkage, damping=self.damping, block=basis.block)
        wide, narrow = _SEARCHES.get(self.rounding, (SEARCHES["scale"], SEARCHES["scale"]))
        if not self._rank_cap(*weight.shape):
            codes = self._round(target, hessian, format, wide, row_weights(stats))
            return assemble(weight, codes, None, stop="budget", stats=stats, basis=basis if basis.block else None)
        scaling = hessian.factor if self.metric == "hessian" else activation_scale(stats, self.exponent)
        codes_part, low_rank_part = torch.zeros_like(weight), torch.zeros_like(weight)
        best: tuple[float, Codes, LowRank | None, str] | None = None
        epochs = self.epochs if self.epochs >= 0 else 20 if self._code_bits == 2 else 1
        searches = [wide] + epochs * [narrow]
        for search in searches:
            for step in self.order.split("-then-"):
                if step == "low-rank":
                    low_rank, stop = self._fit_low_rank(target - codes_part, scaling, generator)
                    low_rank_part = low_rank.dense() if low_rank else torch.zeros_like(weight)
                else:
                    rounded = self._round(target - low_rank_part, hessian, format, search, row_weights(stats))
                    codes_part = rounded.decode()
            alone = len(searches) == 1
            error = 0.0 if alone else missed(target - codes_part - low_rank_part, hessian.matrix)
            if best is None or error < best[0]:
                best = (error, rounded, low_rank, stop)
        assert best is not None
        _, rounded, low_rank, stop = best
        return assemble(weight, rounded, low_rank, stop=stop, stats=stats, basis=basis if basis.block else None)

    def _round(
        self,
        target: Float[Tensor, "out in"],
        hessian: PreparedHessian,
        format: Grid,
        search: RangeSearch | None,
        rows: Tensor | None,
    ) -> Codes:
        """Codes of what the low rank does not hold."""
        if isinstance(format, TrellisGrid):
            return trellis(target, hessian, format, rows)
        if isinstance(format, GgufGrid):
            return gguf(target, hessian, format)
        return ROUNDINGS[self.rounding](target, hessian, format, search)

    def _basis(self, width: int) -> Basis:
        """Trellis codes want weights that are all but Gaussian."""
        return rotation(width) if self.codebook == "trellis" else Basis(None, 0, 0)

    def _codes(self, out: int, in_: int) -> Grid:
        if self.codebook == "trellis":
            return TrellisGrid.of(out, self.bits, self.window)
        return gguf_grid(in_, self.grid) or layer_grid(in_, self.bits, self.group_size, self.symmetric)

    def _fit_low_rank(
        self, target: Float[Tensor, "out in"], scaling: Tensor, generator: torch.Generator
    ) -> tuple[LowRank | None, str]:
        """R1-FLR on the scaled matrix, unscaled afterwards, in the precision it is stored in."""
        out, in_ = target.shape
        scaled = times_lower(target, scaling) if scaling.ndim == 2 else target * scaling
        # One more than the cap, so that running into the budget can be told from running out.
        candidates = min(self._rank_cap(out, in_) + 1, out, in_)
        left, right = sketch(scaled, rank=candidates, form=self.sketch, iterations=self.iterations, generator=generator)
        choice = choose_rank(
            scaled, left, right, bits=self._code_bits, factor_bits=factor_bits(self.factor_type), budget=self.budget,
            slope_window=self.slope_window, slope_threshold=self.slope_threshold, min_gain=self.min_gain,
            warm_up=self.iterations, measure=self.range_measure,
            group_size=self._codes(out, in_).plain(in_).group_size if self.range_measure == "group" else None,
        )  # fmt: skip
        left, right = left[:, : choice.rank], right[: choice.rank]
        if scaling.ndim == 2:
            right = torch.linalg.solve_triangular(scaling, right, upper=False, left=False)
        else:
            right = right / scaling
        return store_factors(left, right, factor_type=self.factor_type), choice.stop

    def largest(self, out: int, in_: int) -> LayerFormat:
        """The format at the rank where the budget ends."""
        basis = self._basis(in_)
        rank = self._rank_cap(out, in_)
        return LayerFormat(self._codes(out, in_), rank, self.factor_type, rotation_block=basis.block)

    def _rank_cap(self, out: int, in_: int) -> int:
        return rank_cap(out, in_, bits=self._code_bits, factor_bits=factor_bits(self.factor_type), budget=self.budget)


@preset
class FLRQPaper(FLRQ):
    """FLRQ with the settings of its paper and its authors' code; see FLRQ for what each one does.

    The low rank first, from the activation-scaled weight, in 16 bits; the residual clipped and rounded to nearest.

    Source:
        FLRQ, arXiv:2601.05684. Where paper and code differ: exponent 2.5 is the paper's, the code has 2.4; zero points
        are the code's, as symmetric codes of 2 bits have a level less. Deviations:

        - The sketch is blocked, 12 times as fast and as good; ``--sketch rank1`` is the paper's.
        - Ranges are searched, and pairs compared, by the Hessian of all tokens, shrunk (``--shrinkage 0`` leaves that
          out: KL 0.613 either way), where the code has 512 tokens; tokens count equally, as a few huge ones decide
          otherwise. The first pair competes too.
        - At "precision" Algorithm 1's rank is kept, one more than the code's, and none at a loss
          (`lorq.core.rank_choice.choose_rank`); the scale's floor is another (`lorq.methods.common.activation_scale`).
        - Left out: the code's second epoch for o and down at 3 bits (``--epochs 2`` has it for all layers); that it
          moves a layer from 2 to 3 bits at a relative error of 0.18, and a rank of 0 to 16, as both undo what was
          asked for or chosen (``--bits-per-weight`` moves bits by what the whole model loses).
        - Texts are the run's: the paper's are 128 windows of 2048 tokens of WikiText-2.
    """

    rounding = "clip"
    order = "low-rank-then-codes"
    metric = "activation"
    slope_threshold = 0.1
    min_gain = 0.1
    epochs = -1
    factor_type = "float16"
