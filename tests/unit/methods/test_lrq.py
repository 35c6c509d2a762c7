"""LRQ: step 0 is rounding to nearest, gradients against finite differences, and blocks that get better."""

import dataclasses
import itertools
import re

import pytest
import torch
from helpers import layer_format, prepared, same_codes, solve_one
from torch.testing import assert_close

from lorq.core.codes import IntGrid
from lorq.core.half import SMALLEST_SCALE
from lorq.core.problem import BlockOutput, Problem
from lorq.core.rounding import clip, nearest
from lorq.core.stats import StatsAccumulator, output_energy
from lorq.methods.common import SEARCHES, assemble
from lorq.methods.lrq import LRQ, FakeQuantize, LRQPaper, Scaling, stored_scale

symmetric = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
scalings = pytest.mark.parametrize("scaling", ["low-rank", "full"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def layer(correlated, generator):
    """A weight and statistics of its inputs."""

    def make(out=32, in_=64):
        sums = StatsAccumulator(in_)
        sums.add(correlated(4 * in_, in_))
        return 0.05 * torch.randn(out, in_, generator=generator), sums.finish()

    return make


@pytest.fixture
def problem(correlated, generator):
    """Two layers with a nonlinearity between and a shortcut around them; the quantized stream is off a little."""
    width, middle, windows, length = 32, 48, 6, 20
    clean = correlated(windows * length, width).view(windows, length, width)
    inputs = clean + 0.01 * torch.randn(clean.shape, generator=generator)
    weights = {
        "up": torch.randn(middle, width, generator=generator) / width**0.5,
        "down": torch.randn(width, middle, generator=generator) / middle**0.5,
    }

    def run(given, hidden):
        return hidden + torch.nn.functional.silu(hidden @ given["up"].T) @ given["down"].T

    def forward(given, windows):
        return run(given, inputs[windows])

    sums = {"up": StatsAccumulator(width), "down": StatsAccumulator(middle)}
    sums["up"].add(inputs)
    sums["down"].add(torch.nn.functional.silu(inputs @ weights["up"].T))
    stats = {name: total.finish() for name, total in sums.items()}
    return Problem(weights, stats, 0, block=BlockOutput(forward, run(weights, clean)))


def solve_block(problem, method, seed=0, **others):
    return method.solve(dataclasses.replace(problem, seed=seed, methods=others))


def block_error(problem, results):
    """Mean over tokens of the squared error over the target's square."""
    block = problem.block
    off = block.forward({name: result.dense() for name, result in results.items()}, slice(None))
    return float(((off - block.targets).square().mean(-1) / block.targets.square().mean(-1)).mean())


def perturbed(scaling, generator, size=0.3):
    """Parameters as they might be after many steps."""
    for parameter in scaling.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return scaling


# ---- step 0 -----------------------------------------------------------------------------------------------


@symmetric
@scalings
@pytest.mark.parametrize("range_search", SEARCHES)
@pytest.mark.parametrize("group_size", [16, -1])
def test_without_steps_it_is_rounding_to_nearest_bit_for_bit(range_search, scaling, symmetric, group_size, layer):
    weight, stats = layer()
    method = LRQ(3, group_size, symmetric, scaling=scaling, range_search=range_search, steps=0)
    grid, search = IntGrid(3, 64 if group_size == -1 else group_size, symmetric), SEARCHES[range_search]
    if search is None:
        rounded = nearest(weight, None, grid)
    else:
        rounded = clip(weight, prepared(stats.hessian), grid, search)
    expected = assemble(weight, rounded, None, stop="given", stats=stats)
    result = solve_one(method, weight, stats)
    assert same_codes(result, expected)
    record = result.record
    assert (record.error_before, record.error_after) == (expected.record.error_before, expected.record.error_after)
    # Without steps the loss is the error that the record has in proportion to the output.
    loss = float(output_energy(weight - result.dense(), stats.hessian))
    assert record.note == f"layer alone: loss {loss:.4g} before, {loss:.4g} after step 0"


def test_without_steps_a_block_is_its_layers_rounded(problem):
    results = solve_block(problem, LRQ(3, 16, steps=0))
    for name, weight in problem.weights.items():
        alone = solve_one(LRQ(3, 16, steps=0), weight, problem.stats[name])
        assert same_codes(results[name], alone)


def test_the_logarithm_of_a_scale_gives_back_the_scale():
    # Every float16 from the smallest scale on, denormals included.
    bits = torch.arange(1, 0x7C00, dtype=torch.int16)
    scales = bits.view(torch.float16).float()
    scales = scales[scales >= SMALLEST_SCALE]
    assert torch.equal(stored_scale(scales.log()), scales)


def test_scales_stay_within_what_float16_holds():
    found = stored_scale(torch.tensor([-200.0, 200.0]))
    assert found.tolist() == [SMALLEST_SCALE, 65504.0]


def test_the_first_steps_right_factor_is_uniform_and_everything_else_zero():
    weight = torch.ones(64, 400)
    scaling = Scaling.start(weight, nearest(weight, None, IntGrid(4, 400)), rank=50, generator=seeded())
    right = scaling.right.detach()
    assert float(right.abs().max()) <= 0.05
    # The standard deviation of a uniform distribution of half-width 1/20.
    assert float(right.std()) == pytest.approx(0.05 / 3**0.5, rel=0.02)
    assert float(right.mean()) == pytest.approx(0.0, abs=1e-3)
    assert not scaling.exponent().any() and not scaling.left.any()


# ---- gradients --------------------------------------------------------------------------------------------


def straight_through(scaling):
    """W^ in float64 as a function of the parameters whose derivative is the straight-through estimator's.

    What rounding does at the present parameters is frozen: the codes' offsets from what was rounded, the scale's
    ratio to its exponential, and which codes lie inside the range.
    """
    grid, z = scaling.grid, scaling.zero_point.unsqueeze(-1)

    def parts():
        scaled = grid.grouped(scaling.weight * torch.exp(-scaling.exponent()))
        return scaled, scaling.log_scale.exp().unsqueeze(-1)

    with torch.no_grad():
        scaled, smooth = parts()
        ratio = stored_scale(scaling.log_scale).unsqueeze(-1) / smooth
        raw = scaled / (smooth * ratio) + z
        offset, codes = raw.round() - raw, raw.round().clamp(0, grid.top)
        inside = raw.round() == codes

    def quantized():
        scaled, smooth = parts()
        s = smooth * ratio
        return (s * (torch.where(inside, scaled / s + z + offset, codes) - z)).flatten(1)

    return quantized, inside


@symmetric
@scalings
def test_gradients_are_those_of_finite_differences(scaling, symmetric, generator):
    weight = 0.05 * torch.randn(6, 16, generator=generator, dtype=torch.float64)
    initial = clip(weight, prepared(torch.eye(16, dtype=torch.float64)), IntGrid(3, 8, symmetric))
    learned = Scaling.start(weight, initial, rank=3 if scaling == "low-rank" else None, generator=generator)
    perturbed(learned, generator)
    pull = torch.randn(6, 16, generator=generator, dtype=torch.float64)
    (learned.quantized() * pull).sum().backward()
    frozen, inside = straight_through(learned)
    assert 0 < int((~inside).sum()) < weight.numel() // 2  # both cases are there
    with torch.no_grad():
        assert_close(frozen(), learned.quantized(), rtol=1e-12, atol=1e-12)
        for parameter in learned.parameters():
            for index in itertools.product(*map(range, parameter.shape)):
                value, step = parameter[index].item(), 1e-6
                ends = []
                for sign in (1, -1):
                    parameter[index] = value + sign * step
                    ends.append(float((frozen() * pull).sum()))
                parameter[index] = value
                slope = (ends[0] - ends[1]) / (2 * step)
                assert float(parameter.grad[index]) == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_gradients_have_the_closed_form(generator):
    grid = IntGrid(2, 4)
    weight, exponent = torch.randn(3, 8, generator=generator), 0.2 * torch.randn(3, 8, generator=generator)
    scale, zero = (tensor.repeat_interleave(4, 1) for tensor in grid.fit(weight / 2))
    log_scale = scale[:, ::4].log().requires_grad_()
    exponent.requires_grad_()
    pull = torch.randn(3, 8, generator=generator)
    FakeQuantize.apply(weight, exponent, log_scale, zero[:, ::4], grid).backward(pull)
    v = weight / (scale * exponent.detach().exp())
    q = (v + zero).round().clamp(0, 3)
    inside = (v + zero).round() == q
    assert_close(exponent.grad, -pull * scale * v * inside)
    by_scale = pull * (scale * (q - zero) - scale * v * inside)
    assert_close(log_scale.grad, by_scale.unflatten(1, (2, 4)).sum(-1))


# ---- what is stored is what was trained -------------------------------------------------------------------


@symmetric
@scalings
@pytest.mark.parametrize("bits", range(2, 9))
def test_stored_codes_decode_to_the_fake_quantized_weight(bits, scaling, symmetric, layer, generator):
    weight, stats = layer()
    initial = nearest(weight, None, IntGrid(bits, 16, symmetric))
    learned = Scaling.start(weight, initial, rank=8 if scaling == "low-rank" else None, generator=generator)
    perturbed(learned, generator)
    rounded = learned.rounded()
    assert float(rounded.codes.min()) >= 0 and float(rounded.codes.max()) <= 2**bits - 1
    assert torch.equal(rounded.codes, rounded.codes.round())
    result = assemble(weight, rounded, None, stop="given", stats=stats)
    assert torch.equal(result.dense(), learned.quantized().detach())


@scalings
def test_the_weights_returned_are_weights_that_were_measured(scaling, problem):
    measured = []

    def forward(weights, hidden):
        if not torch.is_grad_enabled():
            measured.append({name: weight.clone() for name, weight in weights.items()})
        return problem.block.forward(weights, hidden)

    method = LRQ(3, 16, scaling=scaling, steps=20, learning_rate=0.01)
    block = dataclasses.replace(problem.block, forward=forward)
    results = solve_block(dataclasses.replace(problem, block=block), method)
    start, results = measured[0], {name: result.dense() for name, result in results.items()}
    assert any(all(torch.equal(results[name], each[name]) for name in results) for each in measured)
    assert not any(torch.equal(results[name], start[name]) for name in results)


# ---- learning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling, loss_weights", [("low-rank", "equal"), ("full", "plain")])
@pytest.mark.parametrize("range_search", ["none", "scale"])
def test_a_block_errs_less_than_its_layers_rounded_each_alone(range_search, loss_weights, scaling, problem):
    method = LRQ(
        3, 16, scaling=scaling, range_search=range_search, steps=100, learning_rate=0.01, loss_weights=loss_weights
    )
    before = block_error(problem, solve_block(problem, dataclasses.replace(method, steps=0)))
    after = block_error(problem, solve_block(problem, method))
    alone = {name: solve_one(method, weight, problem.stats[name]) for name, weight in problem.weights.items()}
    # The range search leaves less to gain.
    assert after < (0.8 if range_search == "scale" else 0.5) * before
    assert after < 0.9 * block_error(problem, alone)


@scalings
@symmetric
def test_a_layer_alone_errs_less_than_rounded(symmetric, scaling, layer):
    weight, stats = layer()
    method = LRQ(3, 16, symmetric, scaling=scaling, range_search="none", steps=100, learning_rate=0.01)
    record = solve_one(method, weight, stats).record
    assert record.error_after < 0.85 * record.error_before


@pytest.mark.parametrize("learning_rate", [0.1, 1.0])
def test_a_rate_that_is_far_too_high_ends_no_worse_than_it_began(learning_rate, problem):
    # Six windows: all of them are measured.
    method = LRQ(3, 16, steps=15, learning_rate=learning_rate)
    before = block_error(problem, solve_block(problem, dataclasses.replace(method, steps=0)))
    assert block_error(problem, solve_block(problem, method)) <= before * (1 + 1e-5)


def test_a_layer_keeps_its_own_settings(problem):
    results = solve_block(
        problem, LRQ(3, 16, steps=10, learning_rate=0.01), down=LRQ(4, 48, True, range_search="none", steps=99)
    )
    assert results["up"].format == layer_format(3, 16, False)
    assert results["down"].format == layer_format(4, 48, True)
    notes = {result.record.note for result in results.values()}
    assert len(notes) == 1  # the block's loss is one
    pattern = r"block: loss (\S+) before, (\S+) after step (10|8|6|4|2)"
    before, after = map(float, re.fullmatch(pattern, *notes).groups()[:2])
    assert after < before


def test_a_block_gives_the_same_bits_again_and_changes_nothing(problem):
    copies = {name: weight.clone() for name, weight in problem.weights.items()}
    targets = problem.block.targets.clone()
    method = LRQ(3, 16, steps=20, learning_rate=0.01)
    first, second, other = (solve_block(problem, method, seed) for seed in (1, 1, 11))
    assert all(same_codes(first[name], second[name]) for name in first)
    assert not all(same_codes(first[name], other[name]) for name in first)
    assert all(torch.equal(copies[name], weight) for name, weight in problem.weights.items())
    assert torch.equal(targets, problem.block.targets)


# ---- sizes and refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "out, in_, rank",
    [(4096, 4096, 1024), (11008, 4096, 1024), (8192, 8192, 2048), (28672, 8192, 2048), (16384, 16384, 2048),
     (8191, 8192, 1024), (576, 1536, 144), (192, 576, 48), (3, 400, 1)],
)  # fmt: skip
def test_the_rank_is_a_quarter_of_the_smaller_side_and_at_most_the_papers(out, in_, rank):
    assert LRQ()._rank(out, in_) == rank


def test_the_rank_given_is_the_rank_learned(layer):
    weight, stats = layer()
    assert LRQ(3, 16, rank=5)._start(weight, stats, seeded()).left.shape == (32, 5)
    assert LRQ(3, 16, rank=5, scaling="full")._start(weight, stats, seeded()).left.shape == (32, 64)


def test_a_rank_beyond_the_layer_is_refused_before_the_work(layer):
    message = (
        "rank must be at most min(out, in) = 32 for a layer of shape (32, 64), got 33; "
        "lower it, or take -1 for a quarter of that"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        LRQ(3, 16, rank=33).largest(32, 64)
    weight, stats = layer()
    with pytest.raises(ValueError, match=re.escape(message)):
        solve_one(LRQ(3, 16, rank=33), weight, stats)
    assert LRQ(3, 16, rank=32).largest(32, 64) == layer_format(3, 16, False)
    # A full matrix has no rank.
    assert LRQ(3, 16, rank=33, scaling="full").largest(32, 64) == layer_format(3, 16, False)


def test_results_have_the_largest_format(layer):
    weight, stats = layer()
    for method in (LRQ(3, 16, steps=1), LRQ(4, -1, True, steps=1, scaling="full")):
        assert solve_one(method, weight, stats).format == method.largest(*weight.shape)


def test_a_group_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="group_size must divide the width, got group_size 24 and width 64"):
        LRQ(3, 24).largest(32, 64)


def test_statistics_are_needed(layer):
    with pytest.raises(ValueError, match="this method needs input statistics, got None; calibrate first"):
        solve_one(LRQ(3, 16), layer()[0], None)


def test_the_papers_settings_are_the_papers():
    paper = LRQPaper()
    assert (paper.group_size, paper.symmetric, paper.steps, paper.learning_rate) == (-1, False, 5000, 9e-4)
    assert (paper.batch, paper.range_search, paper.loss_weights) == (2, "none", "plain")
    assert paper._rank(4096, 4096) == 1024
