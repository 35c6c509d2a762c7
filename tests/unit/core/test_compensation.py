"""Factors of an error, ranks under a budget, and scales that were moved."""

import itertools

import pytest
import torch

from lorq.core.compensation import error_pairs, fit_scaling, share_ranks
from lorq.core.linalg import cholesky, damp
from lorq.core.low_rank import Metric


def test_pairs_gain_the_squares_of_the_whitened_singular_values(correlated, generator):
    inputs = correlated(400, 24)
    hessian = damp(inputs.T @ inputs / 400, 0.01)
    error = torch.randn(40, 24, generator=generator)
    pairs = error_pairs(error, Metric.hessian(cholesky(hessian)), rank=24, generator=generator)
    # By another root of H than the one that is used.
    values, vectors = torch.linalg.eigh(hessian.double())
    spectrum = torch.linalg.svdvals(error.double() @ (vectors * values.sqrt()))
    torch.testing.assert_close(pairs.gains.double(), spectrum.square(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(pairs.left @ pairs.right, error, rtol=1e-3, atol=1e-3)

    def left_over(rank):
        rest = (error - pairs.left[:, :rank] @ pairs.right[:rank]).double()
        return torch.trace(rest @ hessian.double() @ rest.T)

    for rank in (0, 1, 5, 23):  # the tail of the spectrum, which no other factors of this rank get below
        torch.testing.assert_close(left_over(rank), spectrum[rank:].square().sum(), rtol=1e-4, atol=1e-4)


def test_a_few_pairs_of_many_gain_all_but_a_thousandth_of_what_is_possible(generator):
    error = torch.randn(200, 160, generator=generator)  # a flat spectrum is the hardest to sketch
    identity = Metric(lambda e: e, lambda v: v)
    pairs = error_pairs(error, identity, rank=16, generator=generator)
    best = torch.linalg.svdvals(error)[:16].square().sum()
    assert 0.98 * best < pairs.gains.sum() <= best * 1.0001
    assert (pairs.gains.diff() <= 0).all()


@pytest.mark.parametrize("budget", [0.5, 1, 3, 4, 7, 11, 100])
def test_no_other_ranks_that_cost_as_much_gain_more(budget, generator):
    costs = [1.0, 2.0, 3.0]
    gains = [torch.rand(4, generator=generator).sort(descending=True).values * cost for cost in costs]
    ranks, price = share_ranks(gains, costs, budget)

    def worth(chosen):
        return sum(float(own[:rank].sum()) for own, rank in zip(gains, chosen, strict=True))

    def spent(chosen):
        return sum(rank * cost for rank, cost in zip(chosen, costs, strict=True))

    assert spent(ranks) <= budget
    cheaper = [chosen for chosen in itertools.product(range(5), repeat=3) if spent(chosen) <= spent(ranks)]
    assert worth(ranks) == pytest.approx(max(map(worth, cheaper)))
    for own, rank, cost in zip(gains, ranks, costs, strict=True):
        assert (own[:rank] / cost >= price - 1e-6).all() and (own[rank:] / cost <= price + 1e-6).all()


def test_more_budget_takes_no_pair_away(generator):
    costs = [576.0, 1152.0, 2112.0]
    gains = [torch.rand(9, generator=generator).sort(descending=True).values for _ in costs]
    chosen = [share_ranks(gains, costs, budget)[0] for budget in range(0, 40000, 500)]
    for before, after in itertools.pairwise(chosen):
        assert all(a <= b for a, b in zip(before, after, strict=True))
    assert chosen[0] == [0, 0, 0] and share_ranks(gains, costs, 1e9) == ([9, 9, 9], 0.0)


@pytest.mark.parametrize("bits", [3, 5])
def test_scales_that_were_moved_before_rounding_are_found_and_those_of_rounding_are_not(bits, generator):
    weight = torch.randn(64, 96, generator=generator)
    rows, columns = (torch.empty(n).uniform_(0.4, 2.5, generator=generator) for n in weight.shape)

    def rounded(w):
        step = w.abs().amax(1, keepdim=True) / 2 ** (bits - 1)
        return (w / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step

    assert fit_scaling(weight, rounded(weight)) is None
    found = fit_scaling(weight, rounded(torch.outer(rows, columns) * weight))
    assert found is not None
    off = torch.outer(*found) / torch.outer(rows, columns)
    # Means over 64 and 96 weights, of which those of small columns are rounded to few steps.
    assert float(off.log().std()) < (0.03 if bits == 5 else 0.15)


def test_a_row_of_zeros_keeps_its_scale():
    weight = torch.eye(8) + 1
    weight[3] = 0
    columns = torch.linspace(0.5, 2, 8)
    rows, found = fit_scaling(weight, weight * columns)
    assert rows[3] == 1 and torch.isfinite(found).all()
    nothing_left = torch.cat([weight[:, :7] * columns[:7], torch.zeros(8, 1)], 1)
    assert fit_scaling(weight, nothing_left)[1][7] == 1
