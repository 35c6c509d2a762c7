"""The best choice under a budget: one candidate for each item, all of them together within so many bits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Candidate:
    """What one choice costs, in stored bits, and the harm that is predicted of it, in any unit."""

    bits: int
    harm: float


@dataclass(frozen=True)
class _Step:
    """From one candidate of an item's hull to the next: more bits, less harm."""

    item: int
    to: int
    bits: int
    gain: float


def hull(candidates: Sequence[Candidate]) -> list[int]:
    """The candidates on the lower convex hull of harm over bits, by rising bits; their harm falls.

    Only these are best for some price of a bit. The first has the fewest bits.

    Example:
        >>> hull([Candidate(4, 1.0), Candidate(2, 9.0), Candidate(3, 8.0), Candidate(8, 1.0)])
        [1, 0]
    """
    order = sorted(range(len(candidates)), key=lambda i: (candidates[i].bits, candidates[i].harm, i))
    kept: list[int] = []
    for i in order:
        if kept and candidates[i].harm >= candidates[kept[-1]].harm:
            continue
        while len(kept) > 1 and _slope(candidates, kept[-2], i) >= _slope(candidates, kept[-2], kept[-1]):
            kept.pop()
        kept.append(i)
    return kept


def _slope(candidates: Sequence[Candidate], a: int, b: int) -> float:
    """Harm that a bit takes off between two candidates."""
    return (candidates[a].harm - candidates[b].harm) / (candidates[b].bits - candidates[a].bits)


def _steps(items: Sequence[Sequence[Candidate]], hulls: Sequence[Sequence[int]]) -> list[_Step]:
    """The steps of all hulls, those that gain most for a bit first; the steps of one item stay in their order."""
    steps = [
        _Step(item, to, own[to].bits - own[at].bits, own[at].harm - own[to].harm)
        for item, (own, path) in enumerate(zip(items, hulls, strict=True))
        for at, to in pairwise(path)
    ]
    return sorted(steps, key=lambda step: -step.gain / step.bits)  # stable: ties by item, then along its hull


def choose(items: Sequence[Sequence[Candidate]], budget: int) -> list[int]:
    """One candidate for each item, at most ``budget`` bits in all, with about the least harm in all.

    From the fewest bits everywhere, steps along the items' hulls are taken in the order of what they gain for a bit:
    as far as all fit, that is the choice of a Lagrange multiplier, the best there is for as many bits. A step that
    does not fit ends its item, and later ones are tried, so that what is left is less than any step that could be
    taken. With a larger budget the harm is never larger: a step gains more than all that fits in its place.

    Raises:
        ValueError: if even the fewest bits are more than the budget.
    """
    hulls = [hull(own) for own in items]
    chosen = [path[0] for path in hulls]
    room = budget - sum(own[i].bits for own, i in zip(items, chosen, strict=True))
    if room < 0:
        raise ValueError(f"the budget must be at least the {budget - room} bits of the smallest choice, got {budget}")
    ended: set[int] = set()
    for step in _steps(items, hulls):
        if step.item in ended:
            continue
        if step.bits > room:
            ended.add(step.item)
        else:
            chosen[step.item] = step.to
            room -= step.bits
    return chosen


def frontier(items: Sequence[Sequence[Candidate]]) -> Iterator[Candidate]:
    """The best choices of all budgets: bits and harm in all, from the fewest bits to the most; harm falls."""
    hulls = [hull(own) for own in items]
    bits = sum(own[path[0]].bits for own, path in zip(items, hulls, strict=True))
    harm = sum(own[path[0]].harm for own, path in zip(items, hulls, strict=True))
    yield Candidate(bits, harm)
    for step in _steps(items, hulls):
        bits, harm = bits + step.bits, harm - step.gain
        yield Candidate(bits, harm)
