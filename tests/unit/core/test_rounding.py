"""Roundings against exact recovery, float64 loops, brute force and each other."""

import dataclasses
import importlib
import itertools

import pytest
import torch
from helpers import prepared, same_codes
from torch.testing import assert_close

from lorq.core.codes import IntCodes, IntGrid
from lorq.core.linalg import damp, inverse_factor
from lorq.core.rounding import ROUNDINGS, RangeSearch, gptq, nearest
from lorq.core.rounding.clip import search_range
from lorq.core.stats import output_energy

SEARCHES = {
    "saturate": RangeSearch(steps=20, depth=0.5, mode="saturate"),
    "scale": RangeSearch(steps=20, depth=0.5, mode="scale"),
    "wide": RangeSearch(steps=40, depth=0.8, mode="saturate"),
}
roundings = pytest.mark.parametrize("rounding", ROUNDINGS)
searches = pytest.mark.parametrize(
    "search", [None, SEARCHES["saturate"], SEARCHES["scale"]], ids=["full range", "saturate", "scale"]
)
modes = pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
symmetry = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])


@pytest.fixture
def layer(correlated, generator):
    """A weight and the Hessian of its inputs, float32 unless told otherwise."""

    def make(out, in_, dtype=torch.float32):
        x = correlated(4 * in_, in_).double()
        weight = torch.randn(out, in_, generator=generator, dtype=torch.float64) * 0.02
        return weight.to(dtype), (x.T @ x / len(x)).to(dtype)

    return make


def energy(target, result, hessian):
    return float(output_energy(target.double() - result.decode(torch.float64), hessian.double()))


@roundings
@searches
@symmetry
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_weight_on_the_grid_comes_back_bit_for_bit(rounding, search, symmetric, bits, layer, generator):
    _, hessian = layer(1, 32)
    grid = IntGrid(bits, 8, symmetric)
    low = 1 if symmetric else 0
    codes = torch.randint(low, grid.top + 1, (10, 4, 8), generator=generator).float()
    codes[..., 2], codes[..., 5] = low, grid.top
    zero_point = torch.full((10, 4), float(grid.middle))
    scale = 2.0 ** torch.randint(-8, 1, (10, 4), generator=generator)
    target = grid.decode(codes, scale.unsqueeze(-1), zero_point.unsqueeze(-1)).flatten(1)
    result = ROUNDINGS[rounding](target, prepared(hessian), grid, search)
    assert same_codes(result, IntCodes.of(codes.flatten(1), scale, zero_point, grid))
    assert torch.equal(result.decode(), target)


@symmetry
def test_white_inputs_leave_gptq_nothing_to_compensate(symmetric, layer):
    target, _ = layer(12, 192)
    grid = IntGrid(3, 48, symmetric)
    plain = nearest(target, None, grid)
    result = gptq(target, prepared(2.5 * torch.eye(192)), grid)
    assert same_codes(result, plain)


@modes
@symmetry
def test_white_inputs_make_gptq_equal_to_the_clip_search(search, symmetric, layer):
    target, _ = layer(12, 192)
    grid = IntGrid(3, 48, symmetric)
    clipped = ROUNDINGS["clip"](target, prepared(torch.eye(192)), grid, search)
    result = gptq(target, prepared(torch.eye(192), 0.0), grid, search)
    assert torch.equal(result.codes, clipped.codes)
    assert torch.equal(result.scale, clipped.scale)


def column_by_column(target, hessian, grid, search, damping):
    """GPTQ without blocks and without a factorisation: the inverse Hessian loses one column after another."""
    width, size = target.shape[1], grid.group_size
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(width, dtype=target.dtype))
    rest, codes, grids, total = target.clone(), torch.empty_like(target), [], 0.0
    for i in range(width):
        if i % size == 0:
            group = slice(i, i + size)
            full = grid.fit(rest[:, group])
            grids.append(search_range(rest[:, group], hessian[group, group], grid, search) if search else full)
        scale, zero_point = (part[:, 0] for part in grids[-1])
        codes[:, i] = (rest[:, i] / scale + zero_point).round().clamp(0, grid.top)
        error = rest[:, i] - (codes[:, i] - zero_point) * scale
        total += float(error.square().sum() / inverse[0, 0])
        rest[:, i:] -= torch.outer(error, inverse[0] / inverse[0, 0])
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return codes, torch.cat([scale for scale, _ in grids], 1), torch.cat([zero for _, zero in grids], 1), total


