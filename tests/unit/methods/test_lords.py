"""LoRDS against exact recovery, plain rounding, finite differences and the bits it may take."""

from dataclasses import replace

import pytest
import torch
from helpers import same_codes, solve_one
from torch.testing import assert_close

from lorq.core.codes import LevelGrid, LowRankScale, level_values
from lorq.core.problem import BlockOutput, Problem
from lorq.core.rounding import gptq_levels, nearest_levels
from lorq.core.scale_factors import block_scales
from lorq.core.stats import StatsAccumulator, output_energy
from lorq.methods.lords import LoRDS, LoRDSPaper, Refined, ScaledLevels
from lorq.methods.nearest import Nearest

kinds = pytest.mark.parametrize("kind", ["integer", "normal-float"])
ALONE = LoRDS(bits=3, group_size=32, refine_steps=0)
PLAIN = replace(ALONE, range_search="none", weighting="none", rounding="nearest", steps=0)


@pytest.fixture
def layer(correlated, generator):
    """A weight with rows and columns of unequal size, and its inputs' statistics."""

    def make(out, in_):
        sums = StatsAccumulator(in_)
        sums.add(correlated(4 * in_, in_))
        weight = 0.02 * torch.randn(out, in_, generator=generator)
        weight *= torch.exp(0.5 * torch.randn(out, 1, generator=generator))
        return weight * torch.exp(0.5 * torch.randn(in_, generator=generator)), sums.finish()

    return make


@pytest.fixture
def problem(layer, generator):
    """A block of two layers, one after the other with a nonlinearity between, and 6 windows of 5 tokens."""
    (first, first_stats), (second, second_stats) = layer(48, 32), layer(32, 48)
    inputs = torch.randn(6, 5, 32, generator=generator)

    def forward(weights, windows):
        x = inputs[windows]
        return x + torch.tanh(20 * x @ weights["first"].T) @ weights["second"].T

    weights = {"first": first, "second": second}
    stats = {"first": first_stats, "second": second_stats}
    return Problem(weights, stats, 3, block=BlockOutput(forward, forward(weights, slice(None))))


@kinds
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_under_a_stored_scale_come_back(kind, bits, generator):
    codes = torch.randint(2**bits, (24, 32), generator=generator)
    codes[:, ::8] = 2**bits - 1  # every block has its largest level, of which its scale is made
    if kind == "integer":
        codes = codes.clamp(min=1)  # the lowest lies outside the range that covers a block
    sizes = 2.0 ** torch.randint(-8, 1, (24, 1), generator=generator)
    weight = level_values(codes, kind, bits) * sizes
    for steps in (0, 3):
        method = LoRDS(bits=bits, rank=1, grid=kind, range_search="none", weighting="none", rounding="nearest",
                       steps=steps, refine_steps=0)  # fmt: skip
        result = solve_one(method, weight, None)
        assert torch.equal(result.codes.codes, codes.to(torch.uint8))
        assert_close(result.dense(), weight, rtol=2e-3, atol=0)  # two factors in float16
        assert result.record.error_after < 1e-6
        assert result.codes.format.grid == LevelGrid(bits, kind)


@kinds
def test_without_a_fit_and_with_a_rank_for_every_block_it_is_block_quantization(kind, layer):
    weight, _ = layer(24, 64)
    result = solve_one(replace(PLAIN, rank=4, grid=kind), weight, None)
    blocks = nearest_levels(weight, LevelGrid(3, kind), 16)
    assert_close(result.codes.scale.dense(), blocks.scale.float().repeat_interleave(16, 1), rtol=5e-3, atol=1e-6)
    assert (result.codes.codes == blocks.codes).float().mean() > 0.99  # scales differ by float16's rounding of factors
    assert_close(output_energy(weight - result.dense(), torch.eye(64)),
                 output_energy(weight - blocks.decode(), torch.eye(64)), rtol=0.02, atol=0)  # fmt: skip


def test_each_part_lowers_the_error_that_it_is_for(layer):
    weight, stats = layer(64, 96)

    def white(method):
        return float((weight - solve_one(method, weight, stats).dense()).square().sum())

    def output(method):
        return solve_one(method, weight, stats).record.error_after

    assert white(replace(PLAIN, range_search="scale")) < white(PLAIN)
    assert white(replace(PLAIN, steps=5)) < white(PLAIN)
    assert white(replace(PLAIN, steps=50, solver="gradient")) < white(PLAIN)
    weighed = replace(PLAIN, weighting="diagonal", steps=5)
    assert output(weighed) < output(replace(PLAIN, steps=5))
    assert output(ALONE) < output(replace(ALONE, rounding="nearest")) < output(PLAIN)


