"""LoPRo: reductions to known cases, the orders of its columns by hand, its sizes and what it refuses."""

import dataclasses
import itertools
import math
import re

import pytest
import torch
from helpers import prepared, same_codes, solve_one
from torch.testing import assert_close

from lorq.core.basis import WHOLE, Basis
from lorq.core.codes import IntGrid, VectorGrid
from lorq.core.linalg import damp, shrink
from lorq.core.low_rank import Metric, r1svd
from lorq.core.problem import Problem, layer_generator
from lorq.core.rounding import clip, gptq, gptvq
from lorq.core.stats import InputStats, StatsAccumulator, output_energy
from lorq.methods import GPTQ, LoPRo, LoPRoPaper, Nearest
from lorq.methods.common import SEARCHES

IMPORTANCES = ("log", "ratio", "hessian", "residual")
importances = pytest.mark.parametrize("importance", IMPORTANCES)
ORDERS = ("codes-then-low-rank", "low-rank-then-codes")
orders = pytest.mark.parametrize("order", ORDERS)
codebooks = pytest.mark.parametrize("codebook", ["scalar", "vector"])
# Nothing but the rounding.
PLAIN = {"rotation": "none", "importance": "none", "rank": 0, "group_size": 32}


def seeded():
    """What `solve_one` draws from."""
    return layer_generator(0, "layer")


