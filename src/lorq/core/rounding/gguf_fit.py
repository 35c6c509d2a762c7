"""Steps of GGUF's groups and blocks: what is tried, what is refitted to its codes, what can be stored."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.codes.gguf import level_of
from lorq.core.codes.gguf_blocks import BlockType
from lorq.core.half import stored_half

# Ranges to try for a group, as shares of the one that covers it, up to a little more: so many of those around zero, and
# so many for either end of the others, in all pairs.
_SYMMETRIC, _ENDS, _WIDEST = 9, 5, 1.05
# How often the best is refitted to its codes.
_REFITS = 2
# Scales to try for a block of groups, as shares of the one that covers their steps.
_BLOCK_TRIALS, _BLOCK_SHARES = 16, (0.8, 1.1)
# Where a group's whole numbers are looked for, around those of what it would like best.
_AROUND = (-2.0, -1.0, 0.0, 1.0, 2.0)
# The smallest number above 0 that float16 holds: no scale is 0.
_TINY = 2.0**-24


@dataclass(frozen=True)
class Fit:
    """Steps of groups and what is subtracted, or None: a code stands for ``step level(code) - low``."""

    step: Float[Tensor, "..."]
    low: Float[Tensor, "..."] | None

    def encode(self, weight: Float[Tensor, "..."], type: BlockType) -> Float[Tensor, "..."]:
        """The nearest codes, as floats. A step of 0 leaves no choice."""
        quotient = torch.nan_to_num((weight if self.low is None else weight + self.low) / self.step, nan=0.0)
        if type.levels:
            table = torch.tensor(type.levels, dtype=weight.dtype, device=weight.device)
            return torch.bucketize(quotient, (table[1:] + table[:-1]) / 2, out_int32=True).to(weight.dtype)
        return quotient.add_(type.zero).round_().clamp_(0, type.top)

    def decode(self, codes: Float[Tensor, "..."], type: BlockType) -> Float[Tensor, "..."]:
        """The values behind codes."""
        values = level_of(codes, type, codes.dtype).mul_(self.step)
        return values if self.low is None else values.sub_(self.low)

    def where(self, condition: Tensor, other: "Fit") -> "Fit":
        """This fit where the condition holds, else the other."""
        low = None
        if self.low is not None and other.low is not None:
            low = torch.where(condition, self.low, other.low)
        return Fit(torch.where(condition, self.step, other.step), low)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Fit":
        """Both parts changed alike."""
        return Fit(change(self.step), None if self.low is None else change(self.low))

    def at(self, number: int) -> "Fit":
        """That of one group."""
        return self.map(lambda part: part[number])


def search(
    weight: Float[Tensor, "groups size rows"],
    upper: Float[Tensor, "groups size size"] | None,
    trials: Fit,
    stored: Callable[[Fit], Fit],
    type: BlockType,
) -> tuple[Fit, Float[Tensor, "groups size rows"]]:
    """The best of ``trials`` (groups, trials, rows), refitted, and its codes; ``stored`` makes a fit storable.

    Without ``upper`` no error is passed on.
    """

    def cheapest(trials: Fit) -> tuple[Tensor, Tensor, Tensor]:
        return search_groups(weight, trials.step, trials.low, upper, type.bits, type.zero, list(type.levels))

    codes, best, cost = cheapest(trials)
    fit = trials.map(lambda part: part.gather(1, best.unsqueeze(1))[:, 0])
    for _ in range(_REFITS):
        other = stored(_refitted(weight, codes, upper, type))
        again, _, reached = cheapest(other.map(lambda part: part.unsqueeze(1)))
        better = reached < cost
        cost, codes = torch.where(better, reached, cost), torch.where(better.unsqueeze(1), again, codes)
        fit = other.where(better, fit)
    return fit, codes


def search_groups_reference(
    weight: Tensor, step: Tensor, low: Tensor | None, upper: Tensor | None, bits: int, zero: int, levels: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Which of some fits is best for each group and row, when its codes pass their errors on inside the group.

    Args:
        weight: (groups, size, rows) float32.
        step: (groups, trials, rows) float32.
        low: as ``step``, or None.
        upper: (groups, size, size) float32, each group's block of the factor of the inverse Hessian; without it no
            error is passed on.
        bits, zero, levels: of `BlockType`.

    Returns:
        The codes (groups, size, rows), as floats; the number (groups, rows) of the best trial, of equals the first; and
        what it costs, ``sum_i ((t_i - q_i) / U_ii)^2``.
    """
    fit, type = Fit(step, low), BlockType(bits, zero, {}, (), levels=tuple(levels))
    columns = weight.unsqueeze(2).repeat(1, 1, step.shape[1], 1)
    codes, costs = torch.empty_like(columns), torch.zeros_like(step)
    for i in range(weight.shape[1]):
        codes[:, i] = fit.encode(columns[:, i], type)
        error = columns[:, i] - fit.decode(codes[:, i], type)
        if upper is not None:
            error.div_(upper[:, i, i].view(-1, 1, 1))
            columns[:, i + 1 :].addcmul_(upper[:, i, i + 1 :, None, None], error.unsqueeze(1), value=-1)
        costs.addcmul_(error, error)
    best = costs.argmin(1, keepdim=True)
    chosen = codes.gather(2, best.unsqueeze(1).expand(-1, codes.shape[1], -1, -1))
    return chosen[:, :, 0].contiguous(), best[:, 0].contiguous(), costs.gather(1, best)[:, 0].contiguous()