def test_more_bits_and_more_rank_lower_the_error(layer):
    weight, stats = layer(64, 96)
    by_bits = [solve_one(replace(ALONE, bits=bits), weight, stats).record.error_after for bits in (2, 3, 4, 8)]
    by_rank = [solve_one(replace(ALONE, rank=rank), weight, stats).record.error_after for rank in (1, 4, 16)]
    assert by_bits == sorted(by_bits, reverse=True) and by_rank == sorted(by_rank, reverse=True)


@pytest.mark.parametrize("shape", [(64, 96), (17, 50), (4, 4)], ids=str)
def test_results_have_the_format_announced_and_take_no_more_scale_bits_than_groups(shape, layer):
    weight, stats = layer(*shape)
    for method in (ALONE, LoRDSPaper(bits=2, group_size=16, steps=2), replace(ALONE, group_size=-1)):
        result = solve_one(method, weight, stats)
        assert result.format == method.largest(*shape)
        out, in_ = shape
        size = in_ if method.group_size == -1 else method.group_size
        assert result.rank == 1 or result.rank * (out + in_) <= out * in_ / size


@kinds
def test_a_diagonal_hessian_leaves_gptq_nothing_to_pass_on(kind, layer, generator):
    weight, _ = layer(12, 160)
    grid, scale = LevelGrid(3, kind), 0.02 * torch.randn(12, 160, generator=generator)
    upper = torch.diag(torch.rand(160, generator=generator) + 0.5)
    assert torch.equal(gptq_levels(weight, scale, grid, upper=upper), grid.encode(weight, scale))


@kinds
def test_passing_errors_on_matches_a_loop_over_columns(kind, layer):
    weight, stats = layer(7, 150)  # two blocks of columns
    grid = LevelGrid(3, kind)
    scale = block_scales(weight, grid, 30).repeat_interleave(30, 1)
    upper = stats.prepared(shrinkage=0.2, damping=0.01).inverse_factor
    rest, expected = weight.double(), torch.empty_like(weight)
    for i in range(150):
        expected[:, i] = grid.encode(rest[:, i].float(), scale[:, i])
        error = (rest[:, i] - grid.decode(expected[:, i], scale[:, i]).double()) / upper[i, i].double()
        rest[:, i:] -= error.unsqueeze(1) * upper[i, i:].double()
    codes = gptq_levels(weight, scale, grid, upper=upper)
    assert (codes == expected).float().mean() > 0.99  # float32 may tip a weight between two levels
    assert_close(codes[:, :20], expected[:, :20])


@kinds
def test_normal_float_blocks_of_the_baseline(kind, layer):
    weight, stats = layer(12, 64)
    method = Nearest(bits=3, group_size=16, grid="normal-float")
    result = solve_one(method, weight, stats)
    cover = weight.unflatten(1, (-1, 16)).abs().amax(-1)
    assert torch.equal(result.codes.scale, cover.to(torch.float16))
    assert result.codes.format.levels == "normal-float" and result.format == method.largest(12, 64)
    error = (weight - result.dense()).square().sum()
    searched = solve_one(replace(method, range_search="scale"), weight, stats)
    assert (weight - searched.dense()).square().sum() < error


def test_a_scale_beyond_float16_is_refused():
    with pytest.raises(ValueError, match=r"must fit float16 \(at most 65504\), got 7e\+04; the weights are too large"):
        nearest_levels(torch.full((1, 4), 7e4), LevelGrid(4, "normal-float"), 4)


