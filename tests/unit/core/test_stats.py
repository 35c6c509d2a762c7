"""Input statistics against their definition in float64."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from lorq.core.stats import _CORRECTION as SHARE
from lorq.core.stats import _CORRECTION_DAMPING as DAMPING
from lorq.core.stats import PreparedHessian, StatsAccumulator, output_energy

both = pytest.mark.parametrize("token_weights", ["equal", "plain"])


def gather(*parts, token_weights):
    sums = StatsAccumulator(parts[0].shape[-1], token_weights)
    for part in parts:
        sums.add(part)
    return sums.finish()


def by_definition(x, token_weights):
    """``(X^T D X / tokens, mean of sqrt(d) |x|)``, one token at a time."""
    x = x.double()
    hessian = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    mean_abs = torch.zeros(x.shape[1], dtype=torch.float64)
    for token in x:
        weight = 1 / token.square().mean() if token_weights == "equal" else 1.0
        hessian += weight * torch.outer(token, token) / len(x)
        mean_abs += weight**0.5 * token.abs() / len(x)
    return hessian, mean_abs


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics_are_their_definition(token_weights, dtype, correlated):
    x = correlated(60, 12).to(dtype)
    before = x.clone()
    stats = gather(x, token_weights=token_weights)
    hessian, mean_abs = by_definition(x, token_weights)
    assert stats.tokens == 60
    assert stats.hessian.dtype == stats.mean_abs.dtype == torch.float32
    # Sums of 60 float32 products, whatever the inputs came in.
    assert_close(stats.hessian.double(), hessian, rtol=1e-5, atol=1e-5 * float(hessian.abs().max()))
    assert_close(stats.mean_abs.double(), mean_abs, rtol=1e-5, atol=0)
    assert torch.equal(x, before)


@both
def test_windows_and_leading_dimensions_are_only_tokens(token_weights, correlated):
    x = correlated(60, 12)
    whole = gather(x, token_weights=token_weights)
    parts = gather(x[:1], x[1:20], x[20:].view(2, 4, 5, 12), x[0, None][:0], token_weights=token_weights)
    assert parts.tokens == 60
    # Another order of float32 sums.
    assert_close(parts.hessian, whole.hessian, rtol=1e-5, atol=1e-5)
    assert_close(parts.mean_abs, whole.mean_abs, rtol=1e-5, atol=0)


def test_equal_weights_do_not_see_how_loud_a_token_is(correlated, generator):
    x = correlated(60, 12)
    loudness = 2.0 ** torch.randint(-6, 12, (60, 1), generator=generator)  # powers of two change no digit
    (equal, louder), (plain, swamped) = (
        [gather(part, token_weights=kind) for part in (x, x * loudness)] for kind in ("equal", "plain")
    )
    assert_close(louder.hessian, equal.hessian, rtol=1e-5, atol=1e-5)
    assert_close(louder.mean_abs, equal.mean_abs, rtol=1e-5, atol=0)
    assert float(swamped.hessian.trace()) > 1000 * float(plain.hessian.trace())
    # Each token has the mean square 1, so the trace is the width.
    assert_close(equal.hessian.trace(), torch.tensor(12.0), rtol=1e-5, atol=0)


def test_a_token_of_zeros_counts_and_adds_nothing(correlated):
    x = correlated(30, 12)
    alone, padded = (gather(part, token_weights="equal") for part in (x, torch.cat([x, torch.zeros(30, 12)])))
    assert padded.tokens == 60
    assert_close(padded.hessian * 2, alone.hessian, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_counted_and_refused(value):
    x = torch.ones(4, 5)
    x[1, 2] = x[3, 0] = value
    with pytest.raises(FloatingPointError, match="got 2 NaN or infinite values of 20"):
        StatsAccumulator(5).add(x)


@both
def test_token_weights_from_outside_count_like_repeated_tokens(token_weights, correlated):
    x, times = correlated(40, 12), torch.arange(40) % 4
    sums = StatsAccumulator(12, token_weights)
    sums.add(x[:15].view(3, 5, 12), times[:15].view(3, 5).float())
    sums.add(x[15:], times[15:].float())
    repeated = gather(x.repeat_interleave(times, 0), token_weights=token_weights)
    assert sums.tokens == 40
    # Another order of float32 sums.
    assert_close(sums.finish().hessian, repeated.hessian, rtol=1e-5, atol=1e-5)
    assert_close(sums.finish().mean_abs, repeated.mean_abs, rtol=1e-5, atol=0)


@both
def test_equal_weights_from_outside_change_nothing(token_weights, correlated):
    x = correlated(60, 12)
    sums = StatsAccumulator(12, token_weights)
    sums.add(x, torch.full((60,), 0.25))  # a power of two changes no digit
    plain = gather(x, token_weights=token_weights)
    assert_close(sums.finish().hessian, plain.hessian, rtol=1e-6, atol=1e-6)
    assert_close(sums.finish().mean_abs, plain.mean_abs, rtol=1e-6, atol=0)


def test_gradients_weigh_tokens_and_weights_from_outside_come_on_top(correlated, generator):
    x, d, v = correlated(60, 12), torch.rand(60, generator=generator), torch.arange(60) % 3.0
    sums = StatsAccumulator(12, "gradient")
    sums.add(x[:40].view(2, 20, 12), v[:40].view(2, 20), d[:40].view(2, 20))
    sums.add(x[40:], v[40:], d[40:])
    stats, x, d, v = sums.finish(), x.double(), d.double(), v.double()
    assert_close(stats.hessian.double(), (x * (d * v)[:, None]).T @ x / v.sum(), rtol=1e-5, atol=1e-5)
    assert_close(stats.mean_abs.double(), (d.sqrt() * v) @ x.abs() / v.sum(), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="60 tokens must come with their gradients"):
        StatsAccumulator(12, "gradient").add(x.float())


@pytest.mark.parametrize("token_weights", ["equal", "plain", "gradient"])
def test_a_correction_is_its_definition(token_weights, correlated, generator):
    x, d = correlated(60, 12), torch.rand(60, generator=generator)
    originals, sums = x + 0.3 * torch.randn(60, 12, generator=generator), StatsAccumulator(12, token_weights)
    for part in (slice(0, 25), slice(25, 60)):
        sums.add(x[part], None, d[part] if token_weights == "gradient" else None, originals[part])
    x, moved = x.double(), (originals - x).double()
    own = {"equal": 1 / x.square().mean(1), "plain": torch.ones(60).double(), "gradient": d.double()}[token_weights]
    drift, h = ((y * own[:, None]).T @ x / 60 for y in (moved, x))
    expected = SHARE * drift @ torch.linalg.inv(h + DAMPING * h.diagonal().mean() * torch.eye(12))
    assert_close(sums.correction().double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_corrected_weight_goes_part_of_the_way_to_what_gives_the_originals_outputs(generator):
    inputs, weight = torch.randn(500, 12, generator=generator), torch.randn(5, 12, generator=generator)
    mix = torch.eye(12) + 0.05 * torch.randn(12, 12, generator=generator)
    sums = StatsAccumulator(12, "plain")
    sums.add(inputs @ mix, originals=inputs)
    wanted = weight @ torch.linalg.inv(mix).T  # W x = W' M^T x
    stats = dataclasses.replace(sums.finish(), correction=sums.correction())
    part = SHARE / (1 + DAMPING)  # the inputs are nearly white
    assert_close(stats.corrected(weight), weight + part * (wanted - weight), rtol=0, atol=0.04)
    assert float((wanted - weight).abs().max()) > 0.2
    # Channels divided, the weight's columns multiplied: the same in other units.
    scale = torch.rand(12, generator=generator) + 0.5
    assert_close(stats.smoothed(scale).corrected(weight * scale), stats.corrected(weight) * scale)
    assert sums.finish().corrected(weight) is weight


def test_a_correction_without_originals_is_refused():
    sums = StatsAccumulator(5)
    sums.add(torch.ones(3, 5))
    with pytest.raises(ValueError, match="needs the originals of inputs, got none with 3 tokens"):
        sums.correction()


@pytest.mark.parametrize("wrong, shown", [(-0.5, "-0.5 to 1.0"), (float("inf"), "1.0 to inf")])
def test_token_weights_that_are_negative_or_not_finite_are_refused(wrong, shown):
    with pytest.raises(ValueError, match=f"finite and at least 0, got {shown}"):
        StatsAccumulator(5).add(torch.ones(2, 5), torch.tensor([1.0, wrong]))


def test_tokens_without_weight_are_as_good_as_inputs_of_zeros():
    sums = StatsAccumulator(5)
    sums.add(torch.ones(2, 5), torch.zeros(2))
    found = sums.finish()
    assert found.empty and found.tokens == 2 and not found.hessian.any() and not found.mean_abs.any()
    sums.add(torch.ones(1, 5) * 1e-10)
    assert not sums.finish().empty


def test_statistics_of_nothing_are_refused():
    with pytest.raises(ValueError, match="at least one token, got 0"):
        StatsAccumulator(5).finish()


def test_a_prepared_hessian_is_shrunk_and_its_factors_damped(correlated):
    stats = gather(correlated(200, 16), token_weights="plain")
    prepared = stats.prepared(shrinkage=0.25, damping=0.01)
    h = stats.hessian.double()
    shrunk = 0.75 * h + 0.25 * torch.diag(h.diagonal())
    damped = shrunk + 0.01 * h.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    assert_close(prepared.matrix.double(), shrunk, rtol=1e-6, atol=1e-7)
    # float32, which loses the condition number's digits.
    assert_close(prepared.factor.double(), torch.linalg.cholesky(damped), rtol=1e-4, atol=1e-4)
    upper = prepared.inverse_factor.double()
    assert_close(upper.T @ upper @ damped, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-3)


def test_a_prepared_hessian_is_made_once_for_each_setting(correlated):
    stats = gather(correlated(60, 12), token_weights="equal")
    first = stats.prepared(shrinkage=0.2, damping=0.01)
    assert stats.prepared(shrinkage=0.2, damping=0.01) is first
    assert first.factor is first.factor and first.inverse_factor is first.inverse_factor
    for shrinkage, damping in ((0.1, 0.01), (0.2, 0.1)):
        assert stats.prepared(shrinkage=shrinkage, damping=damping) is not first


def test_columns_fall_with_their_diagonal_inside_of_groups_and_blocks():
    diagonal = torch.tensor([1.0, 2.0, 9.0, 1.0, 3.0, 3.0, 8.0, 7.0])  # blocks of 4 in groups of 2
    hessian = PreparedHessian(torch.diag(diagonal) + 0.1, 0.01)
    order, ordered = hessian.falling(4, 2)
    assert order.tolist() == [6, 7, 4, 5, 2, 3, 1, 0]
    assert torch.equal(ordered.matrix, hessian.matrix[order][:, order]) and ordered.damping == 0.01
    assert hessian.falling(4, 2)[1] is ordered and hessian.falling(8, 8)[0].tolist() == [2, 6, 7, 4, 5, 1, 0, 3]
    assert PreparedHessian(torch.eye(8), 0.0).falling(4, 2)[0].tolist() == list(range(8))


def test_other_statistics_have_other_prepared_hessians(correlated):
    stats = gather(correlated(60, 12), token_weights="equal")
    stats.prepared(shrinkage=0.0, damping=0.01)
    louder = dataclasses.replace(stats, hessian=4 * stats.hessian)
    assert torch.equal(louder.prepared(shrinkage=0.0, damping=0.01).matrix, 4 * stats.hessian)


def test_output_energy_is_the_mean_squared_change_of_the_output(correlated, generator):
    x = correlated(300, 16).double()
    delta = torch.randn(9, 16, generator=generator, dtype=torch.float64)
    changed = torch.stack([(delta @ token).square().sum() for token in x]).mean()
    assert_close(output_energy(delta, x.T @ x / 300), changed, rtol=1e-12, atol=0)
    assert float(output_energy(torch.zeros(9, 16), torch.eye(16))) == 0


def test_outputs_that_are_divided_count_by_their_own_gradients(generator):
    gradients = torch.randn(30, 6, generator=generator)
    scale = torch.rand(6, generator=generator) * 4 + 0.1

    def weights(g):
        squares = g.square().mean(0)
        return squares / squares.mean()

    stats = gather(torch.randn(30, 4, generator=generator), token_weights="equal")
    assert stats.outputs_divided(scale) is stats
    found = dataclasses.replace(stats, output_weights=weights(gradients)).outputs_divided(scale)
    assert_close(found.output_weights, weights(gradients * scale))  # y / s has the gradient g s
    assert found.hessian is stats.hessian