@pytest.mark.parametrize(
    "width, size, search",
    # Groups below, at and above a block of 128 columns, those that divide it and those that do not.
    [(*sizes, None) for sizes in [(192, 32), (192, 96), (192, 192), (256, 64), (256, 128), (384, 192), (384, 384)]]
    + [(*sizes, SEARCHES["scale"]) for sizes in [(192, 64), (256, 256), (384, 96)]],
)
def test_gptq_is_the_loop_without_blocks(width, size, search, layer):
    target, hessian = layer(6, width, torch.float64)  # float64, so that no code is decided by rounding
    grid = IntGrid(3, size)
    before = target.clone(), hessian.clone()
    result = gptq(target, prepared(hessian), grid, search)
    codes, scale, zero_point, total = column_by_column(target, hessian, grid, search, 0.01)
    assert torch.equal(result.codes, codes)
    assert torch.equal(result.scale, scale)
    assert torch.equal(result.zero_point, zero_point)
    # Each column's own error, over what the later ones cannot make up for, is the damped output error.
    assert_close(energy(target, result, damp(hessian, 0.01)), total, rtol=1e-9, atol=0)
    assert torch.equal(target, before[0]) and torch.equal(hessian, before[1])


def test_gptq_in_float32_is_as_good_as_in_float64(layer):
    target, hessian = layer(48, 256)
    grid = IntGrid(3, 64)
    single = energy(target, gptq(target, prepared(hessian), grid), hessian)
    double = energy(target, gptq(target.double(), prepared(hessian.double()), grid), hessian)
    # A code on the edge may fall either way and sends its row along another path, of equal quality on average.
    assert single == pytest.approx(double, rel=0.02)


@pytest.mark.parametrize("rounding", ["nearest", "clip", "gptq"])
def test_no_rounding_beats_all_codes_tried_and_gptq_keeps_its_bound(rounding, layer):
    target, hessian = layer(5, 6)
    grid = IntGrid(bits=2, group_size=3)
    result = ROUNDINGS[rounding](target, prepared(hessian, 0.0), grid)
    every = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.float32)  # (4096, 6)
    for row in range(5):
        scale, zero_point = (part[row].float().repeat_interleave(3) for part in (result.scale, result.zero_point))
        delta = ((every - zero_point) * scale - target[row]).double()
        costs = ((delta @ hessian.double()) * delta).sum(1)
        found = ((result.codes[row].float() - zero_point) * scale - target[row]).double()
        cost = float(found @ hessian.double() @ found)
        assert cost >= float(costs.min()) * (1 - 1e-6)
        assert cost <= float(costs.median())
        if rounding == "gptq":
            # Where no code is clamped each column errs by at most half a step (Babai's bound); a clamp may add to it.
            upper = inverse_factor(hessian.double()).diagonal()
            bound = float((scale.double() / 2 / upper).square().sum())
            clamped = ((result.codes[row] == 0) | (result.codes[row] == grid.top)).sum()
            assert cost <= bound * (1 + int(clamped))


def ranges_tried(low, high, search):
    """The ranges of one group, straight from the definition."""
    largest = max(-low, high)
    for i in range(round(search.steps * search.depth)):
        share = 1 - i / search.steps
        if search.mode == "saturate":
            yield max(low, -share * largest), min(high, share * largest)
        else:
            yield share * low, share * high


def group_cost(weights, hessian, scale, zero_point, top):
    codes = [min(max(round(w / scale + zero_point), 0), top) for w in weights]
    delta = torch.tensor([(c - zero_point) * scale - w for c, w in zip(codes, weights, strict=True)])
    return float(delta.double() @ hessian @ delta.double())