@pytest.fixture
def layer(correlated, generator):
    """A weight with decaying directions over noise and a few outliers, and statistics of its inputs."""

    def make(out=64, in_=96):
        sums = StatsAccumulator(in_)
        sums.add(correlated(4 * in_, in_))
        strong = torch.randn(out, 6, generator=generator) * 0.6 ** torch.arange(6)
        weight = strong @ torch.randn(6, in_, generator=generator) + torch.randn(out, in_, generator=generator)
        loud = torch.randperm(weight.numel(), generator=generator)[: weight.numel() // 100]
        weight.view(-1)[loud] *= 8.0
        return 0.02 * weight, sums.finish()

    return make


def solve(weight, stats, **settings):
    return solve_one(LoPRo(**settings), weight, stats)


# ---- reductions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("range_search", SEARCHES)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("shrinkage, damping", [(0.2, 0.01), (0.0, 0.1)], ids=str)
def test_without_basis_and_rank_it_is_gptq(range_search, symmetric, shrinkage, damping, layer):
    weight, stats = layer()
    common = {
        "bits": 3, "symmetric": symmetric, "range_search": range_search, "shrinkage": shrinkage, "damping": damping,
    }  # fmt: skip
    result = solve(weight, stats, epochs=3, **common | PLAIN)
    expected = solve_one(GPTQ(group_size=32, **common), weight, stats)
    assert same_codes(result.codes, expected.codes)
    assert result.low_rank is None and result.basis is None
    assert result.format == expected.format
    assert dataclasses.replace(result.record, stop="none") == expected.record


def test_without_basis_and_rank_the_other_roundings_are_themselves(layer):
    weight, stats = layer()
    result = solve(weight, stats, bits=3, rounding="nearest", **PLAIN)
    expected = solve_one(Nearest(bits=3, group_size=32), weight, stats)
    assert same_codes(result.codes, expected.codes)
    result = solve(weight, stats, bits=3, rounding="clip", range_search="saturate", **PLAIN)
    clipped = clip(weight, prepared(shrink(stats.hessian, 0.2)), IntGrid(3, 32), SEARCHES["saturate"])
    assert same_codes(result.codes, clipped)


def test_without_basis_and_rank_vectors_are_gptvqs(layer):
    weight, stats = layer()
    result = solve(weight, stats, bits=2, codebook="vector", codebook_rows=32, codebook_columns=48, **PLAIN)
    expected = gptvq(weight, VectorGrid(2, 4, 32, 48, 96), upper=prepared(shrink(stats.hessian, 0.2)).inverse_factor)
    assert same_codes(result.codes, expected)
    assert torch.equal(result.dense(), expected.decode())


def test_vectors_without_error_passing_are_those_of_a_diagonal_hessian(layer):
    weight, stats = layer()
    result = solve(weight, stats, bits=2, codebook="vector", rounding="nearest", **PLAIN)
    diagonal = stats.hessian.diagonal()
    expected = gptvq(weight, result.codes.format, upper=diagonal.rsqrt().diag())
    assert same_codes(result.codes, expected)
    exact = gptvq(weight, result.codes.format, upper=prepared(stats.hessian.diagonal().diag(), 0.0).inverse_factor)
    codes = result.codes.codes
    assert int((codes != exact.codes).sum()) <= 0.01 * codes.numel()  # the same in other words


@pytest.mark.parametrize("rotation, block, skip", [("full", 32, 0), ("partial", 32, 32), ("whole", WHOLE, 0)])
def test_at_rank_zero_it_is_gptq_in_the_basis(rotation, block, skip, layer):
    weight, stats = layer()
    result = solve(weight, stats, bits=3, group_size=32, rank=0, rotation=rotation, importance="hessian")
    basis = Basis(stats.hessian.diagonal().argsort(descending=True), block, skip)
    hessian = basis.rotate_hessian(shrink(stats.hessian, 0.2))
    expected = gptq(basis.rotate(weight), prepared(hessian), IntGrid(3, 32), SEARCHES["scale"])
    assert torch.equal(result.basis.permutation, basis.permutation)
    assert (result.basis.block, result.basis.skip) == (block, skip)
    assert same_codes(result.codes, expected)
    assert torch.equal(result.dense(), basis.unrotate(expected.decode()))


@orders
@pytest.mark.parametrize("sketch", ["block", "rank1"])
def test_one_pass_is_the_two_parts_in_order(order, sketch, layer):
    weight, stats = layer()
    result = solve(
        weight, stats, bits=3, group_size=32, rank=4, order=order, sketch=sketch, epochs=0, factor_type="e4m3"
    )  # fmt: skip
    basis = Basis(None, 32, 0)
    target, hessian = basis.rotate(weight), basis.rotate_hessian(shrink(stats.hessian, 0.2))
    metric = Metric.hessian(torch.linalg.cholesky(damp(hessian, 0.01)))

    def rounded(rest):
        return gptq(rest, prepared(hessian), IntGrid(3, 32), SEARCHES["scale"])

    def fitted(rest):
        return r1svd(rest, metric, rank=4, factor_type="e4m3", form=sketch, iterations=2, generator=seeded())

    if order == "codes-then-low-rank":
        codes = rounded(target)
        low_rank = fitted(target - codes.decode())
    else:
        low_rank = fitted(target)
        codes = rounded(target - low_rank.dense())
    assert_close(result.low_rank.dense(), low_rank.dense(), rtol=0, atol=1e-3 * float(low_rank.dense().abs().max()))
    assert int((result.codes.codes != codes.codes).sum()) < 0.01 * weight.numel()
    both = basis.unrotate(codes.decode() + low_rank.dense())
    assert_close(result.dense(), both, rtol=0, atol=1.1 * float(result.codes.scale.max()))


def test_the_papers_settings_are_lopros_with_other_defaults(layer):
    weight, stats = layer()
    told = {
        field.name: field.default
        for field in dataclasses.fields(LoPRoPaper)
        if field.default != LoPRo.__dataclass_fields__[field.name].default
    }
    assert told["rotation"] == "partial" and told["importance"] == "log" and told["metric"] == "activation"
    paper = solve_one(LoPRoPaper(bits=2, group_size=32), weight, stats)
    result = solve(weight, stats, bits=2, group_size=32, **told)
    assert same_codes(paper.codes, result.codes) and torch.equal(paper.dense(), result.dense())
    assert paper.record == result.record


@pytest.mark.parametrize("metric", ["hessian", "activation"])
@pytest.mark.parametrize("rotation", ["full", "partial", "whole", "none"])
def test_a_matrix_of_low_rank_needs_no_codes(metric, rotation, layer, generator):
    _, stats = layer()
    weight = torch.randn(64, 3, generator=generator) @ torch.randn(3, 96, generator=generator)
    result = solve(
        weight, stats, bits=3, group_size=32, rank=3, factor_type="float16", order="low-rank-then-codes",
        metric=metric, rotation=rotation, importance="log", exponent=1.0, iterations=6,
    )  # fmt: skip
    # float16 factors: 2^-11 each, and the codes take up part of what these miss.
    assert result.record.error_after < 2.0**-20


# ---- epochs and errors ------------------------------------------------------------------------------------


@orders
@codebooks
@pytest.mark.parametrize("metric", ["hessian", "activation"])
def test_the_kept_error_never_rises_with_epochs(order, codebook, metric, layer):
    weight, stats = layer()
    for shrinkage in (0.0, 0.3):
        hessian = shrink(stats.hessian, shrinkage).double()  # what is minimised; without shrinkage what is recorded
        errors, recorded = [], []
        for epochs in (0, 1, 3):
            result = solve(
                weight, stats, bits=2, group_size=32, rank=8, order=order, codebook=codebook, metric=metric,
                exponent=1.0, epochs=epochs, shrinkage=shrinkage, importance="log", sketch="rank1",
            )  # fmt: skip
            errors.append(float(output_energy((weight - result.dense()).double(), hessian)))
            recorded.append(result.record.error_after)
        assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
        if shrinkage == 0.0:
            assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(recorded))


