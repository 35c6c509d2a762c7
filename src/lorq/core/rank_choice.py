"""How many low-rank components a matrix is worth: the rank cap of a memory budget, and R1-FLR's stops."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

# Of the residual: its largest magnitude, or the root mean square, over (row, group), of max - min.
MEASURES = ("amax", "group")
# The residual is brought down by this many ranks between two looks at the stopping rule.
_RANKS_PER_LOOK = 16
# A tile stays in a core's L2 cache while those ranks are taken off it, and is just below the size from which
# torch 2.13 splits an operation over threads: tens of thousands of such splits stall a machine that is busy
# otherwise (8 to 27 seconds were seen where one thread took 2).
_TILE_ELEMENTS = (1 << 15) - 1


@dataclass(frozen=True)
class RankChoice:
    """The rank kept, why it is not larger, and the range measure at ranks 0, 1, 2, ... as far as seen."""

    rank: int
    stop: str
    curve: tuple[float, ...]


def rank_cap(rows: int, cols: int, *, bits: int, factor_bits: int, budget: float) -> int:
    """The largest rank whose factors add at most a share ``budget`` to the size of the codes.

        floor(budget * bits * rows * cols / (factor_bits * (rows + cols))),  at most min(rows, cols)

    Args:
        rows, cols: of the weight.
        bits: width of one code.
        factor_bits: width of one stored entry of the factors.
        budget: growth allowed, ``x`` in the paper; dimensionless.

    Raises:
        ValueError: if a size or width is below 1 or ``budget`` is negative.

    Source:
        FLRQ, arXiv:2601.05684, ``k <= 1 + x`` solved for the rank.

    Example:
        >>> rank_cap(4096, 4096, bits=3, factor_bits=16, budget=0.2)
        76
    """
    for name, value in (("rows", rows), ("cols", cols), ("bits", bits), ("factor_bits", factor_bits)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= budget < math.inf:
        raise ValueError(f"budget must be a finite share of at least 0, got {budget}")
    exact = budget * bits * rows * cols / (factor_bits * (rows + cols))
    # A budget such as 0.1 has no exact float: without the allowance 3.0 would become 2.
    return min(math.floor(exact * (1 + 1e-12)), rows, cols)


def choose_rank(
    a: Float[Tensor, "p q"],
    left: Float[Tensor, "p candidates"],
    right: Float[Tensor, "candidates q"],
    *,
    bits: int,
    factor_bits: int,
    budget: float = 0.2,
    slope_window: int = 8,
    slope_threshold: float = 0.1,
    min_gain: float = 0.1,
    warm_up: int = 2,
    measure: str = "amax",
    group_size: int | None = None,
) -> RankChoice:
    """R1-FLR: take components while they save more bits of range than they cost to store.

    With ``w_r`` the range measure of ``a - left[:, :r] @ right[:r]`` the tests after rank r are, in order:

        flat       w_{r-window} - w_r <= slope_threshold * w_{r-window}   keep r - 1 - window // 2, at least 0
        budget     k > 1 + budget,  k = 1 + cost / bits                   keep r - 1
        precision  k >= q,          q = 1 + log2(w_0 / w_r) / bits        keep r - 1

    where ``cost = factor_bits * r * (p + q) / (p * q)`` is in bits per weight. If none fires the
    candidates are ``exhausted`` and all are kept. ``k >= q`` is ``cost >= log2(w_0 / w_r)``, whatever
    ``bits`` is, and is computed so.

    The measure may stay for the first ranks and fall after them, so they are not tested (the warm-up). But a
    rank that costs more than it saves is never kept: if the one to keep does, it is for ``precision`` the
    last before it that does not, or 0. Last, if the kept rank lowers the measure by at most a share
    ``min_gain`` it is ``useless`` and the answer is 0.

    Args:
        a: the matrix that was sketched, with whatever scaling it had then; left unchanged.
        left: candidate components, best first; see :func:`lorq.core.sketch.sketch`. More than
            :func:`rank_cap` of them are never looked at; that many suffice for ``"budget"`` to be told.
        right: their right factors.
        bits, factor_bits, budget: as in :func:`rank_cap`.
        slope_window: ranks over which the drop is measured, at least 1.
        slope_threshold: least relative drop over the window; 0 turns the test off.
        min_gain: least total relative drop, else rank 0.
        warm_up: the precision test starts at rank ``warm_up + 2``.
        measure: ``"amax"`` as in the paper, or ``"group"``, which follows a grouped grid's step.
        group_size: columns per group, for ``"group"`` only; must divide q.

    Raises:
        ValueError: if an option is out of range or the shapes disagree.

    Source:
        FLRQ, arXiv:2601.05684, Eq. 9 and Algorithm 1. Window, slope threshold, warm-up, minimal gain and the ranks
        kept at "flat" and "budget" are those of the authors' code, which counts components from 0: at index
        ``i = r - 1`` it keeps ``i - window // 2`` or ``i``, and tests precision only for ``i > warm_up``. Then it
        keeps ``i - 1``, one less than here and in Algorithm 1: of noise ``warm_up``, which its ``min_gain`` takes away
        again. Ours: in the warm-up, where Algorithm 1 would stop, a later rank may still pay; the window may start at
        the untouched matrix; and the rank over budget is known beforehand, so it is never taken off nor tested.

    Example:
        >>> left, right = torch.full((64, 1), 2.0), torch.ones(1, 64)
        >>> choose_rank(left @ right, left, right, bits=4, factor_bits=8)
        RankChoice(rank=1, stop='exhausted', curve=(2.0, 0.0))
    """
    if (left.shape[0], right.shape[1], left.shape[1]) != (*a.shape, right.shape[0]):
        raise ValueError(
            f"left (p, r) and right (r, q) must fit a of shape {tuple(a.shape)}, got "
            f"{tuple(left.shape)} and {tuple(right.shape)}"
        )
    if slope_window < 1:
        raise ValueError(f"slope_window must be at least 1, got {slope_window}")
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {sorted(MEASURES)}, got {measure!r}")
    if (measure == "group") != (group_size is not None):
        raise ValueError(
            f"group_size goes with measure 'group' and only with it, got measure {measure!r}, {group_size=}"
        )
    if group_size is not None and (group_size < 1 or a.shape[1] % group_size):
        raise ValueError(f"group_size must divide the {a.shape[1]} columns, got {group_size}")
    cap = rank_cap(*a.shape, bits=bits, factor_bits=factor_bits, budget=budget)
    bits_per_rank = factor_bits * sum(a.shape) / a.numel()
    candidates = min(left.shape[1], cap)
    rest = a.clone(memory_format=torch.contiguous_format)
    curve = _deflate(rest, left[:, :0], right[:0], measure, group_size)

    def pays(r: int) -> bool:
        return curve[r] * 2.0 ** (r * bits_per_rank) < curve[0]

    rank, stop, seen = candidates, "budget" if candidates == cap < min(a.shape) else "exhausted", candidates
    for r in range(1, candidates + 1):
        if r == len(curve):
            more = slice(r - 1, min(r - 1 + _RANKS_PER_LOOK, candidates))
            curve += _deflate(rest, left[:, more], right[more], measure, group_size)[1:]
        looks_back = slope_threshold > 0 and r >= slope_window
        if looks_back and _is_small_drop(curve[r - slope_window], curve[r], slope_threshold):
            rank, stop, seen = max(0, r - 1 - slope_window // 2), "flat", r
            break
        if r > warm_up + 1 and not pays(r):
            rank, stop, seen = r - 1, "precision", r
            break
    if (paying := next((r for r in range(rank, 0, -1) if pays(r)), 0)) < rank:
        rank, stop = paying, "precision"
    if rank > 0 and _is_small_drop(curve[0], curve[rank], min_gain):
        rank, stop = 0, "useless"
    return RankChoice(rank, stop, tuple(curve[: seen + 1]))


def _is_small_drop(before: float, after: float, share: float) -> bool:
    # Not strict, so that a residual of zero, which cannot fall, counts as flat.
    return before - after <= share * before


def _deflate(
    rest: Float[Tensor, "p q"],
    left: Float[Tensor, "p some"],
    right: Float[Tensor, "some q"],
    measure: str,
    group_size: int | None,
) -> list[float]:
    """Subtract components from ``rest`` in place; the measure before, and after each of them.

    On a CPU rows go by in tiles that stay in cache while all components pass over them, so that main memory is read and
    written once for the lot, not once per component. A device, which pays for every launch, has all rows at once.
    """
    tiles = []
    height = max(1, _TILE_ELEMENTS // rest.shape[1]) if rest.device.type == "cpu" else rest.shape[0]
    extent = _amax if measure == "amax" else partial(_range, group_size=group_size)
    for tile, columns in zip(rest.split(height), left.split(height), strict=True):
        values = [extent(tile)]
        for column, row in zip(columns.T.unsqueeze(-1), right, strict=True):
            tile.addcmul_(column, row, value=-1)  # (rows, 1) times (q,)
            values.append(extent(tile))
        tiles.append(torch.stack([number for value in values for number in value]).view(len(values), -1))
    table = torch.stack(tiles)  # (tiles, some + 1, numbers of a value)
    if measure == "amax":
        return table.abs().amax((0, 2)).tolist()
    groups = rest.numel() // (group_size or rest.shape[1])
    return (table[..., 0].double().square().sum(0) / groups).sqrt().tolist()


def _amax(tile: Float[Tensor, "rows q"]) -> tuple[Tensor, Tensor]:
    """A tile's smallest and largest number."""
    return tile.aminmax()


def _range(tile: Float[Tensor, "rows q"], group_size: int | None) -> tuple[Tensor]:
    """The 2-norm of a tile's group ranges."""
    # torch 2.13 on a CPU: `aminmax` along an axis takes ten times as long as these two.
    grouped = tile.unflatten(1, (-1, group_size or tile.shape[1]))
    return (torch.linalg.vector_norm(grouped.amax(-1) - grouped.amin(-1)),)
