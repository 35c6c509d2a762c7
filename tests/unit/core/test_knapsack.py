"""The choice under a budget: against all choices of small problems, and how it moves with the budget."""

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorq.core.knapsack import Candidate, choose, frontier, hull

candidates = st.builds(Candidate, st.integers(1, 40), st.floats(0, 10))
problems = st.lists(st.lists(candidates, min_size=1, max_size=4), min_size=1, max_size=4)


def _all(items, what):
    """Bits and harm of the choices in ``what``, numbers of candidates."""
    picked = [own[i] for own, i in zip(items, what, strict=True)]
    return sum(c.bits for c in picked), sum(c.harm for c in picked)


def test_a_candidate_above_the_line_between_two_others_is_never_best():
    assert hull([Candidate(2, 4.0), Candidate(3, 3.5), Candidate(4, 1.0), Candidate(5, 1.0)]) == [0, 2]


@given(problems)
@settings(max_examples=50)
def test_whole_steps_of_the_frontier_are_the_best_of_all_choices(items):
    every = [_all(items, what) for what in product(*(range(len(own)) for own in items))]
    for point in frontier(items):
        best = min(harm for bits, harm in every if bits <= point.bits)
        assert point.harm == pytest.approx(best, abs=1e-9)


@given(problems, st.integers(0, 160))
@settings(max_examples=50)
def test_a_choice_keeps_the_budget_and_is_no_worse_than_the_frontier_there(items, budget):
    points = list(frontier(items))
    if budget < points[0].bits:
        with pytest.raises(
            ValueError, match=f"at least the {points[0].bits} bits of the smallest choice, got {budget}"
        ):
            choose(items, budget)
        return
    bits, harm = _all(items, choose(items, budget))
    assert bits <= budget
    assert harm <= min(p.harm for p in points if p.bits <= budget) + 1e-9


@given(problems)
@settings(max_examples=25)
def test_more_bits_never_harm(items):
    least = next(frontier(items)).bits
    harms = [_all(items, choose(items, budget))[1] for budget in range(least, least + 100)]
    assert all(b <= a + 1e-9 for a, b in pairwise(harms))


def test_what_a_large_step_leaves_is_given_to_smaller_ones():
    items = [[Candidate(1, 9.0), Candidate(11, 0.0)], [Candidate(1, 1.0), Candidate(2, 0.5)]]
    assert choose(items, 11) == [0, 1]
    assert choose(items, 12) == [1, 0]
    assert choose(items, 13) == [1, 1]


def test_the_same_problem_has_the_same_answer_where_steps_are_alike():
    alike = [[Candidate(2, 4.0), Candidate(3, 1.0)] for _ in range(5)]
    assert choose(alike, 12) == [1, 1, 0, 0, 0]
