"""Clipping: search each group's range for the least output error, then round to nearest."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.codes import IntCodes, IntGrid
from lorq.core.rounding.nearest import encode_on
from lorq.core.stats import PreparedHessian

# Rows are searched in slices of about this many trial weights: few operations, small temporaries.
_SLICE = 1 << 20


@dataclass(frozen=True)
class RangeSearch:
    """Which ranges to try: the shares ``1 - i / steps`` of the full one, for ``i < depth * steps``.

    Attributes:
        depth: how far to shrink; 0.8 ends just above a fifth of the range.
        mode: "saturate" clamps to ``+- share * max|w|`` and then takes what range is left (the paper's and
            AWQ's way); "scale" multiplies both ends by the share.
    """

    steps: int = 20
    depth: float = 0.5
    mode: Literal["saturate", "scale"] = "saturate"

    def shares(self) -> list[float]:
        """The shares to try, from 1 downwards."""
        # The allowance keeps 0.8 * 40 from becoming 33 for want of an exact float.
        return [1.0 - i / self.steps for i in range(max(1, math.ceil(self.depth * self.steps - 1e-9)))]


def search_range(
    target: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    grid: IntGrid,
    search: RangeSearch,
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """The scale and zero point of each group that cost its own output least.

    For a row's group with weights ``w`` and their part ``H_g`` of the Hessian, minimises over the shares

        (Q(w) - w) H_g (Q(w) - w)^T

    which is the mean of ``(x_g . (Q(w) - w))^2`` over the calibration tokens. What a low-rank part adds to
    the layer cancels in the difference.

    Of the Hessian only the blocks on the diagonal are read.

    Source:
        AWQ's automatic clipping, as FLRQ's authors' code uses it, on at most 512 tokens; the Hessian has all.
    """
    return search_shares(target, hessian, grid, search.shares(), search.mode == "saturate")


def search_shares(
    target: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], grid: IntGrid, shares: list[float], saturate: bool
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """`search_range` by the numbers of a `RangeSearch`."""
    groups = grid.grouped(target)
    count, size = groups.shape[1:]
    index = torch.arange(count, device=target.device)
    blocks = hessian.unflatten(0, (count, size)).unflatten(2, (count, size))[index, :, index, :]
    rows = max(1, _SLICE // (target.shape[1] * len(shares)))
    found = [_search_rows(part, blocks, grid, shares, saturate) for part in groups.split(rows)]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def _search_rows(
    groups: Float[Tensor, "rows groups size"],
    blocks: Float[Tensor, "groups size size"],
    grid: IntGrid,
    shares: list[float],
    saturate: bool,
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    groups = groups.transpose(0, 1).contiguous()  # (groups, rows, size)
    low, high = groups.amin(-1), groups.amax(-1)
    each = torch.tensor(shares, dtype=groups.dtype, device=groups.device).view(-1, 1, 1)
    if saturate:
        limit = each * torch.maximum(-low, high)
        low, high = torch.maximum(low, -limit), torch.minimum(high, limit)
    else:
        low, high = each * low, each * high
    scale, zero = grid.span(low, high)  # (shares, groups, rows)
    s, z = scale.unsqueeze(-1), zero.unsqueeze(-1)
    delta = grid.decode(grid.encode(groups, s, z), s, z).sub_(groups)  # (shares, groups, rows, size)
    cost = (torch.matmul(delta, blocks) * delta).sum(-1)
    best = cost.argmin(0, keepdim=True)  # the widest of equals, since the first
    return scale.gather(0, best)[0].T, zero.gather(0, best)[0].T


def clip(
    target: Float[Tensor, "out in"],
    hessian: PreparedHessian,
    grid: IntGrid,
    search: RangeSearch | None = None,
) -> IntCodes:
    """Saturating clip search (`search_range`), then rounding to nearest: the paper's quantizer.

    Source:
        FLRQ, arXiv:2601.05684, algorithm 2. Its text zeroes the largest magnitudes; its figure, its code and this
        saturate them.
    """
    return encode_on(target, *search_range(target, hessian.matrix, grid, search or RangeSearch()), grid)
