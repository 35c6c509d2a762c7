"""TileQ: what its parts add up to, whose inputs its factors serve, reductions to LoPRo, and what it refuses."""

import dataclasses
import itertools

import pytest
import torch
from helpers import solve_one
from torch.testing import assert_close

from lorq.core.basis import Basis
from lorq.core.codes import IntGrid
from lorq.core.linalg import damp, shrink
from lorq.core.problem import Problem
from lorq.core.rounding import nearest
from lorq.core.stats import InputStats, PreparedHessian, StatsAccumulator, output_energy
from lorq.core.tile_factors import TileFormat
from lorq.methods import LoPRo, TileQ

OUT, IN, EXPERTS = 24, 32, 6
COMMON = {"bits": 3, "group_size": 16, "rank": 4, "range_search": "none"}
inputs = pytest.mark.parametrize("common_input", [True, False], ids=["common input", "own inputs"])
sharings = pytest.mark.parametrize("sharing", ["row", "layer", "expert"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def experts(generator):
    """Weights that have directions in common over noise, and statistics of inputs unlike each other."""

    def make(count=EXPERTS, out=OUT, in_=IN):
        left = torch.randn(2, out, 3, generator=generator)
        right = torch.randn(2, 3, in_, generator=generator)
        weights = [
            0.02 * (left[e % 2] @ right[e // 2 % 2] + 0.7 * torch.randn(out, in_, generator=generator))
            for e in range(count)
        ]
        stats = []
        for expert in range(count):
            sums = StatsAccumulator(in_, "plain")
            mix = torch.eye(in_) + 0.2 * torch.randn(in_, in_, generator=generator)
            loudness = torch.linspace(0.3, 2.0, in_).roll(5 * expert)
            sums.add(torch.randn(100 * (expert + 1), in_, generator=generator) @ mix * loudness)
            stats.append(sums.finish())
        return weights, stats

    return make


def solve_projections(method, projections, stats, *, common_input=True, seed=0):
    """The experts of projections that read the same inputs, by projection."""
    names = tuple(tuple(f"{e}.{i}" for e in range(len(stats))) for i in range(len(projections)))
    weights = {name: w for own, ws in zip(names, projections, strict=True) for name, w in zip(own, ws, strict=True)}
    known = {name: s for own in names for name, s in zip(own, stats, strict=True) if s is not None}
    solved = method.solve(Problem(weights, known, seed, projections=names, common_input=common_input))
    return [[solved[name] for name in own] for own in names]


def solve(weights, stats, *, common_input=True, seed=0, **settings):
    """One projection of all experts."""
    method = TileQ(**COMMON | settings)
    return solve_projections(method, [weights], stats, common_input=common_input, seed=seed)[0]


def energy(delta, stats):
    h = stats.hessian.double()
    return float(torch.trace(delta.double() @ h @ delta.double().T))


def total_error(results, weights, stats):
    """Output error over all tokens of all experts."""
    pairs = zip(results, weights, stats, strict=True)
    return sum(s.tokens * energy(weight - result.dense(), s) for result, weight, s in pairs)


# ---- what a result is -------------------------------------------------------------------------------------


@sharings
@inputs
@pytest.mark.parametrize("codebook, rotation", [("scalar", "full"), ("vector", "partial"), ("scalar", "none")])
def test_a_weight_is_its_codes_and_its_part_of_the_shared_factors(sharing, common_input, codebook, rotation, experts):
    weights, stats = experts(4)
    results = solve(
        weights, stats, common_input=common_input, codebook=codebook, rotation=rotation, importance="log",
        sharing=sharing, metric="activation" if sharing == "expert" else "hessian", epochs=0,
    )  # fmt: skip
    factors = results[0].tile.factors
    left, right = factors.left.double(), factors.right.double()
    left, right = left * factors.left_scale.double()[:, None], right * factors.right_scale.double()[:, :, None]
    for expert, result in enumerate(results):
        assert result.tile.factors is factors and result.tile.expert == expert
        assert result.rank == 4 and result.format.rank == 0
        i, j = factors.cells[expert].tolist()
        part, decoded = left[j] @ right[i], result.codes.decode(torch.float64)
        whole = result.basis.unrotate(decoded + (0.0 if sharing == "expert" else part))
        if sharing == "expert":
            whole = whole + part * factors.input_scale[expert].double()
        assert_close(result.dense(torch.float64), whole, rtol=1e-9, atol=1e-9)
        h = stats[expert].hessian
        size = output_energy(weights[expert], h)
        plain = nearest(weights[expert], None, IntGrid(3, IN if codebook == "vector" else 16)).decode()
        assert result.record.error_before == pytest.approx(
            float(output_energy(weights[expert] - plain, h) / size), rel=1e-5
        )
        error = energy(weights[expert] - whole, stats[expert]) / energy(weights[expert], stats[expert])
        assert result.record.error_after == pytest.approx(error, rel=1e-4)
        assert result.record.stop == "given"


@sharings
@inputs
def test_the_same_seed_gives_the_same_bits_and_leaves_everything_alone(sharing, common_input, experts):
    weights, stats = experts()
    before = [t.clone() for t in (*weights, *(s.hessian for s in stats), *(s.mean_abs for s in stats))]

    def bits(seed):
        results = solve(
            weights, stats, common_input=common_input, sharing=sharing, metric="activation", iterations=0,
            importance="log", seed=seed,
        )  # fmt: skip
        return [part.tensors() for part in (results[0].tile.factors, *results)]

    def same(a, b):
        pairs = [(x, others[name]) for own, others in zip(a, b, strict=True) for name, x in own.items()]
        return all(torch.equal(x.double(), y.double()) for x, y in pairs)

    first = bits(0)
    assert same(first, bits(0)) and not same(first, bits(1))
    after = (*weights, *(s.hessian for s in stats), *(s.mean_abs for s in stats))
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("bits, common_input", [(2, False), (3, True)])
@pytest.mark.parametrize("order", ["codes-then-low-rank", "low-rank-then-codes"])
def test_shared_factors_lower_the_error_of_experts_without(bits, common_input, order, experts):
    weights, stats = experts()
    given = {"bits": bits, "order": order}
    plain = [
        solve_one(LoPRo(**COMMON | given | {"rank": 0}), weight, s) for weight, s in zip(weights, stats, strict=True)
    ]
    shared = solve(weights, stats, common_input=common_input, grid_rows=3, **given)
    more = solve(weights, stats, common_input=common_input, grid_rows=3, **given | {"rank": 12})
    without, error, less = (total_error(r, weights, stats) for r in (plain, shared, more))
    assert less < 0.9 * error < 0.8 * without


@sharings
def test_the_kept_error_never_rises_with_epochs(sharing, experts):
    weights, stats = experts()
    settings = {"sharing": sharing, "metric": "activation", "exponent": 1.0, "shrinkage": 0.0, "bits": 2}
    errors = [total_error(solve(weights, stats, epochs=epochs, **settings), weights, stats) for epochs in (0, 1, 2)]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))


# ---- who shares what --------------------------------------------------------------------------------------


def ranks(parts):
    """Rank of all experts' parts beside each other, and above each other."""
    return [int(torch.linalg.matrix_rank(torch.cat(parts, dim), rtol=1e-6)) for dim in (1, 0)]


@pytest.mark.parametrize("common_input", [True, False])
def test_a_row_shares_what_is_read_and_a_column_what_is_written(common_input, experts):
    weights, stats = experts()

    def parts(rows, columns):
        results = solve(weights, stats, common_input=common_input, grid_rows=rows, grid_columns=columns)
        assert results[0].tile.factors.grid == (rows, columns)
        return [r.tile.factors.dense(r.tile.expert, torch.float64) for r in results]

    # All in one row: one right factor, so all rows lie in one space of 4; columns span as much as the width lets.
    assert ranks(parts(1, 6)) == [24, 4]
    assert ranks(parts(6, 1)) == [4, 24]
    found = parts(3, 2)
    assert ranks(found) == [8, 12]


def test_experts_of_one_input_have_one_basis(experts):
    weights, stats = experts()
    others = [1.5 * weight.flip(0)[:8] for weight in weights]
    gate, up = solve_projections(TileQ(**COMMON, importance="log"), [weights, others], stats)
    tokens = torch.tensor([float(s.tokens) for s in stats])
    h = sum(s.hessian.diagonal() * t for s, t in zip(stats, tokens, strict=True)) / tokens.sum()
    magnitude = sum(w.abs().sum(0) for w in (*weights, *others))
    score = (magnitude / ((h / h.min()).log2() + 1))[gate[0].basis.permutation.long()]
    assert (score.diff() >= -1e-5 * score.max()).all()
    assert all(torch.equal(r.basis.permutation, gate[0].basis.permutation) for r in (*gate, *up))
    assert gate[0].tile.factors is not up[0].tile.factors


def test_experts_with_inputs_of_their_own_have_the_basis_that_lopro_gives_them(experts):
    weights, stats = experts()
    results = solve(weights, stats, common_input=False, importance="log")
    orders = [r.basis.permutation.tolist() for r in results]
    assert len({tuple(order) for order in orders}) == EXPERTS
    for weight, s, order in zip(weights, stats, orders, strict=True):
        alone = solve_one(LoPRo(**COMMON, importance="log", epochs=0), weight, s)
        assert order == alone.basis.permutation.tolist()


@inputs
@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_a_metric_is_that_of_the_mean_hessian_weighted_by_tokens(common_input, damping, experts):
    _, stats = experts()
    tokens = [3, 5000, 70, 1, 900, 20]
    stats = [dataclasses.replace(s, tokens=t) for s, t in zip(stats, tokens, strict=True)]
    bases = [Basis(torch.randperm(IN, generator=seeded(0 if common_input else e)), 16, 0) for e in range(EXPERTS)]
    method = TileQ(**COMMON, damping=damping)
    hessians = [
        PreparedHessian(basis.rotate_hessian(shrink(s.hessian, 0.2)), damping)
        for basis, s in zip(bases, stats, strict=True)
    ]
    groups = [[0, 1], [2, 3, 4, 5], [3], []]
    metrics = method._metrics(groups, stats, bases, hessians)
    for group, metric in zip(groups, metrics, strict=True):
        group = group or range(EXPERTS)
        mean = sum(tokens[e] * hessians[e].matrix.double() for e in group) / sum(tokens[e] for e in group)
        factor = metric.apply(torch.eye(IN)).double()
        expected = damp(mean, damping)
        assert_close(factor @ factor.T, expected, rtol=1e-4, atol=1e-4 * float(expected.diagonal().mean()))
        assert_close(metric.undo(factor.float()), torch.eye(IN), rtol=0, atol=1e-3)


def test_the_activation_metric_of_a_row_is_of_its_mean_magnitudes(experts):
    weights, stats = experts()
    tokens = [3, 5000, 70, 1, 900, 20]
    stats = [dataclasses.replace(s, tokens=t) for s, t in zip(stats, tokens, strict=True)]
    basis = Basis(torch.randperm(IN, generator=seeded()), 16, 0)
    method = TileQ(**COMMON, metric="activation", exponent=1.5)
    hessians = [PreparedHessian(s.hessian, 0.01) for s in stats]
    groups = [[0, 1], [2, 3, 4, 5]]
    metrics = method._metrics(groups, stats, [basis] * EXPERTS, hessians)
    for group, metric in zip(groups, metrics, strict=True):
        mean = sum(tokens[e] * stats[e].mean_abs.double() for e in group) / sum(tokens[e] for e in group)
        alpha = mean**1.5 / (mean.max() * mean.min()) ** 0.75
        assert_close(metric.apply(basis.rotate(torch.eye(IN))).double(), alpha.diag(), rtol=1e-4, atol=1e-4)
        assert_close(metric.undo(metric.apply(weights[0])), weights[0], rtol=1e-4, atol=1e-6)


def test_the_activation_scales_of_experts_in_bases_of_their_own_are_turned_with_them(experts):
    weights, stats = experts()
    method, generator = TileQ(metric="activation", exponent=1.5), seeded(1)
    bases = [Basis(torch.randperm(IN, generator=generator).int(), 4, 8) for _ in stats]
    hessians = [PreparedHessian(s.hessian, 0.01) for s in stats]
    (metric,) = method._metrics([range(EXPERTS)], stats, bases, hessians)
    loads = torch.tensor([s.load for s in stats]).double()
    expected = torch.zeros(IN, IN).double()
    for basis, s, load in zip(bases, stats, loads, strict=True):
        mean = s.mean_abs.double()
        turn = basis.rotate(torch.eye(IN)).double()
        expected += load / loads.sum() * turn.T @ (mean**1.5 / (mean.max() * mean.min()) ** 0.75).square().diag() @ turn
    seen = metric.apply(torch.eye(IN)).double()
    assert_close(seen @ seen.T, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert_close(metric.undo(metric.apply(weights[0])), weights[0], rtol=1e-3, atol=1e-5)


def test_activation_scales_over_many_decades_have_a_metric_in_bases_of_their_own():
    # A real layer's: in float32 the mean of their squares has no Cholesky factor.
    width, generator = 1024, seeded(2)
    decades = [10 ** (4 * torch.rand(width, generator=generator) - 2) for _ in range(3)]
    stats = [InputStats(torch.eye(width), mean_abs, 100) for mean_abs in decades]
    bases = [Basis(torch.randperm(width, generator=generator).int(), 256, 0) for _ in stats]
    metric = TileQ(metric="activation")._activation_metric(stats, bases, torch.full((3,), 1 / 3))
    rows = torch.randn(4, width, generator=generator)
    assert_close(metric.undo(metric.apply(rows)), rows, rtol=0, atol=1e-3)


def test_a_row_serves_its_own_experts_and_a_layer_all(experts):
    # Two rows with unlike inputs: factors for each row's own inputs leave less than those for the mean of all.
    weights, stats = experts()
    for expert in range(EXPERTS):
        loud = torch.where(torch.arange(IN) % 2 == expert % 2, 8.0, 0.1)
        mixed = stats[expert].hessian
        stats[expert] = InputStats(loud[:, None] * mixed * loud, stats[expert].mean_abs * loud, 500)

    def left_over(sharing):
        method = TileQ(rank=6, shrinkage=0.0, damping=1e-4, grid_rows=2, grid_columns=3, sharing=sharing)
        bases, hessians = [Basis(None, 0, 0)] * EXPERTS, [PreparedHessian(s.hessian, 1e-4) for s in stats]
        cells = torch.tensor([[e % 2, e // 2] for e in range(EXPERTS)], dtype=torch.int16)
        tiles = method._fit_tiles(torch.stack(weights), cells, stats, bases, hessians, seeded())
        return sum(energy(weights[e] - tiles.dense(e), stats[e]) for e in range(EXPERTS))

    assert left_over("row") < 0.9 * left_over("layer")


def test_an_experts_own_input_scale_is_the_inverse_of_its_activation_scale(experts):
    weights, stats = experts()
    factors = solve(weights, stats, sharing="expert", metric="activation", exponent=1.2)[0].tile.factors
    for expert, s in enumerate(stats):
        alpha = s.mean_abs.double() ** 1.2
        alpha = alpha / (alpha.max() * alpha.min()).sqrt()
        assert_close(factors.input_scale[expert].double(), 1 / alpha, rtol=2**-10, atol=0)


@inputs
def test_experts_scaled_each_for_itself_are_fitted_like_the_svd_of_the_scaled_tile_matrix(common_input, experts):
    weights, stats = experts(4)
    results = solve(
        weights, stats, common_input=common_input, sharing="expert", metric="activation", exponent=1.0,
        order="low-rank-then-codes", epochs=0, iterations=8, importance="log", factor_type="float16",
    )  # fmt: skip
    factors = results[0].tile.factors
    cells = [tuple(cell) for cell in factors.cells.tolist()]
    blocks = {cells[e]: w.double() / factors.input_scale[e].double() for e, w in enumerate(weights)}
    matrix = torch.cat([torch.cat([blocks[i, j] for i in range(2)], 1) for j in range(2)])
    found = sum(
        float(((w - factors.dense(e, torch.float64)) / factors.input_scale[e].double()).square().sum())
        for e, w in enumerate(weights)
    )
    assert found**0.5 == pytest.approx(float(torch.linalg.svdvals(matrix)[4:].norm()), rel=0.01)


# ---- reductions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["hessian", "activation"])
@pytest.mark.parametrize("factor_type", ["int8", "e4m3", "float16"])
@pytest.mark.parametrize("order", ["codes-then-low-rank", "low-rank-then-codes"])
def test_one_expert_alone_is_lopros_to_rounding(metric, factor_type, order, experts):
    weights, stats = experts(1)
    given = {
        "metric": metric, "factor_type": factor_type, "order": order, "exponent": 1.0, "iterations": 6, "epochs": 0,
    }  # fmt: skip
    (tile,) = solve(weights, stats, importance="hessian", **given)
    alone = solve_one(LoPRo(**COMMON, importance="hessian", **given), weights[0], stats[0])
    assert torch.equal(tile.basis.permutation, alone.basis.permutation)
    assert tile.tile.factors.grid == (1, 1) and tile.rank == alone.rank == 4
    # The same fit in other words: the pairs differ by rounding, and so do some codes if they come after.
    tolerance = 1e-3 if order == "codes-then-low-rank" else 0.05
    assert tile.record.error_after == pytest.approx(alone.record.error_after, rel=tolerance)
    assert tile.record.error_before == alone.record.error_before


def test_a_weight_of_no_expert_is_lopros(experts):
    weights, stats = experts(1)
    ordinary = solve_one(TileQ(**COMMON), weights[0], stats[0])
    expected = solve_one(LoPRo(**COMMON, order="low-rank-then-codes"), weights[0], stats[0])
    assert torch.equal(ordinary.dense(), expected.dense()) and ordinary.format == expected.format
    assert ordinary.tile is None


def test_experts_of_low_rank_need_no_codes(experts):
    _, stats = experts()
    generator = seeded(3)
    left, right = torch.randn(2, OUT, 4, generator=generator), torch.randn(3, 4, IN, generator=generator)
    weights = [left[e % 2] @ right[e // 2] for e in range(EXPERTS)]
    results = solve(
        weights, stats, factor_type="float16", order="low-rank-then-codes", iterations=8, sharing="layer", epochs=0,
        grid_rows=3,
    )  # fmt: skip
    # Each in its row and column, or the tile matrix is not of rank 4.
    assert max(r.record.error_after for r in results) < 2.0**-20


# ---- sizes and refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", ["scalar", "vector"])
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"rank": 500}, {"grid_rows": 2}, {"grid_columns": 1}, {"grid_rows": 4, "grid_columns": 3},
        {"factor_type": "float16"}, {"factor_type": "e4m3", "importance": "log", "rotation": "partial"},
        {"sharing": "expert", "metric": "activation"},
    ],
    ids=str,
)  # fmt: skip
def test_the_largest_formats_are_the_results(codebook, settings, experts):
    weights, stats = experts()
    settings = {"codebook": codebook, "epochs": 0, "kmeans_iterations": 1, "bits": 2} | settings
    results = solve(weights, stats, **settings)
    layer, tile = TileQ(**COMMON | settings).largest_experts(OUT, IN, EXPERTS)
    assert all(r.format == layer and r.tile.factors.format == tile for r in results)
    assert tile.experts == EXPERTS and tile.rank == min(settings.get("rank", 4), tile.rows * IN, tile.columns * OUT)
    assert results[0].stored_bits() == layer.stored_bits(OUT, IN) + tile.share(OUT, IN)


def test_the_defaults_of_a_real_layer_cost_what_they_should():
    layer, tile = TileQ(bits=2).largest_experts(1408, 2048, 60)
    assert tile == TileFormat(6, 10, 60, 32, "int8") and layer.rank == 0
    assert layer.stored_bits(1408, 2048) / (1408 * 2048) == pytest.approx(2 + 16 / 128 + 2 / 128, rel=1e-6)


def test_an_input_scale_of_each_expert_needs_the_activation_metric():
    with pytest.raises(ValueError, match="metric must be activation, got 'hessian'"):
        TileQ(sharing="expert")


def test_a_grid_that_is_too_small_is_refused_before_and_while_solving(experts):
    weights, stats = experts()
    message = r"got 2 x 2 = 4 cells for 6 experts; raise grid_rows or grid_columns"
    with pytest.raises(ValueError, match=message):
        TileQ(grid_rows=2, grid_columns=2, group_size=16).largest_experts(OUT, IN, EXPERTS)
    with pytest.raises(ValueError, match=message):
        solve(weights, stats, grid_rows=2, grid_columns=2)


def test_experts_without_statistics_are_refused(experts):
    weights, stats = experts()
    with pytest.raises(ValueError, match="needs input statistics, got None"):
        solve(weights, [*stats[:-1], None])


@sharings
@inputs
def test_channels_and_experts_that_are_always_zero_break_nothing(sharing, common_input, experts):
    weights, stats = experts()
    weights[2] = torch.zeros(OUT, IN)
    for expert in (0, 3):
        hessian, mean_abs = stats[expert].hessian.clone(), stats[expert].mean_abs.clone()
        for channel in (0, 9) if expert else range(IN):
            hessian[channel], hessian[:, channel], mean_abs[channel] = 0, 0, 0
        stats[expert] = InputStats(hessian, mean_abs, 10)
    for metric in ("activation", "hessian") if sharing != "expert" else ("activation",):
        results = solve(
            weights, stats, common_input=common_input, sharing=sharing, metric=metric, importance="log", exponent=1.0
        )
        for result in results:
            assert torch.isfinite(result.dense()).all()
        assert all(results[e].record.error_after < results[e].record.error_before for e in (1, 4, 5))