def test_gradients_of_the_refinement_match_finite_differences(generator):
    # On a lattice of float16 the straight-through cast is the identity.
    left = (torch.randint(-64, 65, (5, 2), generator=generator) / 64).double()
    right = (torch.randint(-64, 65, (2, 6), generator=generator) / 64).double()
    codes = torch.randint(8, (5, 6), generator=generator, dtype=torch.uint8)
    mix = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    grid, step = LevelGrid(3, "normal-float"), 1 / 64
    left.requires_grad_(True), right.requires_grad_(True)

    def value():
        return (ScaledLevels.apply(left, right, codes, grid) * mix).sum()

    value().backward()
    for part in (left, right):
        for at in range(part.numel()):
            around = []
            for sign in (1, -1):
                with torch.no_grad():
                    part.view(-1)[at] += sign * step
                    around.append(float(value()))
                    part.view(-1)[at] -= sign * step
            # The product is linear in each factor: the central difference is exact.
            assert_close(float(part.grad.view(-1)[at]), (around[0] - around[1]) / (2 * step), rtol=1e-9, atol=1e-9)


@kinds
def test_refinement_starts_at_the_layers_own_result(kind, layer):
    weight, stats = layer(24, 64)
    method = replace(ALONE, grid=kind)
    result = solve_one(method, weight, stats)
    start = Refined.of(result.codes)
    assert torch.equal(start.weight(), result.dense())
    assert same_codes(start.rounded(), result.codes)


def test_what_is_exported_is_what_was_trained(layer):
    weight, stats = layer(24, 64)
    learned = Refined.of(ALONE._rounded(weight, stats))
    with torch.no_grad():
        learned.left.mul_(1.01)
        learned.right.add_(0.003)
    assert torch.equal(learned.weight(), learned.rounded().decode())
    assert isinstance(learned.rounded().scale, LowRankScale)


def test_refinement_lowers_the_blocks_error_and_keeps_the_codes(problem):
    alone = {name: solve_one(ALONE, weight, problem.stats[name]) for name, weight in problem.weights.items()}
    refined = replace(ALONE, refine_steps=60).solve(problem)

    def error(results):
        block = problem.block
        output = block.forward({name: result.dense() for name, result in results.items()}, slice(None))
        return float(((output - block.targets).square().mean(-1) / block.targets.square().mean(-1)).mean())

    assert error(refined) < 0.9 * error(alone)
    for name, result in refined.items():
        assert torch.equal(result.codes.codes, alone[name].codes.codes)
        assert not torch.equal(result.codes.scale.left, alone[name].codes.scale.left)
        assert result.record.note.startswith("block: loss ")


@pytest.mark.parametrize("method", [ALONE, replace(ALONE, solver="gradient"), LoRDSPaper(bits=3, steps=5)], ids=str)
def test_same_call_same_bits_and_inputs_unchanged(method, layer, problem):
    weight, stats = layer(24, 64)
    before = weight.clone(), stats.hessian.clone()
    first, second = (solve_one(method, weight, stats) for _ in range(2))
    refined = [replace(method, refine_steps=3).solve(problem)["first"] for _ in range(2)]
    for a, b in ((first, second), refined):
        assert same_codes(a.codes, b.codes)
    assert torch.equal(weight, before[0]) and torch.equal(stats.hessian, before[1])


def test_the_papers_settings_look_at_weights_only(layer):
    weight, stats = layer(24, 64)
    paper = LoRDSPaper(bits=3, group_size=32, steps=5)
    assert not paper.needs_stats and paper.scope == "layer"
    assert same_codes(solve_one(paper, weight, None).codes, solve_one(paper, weight, stats).codes)
    assert LoRDS(refine_steps=1).scope == "block" and LoRDS().needs_stats and ALONE.scope == "layer"


def test_a_layer_of_zeros_and_channels_that_were_never_active_are_no_trouble(layer):
    weight, stats = layer(24, 64)
    silent = stats.hessian.clone()
    silent[5], silent[:, 5] = 0, 0
    stats = replace(stats, hessian=silent)
    assert torch.isfinite(solve_one(ALONE, weight, stats).dense()).all()
    assert not solve_one(ALONE, torch.zeros(24, 64), stats).dense().any()


def test_a_rank_above_the_layers_sides_is_refused_with_both_numbers():
    method = LoRDS(rank=40)
    with pytest.raises(
        ValueError, match=r"at most min\(out, in\) = 32 for a layer of shape \(32, 64\), got 40; lower it"
    ):
        method.largest(32, 64)


def test_statistics_that_are_missing_are_asked_for(layer):
    weight, _ = layer(8, 32)
    for method in (ALONE, replace(ALONE, rounding="nearest"), replace(ALONE, weighting="none")):
        with pytest.raises(ValueError, match="needs input statistics, got None; calibrate first"):
            solve_one(method, weight, None)
