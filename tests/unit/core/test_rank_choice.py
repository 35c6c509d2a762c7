"""R1-FLR's stopping rule: the cap's closed form, a plain reference for the curve, and each stop."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorq.core import rank_choice
from lorq.core.rank_choice import MEASURES, RankChoice, choose_rank, rank_cap
from lorq.core.sketch import sketch


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def steps(*falls, size=256):
    """A matrix whose range measure falls by the given factors, one per rank, and its factors.

    All on the diagonal, each component alone in its row and column, the last level left to stay.
    """
    levels = [1.0]
    for fall in falls:
        levels.append(levels[-1] / fall)
    left, right = torch.zeros(size, len(falls)), torch.zeros(len(falls), size)
    for r, level in enumerate(levels[:-1]):
        left[r, r], right[r, r] = level, 1.0
    a = left @ right
    a[len(falls) :, len(falls) :].fill_diagonal_(levels[-1])
    return a, left, right


def choose(a, left, right, **options):
    return choose_rank(a, left, right, **({"bits": 4, "factor_bits": 16} | options))


@pytest.mark.parametrize(
    "rows, cols, expected",
    # The paper's cases; 76.8 and 74.6 in closed form, which round to 77 and 75 but must not exceed x.
    [
        (4096, 4096, (51, 76, 102)),
        (11008, 4096, (74, 111, 149)),
        (2048, 2048, (25, 38, 51)),
        (8192, 2048, (40, 61, 81)),
    ],
)
def test_cap_is_the_largest_rank_within_the_budget(rows, cols, expected):
    for bits, rank in zip((2, 3, 4), expected, strict=True):
        assert rank_cap(rows, cols, bits=bits, factor_bits=16, budget=0.2) == rank

        def growth(r, bits=bits):
            return 1 + 16 * r * (rows + cols) / (bits * rows * cols)

        assert growth(rank) <= 1.2 < growth(rank + 1)


def test_cap_is_exact_where_the_budget_has_no_exact_float():
    # 0.1 * 3 * 80 / 8 = 3 in real numbers, and 3.0000000000000004 or 2.9999999999999996 in floats.
    for budget, rank in ((0.1, 3), (0.2, 6), (0.3, 9), (0.7, 21)):
        assert rank_cap(160, 160, bits=3, factor_bits=8, budget=budget) == rank


def test_cap_never_exceeds_the_matrix_and_eight_bit_factors_double_it():
    assert rank_cap(16, 4096, bits=4, factor_bits=16, budget=100.0) == 16
    assert rank_cap(4096, 4096, bits=4, factor_bits=8, budget=0.2) == 204
    assert rank_cap(4096, 4096, bits=4, factor_bits=8, budget=0.0) == 0


@pytest.mark.parametrize("measure", MEASURES)
def test_curve_is_the_measure_of_every_residual(measure, generator):
    # 700 rows: two tiles, the last one shorter.
    a = torch.randn(700, 384, generator=generator).T.contiguous().T * torch.linspace(0.1, 3, 384)
    before = a.clone()
    left, right = sketch(a, rank=20, generator=generator)
    group = 64 if measure == "group" else None
    options = {"measure": measure, "group_size": group, "budget": 9.0, "slope_threshold": 0.0}
    choice = choose(a, left, right, **options, warm_up=99)
    for r, value in enumerate(choice.curve):
        rest = a.double() - left[:, :r].double() @ right[:r].double()
        if measure == "amax":
            expected = rest.abs().max()
        else:
            grouped = rest.reshape(700, 6, 64)
            expected = (grouped.amax(-1) - grouped.amin(-1)).square().mean().sqrt()
        assert value == pytest.approx(float(expected), rel=1e-5)
    assert len(choice.curve) == 21 and torch.equal(a, before)


def test_white_noise_is_not_worth_a_rank(generator):
    a = torch.randn(512, 512, generator=generator)
    left, right = sketch(a, rank=32, generator=generator)
    choice = choose(a, left, right)
    assert choice.rank == 0 and choice.stop == "precision"
    assert len(choice.curve) < 33  # the rule stopped; the rest was not looked at


@pytest.mark.parametrize("window, above", [(2, 0), (8, 3)])
@pytest.mark.parametrize("measure, group", [("amax", None), ("group", 64)])
def test_planted_rank_is_found_but_for_the_windows_lag(window, above, measure, group, generator):
    # Falling components: the maximum does not react to a few out of many equal ones.
    falling = 0.7 ** torch.arange(12) * torch.randn(512, 12, generator=generator)
    planted = falling @ torch.randn(12, 512, generator=generator)
    a = planted + 1e-4 * torch.randn(512, 512, generator=generator)
    left, right = sketch(a, rank=40, generator=generator)
    options = {"measure": measure, "group_size": group, "budget": 1.0, "slope_threshold": 0.05}
    choice = choose(a, left, right, slope_window=window, **options)
    # Flat at planted + window; half a window and the offending rank are given back.
    assert choice.stop == "flat" and choice.rank == 12 + above
    assert choice.curve[12] < 0.1 * choice.curve[11]


def test_flat_slope_keeps_half_a_window_less():
    a, left, right = steps(*[1.5] * 6, *[1.001] * 10)
    choice = choose(a, left, right, budget=1.0, warm_up=99)
    # The first 8-rank window that falls by at most 10 % is the one that ends at rank 14.
    assert choice == RankChoice(14 - 1 - 4, "flat", choice.curve)
    assert choice.curve[6] == pytest.approx(1.5**-6) and len(choice.curve) == 15


def test_flat_slope_never_keeps_a_negative_rank():
    a, left, right = steps(*[1.001] * 10)
    choice = choose(a, left, right, slope_window=1, budget=1.0)
    assert (choice.rank, choice.stop) == (0, "flat")


def test_budget_drops_the_offending_rank():
    a, left, right = steps(*[2.0] * 20)
    cap = rank_cap(256, 256, bits=4, factor_bits=16, budget=0.3)
    assert cap == 9
    for candidates in (9, 10, 20):  # the cap is told as soon as the candidates reach it
        choice = choose(a, left[:, :candidates], right[:candidates], budget=0.3)
        assert (choice.rank, choice.stop, len(choice.curve)) == (9, "budget", 10)
    choice = choose(a, left[:, :8], right[:8], budget=0.3)
    assert (choice.rank, choice.stop) == (8, "exhausted")


def test_budget_of_nothing_keeps_nothing():
    a, left, right = steps(2.0, 2.0)
    assert choose(a, left, right, budget=0.0) == RankChoice(0, "budget", (1.0,))


def test_precision_stops_where_a_rank_costs_more_than_it_saves():
    # 16 * 2 * 256 / 256^2 = 1/8 bit per rank. Saved: 1 bit at once, then a 20th of a bit per rank, so
    # that r / 8 >= 1 + (r - 1) / 20 first holds at r = 13.
    a, left, right = steps(2.0, *[2**0.05] * 20)
    choice = choose(a, left, right, budget=9.0)
    assert (choice.rank, choice.stop) == (12, "precision")
    at = [r for r in range(1, 15) if r / 8 >= math.log2(choice.curve[0] / choice.curve[min(r, 13)])]
    assert at[0] == 13


@pytest.mark.parametrize("warm_up, expected", [(0, 0), (2, 0), (5, 12)])
def test_a_loss_during_warm_up_stops_nothing(warm_up, expected):
    # An eighth of a bit per rank. Five ranks save nothing, the sixth a bit and a half; 12 / 8 = 1.5 + 0, 13 / 8 > 1.5.
    a, left, right = steps(*[2**0.001] * 5, 2**1.5, *[2**0.001] * 10)
    choice = choose(a, left, right, budget=9.0, warm_up=warm_up, min_gain=0.0, slope_threshold=0.0)
    assert (choice.rank, choice.stop) == (expected, "precision")


@pytest.mark.parametrize("warm_up", [0, 2, 5])
@pytest.mark.parametrize("candidates", [2, 20])
def test_no_rank_is_kept_that_costs_more_than_it_saves(warm_up, candidates):
    # Falls by 2^-0.1 per rank against a cost of 2^-0.125: a loss from the first rank on, so Algorithm 1 keeps none.
    a, left, right = steps(*[2**0.1] * candidates)
    choice = choose(a, left, right, budget=9.0, warm_up=warm_up, min_gain=0.0)
    assert (choice.rank, choice.stop) == (0, "precision")


def test_of_the_ranks_in_the_warm_up_the_last_that_pays_is_kept():
    a, left, right = steps(2.0, *[1.0] * 12)
    for factor_bits, rank in ((16, 7), (64, 1)):  # an eighth of a bit per rank; half a bit
        choice = choose(a, left, right, budget=99.0, factor_bits=factor_bits, warm_up=20, slope_threshold=0.0)
        assert (choice.rank, choice.stop) == (rank, "precision")


@pytest.mark.parametrize("measure, group", [("amax", None), ("group", 64)])
@pytest.mark.parametrize("budget", [0.05, 0.2, 1.0])
def test_white_noise_has_no_rank_without_the_other_tests(budget, measure, group, generator):
    a = torch.randn(192, 576, generator=generator)
    left, right = sketch(a, rank=24, generator=generator)
    options = {"measure": measure, "group_size": group, "budget": budget, "min_gain": 0.0, "slope_threshold": 0.0}
    assert choose(a, left, right, bits=3, factor_bits=8, **options).rank == 0


def test_a_slope_test_that_is_off_stops_on_no_plateau():
    # Four bits at once, nothing for a dozen ranks, then a bit each: all 20 are worth an eighth of a bit.
    a, left, right = steps(16.0, *[1.0] * 12, *[2.0] * 7)
    assert choose(a, left, right, budget=9.0).stop == "flat"
    choice = choose(a, left, right, budget=9.0, slope_threshold=0.0)
    assert (choice.rank, choice.stop) == (20, "exhausted")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_precision_test_does_not_depend_on_bits(bits):
    a, left, right = steps(2.0, *[2**0.05] * 20)
    assert choose(a, left, right, budget=9.0, bits=bits) == choose(a, left, right, budget=9.0, bits=4)


def test_a_small_total_gain_is_useless():
    a, left, right = steps(*[1.02] * 4)  # 0.029 bits a rank, for 0.008
    assert choose(a, left, right, budget=9.0, factor_bits=1).stop == "useless"
    kept = choose(a, left, right, budget=9.0, factor_bits=1, min_gain=0.05)
    assert (kept.rank, kept.stop) == (4, "exhausted")


def test_nothing_to_gain_from_a_zero_matrix():
    zero = torch.zeros(64, 64)
    assert choose(zero, zero[:, :4], zero[:4], budget=9.0).rank == 0


def test_scaling_the_matrix_changes_nothing(generator):
    a = torch.randn(256, 20, generator=generator) @ torch.randn(20, 256, generator=generator)
    left, right = sketch(a, rank=24, generator=generator)
    plain, scaled = choose(a, left, right), choose(4 * a, 4 * left, right)
    assert (plain.rank, plain.stop) == (scaled.rank, scaled.stop)
    assert scaled.curve == tuple(4 * value for value in plain.curve)


def test_options_out_of_range_are_refused():
    a, left, right = torch.ones(6, 10), torch.ones(6, 2), torch.ones(2, 10)
    with pytest.raises(ValueError, match=r"bits must be at least 1, got 0"):
        choose(a, left, right, bits=0)
    with pytest.raises(ValueError, match=r"budget must be .* at least 0, got -0.2"):
        rank_cap(6, 10, bits=4, factor_bits=16, budget=-0.2)
    with pytest.raises(ValueError, match=r"slope_window must be at least 1, got 0"):
        choose(a, left, right, slope_window=0)
    with pytest.raises(ValueError, match=r"measure must be one of \['amax', 'group'\], got 'max'"):
        choose(a, left, right, measure="max")
    with pytest.raises(ValueError, match=r"measure 'group', group_size=None"):
        choose(a, left, right, measure="group")
    with pytest.raises(ValueError, match=r"measure 'amax', group_size=5"):
        choose(a, left, right, group_size=5)
    with pytest.raises(ValueError, match=r"must divide the 10 columns, got 4"):
        choose(a, left, right, measure="group", group_size=4)


@pytest.mark.parametrize("measure, group", [("amax", None), ("group", 32)])
def test_a_device_gets_whole_matrices_and_few_launches_and_the_same_answer(measure, group, generator, monkeypatch):
    """A device is played by the CPU: what counts are the operations, and that they have all rows."""
    a = torch.randn(512, 256, generator=generator) + 4 * torch.randn(512, 1, generator=generator)
    left, right = sketch(a, rank=24, generator=generator)
    monkeypatch.setattr(rank_choice, "_TILE_ELEMENTS", 8 * 256)

    def choose():
        return choose_rank(a, left, right, bits=3, factor_bits=8, budget=1.0, measure=measure, group_size=group)

    tiled, launched = choose(), []

    class Launches(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            launched.append((str(function), [a.shape for a in args if isinstance(a, torch.Tensor)]))
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(rank_choice, "_TILE_ELEMENTS", a.numel())
    with Launches():
        whole = choose()
    assert whole.rank == tiled.rank and whole.stop == tiled.stop
    assert whole.curve == pytest.approx(tiled.curve, rel=1e-6)
    taken = [shapes for name, shapes in launched if "addcmul_" in name]
    assert taken and all(shapes[0] == a.shape for shapes in taken)
    views = ("view", "unbind", "slice", "select", "split", "t.default", "transpose", "unsqueeze", "detach", "alias")
    assert len([name for name, _ in launched if not any(view in name for view in views)]) < 6 * len(taken) + 40