# The function keeps its name, as the kernels' reference.
search_groups = torch.library.custom_op("lorq::search_groups", search_groups_reference, mutates_args=())


def _refitted(
    weight: Float[Tensor, "groups size rows"],
    codes: Float[Tensor, "groups size rows"],
    upper: Float[Tensor, "groups size size"] | None,
    type: BlockType,
) -> Fit:
    """The fit with the least ``|(w - step level(c) + low) U^-1|^2`` for given codes."""
    levels, ones, squares = _moments(codes, upper, type)
    against = weight if upper is None else torch.linalg.solve_triangular(upper.mT, weight, upper=False)
    level_level, level_one, one_one = squares
    alone = (levels * against).sum(1) / level_level.clamp(min=1e-30)
    if not type.affine:
        return Fit(alone, None)
    second = (ones * against).sum(1)
    determinant = level_level * one_one - level_one.square()
    step = (alone * level_level * one_one - second * level_one) / determinant
    low = (alone * level_level * level_one - second * level_level) / determinant
    if type.packing:  # nothing below 0 is subtracted
        step, low = torch.where(low < 0, alone, step).clamp(min=0), low.clamp(min=0)
    alike = ~(determinant > 1e-6 * level_level * one_one)  # all codes are one
    return Fit(torch.where(alike, 0.0, step), torch.where(alike, 0.0, low))


def _moments(
    codes: Float[Tensor, "groups size rows"], upper: Float[Tensor, "groups size size"] | None, type: BlockType
) -> tuple[Float[Tensor, "groups size rows"], Float[Tensor, "groups size 1"], tuple[Tensor, Tensor, Tensor]]:
    """``level(c) U^-1``, ``1 U^-1``, and the products (groups, rows) of both with each other."""
    levels, ones = level_of(codes, type, codes.dtype), torch.ones_like(codes[:, :, :1])
    if upper is not None:
        levels, ones = (torch.linalg.solve_triangular(upper.mT, part, upper=False) for part in (levels, ones))
    return levels, ones, (levels.square().sum(1), (levels * ones).sum(1), ones.square().sum(1))