@codebooks
def test_each_part_lowers_the_error_of_two_bits(codebook, layer):
    weight, stats = layer(128, 128)
    common = {"bits": 2, "group_size": 64, "codebook": codebook}
    plain = solve(weight, stats, rotation="none", rank=0, **common).record
    turned = solve(weight, stats, rank=0, **common).record
    both = solve(weight, stats, rank=8, **common).record
    more = solve(weight, stats, rank=16, **common).record
    assert turned.error_after < 0.9 * plain.error_after  # a rotation spreads the outliers
    assert both.error_after < 0.9 * turned.error_after
    assert more.error_after < both.error_after < both.error_before


def test_two_bit_vectors_beat_two_bit_values(layer):
    weight, stats = layer(128, 128)
    values, vectors = (solve(weight, stats, bits=2, group_size=64, codebook=book) for book in ("scalar", "vector"))
    assert vectors.record.error_after < 0.9 * values.record.error_after


# ---- the order of the columns -----------------------------------------------------------------------------

MAGNITUDES = (0.5, 4.0, 1.0, 3.0)
SQUARES = (1.0, 64.0, 0.25, 4.0)
# By hand. log: m / (log2 h + 3) = 1/6, 4/9, 1, 3/5; ratio: m / h = 1/2, 1/16, 4, 3/4.
BY_HAND = {"log": [0, 1, 3, 2], "ratio": [1, 0, 3, 2], "hessian": [1, 3, 0, 2], "residual": [0, 2, 3, 1]}


@importances
@pytest.mark.parametrize("loudness", [1.0, 2.0**10])
def test_the_columns_of_a_hand_made_weight_are_ordered_by_the_formula(importance, loudness):
    signs = torch.tensor([[1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, -1.0, 1.0]])
    weight = signs * torch.tensor(MAGNITUDES) * torch.tensor([[0.5], [1.5]])  # means are as written
    stats = InputStats(loudness * torch.tensor(SQUARES).diag(), torch.tensor(SQUARES).sqrt(), 10)
    result = solve(weight, stats, bits=4, group_size=4, rank=0, importance=importance, rotation="none")
    assert result.basis.permutation.tolist() == BY_HAND[importance]
    lowest = math.log2(min(SQUARES))
    scores = {
        "log": [m / (math.log2(h) - lowest + 1) for m, h in zip(MAGNITUDES, SQUARES, strict=True)],
        "ratio": [m / h for m, h in zip(MAGNITUDES, SQUARES, strict=True)],
        "hessian": [-h for h in SQUARES],
        "residual": list(MAGNITUDES),
    }[importance]
    assert sorted(range(4), key=scores.__getitem__) == BY_HAND[importance]


