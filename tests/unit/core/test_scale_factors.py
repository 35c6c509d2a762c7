"""Scales of low rank: starts in closed form, halves of sweeps that never raise the sum, least squares in float64."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from lorq.core.codes import LevelGrid, LowRankScale, level_values, levels, start_block
from lorq.core.scale_factors import (
    _normal,
    _solved,
    assigned_loss,
    balanced,
    block_scales,
    fit_gradient,
    fit_least_squares,
    parity_rank,
    store_scale,
    truncated,
)

kinds = pytest.mark.parametrize("kind", ["integer", "normal-float"])
widths = pytest.mark.parametrize("bits", [2, 3, 4])


@pytest.fixture
def uneven(generator):
    """A weight whose rows and columns differ in size, what errors cost in its columns, and a start of rank 3."""

    def make(out, in_, grid):
        def sizes(n):
            return torch.exp(0.7 * torch.randn(n, generator=generator))

        weight = 0.05 * torch.randn(out, in_, generator=generator) * sizes(out)[:, None] * sizes(in_)
        left, right = truncated(block_scales(weight, grid, start_block(in_, 3)), in_, 3)
        return weight, left, right, sizes(in_)

    return make


def brute_force(weight, scale, table):
    """The codes with the least squared error, all levels tried, in float64."""
    error = (weight.double().unsqueeze(-1) - scale.double().unsqueeze(-1) * table.double()).square()
    return error, error.argmin(-1)


@kinds
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_the_nearest_of_all_under_scales_of_either_sign(kind, bits, generator):
    weight, scale = torch.randn(2, 40, 30, generator=generator).unbind()
    error, best = brute_force(weight, scale, levels(kind, bits))
    codes = LevelGrid(bits, kind).encode(weight, scale).long()
    chosen, least = (error.gather(-1, c.unsqueeze(-1)) for c in (codes, best))
    assert_close(chosen, least, rtol=1e-5, atol=1e-9)  # equals up to float32's rounding of the quotient
    assert (codes == best).float().mean() > 0.999


@pytest.mark.parametrize(
    ("shape", "ranks"),
    [((4096, 4096), (32, 16, 8)), ((1024, 4096), (12, 6, 3)), ((14336, 4096), (49, 24, 12)), ((8, 8), (1, 1, 1))],
    ids=str,
)
def test_the_rank_of_equal_bits_is_the_papers(shape, ranks):
    assert tuple(parity_rank(*shape, block) for block in (64, 128, 256)) == ranks


@pytest.mark.parametrize(
    ("in_", "rank", "block"), [(4096, 16, 256), (4096, 6, 512), (576, 4, 144), (10, 3, 2), (4, 9, 1)]
)
def test_blocks_before_the_fit_divide_the_width(in_, rank, block):
    assert start_block(in_, rank) == block


@kinds
def test_with_a_rank_for_every_block_the_start_is_block_scales(kind, generator):
    weight, grid = torch.randn(12, 48, generator=generator), LevelGrid(3, kind)
    scale = block_scales(weight, grid, 8)
    left, right = truncated(scale, 48, 6)
    assert_close(left @ right, scale.repeat_interleave(8, 1))
    wide_left, wide_right = truncated(scale, 48, 9)
    assert_close(wide_left @ wide_right, scale.repeat_interleave(8, 1))
    assert not wide_left[:, 6:].any() and not wide_right[6:].any()


def test_a_truncated_start_misses_the_tail_of_the_spectrum(generator):
    scale = torch.rand(12, 6, generator=generator)
    left, right = truncated(scale, 48, 2)
    tail = torch.linalg.svdvals(scale.double())[2:].square().sum() * 8
    assert_close((left @ right - scale.repeat_interleave(8, 1)).square().sum(), tail.float())


def test_covering_scales_of_a_weight_made_by_hand():
    weight = torch.tensor([[1.0, -2.0, 0.5, 0.25], [0.0, 0.0, 3.0, -3.0]])
    assert torch.equal(
        block_scales(weight, LevelGrid(2, "normal-float"), 2), torch.tensor([[2.0, 0.5], [2.0**-17, 3.0]])
    )
    assert torch.equal(block_scales(weight, LevelGrid(3, "integer"), 4), torch.tensor([[2.0], [3.0]]) / 3)


@kinds
def test_searched_scales_are_the_best_of_those_tried(kind, generator):
    weight, cost = torch.randn(6, 16, generator=generator), torch.rand(16, generator=generator)
    grid, shares = LevelGrid(2, kind), (1.0, 0.7, 0.5)
    found = block_scales(weight, grid, 8, importance=cost, shares=shares)
    for row, part in ((r, p) for r in range(6) for p in range(2)):
        columns = slice(8 * part, 8 * part + 8)
        w = weight[row, columns]
        cover = float(block_scales(w[None], grid, 8))
        sums = [
            float((brute_force(w, torch.full_like(w, s * cover), levels(kind, 2))[0].amin(-1) * cost[columns]).sum())
            for s in shares
        ]
        assert_close(float(found[row, part]), shares[sums.index(min(sums))] * cover)


@kinds
@widths
def test_no_half_of_a_sweep_raises_the_sum(kind, bits, uneven):
    grid = LevelGrid(bits, kind)
    weight, left, right, cost = uneven(40, 48, grid)
    fitted_left, fitted_right, losses = fit_least_squares(weight, left, right, grid, importance=cost, sweeps=8)
    assert len(losses) == 17
    for before, after in pairwise(losses):
        assert after <= before * (1 + 1e-6)  # the factors are balanced anew between: float32's rounding
    assert losses[-1] < 0.9 * losses[0]
    scale = fitted_left.double() @ fitted_right.double()
    error, _ = brute_force(weight, scale, levels(kind, bits))
    assert_close(float((error.amin(-1) * cost).sum()), losses[-1], rtol=1e-4, atol=0)
    start, _ = brute_force(weight, left.double() @ right.double(), levels(kind, bits))
    assert_close(float((start.amin(-1) * cost).sum()), losses[0], rtol=1e-4, atol=0)


@widths
def test_sweeps_end_below_many_gradient_steps(bits, uneven):
    grid = LevelGrid(bits, "normal-float")
    weight, left, right, cost = uneven(64, 96, grid)
    swept = fit_least_squares(weight, left, right, grid, importance=cost, sweeps=10)[2]
    stepped = fit_gradient(weight, left, right, grid, importance=cost, steps=200, learning_rate=1e-3)[2]
    assert swept[-1] < min(stepped) < swept[0]


@pytest.mark.parametrize("tile", [1, 7 * 48], ids=["row by row", "seven rows at a time"])
def test_tiles_change_nothing_but_rounding(tile, uneven, monkeypatch):
    grid = LevelGrid(3, "integer")
    weight, left, right, cost = uneven(40, 48, grid)
    whole = fit_least_squares(weight, left, right, grid, importance=cost, sweeps=1)
    stepped = fit_gradient(weight, left, right, grid, importance=cost, steps=3, learning_rate=1e-3)
    monkeypatch.setattr("lorq.core.scale_factors._TILE", tile)
    parts = fit_least_squares(weight, left, right, grid, importance=cost, sweeps=1)
    # The last bit of a sum, which is the processor's, may tip a code: a thousandth of the loss of so small a weight.
    assert_close(parts[2], whole[2], rtol=5e-3, atol=0)
    again = fit_gradient(weight, left, right, grid, importance=cost, steps=3, learning_rate=1e-3)
    assert_close(again[2], stepped[2], rtol=5e-3, atol=0)


def test_rows_solve_weighted_least_squares(generator):
    values, weight = torch.randn(2, 5, 40, generator=generator).unbind()
    right, cost = torch.randn(4, 40, generator=generator), torch.rand(40, generator=generator)
    found = _solved(*_normal(values, weight, right, cost), torch.zeros(5, 4))
    for row in range(5):
        root = cost.double().sqrt()
        matrix = (right.double() * values[row].double() * root).T
        solution = torch.linalg.lstsq(matrix, (weight[row].double() * root).unsqueeze(1)).solution
        assert_close(found[row].double(), solution[:, 0], rtol=1e-4, atol=1e-4)


def test_a_row_without_values_keeps_what_it_has(generator):
    before = torch.randn(2, 3, generator=generator)
    right = torch.randn(3, 8, generator=generator)
    assert torch.equal(_solved(*_normal(torch.zeros(2, 8), torch.ones(2, 8), right, None), before), before)


def test_steps_follow_the_gradient_of_the_root_of_the_sum(uneven):
    grid = LevelGrid(3, "normal-float")
    weight, left, right, cost = uneven(6, 12, grid)
    left, right = left.double().requires_grad_(True), right.double().requires_grad_(True)
    codes = grid.encode(weight, (left @ right).detach().float())
    values = level_values(codes, grid.kind, grid.bits, dtype=torch.float64)
    ((values * (left @ right) - weight).square() * cost).sum().sqrt().backward()
    # Adam's first step is the rate times the gradient's sign.
    moved = fit_gradient(
        weight, left.detach().float(), right.detach().float(), grid, importance=cost, steps=1, learning_rate=1e-6
    )
    for before, after, slope in ((left, moved[0], left.grad), (right, moved[1], right.grad)):
        clear = slope.abs() > 1e-4
        assert torch.equal((before - after)[clear].sign(), slope[clear].sign()) and clear.float().mean() > 0.9


def test_gradient_steps_keep_the_best(uneven):
    grid = LevelGrid(3, "integer")
    weight, left, right, cost = uneven(20, 24, grid)
    *factors, losses = fit_gradient(weight, left, right, grid, importance=cost, steps=20, learning_rate=0.3)
    assert losses[-1] > min(losses)  # the rate is far too high
    assert_close(assigned_loss(weight, *factors, grid, importance=cost), min(losses))


def test_balanced_factors_have_the_same_product_and_orthogonal_columns_of_equal_norms(generator):
    left, right = 100 * torch.randn(20, 4, generator=generator), 0.01 * torch.randn(4, 30, generator=generator)
    left[:, 1] = left[:, 0]  # rank 3
    b, a = balanced(left, right)
    assert_close(b @ a, left @ right)
    assert_close(b.T @ b, a @ a.T, rtol=1e-4, atol=1e-4)
    assert_close(b.T @ b, torch.diag((b.T @ b).diagonal()), rtol=0, atol=1e-4)


@kinds
def test_rows_may_change_places(kind, uneven):
    grid = LevelGrid(3, kind)
    weight, left, right, cost = uneven(24, 36, grid)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    plain = fit_least_squares(weight, left, right, grid, importance=cost, sweeps=2)
    mixed = fit_least_squares(weight[order], left[order], right, grid, importance=cost, sweeps=2)
    assert_close(mixed[2], plain[2], rtol=5e-3, atol=0)  # a tipped code, as above


@pytest.mark.parametrize("fit", [fit_least_squares, fit_gradient], ids=["least squares", "gradient"])
def test_same_call_same_bits_and_inputs_unchanged(fit, uneven):
    grid = LevelGrid(3, "normal-float")
    weight, left, right, cost = uneven(24, 36, grid)
    before = [tensor.clone() for tensor in (weight, left, right, cost)]
    more = {"sweeps": 3} if fit is fit_least_squares else {"steps": 3, "learning_rate": 1e-3}
    first, second = (fit(weight, left, right, grid, importance=cost, **more) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1]) and first[2] == second[2]
    assert all(torch.equal(*pair) for pair in zip(before, (weight, left, right, cost), strict=True))


def test_rows_times_powers_of_two_have_solutions_times_these(generator):
    values, weight = torch.randn(2, 6, 40, generator=generator).unbind()
    right, cost = torch.randn(4, 40, generator=generator), torch.rand(40, generator=generator)
    rows = 2.0 ** torch.arange(-3, 3).view(6, 1)
    plain = _solved(*_normal(values, weight, right, cost), torch.zeros(6, 4))
    assert torch.equal(_solved(*_normal(values, weight * rows, right, cost), torch.zeros(6, 4)), plain * rows)


def test_a_weight_times_a_power_of_four_has_a_sum_times_its_square(uneven):
    grid = LevelGrid(3, "normal-float")
    weight, left, right, cost = uneven(24, 36, grid)
    plain = fit_least_squares(weight, left, right, grid, importance=cost, sweeps=2)
    whole = fit_least_squares(weight * 4, left * 2, right * 2, grid, importance=cost, sweeps=2)
    assert_close(whole[2], [16 * loss for loss in plain[2]], rtol=1e-5, atol=0)
    assert_close(whole[0] @ whole[1], 4 * (plain[0] @ plain[1]), rtol=1e-4, atol=1e-6)


def test_stored_factors_are_float16_and_near(uneven):
    _, left, right, _ = uneven(24, 36, LevelGrid(3, "integer"))
    stored = store_scale(1000 * left, right / 1000)
    assert isinstance(stored, LowRankScale) and stored.rank == 3
    assert stored.left.dtype == stored.right.dtype == torch.float16
    assert_close(stored.dense(), left @ right, rtol=5e-3, atol=1e-5)


def test_factors_beyond_float16_are_refused():
    with pytest.raises(ValueError, match=r"must fit float16 \(at most 65504\), got 1e\+05; the weights are too large"):
        store_scale(torch.full((1, 1), 1e10), torch.ones(1, 1))