def _half(numbers: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return stored_half(numbers).to(numbers.dtype)


def halves(fit: Fit) -> Fit:
    """A fit as a block without groups stores it."""
    step = _half(fit.step)
    return Fit(torch.where(step == 0, _TINY, step), None if fit.low is None else _half(fit.low))


def in_units(fit: Fit, unit: Fit, type: BlockType) -> Fit:
    """A fit in whole numbers of a block's units."""
    step = (fit.step / unit.step).round_().clamp_(*type.scales).mul_(unit.step)
    if fit.low is None or unit.low is None:
        return Fit(step, None)
    return Fit(step, (fit.low / unit.low).round_().clamp_(0, type.minima).mul_(unit.low))


def covering(weight: Float[Tensor, "groups size rows"], type: BlockType) -> Fit:
    """Trials (groups, trials, rows): shares of the range from a group's smallest to its largest weight."""
    count = _ENDS if type.affine else _SYMMETRIC
    narrowest = 1 - 1.2 / math.log2(type.top + 1)
    shares = torch.linspace(narrowest, _WIDEST, count, dtype=weight.dtype, device=weight.device)[:, None]
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if type.affine:
        low = low.clamp(max=0) if type.packing else low
        middle, reach = (high + low) / 2, (high - low) / 2
        low = middle - shares.repeat(count, 1) * reach
        low = low.clamp(max=0) if type.packing else low
        return Fit((middle + shares.repeat_interleave(count, 0) * reach - low) / type.top, -low)
    extreme = torch.where(-low > high, low, high)
    ends = level_of(torch.tensor([0, type.top], device=weight.device), type, weight.dtype).tolist()
    return Fit(torch.cat([shares * (extreme / end) for end in ends], 1), None)


def near(wanted: Fit, unit: Fit, type: BlockType) -> Fit:
    """Trials (1, trials, rows): the whole numbers next to those of what a group would like best."""
    around = torch.tensor(_AROUND, dtype=wanted.step.dtype, device=wanted.step.device)[:, None]
    step = wanted.step + around * unit.step
    if wanted.low is None or unit.low is None:
        return in_units(Fit(step[None], None), unit, type)
    low, count = wanted.low + around * unit.low, len(around)
    return in_units(Fit(step.repeat(count, 1)[None], low.repeat_interleave(count, 0)[None]), unit, type)


def begin_block(
    weight: Float[Tensor, "block rows"], upper: Float[Tensor, "block block"] | None, type: BlockType
) -> tuple[Fit, Fit]:
    """The units of a block (rows,), as they are stored, and what each of its groups would like best (groups, rows)."""
    groups = weight.unflatten(0, (-1, type.group))
    count = len(groups)
    index = torch.arange(count, device=weight.device)
    inner = None if upper is None else upper.unflatten(0, (count, -1)).unflatten(2, (count, -1))[index, :, index, :]
    wanted, codes = search(groups, inner, covering(groups, type), lambda fit: fit, type)
    _, _, (level_level, level_one, one_one) = _moments(codes, inner, type)
    if wanted.low is None:
        return Fit(_unit(wanted.step, level_level, type.scales), None), wanted
    # A step that is off moves the best minimum.
    step = _unit(wanted.step, level_level - level_one.square() / one_one, type.scales)
    off = in_units(Fit(wanted.step, None), Fit(step, None), type).step - wanted.step
    low = (wanted.low + level_one / one_one * off).clamp(min=0)
    return Fit(step, _unit(low, one_one.expand_as(low), (0, type.minima))), wanted


def _unit(
    numbers: Float[Tensor, "groups rows"], importance: Float[Tensor, "groups rows"], range_: tuple[int, int]
) -> Float[Tensor, "rows"]:
    """The unit, as it is stored, in whole numbers of which all numbers come out best, none outside of the range."""
    least, most = range_
    shares = torch.linspace(*_BLOCK_SHARES, _BLOCK_TRIALS, dtype=numbers.dtype, device=numbers.device)[:, None]
    low, high = numbers.amin(0), numbers.amax(0)
    extreme = torch.where(-low > high, low, high)
    trials = torch.cat([shares * extreme / end for end in range_ if end])  # (trials, rows)
    trials = _half(trials)
    trials = torch.where(trials == 0, _TINY, trials).unsqueeze(1)  # (trials, 1, rows)
    off = (numbers / trials).round_().clamp_(least, most).mul_(trials).sub_(numbers)
    best = (off.square_() * importance).sum(1).argmin(0, keepdim=True)
    return trials[:, 0].gather(0, best)[0]