@importances
def test_the_paper_orders_by_what_the_low_rank_part_leaves(importance, layer):
    weight, stats = layer()
    settings = {"bits": 3, "group_size": 32, "rank": 6, "importance": importance, "iterations": 4}
    result = solve(weight, stats, order="low-rank-then-codes", metric="activation", exponent=1.0, **settings)
    metric = Metric.activation(stats.mean_abs)  # a constant on it changes nothing
    low_rank = r1svd(weight, metric, rank=6, factor_type="int8", form="block", iterations=4, generator=seeded())
    m, h = (weight - low_rank.dense()).abs().sum(0), stats.hessian.diagonal()
    score = {"log": m / (h / h.min()).log2().add(1), "ratio": m / h, "hessian": -h, "residual": m}[importance]
    found = score[result.basis.permutation.long()]
    # The residual differs by the rounding of factors whose scale differs.
    assert (found.diff() >= -0.01 * score.abs().max()).all()
    whole = solve(weight, stats, **settings)
    m = weight.abs().sum(0)
    score = {"log": m / (h / h.min()).log2().add(1), "ratio": m / h, "hessian": -h, "residual": m}[importance]
    assert (score[whole.basis.permutation.long()].diff() >= -1e-5 * score.abs().max()).all()
    same = torch.equal(whole.basis.permutation, result.basis.permutation)
    assert same == (importance == "hessian")


def test_dead_channels_come_first_as_the_authors_code_has_it():
    squares, magnitudes = (8.0, 0.5, 0.0, 4.0, 0.0), (1.0, 1.0, 0.3, 2.4, 7.0)
    weight = torch.tensor([magnitudes]) * torch.tensor([[1.0], [-1.0]])
    stats = InputStats(torch.tensor(squares).diag(), torch.tensor(squares).sqrt(), 10)
    # By hand, of the others. log: m / (log2 h + 2) = 0.2, 1, 0.6; ratio: m / h = 0.125, 2, 0.6; hessian: -8, -0.5, -4.
    for importance, order in (
        ("log", [0, 3, 1]),
        ("ratio", [0, 3, 1]),
        ("hessian", [0, 3, 1]),
        ("residual", [0, 1, 3]),
    ):
        result = solve(weight, stats, bits=4, group_size=5, rank=0, importance=importance, rotation="none")
        assert result.basis.permutation.tolist() == [2, 4, *order]


def test_the_order_of_the_paper_is_that_of_the_authors_key(layer):
    weight, stats = layer()
    dead = torch.tensor([3, 40, 41])
    hessian = stats.hessian.clone()
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    stats = InputStats(hessian, stats.mean_abs.index_fill(0, dead, 0.0), 10)
    result = solve_one(LoPRoPaper(bits=3, group_size=32, rank=0), weight, stats)
    # gptq_utils_lora.py: a dead channel's Hessian is 1 and its column of the residual 0.
    h, residual = hessian.diagonal().clone(), weight.index_fill(1, dead, 0.0)
    h[dead] = 1.0
    key = residual.abs().mean(0) / (h.log2() - h.log2().min() + 1)
    expected = key.argsort(stable=True)
    assert torch.equal(result.basis.permutation, expected) and result.basis.permutation[:3].tolist() == [3, 40, 41]


@pytest.mark.parametrize("sketch", ["block", "rank1"])
def test_the_columns_are_ordered_by_the_factors_that_are_stored(sketch, layer):
    weight, stats = layer()
    # Without power iterations the factors are those of the seed and no others.
    result = solve(
        weight, stats, bits=3, group_size=32, rank=6, order="low-rank-then-codes", metric="activation", exponent=1.0,
        importance="residual", sketch=sketch, iterations=0, factor_type="float16", epochs=0,
    )  # fmt: skip
    magnitude = (weight - result.basis.unrotate(result.low_rank.dense())).abs().sum(0)[result.basis.permutation.long()]
    assert (magnitude.diff() >= -1e-3 * magnitude.max()).all()


