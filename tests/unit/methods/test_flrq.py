"""FLRQ: exact cases, a composition by hand, and the order that its errors keep."""

import dataclasses
import itertools

import pytest
import torch
from helpers import prepared, same_codes, solve_one
from torch.testing import assert_close

from lorq.core.codes import IntGrid
from lorq.core.linalg import shrink
from lorq.core.low_rank import store_factors
from lorq.core.problem import layer_generator
from lorq.core.rank_choice import choose_rank, rank_cap
from lorq.core.rounding import RangeSearch, clip, nearest
from lorq.core.sketch import sketch
from lorq.core.stats import InputStats, StatsAccumulator, output_energy
from lorq.methods import FLRQ, FLRQPaper, Nearest

# The stops of the paper's code are made for matrices of thousands; these let small ones have a rank.
EAGER = {"group_size": 32, "budget": 1.0, "slope_window": 2, "slope_threshold": 0.01, "range_measure": "group"}


def seeded():
    """What `solve_one` draws from."""
    return layer_generator(0, "layer")


@pytest.fixture
def layer(correlated, generator):
    """A weight with decaying directions over noise and loud rows, so that ranks pay; and statistics of its inputs."""

    def make(out=64, in_=96):
        sums = StatsAccumulator(in_)
        sums.add(correlated(4 * in_, in_))
        rank = 12
        strong = torch.randn(out, rank, generator=generator) * 0.7 ** torch.arange(rank)
        weight = strong @ torch.randn(rank, in_, generator=generator) + torch.randn(out, in_, generator=generator)
        weight[:3] *= torch.tensor([[64.0], [24.0], [8.0]])
        return 0.02 * weight, sums.finish()

    return make


def same(a, b):
    if (a.low_rank is None) != (b.low_rank is None):
        return False
    pairs = []
    if a.low_rank is not None:
        pairs = [(a.low_rank.left, b.low_rank.left), (a.low_rank.right, b.low_rank.right)]
    return same_codes(a.codes, b.codes) and all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("metric", ["activation", "hessian"])
@pytest.mark.parametrize("form", ["block", "rank1"])
def test_a_low_rank_matrix_on_top_of_the_grid_is_nearly_exact(metric, form, correlated, generator):
    # Ranks 1 and 2 are a thousand steps high, the rest is on a grid that spans its range.
    codes = torch.randint(0, 8, (64, 3, 32), generator=generator).float()
    codes[..., 0], codes[..., -1] = 0, 7
    on_grid = ((codes - 3) * 2.0**-9).flatten(1)
    strong = torch.randn(64, 2, generator=generator) @ torch.randn(2, 96, generator=generator)
    sums = StatsAccumulator(96)
    sums.add(correlated(400, 96))
    stats = sums.finish()
    method = FLRQPaper(bits=3, metric=metric, sketch=form, shrinkage=1.0, epochs=4, **EAGER)
    result = solve_one(method, strong + on_grid, stats)
    assert result.format.rank >= 2
    # Of what rounding to nearest misses only noise of the grid's size is left: 50 times less amplitude.
    assert result.record.error_after < result.record.error_before / 2500
    assert result.record.error_after < 1e-5


def test_a_matrix_of_low_rank_needs_no_codes(layer, generator):
    _, stats = layer()
    weight = torch.randn(64, 2, generator=generator) @ torch.randn(2, 96, generator=generator)
    # Two tests that would refuse the last rank are off: the curve falls to zero there.
    result = solve_one(FLRQPaper(bits=4, **EAGER), weight, stats)
    assert result.format.rank >= 2
    # float16 factors: 2^-11 each, and the codes take up part of what these miss.
    assert result.record.error_after < 2.0**-20


@pytest.mark.parametrize("exponent, constant", [(1.0, 4.0), (2.0, 0.125), (0.0, 3.0)])
def test_a_constant_on_the_magnitudes_changes_no_bit(exponent, constant, layer):
    weight, stats = layer()
    louder = dataclasses.replace(stats, mean_abs=stats.mean_abs * constant)  # exact: a power of two, or unused
    method = FLRQPaper(bits=3, exponent=exponent, **EAGER)
    results = [solve_one(method, weight, s) for s in (stats, louder)]
    assert results[0].format.rank > 0
    assert same(*results)