@modes
@symmetry
@pytest.mark.parametrize("bits", [2, 4])
def test_range_search_is_a_brute_force_over_every_share(search, symmetric, bits, layer):
    target, hessian = layer(4, 24, torch.float64)
    grid = IntGrid(bits, 8, symmetric)
    scale, zero_point = search_range(target, hessian, grid, search)
    narrowed = 0
    for row, group in itertools.product(range(4), range(3)):
        part = slice(8 * group, 8 * group + 8)
        weights, block = target[row, part].tolist(), hessian[part, part]
        found = []
        for low, high in ranges_tried(min(weights), max(weights), search):
            low, high = min(low, 0.0), max(high, 0.0)
            step = max(-low, high) / (grid.middle - 1) if symmetric else (high - low) / grid.top
            step = float(torch.tensor(step).to(torch.float16))
            zero = grid.middle if symmetric else min(max(round(-low / step), 0), grid.top)
            found.append((group_cost(weights, block, step, zero, grid.top), step, zero))
        _, step, zero = min(found, key=lambda one: one[0])  # the widest of equals
        assert (float(scale[row, group]), float(zero_point[row, group])) == (step, zero)
        narrowed += step < found[0][1]
    assert narrowed > 0, "no group gained from a narrower range: the search was not tested"


@modes
@symmetry
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_range_search_never_costs_a_group_more_than_its_full_range(search, symmetric, bits, layer):
    target, hessian = layer(20, 96)
    grid = IntGrid(bits, 24, symmetric)
    searched = ROUNDINGS["clip"](target, prepared(hessian), grid, search).decode()
    full = nearest(target, None, grid).decode()
    for start in range(0, 96, 24):
        part = slice(start, start + 24)
        costs = []
        for dense in (searched, full):
            delta = (dense - target)[:, part].double()
            costs.append(((delta @ hessian[part, part].double()) * delta).sum(1))
        assert (costs[0] <= costs[1] * (1 + 1e-5)).all()  # float32 decides between near equals
        assert float(costs[0].sum()) < 0.99 * float(costs[1].sum())


def test_range_search_in_slices_changes_nothing(layer, monkeypatch):
    target, hessian = layer(33, 48, torch.float64)  # float64: products of matrices may sum in another order
    grid = IntGrid(2, 16)
    whole = search_range(target, hessian, grid, SEARCHES["wide"])
    # The package's attribute of this name is the function.
    monkeypatch.setattr(importlib.import_module("lorq.core.rounding.clip"), "_SLICE", 48 * 4)
    sliced = search_range(target, hessian, grid, SEARCHES["wide"])
    assert torch.equal(sliced[0], whole[0]) and torch.equal(sliced[1], whole[1])


def test_shares_run_from_the_full_range_to_the_depth():
    assert RangeSearch(steps=4, depth=0.5).shares() == [1.0, 0.75]
    assert RangeSearch(steps=20, depth=0.5).shares()[-1] == pytest.approx(0.55)
    assert len(RangeSearch(steps=40, depth=0.8).shares()) == 32
    assert RangeSearch(steps=40, depth=0.0).shares() == [1.0]


@pytest.mark.parametrize("steps, depth, last", [(100, 0.29, 0.72), (5, 0.5, 0.6), (10, 0.3, 0.8)])
def test_every_share_above_the_depth_is_tried(steps, depth, last):
    # i < depth * steps, as stated: 29 shares for 0.29 * 100, which is a hair below 29 in floats; 3 for 2.5.
    assert RangeSearch(steps=steps, depth=depth).shares()[-1] == pytest.approx(last)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_looking_at_inputs_is_not_worse_than_rounding_to_nearest(bits, seed, layer, generator):
    generator.manual_seed(seed)
    target, hessian = layer(32, 128)
    grid = IntGrid(bits, 32)
    plain = energy(target, nearest(target, None, grid), hessian)
    clipped = energy(target, ROUNDINGS["clip"](target, prepared(hessian), grid), hessian)
    passed_on = energy(target, gptq(target, prepared(hessian), grid), hessian)
    searched = energy(target, gptq(target, prepared(hessian), grid, SEARCHES["scale"]), hessian)
    assert clipped <= plain
    assert passed_on < 0.75 * plain
    # A group's range is chosen for its own error only, so it may cost the whole layer a little; at 2 bits it pays.
    assert searched <= (0.9 if bits == 2 else 1.02) * passed_on


