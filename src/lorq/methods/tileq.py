"""TileQ: experts share low-rank factors along the rows and columns of a grid; the rest of each is LoPRo's."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.basis import Basis
from lorq.core.checks import Range
from lorq.core.codes import Codes
from lorq.core.linalg import cholesky, damp, shrink
from lorq.core.low_rank import Metric
from lorq.core.problem import Problem
from lorq.core.stats import InputStats, PreparedHessian, output_energy
from lorq.core.tile_factors import TileFactors, TileFormat, fit_tiles, grid_of, place_experts
from lorq.core.weight import LayerFormat, QuantizedWeight, Tile
from lorq.methods.common import WIDTHS, activation_scale, assemble, needed, preset
from lorq.methods.lopro import LoPRo

# Singular vectors by which experts are compared.
_FEATURES = 8
# Damping of activation scales in several bases, which are known and not estimated.
_SMALL = 1e-6


@dataclass(frozen=True)
class TileQ(LoPRo):
    """LoPRo whose experts share their factors; attention and shared experts get ordinary LoPRo.

    The tile factors come from one blocked sketch, whatever ``sketch`` says, and columns are ordered by the weights.

    The low rank comes first by default: what the weights of experts have in common is shared, while what codes miss of
    one expert has nothing to do with another's (docs/results/tileq.md).

    Attributes:
        rank: factor pairs of a layer, and of the tile matrix of each projection of its experts.
        grid_rows: rows of the grid; experts of a row share the factor on their inputs' side. -1 for those of the grid
            whose factors have the fewest numbers.
        grid_columns: columns of the grid; experts of a column share the factor on their outputs' side. -1 for as many
            as are needed; cells may stay empty.
        sharing: whose inputs the factors of a grid row serve: the "row"'s experts', all of the "layer"'s, or each
            "expert"'s own by a stored input scale (the paper's; needs metric "activation").
    """

    rank: Annotated[int, Range(1, 1 << 16)] = 32
    grid_rows: Annotated[int, Range(1, 1 << 12, "those of the smallest factors")] = -1
    grid_columns: Annotated[int, Range(1, 1 << 12, "as many as are needed")] = -1
    sharing: Literal["row", "layer", "expert"] = "row"
    order: Literal["codes-then-low-rank", "low-rank-then-codes"] = "low-rank-then-codes"

    scope: ClassVar[str] = "experts"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharing == "expert" and self.metric != "activation":
            raise ValueError(
                f"sharing 'expert' stores an activation scale for each expert: metric must be activation, "
                f"got {self.metric!r}"
            )

    @property
    def choices(self) -> dict[str, tuple[Any, ...]]:
        """The widths: all experts of a layer share their factors' rank."""
        return {"bits": WIDTHS[self.codebook]}

    def solve(self, problem: Problem) -> dict[str, QuantizedWeight]:
        """All experts of the projections that read the same inputs; other layers as LoPRo does them.

        The results of one projection share their tile factors.
        """
        if not problem.projections:
            return super().solve(problem)
        projections = [[problem.weights[name] for name in names] for names in problem.projections]
        stats = [needed(problem.stats.get(name)) for name in problem.projections[0]]
        mean = _mean_stats(stats)
        magnitudes = [
            torch.stack([weights[e].abs().sum(0) for weights in projections]).sum(0) for e in range(len(stats))
        ]
        if problem.common_input:
            bases = [self._basis(torch.stack(magnitudes).sum(0), mean)] * len(stats)
        else:
            bases = [self._basis(m, s) for m, s in zip(magnitudes, stats, strict=True)]
        hessians = [
            PreparedHessian(basis.rotate_hessian(shrink(s.hessian, self.shrinkage)), self.damping)
            for basis, s in zip(bases, stats, strict=True)
        ]
        results: dict[str, QuantizedWeight] = {}
        for names, weights in zip(problem.projections, projections, strict=True):
            solved = self._solve_tiles(weights, stats, bases, hessians, problem.generator(names[0]))
            results |= dict(zip(names, solved, strict=True))
        return results

    def _solve_tiles(
        self,
        weights: Sequence[Tensor],
        stats: Sequence[InputStats],
        bases: Sequence[Basis],
        hessians: Sequence[PreparedHessian],
        generator: torch.Generator,
    ) -> list[QuantizedWeight]:
        """Codes of every expert and one set of tile factors, fitted in turns; the best pair after any step is kept."""
        targets = torch.stack([basis.rotate(weight) for basis, weight in zip(bases, weights, strict=True)])
        codes_part, tile_part = torch.zeros_like(targets), torch.zeros_like(targets)
        tokens = torch.tensor([s.load for s in stats], dtype=targets.dtype, device=targets.device)
        rounded: list[Codes] = []
        best: tuple[float, list[Codes], TileFactors] | None = None
        tiles, cells = None, None
        for step in self._steps():
            if step == "low-rank":
                rest = targets - codes_part
                if cells is None:
                    cells = self._place(rest, stats, bases, hessians, generator)
                tiles = self._fit_tiles(rest, cells, stats, bases, hessians, generator)
                tile_part = _dense(tiles, bases)
            else:
                rounded = [self._round(t, h) for t, h in zip(targets - tile_part, hessians, strict=True)]
                codes_part = torch.stack([r.decode() for r in rounded])
            if tiles is None or not rounded:
                continue
            rest = targets - codes_part - tile_part
            errors = torch.stack([output_energy(e, h.matrix) for e, h in zip(rest, hessians, strict=True)])
            error = float((errors * tokens).sum())
            if best is None or error < best[0]:
                best = (error, rounded, tiles)
        assert best is not None
        _, rounded, tiles = best
        return [
            assemble(weight, rounded[e], Tile(tiles, e), stop="given", stats=stats[e], basis=self._stored(bases[e]))
            for e, weight in enumerate(weights)
        ]

    def _steps(self) -> list[str]:
        """What is fitted one after the other; factors come last, which make up for the codes, where there is a further
        pass."""
        steps = self.order.split("-then-") * (1 + self.epochs)
        return [*steps, "low-rank"] if self.epochs and steps[0] == "low-rank" else steps

    def _place(
        self,
        rest: Float[Tensor, "experts out in"],
        stats: Sequence[InputStats],
        bases: Sequence[Basis],
        hessians: Sequence[PreparedHessian],
        generator: torch.Generator,
    ) -> Tensor:
        """The experts' cells, by what the factors are to hold."""
        metric = self._metrics([range(len(stats))], stats, bases, hessians)[0]
        scaled = torch.stack([metric.apply(part) for part in rest])
        return place_experts(scaled, *self._grid(*rest.shape), rank=_FEATURES, generator=generator)

    def _metrics(
        self,
        members: Sequence[Sequence[int]],
        stats: Sequence[InputStats],
        bases: Sequence[Basis],
        hessians: Sequence[PreparedHessian],
    ) -> list[Metric]:
        """The metric of each group of experts: from their mean statistics, weighted by their tokens."""
        metrics = []
        for group in members:
            chosen = group or range(len(stats))  # a row without experts has factors that nobody reads
            weights = torch.tensor([stats[e].load for e in chosen], dtype=torch.float32)
            weights = weights / weights.sum()
            if self.metric == "hessian":
                parts = zip(weights.tolist(), (hessians[e].matrix for e in chosen), strict=True)
                mean = torch.stack([weight * part for weight, part in parts]).sum(0)
                metrics.append(Metric.hessian(PreparedHessian(mean, self.damping).factor))
            else:
                metrics.append(self._activation_metric([stats[e] for e in chosen], [bases[e] for e in chosen], weights))
        return metrics

    def _activation_metric(
        self, stats: Sequence[InputStats], bases: Sequence[Basis], weights: Float[Tensor, "experts"]
    ) -> Metric:
        """Of experts in one basis by the scale of their mean, else by the mean of ``T^T diag(alpha)^2 T``.

        The mean has the squares of scales that spread over decades: float64 holds their factor, and channels below a
        thousandth of the others count as much as those.
        """
        if all(basis is bases[0] or basis.permutation is bases[0].permutation is None for basis in bases):
            return self._metric(bases[0], PreparedHessian(stats[0].hessian, self.damping), _mean_stats(stats))
        mean = torch.zeros_like(stats[0].hessian, dtype=torch.float64)
        for weight, basis, own in zip(weights.tolist(), bases, stats, strict=True):
            square = activation_scale(own, self.exponent).double().square().diag()
            mean += weight * basis.rotate_hessian(square)
        return Metric.hessian(cholesky(damp(mean, _SMALL)).to(stats[0].hessian.dtype))

    def _fit_tiles(
        self,
        rest: Float[Tensor, "experts out in"],
        cells: Tensor,
        stats: Sequence[InputStats],
        bases: Sequence[Basis],
        hessians: Sequence[PreparedHessian],
        generator: torch.Generator,
    ) -> TileFactors:
        grid = self._grid(*rest.shape)
        rank = min(self.rank, grid[0] * rest.shape[2], grid[1] * rest.shape[1])
        given = {"rank": rank, "factor_type": self.factor_type, "iterations": self.iterations}
        if self.sharing == "expert":
            scales = torch.stack([activation_scale(s, self.exponent) for s in stats])
            inputs = scales.reciprocal().clamp(2.0**-14, torch.finfo(torch.float16).max).to(torch.float16)
            scaled = torch.stack([b.unrotate(r) for b, r in zip(bases, rest, strict=True)])
            scaled = scaled / inputs.to(rest.dtype).unsqueeze(1)
            plain = Metric(lambda e: e, lambda v: v)
            tiles = fit_tiles(scaled, [plain] * grid[0], cells, grid, generator=generator, **given)  # type: ignore[arg-type]
            return replace(tiles, input_scale=inputs)
        everyone = range(len(stats))
        rows = [everyone] * grid[0]
        if self.sharing == "row":
            rows = [[e for e in everyone if int(cells[e, 0]) == i] for i in range(grid[0])]  # type: ignore[misc]
        metrics = self._metrics(rows, stats, bases, hessians)
        return fit_tiles(rest, metrics, cells, grid, generator=generator, **given)  # type: ignore[arg-type]

    def _grid(self, experts: int, out: int, in_: int) -> tuple[int, int]:
        return grid_of(experts, self.grid_rows, self.grid_columns, out=out, in_=in_)

    def largest_experts(self, out: int, in_: int, experts: int) -> tuple[LayerFormat, TileFormat]:
        """The formats of an expert's weight and of its projection's tile factors.

        Raises:
            ValueError: if a block, codebook or group does not fit, or the grid is too small.
        """
        rows, columns = self._grid(experts, out, in_)
        rank = min(self.rank, rows * in_, columns * out)
        tile = TileFormat(rows, columns, experts, rank, self.factor_type, self.sharing == "expert")
        return replace(self.largest(out, in_), rank=0, factor_type="float16"), tile