def test_a_constant_on_the_magnitudes_changes_nothing_but_rounding(layer):
    weight, stats = layer()
    louder = dataclasses.replace(stats, mean_abs=stats.mean_abs * 7.3)
    method = FLRQPaper(bits=3, **EAGER)
    a, b = (solve_one(method, weight, s) for s in (stats, louder))
    assert a.format == b.format and a.format.rank > 0
    assert_close(a.low_rank.dense(), b.low_rank.dense(), rtol=0, atol=2e-3 * float(a.low_rank.dense().abs().max()))
    # A weight between two codes may fall either way.
    assert int((a.codes.codes != b.codes.codes).sum()) < 0.01 * weight.numel()


def test_no_epochs_are_one_shot_of_sketch_rank_and_clip(layer):
    weight, stats = layer()
    result = solve_one(FLRQPaper(bits=3, epochs=0, **EAGER), weight, stats)

    alpha = stats.mean_abs**2.5
    alpha = alpha / (alpha.max() * alpha.min()).sqrt()
    cap = rank_cap(64, 96, bits=3, factor_bits=16, budget=1.0)
    left, right = sketch(weight * alpha, rank=cap + 1, iterations=2, generator=seeded())
    choice = choose_rank(
        weight * alpha, left, right, bits=3, factor_bits=16, budget=1.0, slope_window=2, slope_threshold=0.01,
        warm_up=2, measure="group", group_size=32,
    )  # fmt: skip
    low_rank = store_factors(left[:, : choice.rank], right[: choice.rank] / alpha, factor_type="float16")
    rounded = clip(
        weight - low_rank.dense(),
        prepared(shrink(stats.hessian, 0.2)),
        IntGrid(3, 32),
        RangeSearch(40, 0.8, "saturate"),
    )
    assert result.format.rank == choice.rank > 0 and result.record.stop == choice.stop
    # The constant of alpha is computed in another order; factors may differ in the last float16 digit.
    assert_close(result.low_rank.dense(), low_rank.dense(), rtol=0, atol=1e-3 * float(low_rank.dense().abs().max()))
    assert int((result.codes.codes != rounded.codes).sum()) < 0.01 * weight.numel()
    assert_close(
        result.dense(), rounded.decode() + low_rank.dense(), rtol=0, atol=1.1 * float(result.codes.scale.max())
    )


def test_codes_first_without_epochs_fit_the_low_rank_to_what_rounding_misses(layer):
    weight, stats = layer()
    # Identity scaling and a plain rounding leave the composition exact.
    method = FLRQPaper(
        bits=2, epochs=0, exponent=0.0, rounding="nearest", order="codes-then-low-rank", min_gain=0.0, **EAGER
    )
    result = solve_one(method, weight, stats)
    rounded = nearest(weight, None, IntGrid(2, 32))
    left, right = sketch(
        weight - rounded.decode(),
        rank=rank_cap(64, 96, bits=2, factor_bits=16, budget=1.0) + 1,
        generator=seeded(),
    )
    rank = result.format.rank
    assert rank > 0
    assert same_codes(result.codes, rounded)
    assert torch.equal(
        result.low_rank.dense(), store_factors(left[:, :rank], right[:rank], factor_type="float16").dense()
    )


@pytest.mark.parametrize("rounding", ["clip", "nearest", "gptq"])
@pytest.mark.parametrize("order", ["low-rank-then-codes", "codes-then-low-rank"])
def test_the_kept_error_never_rises_with_epochs(rounding, order, layer):
    weight, stats = layer()
    hessian = shrink(stats.hessian, 0.2)  # the error that is minimised; the recorded one is without shrinkage
    errors = []
    for epochs in (0, 1, 4):
        method = FLRQ(bits=2, rounding=rounding, order=order, epochs=epochs, **EAGER)
        result = solve_one(method, weight, stats)
        errors.append(float(output_energy((weight - result.dense()).double(), hessian.double())))
    for before, after in itertools.pairwise(errors):
        assert after <= before * (1 + 1e-5)  # float32 decides between near equals
    assert errors[-1] < 0.99 * errors[0]


