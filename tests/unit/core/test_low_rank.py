"""Low-rank factors as they are stored, and the fit that repairs their rounding."""

import itertools
import re

import pytest
import torch
from torch.testing import assert_close

from lorq.core.linalg import cholesky, damp
from lorq.core.low_rank import FACTOR_TYPES, LowRank, Metric, factor_bits, r1svd, store_factors
from lorq.core.sketch import FORMS, sketch

types = pytest.mark.parametrize("type", FACTOR_TYPES)
forms = pytest.mark.parametrize("form", FORMS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def white(width):
    """The metric of the weights themselves."""
    return Metric.activation(torch.ones(width))


def relative(delta, whole):
    return float(torch.linalg.norm(delta.double()) / torch.linalg.norm(whole.double()))


# ---- storage ----------------------------------------------------------------------------------------------


def factors(generator, out=20, rank=4, in_=30):
    # Three decades between the vectors, and very unequal sides, as a sketch gives them.
    left = torch.randn(out, rank, generator=generator) * torch.tensor([[300.0, 10.0, 1.0, 0.3]])
    right = torch.randn(rank, in_, generator=generator) * 1e-3
    return left, right


def test_sixteen_bit_factors_are_balanced_and_within_float16s_rounding(generator):
    left, right = factors(generator)
    before = left.clone(), right.clone()
    stored = store_factors(left, right, factor_type="float16")
    assert stored.left.dtype == stored.right.dtype == torch.float16
    assert stored.left_scale is None and stored.right_scale is None and stored.rank == 4
    assert_close(stored.left.abs().amax(0), stored.right.abs().amax(1), rtol=2**-10, atol=0)
    for r in range(4):  # two factors, each off by at most 2^-11 of itself
        pair = stored.left[:, r : r + 1].double() @ stored.right[r : r + 1].double()
        assert_close(pair, torch.outer(left[:, r], right[r]).double(), rtol=2.1 * 2**-11, atol=1e-9)
    assert torch.equal(left, before[0]) and torch.equal(right, before[1])


def test_eight_bit_factors_are_within_half_a_step_of_each_vector(generator):
    left, right = factors(generator)
    stored = store_factors(left, right, factor_type="int8")
    assert stored.left.dtype == stored.right.dtype == torch.int8
    assert stored.left_scale.dtype == stored.right_scale.dtype == torch.float16
    assert torch.equal(stored.left.abs().amax(0), torch.full((4,), 127, dtype=torch.int8))
    assert torch.equal(stored.right.abs().amax(1), torch.full((4,), 127, dtype=torch.int8))
    balance = (right.double().abs().amax(1) / left.double().abs().amax(0)).sqrt()
    found_left, found_right = stored.factors(torch.float64)
    # Half a step, and what float32 loses while balancing.
    assert ((found_left - left * balance).abs() <= 0.501 * stored.left_scale.double()).all()
    off = (found_right - right / balance[:, None]).abs()
    assert (off <= 0.501 * stored.right_scale.double()[:, None]).all()


@pytest.mark.parametrize("type, tolerance", [("float16", 2**-10), ("int8", 0.02), ("e4m3", 0.04)])
def test_the_product_survives_storage(type, tolerance, generator):
    left, right = factors(generator)
    stored = store_factors(left, right, factor_type=type)
    exact = left.double() @ right.double()
    error = torch.linalg.matrix_norm(stored.dense(torch.float64) - exact) / torch.linalg.matrix_norm(exact)
    assert float(error) < tolerance


def test_powers_of_two_are_stored_exactly_in_sixteen_bits():
    left, right = torch.tensor([[4.0], [-2.0]]), torch.tensor([[0.25, 0.125, 0.0]])
    stored = store_factors(left, right, factor_type="float16")
    assert torch.equal(stored.dense(), left @ right)
    assert float(stored.left.abs().max()) == float(stored.right.abs().max()) == 1


@types
def test_vectors_of_zeros_stay_zero(type, generator):
    left, right = factors(generator)
    left[:, 1], right[2], left[:, 3], right[3] = 0, 0, 0, 0
    dense = store_factors(left, right, factor_type=type).dense(torch.float64)
    assert torch.isfinite(dense).all()
    # Two entries, each off by at most 2^-4 of itself in e4m3.
    share = 0.13 if type == "e4m3" else 0.01
    assert_close(dense, torch.outer(left[:, 0], right[0]).double(), rtol=0, atol=share * float(dense.abs().max()))
    nothing = store_factors(torch.zeros(3, 2), torch.zeros(2, 5), factor_type=type)
    assert torch.equal(nothing.dense(), torch.zeros(3, 5))


@types
def test_rank_zero_stores_nothing(type):
    assert store_factors(torch.zeros(5, 0), torch.zeros(0, 6), factor_type=type) is None


@types
def test_balance_keeps_a_large_and_a_small_side_inside_float16(type):
    stored = store_factors(torch.tensor([[1e9], [5e8]]), torch.tensor([[1e-9, -1e-9]]), factor_type=type)
    assert_close(stored.dense(), torch.tensor([[1.0, -1.0], [0.5, -0.5]]), rtol=0.01, atol=0)


@pytest.mark.parametrize("value, shown", [(1e6, "1e+06"), (float("nan"), "nan"), (float("inf"), "nan")], ids=str)
def test_factors_that_do_not_fit_float16_are_refused_with_the_value(value, shown):
    with pytest.raises(ValueError, match=re.escape(f"at most 65504), got {shown}")):
        store_factors(torch.full((2, 1), value), torch.full((1, 3), value), factor_type="float16")


@pytest.mark.parametrize("type", ["int4", "e5m2", ""])
def test_other_types_are_refused_by_every_function(type, generator):
    with pytest.raises(ValueError, match=f"factor_type must be one of float16, int8, e4m3, got '{type}'"):
        store_factors(torch.ones(2, 1), torch.ones(1, 2), factor_type=type)
    with pytest.raises(ValueError, match=f"got '{type}'"):
        r1svd(torch.ones(2, 3), white(3), rank=1, factor_type=type, generator=generator)
    with pytest.raises(ValueError, match=f"got '{type}'"):
        factor_bits(type)


def test_low_rank_multiplies_its_scales_in():
    part = LowRank(
        left=torch.tensor([[1, -2], [3, 4]], dtype=torch.int8),
        right=torch.tensor([[5, 0, 1], [0, 7, -1]], dtype=torch.int8),
        left_scale=torch.tensor([0.5, 2.0], dtype=torch.float16),
        right_scale=torch.tensor([4.0, 0.25], dtype=torch.float16),
    )
    left, right = part.factors()
    assert torch.equal(left, torch.tensor([[0.5, -4.0], [1.5, 8.0]]))
    assert torch.equal(right, torch.tensor([[20.0, 0.0, 4.0], [0.0, 1.75, -0.25]]))
    assert torch.equal(part.dense(), torch.tensor([[10.0, -7.0, 3.0], [30.0, 14.0, 4.0]]))


@pytest.mark.parametrize("type, bits", [("float16", 16), ("int8", 8), ("e4m3", 8)])
def test_the_width_is_that_of_the_stored_dtype(type, bits, generator):
    stored = store_factors(*factors(generator), factor_type=type)
    assert factor_bits(type) == bits == 8 * stored.left.element_size() == 8 * stored.right.element_size()
    assert stored.factor_type == type


def test_e4m3_factors_reach_448_and_are_within_half_a_step_of_their_binade(generator):
    left, right = factors(generator)
    stored = store_factors(left, right, factor_type="e4m3")
    assert stored.left.dtype == stored.right.dtype == torch.float8_e4m3fn
    assert torch.equal(stored.left.float().abs().amax(0), torch.full((4,), 448.0))
    assert torch.equal(stored.right.float().abs().amax(1), torch.full((4,), 448.0))
    balance = (right.double().abs().amax(1) / left.double().abs().amax(0)).sqrt()
    found_left, found_right = stored.factors(torch.float64)
    for found, exact, scale in (
        (found_left.T, (left * balance).T, stored.left_scale),
        (found_right, right / balance[:, None], stored.right_scale),
    ):
        step = torch.maximum(exact.abs() * 2.0**-4, scale.double()[:, None] * 2.0**-10)  # denormals are 2^-9 apart
        assert ((found - exact).abs() <= 1.001 * step).all()


@pytest.mark.parametrize("length, raw_is_over", [(1024, 0.025), (4096, 0.035), (11008, 0.05)])
def test_vectors_in_e4m3_are_scaled_clear_of_its_underflow(length, raw_is_over, generator):
    v = torch.randn(length, generator=generator)
    v = v / v.norm()
    assert relative(v.to(torch.float8_e4m3fn).float() - v, v) > raw_is_over
    column = store_factors(v[:, None], torch.ones(1, 1), factor_type="e4m3")
    row = store_factors(torch.ones(1, 1), v[None], factor_type="e4m3")
    assert relative(column.dense()[:, 0] - v, v) < 0.028
    assert relative(row.dense()[0] - v, v) < 0.028


# ---- R1SVD ------------------------------------------------------------------------------------------------


def spectrum_of(generator, values, out=96, in_=128):
    """A matrix with these singular values and random singular vectors."""
    values = values.double()
    u = torch.linalg.qr(torch.randn(out, len(values), generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(in_, len(values), generator=generator, dtype=torch.float64))[0]
    return (u * values @ v.T).float()


def power(exponent, count=96):
    return torch.arange(1, count + 1) ** -exponent


@pytest.fixture
def metrics(correlated):
    """Both metrics for a width, and the matrix C of each."""

    def make(width):
        x = correlated(4 * width, width)
        factor = cholesky(damp(x.T @ x / len(x), 0.01))
        alpha = x.abs().mean(0)
        return {"hessian": (Metric.hessian(factor), factor), "activation": (Metric.activation(alpha), alpha.diag())}

    return make


@pytest.mark.parametrize("name", ["hessian", "activation"])
def test_a_metric_is_a_product_with_its_matrix_and_undone(name, metrics, generator):
    metric, c = metrics(24)[name]
    e = torch.randn(5, 24, generator=generator)
    assert_close(metric.apply(e), e @ c, rtol=1e-5, atol=1e-5)
    assert_close(metric.undo(metric.apply(e)), e, rtol=1e-3, atol=1e-3)


def test_the_hessian_metrics_norm_is_the_output_error(correlated, generator):
    x = correlated(200, 24)
    hessian = x.T @ x / 200
    e = torch.randn(5, 24, generator=generator)
    found = Metric.hessian(cholesky(hessian)).apply(e).square().sum()
    assert_close(found, (x @ e.T).square().sum() / 200, rtol=1e-4, atol=0)


@forms
@pytest.mark.parametrize("name", ["hessian", "activation"])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_matrix_of_low_rank_is_recovered_to_float16s_rounding(name, form, rank, metrics, generator):
    metric, c = metrics(48)[name]
    target = torch.randn(40, rank, generator=generator) @ torch.randn(rank, 48, generator=generator)
    found = r1svd(target, metric, rank=rank, factor_type="float16", form=form, iterations=4, generator=generator)
    assert found.rank == rank and found.left_scale is None
    # Entries are off by 2^-12 on average; each vector's by a little less.
    assert relative((found.dense() - target) @ c, target @ c) < 2**-11


@types
@forms
@pytest.mark.parametrize("name", ["hessian", "activation"])
def test_the_residual_is_that_of_the_truncated_svd(type, form, name, metrics, generator):
    metric, c = metrics(128)[name]
    # In the metric the spectrum is k^-0.5: flat enough that stored precision is no part of the matter.
    target = metric.undo(spectrum_of(generator, power(0.5)))
    found = r1svd(target, metric, rank=12, factor_type=type, form=form, iterations=8, generator=generator)
    values = torch.linalg.svdvals(target.double() @ c.double())
    error = float(torch.linalg.norm((target.double() - found.dense(torch.float64)) @ c.double()))
    optimal = float(values[12:].norm())
    assert optimal * (1 - 1e-5) <= error < 1.01 * optimal


@pytest.mark.parametrize(
    "decay, type, form, gain",
    [
        ("power", "int8", "block", 1.005), ("power", "int8", "rank1", 1.01),
        ("power", "e4m3", "block", 1.02), ("power", "e4m3", "rank1", 1.08),
        # int8 gains nothing that is sure here: the last pairs are as small as the rounding of the first.
        ("geometric", "e4m3", "block", 1.02), ("geometric", "e4m3", "rank1", 1.04),
    ],
)  # fmt: skip
def test_rounding_inside_the_deflation_beats_rounding_after_it(decay, type, form, gain, metrics):
    values = power(1.5) if decay == "power" else 0.8 ** torch.arange(96)
    for name, (metric, c) in metrics(128).items():
        for seed in range(3):
            target = metric.undo(spectrum_of(seeded(seed), values))
            inside = r1svd(target, metric, rank=16, factor_type=type, form=form, iterations=4, generator=seeded(seed))
            left, right = sketch(metric.apply(target), rank=16, form=form, iterations=4, generator=seeded(seed))
            after = store_factors(left, metric.undo(right), factor_type=type)
            errors = [relative((target - part.dense()) @ c, target @ c) for part in (inside, after)]
            assert errors[0] * gain < errors[1], (name, seed)


def test_factors_of_many_decades_need_a_float_type(correlated, generator):
    # The paper's exponent: a row of right spans three decades, and int8 has two.
    alpha = correlated(400, 128).abs().mean(0) ** 2.4
    metric = Metric.activation(alpha)
    target = metric.undo(spectrum_of(generator, power(1.0)))
    optimal = float(power(1.0)[16:].norm())
    error = {}
    for type in FACTOR_TYPES:
        found = r1svd(target, metric, rank=16, factor_type=type, iterations=4, generator=seeded())
        error[type] = float(torch.linalg.norm((target - found.dense()) * alpha)) / optimal
    assert error["float16"] < 1.001 and error["e4m3"] < 1.03
    assert error["int8"] > 1.2


@types
@forms
def test_rank_zero_is_no_factors(type, form, generator):
    assert r1svd(torch.randn(4, 6), white(6), rank=0, factor_type=type, form=form, generator=generator) is None


@types
@forms
def test_the_same_seed_gives_the_same_bits_and_the_target_is_unchanged(type, form, metrics, generator):
    metric, _ = metrics(32)["hessian"]
    target = torch.randn(20, 32, generator=generator)
    before = target.clone()
    first, second = (r1svd(target, metric, rank=4, factor_type=type, form=form, generator=seeded(3)) for _ in range(2))
    other = r1svd(target, metric, rank=4, factor_type=type, form=form, generator=seeded(4))
    for part in ("left", "right"):
        assert torch.equal(getattr(first, part).float(), getattr(second, part).float())
    assert torch.equal(first.left.float(), other.left.float()) == (form == "svd")
    assert torch.equal(target, before)


@types
@forms
def test_more_pairs_never_leave_more_in_the_metric(type, form, metrics, generator):
    metric, c = metrics(48)["hessian"]
    target = metric.undo(spectrum_of(generator, power(1.0, 40), 40, 48))
    errors = [
        relative(
            (target - r1svd(target, metric, rank=rank, factor_type=type, form=form, generator=seeded()).dense()) @ c,
            target @ c,
        )
        for rank in (1, 2, 4, 8, 16, 40)
    ]
    assert all(after < before for before, after in itertools.pairwise(errors))


@types
def test_a_target_of_zeros_stays_zero(type, generator):
    found = r1svd(torch.zeros(6, 8), white(8), rank=2, factor_type=type, generator=generator)
    assert found.rank == 2 and not found.dense().any()


def test_options_out_of_range_and_infinite_targets_are_refused(generator):
    target, metric = torch.randn(4, 6, generator=generator), white(6)
    for form in FORMS:
        with pytest.raises(ValueError, match=r"rank must be between 0 and min\(out, in\) = 4 for .*\(4, 6\), got 5"):
            r1svd(target, metric, rank=5, form=form, generator=generator)
        with pytest.raises(ValueError, match="iterations must be at least 0, got -1"):
            r1svd(target, metric, rank=2, form=form, iterations=-1, generator=generator)
        with pytest.raises(ValueError, match="finite"):
            r1svd(target / 0, metric, rank=2, form=form, generator=generator)
    with pytest.raises(ValueError, match=r"form must be one of .*got 'full'"):
        r1svd(target, metric, rank=2, form="full", generator=generator)


@pytest.mark.parametrize("form", ["block", "rank1"])
def test_the_unit_of_the_inputs_does_not_matter_however_small(form, generator):
    target, root = torch.randn(24, 16, generator=generator), torch.randn(16, 16, generator=generator)
    factor = torch.linalg.cholesky(root @ root.T + torch.eye(16))
    one, *others = (
        r1svd(target, Metric.hessian(factor * 4.0**k), rank=4, form=form, generator=seeded()) for k in (0, 3, -12, -24)
    )
    for other in others:
        assert all(a.equal(b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))
