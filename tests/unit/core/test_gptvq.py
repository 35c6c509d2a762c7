"""Vector codebooks against brute force, float64 loops and exact recovery."""

import itertools
import re

import pytest
import torch
from helpers import prepared
from torch.testing import assert_close

from lorq.core.codes import IntGrid, VectorGrid
from lorq.core.linalg import damp, inverse_factor
from lorq.core.rounding import gptq
from lorq.core.rounding.gptvq import fit_codebooks, gptvq, store_codebooks
from lorq.core.stats import output_energy


@pytest.fixture
def layer(correlated, generator):
    """A weight of rows of unequal size, and the Hessian of its inputs; float64, so that rounding decides no code."""

    def make(out, in_, dtype=torch.float64):
        x = correlated(4 * in_, in_).double()
        rows = torch.rand(out, 1, generator=generator, dtype=torch.float64) + 0.5
        weight = torch.randn(out, in_, generator=generator, dtype=torch.float64) * 0.02 * rows
        return weight.to(dtype), (x.T @ x / len(x)).to(dtype)

    return make


def energy(target, result, hessian):
    return float(output_energy(target.double() - result.decode(torch.float64), hessian.double()))


def cost(points, weights, centres):
    """The weighted squared distance to the nearest centre, summed over each tile."""
    distance = (weights.unsqueeze(2) * (points.unsqueeze(2) - centres.unsqueeze(1)).square()).sum(-1)
    return distance.amin(-1).sum(1)


@pytest.fixture
def cloud(generator):
    """Points and weights of several tiles."""

    def make(tiles=3, count=200, vector=2):
        points = torch.randn(tiles, count, vector, generator=generator, dtype=torch.float64)
        return points, torch.rand(tiles, count, vector, generator=generator, dtype=torch.float64) + 0.1

    return make


# ---- k-means ----------------------------------------------------------------------------------------------


def lloyd(points, weights, centres):
    """One step on one tile."""
    groups = {}
    for x, w in zip(points, weights, strict=True):
        nearest = min(range(len(centres)), key=lambda k: float((w * (x - centres[k]) ** 2).sum()))
        groups.setdefault(nearest, []).append((x, w))
    moved = centres.clone()
    for k, members in groups.items():
        moved[k] = sum(w * x for x, w in members) / sum(w for _, w in members)
    return moved


@pytest.mark.parametrize("vector", [1, 2, 4])
def test_k_means_is_the_loop_over_points(vector, cloud):
    points, weights = cloud(2, 40, vector)
    start = fit_codebooks(points, weights, entries=5, iterations=0)
    for tile in range(2):
        centres = start[tile]
        for steps in range(1, 4):
            centres = lloyd(points[tile], weights[tile], centres)
            found = fit_codebooks(points, weights, entries=5, iterations=steps)[tile]
            assert_close(found, centres, rtol=1e-10, atol=1e-12)


def test_the_start_is_spread_over_the_order_of_mahalanobis_distances(cloud):
    points, weights = cloud(2, 61, 3)
    points[1] *= torch.tensor([10.0, 1.0, 0.1])
    start = fit_codebooks(points, weights, entries=16, iterations=0)
    for tile in range(2):
        centred = points[tile] - points[tile].mean(0)
        inverse = torch.linalg.inv(centred.T @ centred / 61)
        order = torch.einsum("ni,ij,nj->n", centred, inverse, centred).argsort()
        assert torch.equal(start[tile], points[tile, order[::4]])  # 60 / 15 apart