def test_a_pass_that_makes_things_worse_is_thrown_away(layer):
    weight, stats = layer()
    hessian = shrink(stats.hessian, 0.2).double()
    results = [
        solve_one(FLRQPaper(
            bits=2, rounding="nearest", order="codes-then-low-rank", epochs=epochs, **EAGER
        ), weight, stats)
        for epochs in range(7)
    ]  # fmt: skip
    errors = [float(output_energy((weight - result.dense()).double(), hessian)) for result in results]
    pairs = list(itertools.pairwise(zip(results, errors, strict=True)))
    assert any(same(before, after) for (before, _), (after, _) in pairs), "every pass was better: nothing was tested"
    assert all(same(before, after) or worse < error for (before, error), (after, worse) in pairs)


def test_two_bits_have_twenty_epochs_unless_told_otherwise(layer):
    weight, stats = layer(32, 64)
    for bits, epochs in ((2, 20), (3, 1), (4, 1)):
        found, told = (solve_one(FLRQPaper(bits=bits, epochs=e, **EAGER), weight, stats) for e in (-1, epochs))
        assert same(found, told)


@pytest.mark.parametrize("factor_type, factor_bits", [("int8", 8), ("e4m3", 8), ("float16", 16)])
@pytest.mark.parametrize("budget", [0.1, 0.3, 1.0])
def test_the_rank_stays_within_the_budget(factor_type, factor_bits, budget, layer):
    weight, stats = layer()
    method = FLRQ(bits=3, factor_type=factor_type, **EAGER | {"budget": budget})
    result = solve_one(method, weight, stats)
    assert result.format.rank <= rank_cap(64, 96, bits=3, factor_bits=factor_bits, budget=budget)
    if result.low_rank:
        entries = result.low_rank.left.numel() + result.low_rank.right.numel()
        assert factor_bits * entries <= budget * 3 * weight.numel()


@pytest.mark.parametrize("rounding", ["clip", "nearest", "gptq"])
def test_without_a_budget_only_the_rounding_is_left(rounding, layer):
    weight, stats = layer()
    result = solve_one(FLRQ(bits=3, rounding=rounding, epochs=0, **EAGER | {"budget": 0.0}), weight, stats)
    assert result.low_rank is None and result.format.rank == 0 and result.record.stop == "budget"
    if rounding == "nearest":
        plain = solve_one(Nearest(bits=3, group_size=32), weight, stats)
        assert same(result, plain)
        assert result.record.error_after == result.record.error_before
    elif rounding == "clip":
        rounded = clip(weight, prepared(shrink(stats.hessian, 0.2)), IntGrid(3, 32), RangeSearch(40, 0.8, "saturate"))
        assert same_codes(result.codes, rounded)
    assert result.record.error_after <= result.record.error_before


def test_fewer_bits_gain_more_over_rounding_to_nearest(layer):
    weight, stats = layer(96, 128)
    gain = {}
    for bits in (2, 3, 4):
        record = solve_one(FLRQ(bits=bits, **EAGER | {"budget": 0.5}), weight, stats).record
        gain[bits] = record.error_before - record.error_after
        assert gain[bits] > 0
    assert gain[2] > gain[3] > gain[4]


@pytest.mark.parametrize("metric", ["activation", "hessian"])
def test_channels_that_are_always_zero_do_not_break_a_layer(metric, layer):
    weight, stats = layer()
    hessian, mean_abs = stats.hessian.clone(), stats.mean_abs.clone()
    hessian[7], hessian[:, 7], mean_abs[7] = 0, 0, 0
    result = solve_one(FLRQ(bits=3, metric=metric, **EAGER), weight, InputStats(hessian, mean_abs, stats.tokens))
    assert torch.isfinite(result.dense()).all()
    assert result.record.error_after < result.record.error_before


def test_a_weight_of_zeros_has_no_low_rank_part_and_stays_zero(layer):
    _, stats = layer()
    result = solve_one(FLRQ(bits=3, **EAGER), torch.zeros(64, 96), stats)
    assert result.low_rank is None
    assert not result.dense().any()


def test_another_seed_is_another_sketch_of_equal_quality(layer):
    weight, stats = layer()
    method = FLRQ(bits=3, sketch="rank1", iterations=1, **EAGER)
    a, b = (solve_one(method, weight, stats, seed=seed) for seed in (0, 1))
    assert not same(a, b)
    assert a.record.error_after == pytest.approx(b.record.error_after, rel=0.05)
