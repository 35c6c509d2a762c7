"""Low-rank compensation of an error that is already there: its best factors, and how ranks are shared out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.low_rank import Metric
from lorq.core.sketch import sketch

# A scaling of rows and columns is believed in if it explains this share of a difference; noise explains
# (out + in) / (out in) of it.
_EXPLAINED = 0.25
_LEAST_SCALE = 1e-4


@dataclass(frozen=True)
class Pairs:
    """Factors of an error, best pair first: the first ``r`` are the best of rank ``r``.

    Attributes:
        gains: what each pair takes off the output error ``tr(E H E^T)``.
    """

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in"]
    gains: Float[Tensor, "rank"]


def error_pairs(
    error: Float[Tensor, "out in"], metric: Metric, *, rank: int, generator: torch.Generator, iterations: int = 4
) -> Pairs:
    """The pairs of ``error`` that take most off the output error.

    With the metric's ``C C^T = H`` that is ``||(E - L R) C||^2``, so they are the singular pairs of ``E C``, the right
    ones brought back by ``C^-1``, and a pair's gain is the square of its singular value (Eckart-Young).

    Args:
        error: ``W - W^``.
        rank: how many pairs, at most min(out, in).
        iterations: of the sketch that finds the pairs; with 4 their gains are within 2 % of the best on a flat one.

    Source:
        EoRA, arXiv:2410.21271, eq. 5-6, with ``C`` a Cholesky factor of the damped ``H`` in place of its eigenvectors
        and roots of its eigenvalues: any ``C C^T = H`` gives the same product.
    """
    left, right = sketch(metric.apply(error), rank=rank, iterations=iterations, generator=generator)
    return Pairs(left, metric.undo(right), left.square().sum(0))


def share_ranks(
    gains: Sequence[Float[Tensor, "_"]], costs: Sequence[float | int], budget: float | int
) -> tuple[list[int], float]:
    """The ranks of layers that gain most in all under a budget, and the price at which they do.

        max  sum_l sum_(k <= r_l) gain_lk    subject to    sum_l r_l cost_l <= budget

    With a Lagrange multiplier ``price`` the layers come apart: layer ``l`` takes each pair with
    ``gain_lk / cost_l > price``; as gains fall within a layer these are its first. The price is the highest at which
    the budget is used up, but for less than one pair. More budget never takes a pair away.

    Args:
        gains: of each layer's pairs, falling, in a unit that layers have in common.
        costs: of a pair of each layer, such as its bits.

    Returns:
        Ranks, and ``gain / cost`` of the first pair that is left out; 0 if none is.

    Example:
        >>> share_ranks([torch.tensor([8.0, 4.0, 1.0]), torch.tensor([9.0, 2.0])], [1.0, 2.0], 4.0)
        ([2, 1], 1.0)
    """
    worth = torch.cat([own.double() / cost for own, cost in zip(gains, costs, strict=True)])
    layer = torch.repeat_interleave(torch.tensor([len(own) for own in gains]))
    order = worth.argsort(descending=True, stable=True)
    spent = torch.tensor(costs, dtype=torch.float64)[layer[order]].cumsum(0)
    count = int((spent <= budget).sum())
    ranks = torch.bincount(layer[order[:count]], minlength=len(gains)).tolist()
    return ranks, float(worth[order[count]]) if count < len(order) else 0.0


def fit_scaling(
    weight: Float[Tensor, "out in"], other: Float[Tensor, "out in"], *, iterations: int = 3
) -> tuple[Float[Tensor, "out"], Float[Tensor, "in"]] | None:
    """Row and column scales with ``diag(rows) weight diag(columns) ~ other``; None where one number does as well.

    Some quantizers (AWQ, SmoothQuant) first move scales from a layer's columns into the norm or the rows of the layer
    before. What they quantize is another matrix with the same function.

    Alternating least squares. A row or column of which nothing is left has scale 1, since nothing tells its own.

    Example:
        >>> w = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, -6.0]])
        >>> rows, columns = fit_scaling(w, w * torch.tensor([2.0, 0.5]))
        >>> torch.allclose(torch.outer(rows, columns), torch.tensor([2.0, 0.5]).expand(3, 2), atol=1e-3)
        True
    """
    w, v = weight.double(), other.double()
    rows, columns = w.new_ones(w.shape[0]), w.new_ones(w.shape[1])

    def ratio(a: Tensor, b: Tensor, axis: int) -> Tensor:
        energy = a.square().sum(axis)
        found = (a * b).sum(axis) / energy.clamp(min=1e-300)
        return torch.where(found > _LEAST_SCALE, found, 1.0)

    for _ in range(iterations):
        columns = ratio(rows[:, None] * w, v, 0)
        rows = ratio(w * columns, v, 1)
    one = ratio(w.flatten(), v.flatten(), 0)
    plain = (one * w - v).square().sum()
    if (torch.outer(rows, columns) * w - v).square().sum() >= (1 - _EXPLAINED) * plain:
        return None
    return rows.to(weight.dtype), columns.to(weight.dtype)
