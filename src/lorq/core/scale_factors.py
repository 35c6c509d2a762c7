"""A scale for every weight, kept as the product of two thin matrices: start, fit, store."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.codes import LevelGrid, LowRankScale, level_values
from lorq.core.half import SMALLEST_SCALE, stored_half

# Weights in hand at once while a scale is fitted: 16 MB for each float32 temporary.
_TILE = 1 << 22
# Share of a normal matrix' mean diagonal that holds a solution near the one before it. Proximal: it slows flat
# directions down and moves no optimum. Well above float32's noise in the sums, well below what matters.
_HOLD = 1e-6
# Multiples of the step to the solution for codes as they are that a sweep tries.
_STRIDES = (2.0, 4.0, 8.0, 16.0)


def parity_rank(out: int, in_: int, block: int) -> int:
    """The largest rank whose factors take no more bits than one scale for each block of a row; at least 1.

        floor(out in / (block (out + in)))

    Source:
        LoRDS, arXiv:2601.22716.

    Example:
        >>> [parity_rank(4096, 4096, block) for block in (64, 128, 256)]
        [32, 16, 8]
    """
    return max(1, out * in_ // (block * (out + in_)))


def block_scales(
    weight: Float[Tensor, "out in"],
    grid: LevelGrid,
    block: int,
    *,
    importance: Float[Tensor, "in"] | None = None,
    shares: tuple[float, ...] = (1.0,),
) -> Float[Tensor, "out blocks"]:
    """The scale of each block of a row with the least squared error, among shares of the one that covers it.

    The covering scale is ``max|w| / max(levels)``; on the integer grid the lowest level then lies outside.

    Args:
        block: columns of a block; must divide the width.
        importance: what a squared error costs in each column; 1 if left out.
        shares: of the covering scale, to try; the first of equals wins.
    """
    top = float(level_values(torch.tensor([2**grid.bits - 1]), grid.kind, grid.bits))
    blocks = weight.unflatten(1, (-1, block))
    cover = (blocks.abs().amax(-1) / top).clamp(min=SMALLEST_SCALE)
    if len(shares) == 1:
        return cover * shares[0]
    best, least = cover * shares[0], torch.full_like(cover, torch.inf)
    for share in shares:
        scale = (cover * share).unsqueeze(-1)
        error = (grid.decode(grid.encode(blocks, scale), scale) - blocks).square_()
        if importance is not None:
            error *= importance.view(-1, block)
        cost = error.sum(-1)
        best = torch.where(cost < least, scale[..., 0], best)
        least = torch.minimum(cost, least)
    return best


def truncated(
    scale: Float[Tensor, "out blocks"], in_: int, rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """The best factors of rank ``rank`` of block scales, each repeated over its block's columns.

    The singular value decomposition is that of ``scale`` itself: repeated columns only repeat right vectors.
    Where there are fewer blocks than ``rank``, the columns left over are zero.
    """
    block = in_ // scale.shape[1]
    u, s, vt = torch.linalg.svd(scale.double(), full_matrices=False)
    kept = min(rank, len(s))
    root = (s[:kept] * block**0.5).sqrt()
    left = scale.new_zeros(scale.shape[0], rank)
    right = scale.new_zeros(rank, in_)
    left[:, :kept] = (u[:, :kept] * root).to(scale.dtype)
    right[:kept] = (root[:, None] * vt[:kept] / block**0.5).repeat_interleave(block, 1).to(scale.dtype)
    return left, right


def balanced(
    left: Float[Tensor, "out rank"], right: Float[Tensor, "rank in"]
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """The same product as ``U sqrt(D), sqrt(D) V^T`` of its singular value decomposition.

    Orthogonal columns of equal norms on both sides: small cancellation when they are rounded to float16.
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    u, s, vt = torch.linalg.svd(r_left @ r_right.T)
    root = s.sqrt()
    return (q_left @ (u * root)).to(left.dtype), ((root[:, None] * vt) @ q_right.T).to(right.dtype)


def store_scale(left: Float[Tensor, "out rank"], right: Float[Tensor, "rank in"]) -> LowRankScale:
    """Balance factors and round them to float16.

    Raises:
        ValueError: if a factor exceeds what float16 holds.
    """
    left, right = balanced(left, right)
    what = "the factors of a scale"
    return LowRankScale(stored_half(left, what), stored_half(right, what))