@preset
class TileQPaper(TileQ):
    """TileQ with the settings of its paper and its authors' code; see TileQ for what each one does.

    The low rank first, from weights scaled by each expert's own activations; the columns by importance, all but the
    first block rotated. ``--codebook vector`` is the paper's TileQ_v, the default its TileQ_s. What is not the paper's:

    * scaled e4m3 in place of e5m2, and one blocked sketch in place of its deflation (the same factors on a full grid);
    * experts are compared by principal angles, where its k-means takes a singular vector's sign for a difference;
    * the smallest grid that holds the experts, where the code has 8 rows (Mixtral 4), and nothing in its empty cells,
      where the code has zeros;
    * an expert that sees too few tokens is scaled by all tokens of its layer (``expert_tokens``), not left unscaled,
      and the exponent is not lowered where scales spread over more than five decades.
    """

    rotation = "partial"
    importance = "log"
    order = "low-rank-then-codes"
    metric = "activation"
    sharing = "expert"
    sketch = "rank1"
    iterations = 8
    factor_type = "e4m3"
    epochs = 0
    shrinkage = 0.0


def _dense(tiles: TileFactors, bases: Sequence[Basis]) -> Float[Tensor, "experts out in"]:
    """The low-rank parts of all experts in their bases."""
    parts = [tiles.dense(expert) for expert in range(len(bases))]
    if tiles.input_scale is not None:
        parts = [basis.rotate(part) for basis, part in zip(bases, parts, strict=True)]
    return torch.stack(parts)


def _mean_stats(stats: Sequence[InputStats]) -> InputStats:
    """Of several inputs, weighted by their tokens."""
    total = sum(s.load for s in stats)
    hessian = torch.stack([s.hessian * (s.load / total) for s in stats]).sum(0)
    return InputStats(hessian, torch.stack([s.mean_abs * (s.load / total) for s in stats]).sum(0), total)