@pytest.mark.parametrize("dtype, slack", [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["float64", "float32"])
def test_no_step_raises_the_cost_and_ten_lower_it(dtype, slack, cloud):
    points, weights = (part.to(dtype) for part in cloud(3, 300, 4))
    costs = [cost(points, weights, fit_codebooks(points, weights, entries=16, iterations=steps)) for steps in range(11)]
    for before, after in itertools.pairwise(costs):
        assert (after <= before * (1 + slack)).all()
    assert (costs[-1] < 0.9 * costs[0]).all()


def test_centres_of_separate_clusters_are_found(generator):
    # At distances from the mean that tell them apart, so that each has a point in the start.
    centres = torch.tensor([[1.0, 0.5], [-4.0, 0.0], [0.0, -9.0], [16.0, 2.0]], dtype=torch.float64)
    points = centres.repeat_interleave(50, 0) + 0.05 * torch.randn(200, 2, generator=generator, dtype=torch.float64)
    points = points[torch.randperm(200, generator=generator)]
    found = fit_codebooks(points[None], torch.ones(1, 200, 2, dtype=torch.float64), entries=4, iterations=3)[0]
    found = found[torch.cdist(centres, found).argmin(1)]
    assert_close(found, centres, rtol=0, atol=0.05)  # a mean of 50 has a deviation of 0.007


def test_weights_pull_a_centre_in_each_coordinate_by_itself():
    points = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    weights = torch.tensor([[[1.0, 3.0], [3.0, 1.0]]])
    assert_close(fit_codebooks(points, weights, entries=1, iterations=1), torch.tensor([[[0.75, 0.25]]]))
    louder = fit_codebooks(points, 1024 * weights, entries=1, iterations=1)
    assert torch.equal(louder, fit_codebooks(points, weights, entries=1, iterations=1))


def test_centres_without_points_and_points_without_weight_do_no_harm(cloud):
    same = torch.full((1, 10, 2), 3.0)
    assert torch.equal(fit_codebooks(same, torch.ones(1, 10, 2), entries=16, iterations=4), torch.full((1, 16, 2), 3.0))
    nothing = fit_codebooks(torch.zeros(1, 10, 2), torch.zeros(1, 10, 2), entries=4, iterations=4)
    assert torch.equal(nothing, torch.zeros(1, 4, 2))
    points, weights = cloud(1, 50, 2)
    weights[:, :25] = 0
    found = fit_codebooks(points, weights, entries=4, iterations=20)
    assert torch.isfinite(found).all()
    assert (cost(points, weights, found) < cost(points, weights, points[:, ::13])).all()


def test_tiles_are_fitted_each_for_itself(cloud):
    points, weights = cloud(4, 100, 2)
    together = fit_codebooks(points, weights, entries=8, iterations=5)
    for tile in range(4):
        alone = fit_codebooks(points[tile : tile + 1], weights[tile : tile + 1], entries=8, iterations=5)
        assert_close(together[tile], alone[0], rtol=1e-12, atol=1e-12)


def test_stored_codebooks_are_within_half_a_step_of_their_largest_entry(generator):
    centres = torch.randn(3, 16, 4, generator=generator) * torch.tensor([1e-3, 1.0, 300.0])[:, None, None]
    book = store_codebooks(centres)
    assert book.entries.dtype == torch.int8 and book.scale.dtype == torch.float16
    assert book.entries.shape == (3, 1, 16, 4) and book.scale.shape == (3, 1)
    assert torch.equal(book.entries.abs().amax((1, 2, 3)), torch.full((3,), 127, dtype=torch.int8))
    off = (book.values(torch.float64)[:, 0] - centres).abs()
    # float16 rounds the scale, by which the largest entries are off: 127 steps of 2^-11 are 0.06 of one.
    assert (off <= 0.57 * book.scale.double()[:, :, None]).all()
    assert not store_codebooks(torch.zeros(1, 4, 2)).values().any()


# ---- rounding ---------------------------------------------------------------------------------------------


def by_elimination(target, hessian, result):
    """GPTVQ without a factorisation: the inverse Hessian loses one vector's columns after another.

    Books and scales are the result's; what they should have been fitted to is returned with the codes.
    """
    grid, rest, inverse = result.format, target.clone(), torch.linalg.inv(hessian)
    v, width, total, seen = grid.vector, target.shape[1], 0.0, {}
    books = result.codebook.values(torch.float64)
    codes = torch.empty(target.shape[0], width // v, dtype=torch.uint8)
    for start in range(0, width, v):
        if start % grid.columns == 0:
            seen[start] = rest.clone(), inverse.clone()
        metric = torch.linalg.inv(inverse[:v, :v])
        error = torch.empty(target.shape[0], v, dtype=torch.float64)
        for row in range(target.shape[0]):
            book = books[row // grid.rows, start // grid.columns] * result.scale[row, start // grid.group_size]
            off = rest[row, start : start + v] - book  # (entries, v)
            costs = ((off @ metric) * off).sum(1)
            codes[row, start // v] = costs.argmin()
            error[row] = off[costs.argmin()]
            total += float(costs.min())
        rest[:, start:] -= error @ metric @ inverse[:v]
        inverse = inverse[v:, v:] - inverse[v:, :v] @ metric @ inverse[:v, v:]
    return codes, total, seen


GRIDS = {
    "one tile": VectorGrid(2, 2, 6, 32, 32),
    "columns": VectorGrid(2, 2, 6, 8, 32),
    "rows and columns": VectorGrid(1, 4, 2, 16, 32),
    "groups": VectorGrid(3, 2, 3, 8, 16),
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_gptvq_is_the_loop_without_a_factorisation(grid, layer):
    target, hessian = layer(6, 32)
    before = target.clone(), hessian.clone()
    result = gptvq(target, grid, upper=prepared(hessian).inverse_factor, iterations=4)
    damped = damp(hessian, 0.01)
    codes, total, seen = by_elimination(target, damped, result)
    assert torch.equal(result.codes, codes)
    # What each vector costs once later ones have made up for it adds up to the damped output error.
    assert_close(energy(target, result, damped), total, rtol=1e-9, atol=0)
    upper = inverse_factor(damped)
    for start, (rest, _) in seen.items():
        group, column = start // grid.group_size, start // grid.columns
        if start % grid.group_size == 0:
            rms = rest[:, start : start + grid.group_size].square().mean(1).sqrt()
            assert torch.equal(result.scale[:, group], rms.to(torch.float16).double())
        scale = result.scale[:, group, None]
        points = (rest[:, start : start + grid.columns] / scale).reshape(6 // grid.rows, -1, grid.vector)
        worth = (scale / upper.diagonal()[start : start + grid.columns]).square().reshape(points.shape)
        book = store_codebooks(fit_codebooks(points, worth, entries=grid.entries, iterations=4))
        assert torch.equal(book.entries[:, 0], result.codebook.entries[:, column])
        assert torch.equal(book.scale[:, 0], result.codebook.scale[:, column])
    assert torch.equal(target, before[0]) and torch.equal(hessian, before[1])


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_identity_takes_the_nearest_entry_of_each_vector(grid, layer):
    target, _ = layer(6, 32)
    result = gptvq(target, grid, upper=torch.eye(32, dtype=torch.float64))
    books = result.codebook.values(torch.float64)
    for row in range(6):
        for position, start in enumerate(range(0, 32, grid.vector)):
            book = books[row // grid.rows, start // grid.columns] * result.scale[row, start // grid.group_size]
            distances = (target[row, start : start + grid.vector] - book).square().sum(1)
            code = int(result.codes[row, position])
            assert float(distances[code]) == pytest.approx(float(distances.min()), rel=1e-9)


def test_codes_are_bytes_in_range_and_scales_are_float16(layer):
    target, hessian = layer(32, 64, torch.float32)
    for bits, vector in ((2, 4), (3, 2), (4, 2), (2, 2)):
        result = gptvq(target, VectorGrid(bits, vector, 16, 32, 64), upper=prepared(hessian).inverse_factor)
        assert result.codes.dtype == torch.uint8 and result.codes.shape == (32, 64 // vector)
        assert int(result.codes.max()) < 2 ** (bits * vector)
        assert len(result.codes.unique()) > 2 ** (bits * vector) / 4
        assert result.scale.dtype == torch.float16
        assert result.codebook.entries.shape == (2, 2, 2 ** (bits * vector), vector)
        assert result.format.plain(128) == IntGrid(bits, 64)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits, vector, share", [(2, 4, 0.8), (3, 2, 0.75)])
def test_passing_errors_on_serves_the_outputs_and_costs_the_weights(seed, bits, vector, share, layer, generator):
    generator.manual_seed(seed)
    target, hessian = layer(128, 128, torch.float32)
    grid = VectorGrid(bits, vector, 128, 128, 128)
    passing, nearest = (
        gptvq(target, grid, upper=prepared(hessian).inverse_factor),
        gptvq(target, grid, upper=torch.eye(128)),
    )
    assert energy(target, passing, hessian) < share * energy(target, nearest, hessian)
    assert energy(target, passing, torch.eye(128)) > energy(target, nearest, torch.eye(128))


def test_vectors_beat_single_weights_of_as_many_bits(layer):
    target, hessian = layer(256, 128, torch.float32)
    vectors = gptvq(target, VectorGrid(2, 4, 256, 128, 128), upper=prepared(hessian).inverse_factor)
    single = gptq(target, prepared(hessian), IntGrid(2, 128))
    assert energy(target, vectors, hessian) < 0.7 * energy(target, single, hessian)


def test_a_weight_of_few_distinct_vectors_comes_back(layer, generator):
    _, hessian = layer(1, 64, torch.float32)
    # Rows of rms 2^-k, of vectors of signs: fewer than there are entries, and each is in the start.
    signs = torch.randint(0, 2, (32, 64), generator=generator).float() * 2 - 1
    target = signs * 2.0 ** torch.randint(-9, 0, (32, 1), generator=generator)
    for upper in (prepared(hessian).inverse_factor, torch.eye(64)):
        result = gptvq(target, VectorGrid(2, 4, 32, 64, 64), upper=upper)
        assert torch.equal(result.scale[:, 0], target.abs().amax(1))
        # 127 steps of a scale that float16 rounds.
        assert_close(result.decode(), target, rtol=2**-11, atol=0)


def test_rows_of_a_tile_may_change_places(layer, generator):
    target, hessian = layer(8, 32)
    grid = VectorGrid(2, 2, 4, 16, 32)
    order = torch.cat([torch.randperm(4, generator=generator), 4 + torch.randperm(4, generator=generator)])
    plain, moved = (gptvq(weight, grid, upper=prepared(hessian).inverse_factor) for weight in (target, target[order]))
    assert torch.equal(moved.codes, plain.codes[order])
    assert torch.equal(moved.scale, plain.scale[order])
    assert torch.equal(moved.codebook.entries, plain.codebook.entries)


def test_a_power_of_two_on_the_weight_moves_to_the_scales(layer):
    target, hessian = layer(8, 32)
    grid = VectorGrid(2, 2, 4, 16, 32)
    plain, scaled = (gptvq(weight, grid, upper=prepared(hessian).inverse_factor) for weight in (target, 8 * target))
    assert torch.equal(scaled.codes, plain.codes)
    assert torch.equal(scaled.scale, 8 * plain.scale)
    assert torch.equal(scaled.codebook.entries, plain.codebook.entries)


def test_rows_and_inputs_of_zeros_stay_finite(layer):
    target, hessian = layer(8, 32, torch.float32)
    target[3], target[:, 5] = 0, 0
    hessian[7], hessian[:, 7] = 0, 0
    result = gptvq(target, VectorGrid(2, 4, 8, 32, 32), upper=prepared(hessian).inverse_factor)
    assert torch.isfinite(result.decode()).all()
    assert float(result.decode()[3].abs().max()) < 1e-3 * float(target.abs().max())
    nothing = gptvq(torch.zeros(8, 32), VectorGrid(2, 4, 8, 32, 32), upper=prepared(hessian).inverse_factor)
    assert not nothing.decode().any()


@pytest.mark.parametrize(
    "grid, message",
    [
        (VectorGrid(2, 4, 5, 32, 32), "5 rows and 32 columns must divide a weight of shape (8, 32)"),
        (VectorGrid(2, 4, 8, 24, 24), "8 rows and 24 columns must divide a weight of shape (8, 32)"),
        (VectorGrid(3, 4, 8, 32, 32), "at most 8, got 3 * 4"),
        (VectorGrid(2, 4, 8, 16, 24), "got 24; choose 32"),
    ],
    ids=["rows", "columns", "bits", "group"],
)
def test_sizes_that_do_not_divide_are_refused(grid, message, layer):
    target, hessian = layer(8, 32)
    with pytest.raises(ValueError, match=re.escape(message)):
        gptvq(target, grid, upper=prepared(hessian).inverse_factor)


def test_weights_too_large_for_a_float16_scale_are_refused():
    with pytest.raises(ValueError, match=re.escape("at most 65504), got 1e+05")):
        gptvq(torch.full((2, 8), 1e5), VectorGrid(2, 4, 2, 8, 8), upper=prepared(torch.eye(8)).inverse_factor)