@pytest.mark.parametrize("rotation", ["full", "partial", "whole", "none"])
def test_the_activation_metric_is_that_of_the_models_own_channels(rotation, layer):
    weight, stats = layer()
    result = solve(
        weight, stats, bits=3, group_size=32, rank=6, order="low-rank-then-codes", metric="activation", exponent=2.4,
        importance="log", rotation=rotation, iterations=8, factor_type="float16", epochs=0,
    )  # fmt: skip
    alpha = stats.mean_abs.double() ** 2.4
    left_over = (weight - result.basis.unrotate(result.low_rank.dense())).double() * alpha
    optimal = torch.linalg.svdvals(weight.double() * alpha)[6:].norm()
    assert float(left_over.norm()) == pytest.approx(float(optimal), rel=1e-3)


def test_layers_of_one_input_are_ordered_by_the_sum_of_their_magnitudes(layer):
    weight, stats = layer()
    other = weight.flip(1)[:24] * 3
    problem = Problem({"a": weight, "b": other}, {"a": stats, "b": stats}, 0)
    results = LoPRo(bits=3, group_size=32, importance="residual").solve(problem)
    expected = (weight.abs().sum(0) + other.abs().sum(0)).argsort(stable=True)
    for result in results.values():
        assert torch.equal(result.basis.permutation.long(), expected)


@codebooks
@pytest.mark.parametrize("importance", [*IMPORTANCES, "none"])
@pytest.mark.parametrize("metric", ["hessian", "activation"])
def test_channels_that_are_always_zero_do_not_break_a_layer(codebook, importance, metric, layer):
    weight, stats = layer()
    hessian, mean_abs = stats.hessian.clone(), stats.mean_abs.clone()
    for channel in (0, 7, 95):
        hessian[channel], hessian[:, channel], mean_abs[channel] = 0, 0, 0
    dead = InputStats(hessian, mean_abs, stats.tokens)
    for rounding, order, rotation in (
        ("gptq", ORDERS[0], "none"),
        ("gptq", ORDERS[1], "partial"),
        ("nearest", ORDERS[0], "full"),
    ):
        result = solve(
            weight, dead, bits=3, group_size=32, codebook=codebook, importance=importance, metric=metric, rank=4,
            exponent=1.0, rounding=rounding, order=order, rotation=rotation, epochs=0,
        )  # fmt: skip
        assert torch.isfinite(result.dense()).all()
        if rounding == "gptq":
            assert result.record.error_after < result.record.error_before


# ---- sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out, in_", [(40, 96), (64, 64), (7, 256), (48, 192), (5, 4)])
def test_the_largest_format_is_the_results(out, in_, layer):
    weight, stats = layer(out, in_)
    for codebook, rotation, importance, rank in itertools.product(
        ("scalar", "vector"), ("full", "partial", "whole", "none"), ("log", "none"), (0, 100)
    ):
        if in_ == 4 and rotation == "partial":
            continue  # no room for two blocks
        method = LoPRo(
            bits=3, group_size=-1, codebook=codebook, rotation=rotation, importance=importance, rank=rank, epochs=0,
            kmeans_iterations=1, range_search="none",
        )  # fmt: skip
        result = solve_one(method, weight, stats)
        assert method.largest(out, in_) == result.format
        assert result.format.rank == min(rank, out, in_)