@roundings
@searches
def test_one_group_per_row_has_one_range_per_row(rounding, search, layer):
    target, hessian = layer(6, 160)
    result = ROUNDINGS[rounding](target, prepared(hessian), IntGrid(4, 160), search)
    low, high = target.amin(1, keepdim=True), target.amax(1, keepdim=True)
    full = ((high - low) / 15).to(torch.float16).float()
    if (search is None and rounding != "clip") or rounding == "nearest":
        assert torch.equal(result.scale, full)
    else:
        assert (result.scale <= full).all() and (result.scale >= 0.2 * full).all()
    codes, zero_point = result.codes.float(), result.zero_point.float()
    assert torch.equal(result.decode(), (codes - zero_point) * result.scale.float())


@roundings
@searches
@symmetry
def test_powers_of_two_on_rows_move_to_the_scales(rounding, search, symmetric, layer):
    target, hessian = layer(8, 160)
    grid = IntGrid(3, 32, symmetric)
    factor = 2.0 ** torch.arange(-3, 5).view(8, 1)
    result = ROUNDINGS[rounding](target, prepared(hessian), grid, search)
    scaled = ROUNDINGS[rounding](target * factor, prepared(hessian), grid, search)
    assert same_codes(scaled, dataclasses.replace(result, scale=(result.scale * factor).half()))


@roundings
@searches
def test_a_constant_on_the_hessian_changes_nothing(rounding, search, layer):
    target, hessian = layer(8, 160)
    grid = IntGrid(3, 32)
    results = [ROUNDINGS[rounding](target, prepared(h), grid, search) for h in (hessian, hessian * 64)]
    assert torch.equal(results[0].codes, results[1].codes)
    assert torch.equal(results[0].scale, results[1].scale)


@roundings
@searches
def test_permuted_rows_are_permuted_codes(rounding, search, layer, generator):
    target, hessian = layer(9, 96, torch.float64)  # float64: products of matrices may sum in another order
    grid = IntGrid(3, 32)
    order = torch.randperm(9, generator=generator)
    result = ROUNDINGS[rounding](target, prepared(hessian), grid, search)
    permuted = ROUNDINGS[rounding](target[order], prepared(hessian), grid, search)
    assert torch.equal(permuted.codes, result.codes[order])
    assert torch.equal(permuted.scale, result.scale[order])


@roundings
@searches
@pytest.mark.parametrize("rows", [8, 1])  # a single row lies in memory as its transpose does
def test_same_call_same_bits_and_inputs_unchanged(rounding, search, rows, layer):
    target, hessian = layer(rows, 160)
    before = target.clone(), hessian.clone()
    first, second = (ROUNDINGS[rounding](target, prepared(hessian), IntGrid(3, 32), search) for _ in range(2))
    for part in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(first, part), getattr(second, part))
    assert torch.equal(target, before[0]) and torch.equal(hessian, before[1])


@roundings
def test_codes_and_scales_are_what_storage_holds(rounding, layer):
    target, hessian = layer(8, 96)
    result = ROUNDINGS[rounding](target, prepared(hessian), IntGrid(3, 32))
    for part in (result.codes, result.zero_point):
        assert torch.equal(part, part.to(torch.uint8).float()) and float(part.max()) <= 7
    assert torch.equal(result.scale, result.scale.to(torch.float16).float())


def test_gptq_survives_channels_that_are_always_zero(layer):
    target, hessian = layer(8, 64)
    hessian[5], hessian[:, 5] = 0, 0
    result = gptq(target, prepared(hessian), IntGrid(4, 32), SEARCHES["scale"])
    assert torch.isfinite(result.decode()).all()
    assert energy(target, result, hessian) < energy(target, nearest(target, None, IntGrid(4, 32)), hessian)


@roundings
@searches
def test_a_group_size_that_does_not_divide_is_refused_with_both_numbers(rounding, search, layer):
    target, hessian = layer(4, 100)
    with pytest.raises(ValueError, match="group_size 48 and width 100"):
        ROUNDINGS[rounding](target, prepared(hessian), IntGrid(4, 48), search)