# ---- least squares --------------------------------------------------------------------------------------


def fit_least_squares(
    weight: Float[Tensor, "out in"],
    left: Float[Tensor, "out rank"],
    right: Float[Tensor, "rank in"],
    grid: LevelGrid,
    *,
    importance: Float[Tensor, "in"],
    sweeps: int,
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"], list[float]]:
    """Factors of the scale that keep ``sum_ij d_j (W_ij - levels[c_ij] (B A)_ij)^2`` small, codes chosen alongside.

    A sweep moves B, then A, codes being the nearest ones before and after each. With ``v_i = levels[c_i]`` as they are,
    the best row ``i`` of B solves

        (A diag(d v_i^2) A^T) b_i = A (d v_i w_i)

    and columns of A likewise; all rows' matrices come from one product, that of ``d V^2`` with the products of pairs of
    A's rows. But codes follow their scale, which takes back most of a change: the sum is far flatter than with codes
    held. So each row (column) tries 2, 4, 8 and 16 times the step and keeps the best, or stays. No half raises the sum.

    Args:
        weight, left, right: W, and B and A to start from.
        importance: d, what a squared error costs in each column.

    Returns:
        ``(B, A, losses)``: the sum at the start and after each half, with nearest codes.

    Source:
        Ours, for the objective of LoRDS, arXiv:2601.22716, which takes gradient steps.
    """
    losses: list[float] = []
    for _ in range(sweeps):
        left, right = balanced(left, right)
        left, grams, sides, costs, start = _moved_left(weight, left, right, grid, importance)
        losses += [start, float(costs.sum())]
        right = _moved_right(weight, left, right, grid, importance, _solved(grams, sides, right.T).T, costs)
    losses.append(assigned_loss(weight, left, right, grid, importance=importance))
    return left, right, losses


def _moved_left(
    weight: Tensor, left: Tensor, right: Tensor, grid: LevelGrid, importance: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """B after its half of a sweep; what A's half needs, matrices, right sides and costs of columns; the sum before."""
    rank, in_ = right.shape
    grams, sides, costs = right.new_zeros(in_, rank, rank), right.new_zeros(in_, rank), right.new_zeros(in_)
    moved, before = torch.empty_like(left), 0.0
    for rows in _tiles(*weight.shape):
        w, b = weight[rows], left[rows]
        values, error = _assigned(w, b @ right, grid, importance)
        least = error.sum(1)
        before += float(least.sum())
        step = _solved(*_normal(values, w, right, importance), b) - b
        best = b
        for stride in _STRIDES:
            trial = torch.add(b, step, alpha=stride)
            cost = _assigned(w, trial @ right, grid, importance)[1].sum(1)
            best = torch.where((cost < least).unsqueeze(1), trial, best)
            least = torch.minimum(cost, least)
        values, error = _assigned(w, best @ right, grid, importance)
        moved[rows] = best
        gram, side = _normal(values.T, w.T, best.T, None)
        grams += gram
        sides += side
        costs += error.sum(0)
    return moved, grams, sides, costs, before


def _moved_right(
    weight: Tensor, left: Tensor, right: Tensor, grid: LevelGrid, importance: Tensor, solved: Tensor, least: Tensor
) -> Float[Tensor, "rank in"]:
    """A after its half of a sweep, each column as far towards ``solved`` and beyond as lowers its cost most."""
    trials = [torch.lerp(right, solved, stride) for stride in _STRIDES]
    costs = [torch.zeros_like(least) for _ in trials]
    for rows in _tiles(*weight.shape):
        for trial, cost in zip(trials, costs, strict=True):
            cost += _assigned(weight[rows], left[rows] @ trial, grid, importance)[1].sum(0)
    for trial, cost in zip(trials, costs, strict=True):
        right = torch.where(cost < least, trial, right)
        least = torch.minimum(cost, least)
    return right


def assigned_loss(
    weight: Float[Tensor, "out in"],
    left: Float[Tensor, "out rank"],
    right: Float[Tensor, "rank in"],
    grid: LevelGrid,
    *,
    importance: Float[Tensor, "in"],
) -> float:
    """``sum_ij d_j (W_ij - levels[c_ij] (B A)_ij)^2`` with nearest codes."""
    return sum(
        float(_assigned(weight[rows], left[rows] @ right, grid, importance)[1].sum()) for rows in _tiles(*weight.shape)
    )


def _tiles(out: int, in_: int) -> Iterator[slice]:
    """Slices of rows of about ``_TILE`` weights."""
    step = max(1, _TILE // in_)
    for start in range(0, out, step):
        yield slice(start, start + step)


def _assigned(
    weight: Tensor, scale: Tensor, grid: LevelGrid, importance: Tensor
) -> tuple[Float[Tensor, "rows in"], Float[Tensor, "rows in"]]:
    """``levels[codes]`` of the nearest codes, and what each costs; ``scale`` is used up."""
    values = level_values(grid.encode(weight, scale), grid.kind, grid.bits)
    return values, scale.mul_(values).sub_(weight).square_().mul_(importance)


def _normal(
    values: Float[Tensor, "rows n"],
    weight: Float[Tensor, "rows n"],
    right: Float[Tensor, "rank n"],
    importance: Float[Tensor, "n"] | None,
) -> tuple[Float[Tensor, "rows rank rank"], Float[Tensor, "rows rank"]]:
    """Matrices and right sides of the rows' least-squares problems."""
    rank = len(right)
    i, j = torch.triu_indices(rank, rank, device=right.device)
    weighted = values if importance is None else values * importance
    pairs = (values * weighted) @ (right[i] * right[j]).T  # (rows, pairs)
    grams = pairs.new_empty(len(pairs), rank, rank)
    grams[:, i, j] = pairs
    grams[:, j, i] = pairs
    return grams, (weighted * weight) @ right.T


def _solved(
    grams: Float[Tensor, "rows rank rank"], sides: Float[Tensor, "rows rank"], before: Float[Tensor, "rows rank"]
) -> Float[Tensor, "rows rank"]:
    """Solutions of ``gram x = side``, held near those before; a row whose matrix is singular keeps its own."""
    grams, old = grams.double(), before.double().unsqueeze(-1)
    rest = sides.double().unsqueeze(-1) - grams @ old
    hold = grams.diagonal(dim1=1, dim2=2).mean(-1).mul_(_HOLD).clamp_(min=1e-30)
    grams = grams + torch.diag_embed(hold.unsqueeze(-1).expand(-1, grams.shape[1]))
    factors, info = torch.linalg.cholesky_ex(grams)
    change = torch.cholesky_solve(rest, factors)
    change = torch.where((info == 0).view(-1, 1, 1) & change.isfinite(), change, 0.0)
    return (old + change).squeeze(-1).to(before.dtype)


# ---- gradient steps -------------------------------------------------------------------------------------


def fit_gradient(
    weight: Float[Tensor, "out in"],
    left: Float[Tensor, "out rank"],
    right: Float[Tensor, "rank in"],
    grid: LevelGrid,
    *,
    importance: Float[Tensor, "in"],
    steps: int,
    learning_rate: float,
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"], list[float]]:
    """As `fit_least_squares`, by Adam: nearest codes, one step on the root of the sum with the codes fixed, and so on.

        dB = (G o V) A^T,   dA = B^T (G o V),   G = d (V o B A - W) / loss,   V = levels[codes]

    Returns:
        The factors with the least sum seen, the last included, and the sums before each step and at the end.

    Source:
        LoRDS, arXiv:2601.22716, and its authors' code. Deviations: the best factors are kept, not the last; scales may
        become negative, where the code keeps them above 1e-8 and would need the clamp in its kernels.
    """
    left, right = left.clone(), right.clone()
    adam = torch.optim.Adam([left, right], lr=learning_rate)
    losses: list[float] = []
    best = left.clone(), right.clone()
    for step in range(steps + 1):
        loss, of_left, of_right = 0.0, torch.empty_like(left), torch.zeros_like(right)
        for rows in _tiles(*weight.shape):
            w, b = weight[rows], left[rows]
            scale = b @ right
            values = level_values(grid.encode(w, scale), grid.kind, grid.bits)
            error = scale.mul_(values).sub_(w)
            weighted = error * importance
            loss += float((weighted * error).sum())
            slope = weighted.mul_(values)
            of_left[rows] = slope @ right.T
            of_right.addmm_(b.T, slope)
        if not losses or loss < min(losses):
            best = left.clone(), right.clone()
        losses.append(loss)
        if step < steps:
            root = max(loss, 1e-30) ** 0.5
            left.grad, right.grad = of_left.div_(root), of_right.div_(root)
            adam.step()
    return *best, losses