@pytest.mark.parametrize(
    "settings, width, expected",
    [
        ({"rotation": "full"}, 576, (64, 0)),
        ({"rotation": "partial"}, 576, (64, 64)),
        ({"rotation": "full"}, 4096, (256, 0)),
        ({"rotation": "partial"}, 4096, (256, 256)),
        ({"rotation": "partial"}, 256, (128, 128)),
        ({"rotation": "partial", "skip": 48}, 96, (16, 48)),
        ({"rotation": "partial", "block": 16}, 96, (16, 16)),
        ({"rotation": "partial", "block": 8, "skip": 12}, 100, (8, 12)),
        ({"rotation": "partial", "skip": 0}, 96, (32, 0)),
        ({"rotation": "full", "skip": 48}, 96, (32, 0)),
        ({"rotation": "none", "block": 16}, 96, (0, 0)),
        ({"rotation": "whole"}, 576, (-1, 0)),
        ({"rotation": "whole"}, 4096, (-1, 0)),
    ],
    ids=str,
)
def test_blocks_fit_unasked(settings, width, expected):
    format = LoPRo(group_size=-1, **settings).largest(8, width)
    assert (format.rotation_block, format.rotation_skip) == expected


@pytest.mark.parametrize(
    "bits, out, in_, expected, cost",
    [
        # GPTVQ's sizes and what they cost in bits per weight.
        (2, 4096, 4096, (4, 256, 256), 0.125),
        (3, 4096, 4096, (2, 128, 256), 0.03125),
        (4, 4096, 4096, (2, 256, 256), 0.0625),
        (2, 1536, 576, (4, 384, 192), 8 * 1024 / (384 * 192)),
        (2, 7, 96, (4, 7, 96), 8 * 1024 / (7 * 96)),
    ],
)
def test_codebooks_have_gptvqs_sizes(bits, out, in_, expected, cost):
    format = LoPRo(bits=bits, codebook="vector", rank=0).largest(out, in_)
    assert (format.codes.vector, format.codes.rows, format.codes.columns) == expected
    scales = 16 * out + 16 * (out // expected[1]) * (in_ // expected[2])
    assert format.stored_bits(out, in_) == pytest.approx((bits + cost) * out * in_ + scales, rel=1e-12)


@pytest.mark.parametrize(
    "settings, shape, message",
    [
        ({"block": 64}, (40, 96), "got block 64 for width 96 less 0; blocks that fit: 4, 8, 16, 32"),
        ({"block": 24}, (40, 96), "got block 24 for width 96 less 0"),
        ({"rotation": "partial", "block": 32, "skip": 80}, (40, 96), "width 96 less 80; blocks that fit: 4, 8, 16"),
        ({"rotation": "partial", "skip": 96}, (40, 96), "for width 96 less 96; blocks that fit: none"),
        ({}, (40, 98), "for width 98 less 0; blocks that fit: none"),
        ({"rotation": "whole"}, (40, 98), "got width 98; rotate in blocks instead"),
        ({"group_size": 36}, (40, 96), "got group_size 36 and width 96"),
        ({"codebook": "vector", "codebook_columns": 36}, (40, 96), "36 columns must divide a weight of shape (40, 96)"),
        ({"codebook": "vector", "codebook_rows": 16}, (40, 96), "16 rows and 96 columns must divide a weight of shape"),
        ({"codebook": "vector", "vector": 5}, (40, 96), "at most 8, got 2 * 5"),
        ({"codebook": "vector", "rotation": "none"}, (40, 98), "divide a weight of shape (40, 98) into vectors of 4"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused_before_and_while_solving(settings, shape, message):
    method = LoPRo(**{"bits": 2, "group_size": -1} | settings)
    with pytest.raises(ValueError, match=re.escape(message)):
        method.largest(*shape)
    stats = InputStats(torch.eye(shape[1]), torch.ones(shape[1]), 10)
    with pytest.raises(ValueError, match=re.escape(message)):
        solve_one(method, torch.zeros(shape), stats)


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_vector_codebooks_of_more_bits_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be 2, 3, 4 with vector codes, got {bits}$"):
        LoPRo(bits=bits, codebook="vector")
    assert LoPRo(bits=bits).codebook == "scalar"


@pytest.mark.parametrize("settings", [{"rounding": "clip"}, {"symmetric": True}], ids=str)
def test_what_vector_codebooks_have_no_use_for_is_refused(settings):
    with pytest.raises(ValueError, match=r"no ranges to clip and no zero points, got rounding '\w+', symmetric \w+;"):
        LoPRo(bits=2, codebook="vector", **settings)
