"""Gradient steps: what they reach by hand, which windows they take, and that they never end worse than they began."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from lorq.core.descent import Descent, State, block_loss, cpu_generator, layer_loss, minimise
from lorq.core.problem import BlockOutput
from lorq.core.stats import StatsAccumulator, output_energy


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def leaf(*values):
    return torch.tensor(values, requires_grad=True)


class Recorder:
    """A loss by window number that notes which windows it is asked for, apart for steps and for measurements."""

    def __init__(self, of_windows):
        self.of_windows, self.steps, self.measured = of_windows, [], []

    def __call__(self, windows):
        (self.steps if torch.is_grad_enabled() else self.measured).append(windows.tolist())
        return self.of_windows(windows)


# ---- the descent ------------------------------------------------------------------------------------------


def test_a_bowl_is_descended_to_its_bottom():
    p, bottom = leaf(1.0, -2.0), torch.tensor([0.25, 0.5])
    outcome = minimise([p], lambda w: (p - bottom).square().sum(), 1, Descent(400, 0.05), generator=seeded())
    assert_close(p.detach(), bottom, atol=1e-3, rtol=0)
    assert outcome.start == pytest.approx(0.75**2 + 2.5**2)
    assert outcome.best == pytest.approx(float((p.detach() - bottom).square().sum()), abs=1e-12)


def test_the_rate_falls_along_half_a_cosine():
    # Under a constant gradient each step of Adam is as long as its rate.
    p, steps, rate = leaf(0.0), 10, 0.01
    minimise([p], lambda w: p.sum(), 1, Descent(steps, rate), generator=seeded())
    length = sum(rate * (1 + math.cos(math.pi * t / steps)) / 2 for t in range(steps))
    assert float(p.detach()) == pytest.approx(-length, rel=1e-5)


def test_every_round_takes_each_window_once_in_a_new_order():
    p = leaf(0.0)
    loss = Recorder(lambda w: p.sum())
    minimise([p], loss, 6, Descent(9, 0.1, batch=2), generator=seeded())
    rounds = [[*itertools.chain(*loss.steps[i : i + 3])] for i in (0, 3, 6)]
    assert [sorted(r) for r in rounds] == [list(range(6))] * 3
    assert rounds[0] != rounds[1] != rounds[2]


def test_a_round_that_the_batch_does_not_divide_goes_on_in_the_next_batch():
    p = leaf(0.0)
    loss = Recorder(lambda w: p.sum())
    minimise([p], loss, 3, Descent(3, 0.1, batch=2), generator=seeded())
    taken = [*itertools.chain(*loss.steps)]
    assert sorted(taken[:3]) == sorted(taken[3:]) == [0, 1, 2]


def test_a_batch_is_at_most_all_windows():
    p = leaf(0.0)
    loss = Recorder(lambda w: p.sum())
    minimise([p], loss, 3, Descent(2, 0.1, batch=50), generator=seeded())
    assert [sorted(batch) for batch in loss.steps] == [[0, 1, 2]] * 2


def test_eight_windows_spread_over_all_are_measured_at_the_start_and_at_five_moments():
    p = leaf(0.0)
    loss = Recorder(lambda w: p.sum())
    minimise([p], loss, 29, Descent(20, 0.1, batch=3), generator=seeded())
    once = [[0, 4, 8], [12, 16, 20], [24, 28]]
    assert loss.measured == once * 6


def test_the_measured_loss_is_the_mean_of_the_windows_whatever_the_batches():
    p, sizes = leaf(1.0), torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0])
    outcome = minimise([p], lambda w: p.sum() * sizes[w].mean(), 5, Descent(0, 0.1, batch=2), generator=seeded())
    assert outcome.start == outcome.best == pytest.approx(4.0)
    assert outcome.step == 0


def test_no_steps_change_nothing():
    p = leaf(0.3, 0.7)
    minimise([p], lambda w: p.square().sum(), 1, Descent(0, 1.0), generator=seeded())
    assert torch.equal(p, torch.tensor([0.3, 0.7]))


def test_steps_that_lead_upwards_are_undone():
    p = leaf(0.3, 0.7)

    def loss(windows):
        # The value grows with p, its gradient says the opposite.
        value = p.square().sum()
        return 2 * value.detach() - value if torch.is_grad_enabled() else value

    outcome = minimise([p], loss, 1, Descent(10, 0.1), generator=seeded())
    assert torch.equal(p, torch.tensor([0.3, 0.7]))
    assert (outcome.best, outcome.step) == (outcome.start, 0)


def test_the_best_moment_is_kept_where_later_ones_are_worse():
    # The rate is so high that 10 steps in one direction pass the bottom at 1 within the second fifth.
    p = leaf(0.0)

    def loss(windows):
        return -p.sum() if torch.is_grad_enabled() else (p - 0.75).square().sum()

    outcome = minimise([p], loss, 1, Descent(10, 0.2), generator=seeded())
    assert outcome.step == 4
    assert float(p.detach()) == pytest.approx(
        sum(0.1 * (1 + math.cos(math.pi * t / 10)) for t in range(outcome.step)), rel=1e-5
    )
    assert outcome.best == pytest.approx((float(p.detach()) - 0.75) ** 2)


def test_gradients_are_taken_where_they_are_switched_off_around():
    p = leaf(1.0)
    with torch.no_grad():
        outcome = minimise([p], lambda w: p.square().sum(), 1, Descent(5, 0.1), generator=seeded())
    assert outcome.best < outcome.start


def test_the_same_generator_gives_the_same_bits():
    def run(seed):
        p, pull = leaf(1.0, 1.0), torch.randn(7, 2, generator=seeded(5))
        minimise([p], lambda w: (p - pull[w]).square().sum(), 7, Descent(13, 0.05, batch=2), generator=seeded(seed))
        return p.detach()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_a_loss_that_is_not_finite_before_any_step_blames_the_block():
    p = leaf(0.0)
    message = r"the loss must be finite, got nan after step 0 of 4; the block overflows .* work in a wider dtype"
    with pytest.raises(ArithmeticError, match=message):
        minimise([p], lambda w: p.sum() * math.nan, 1, Descent(4, 0.1), generator=seeded())


def test_a_loss_that_ceases_to_be_finite_blames_the_rate():
    p = leaf(0.0)
    message = r"the loss must be finite, got inf after step 2 of 4; lower learning_rate, which is 1"
    with pytest.raises(ArithmeticError, match=message):
        minimise([p], lambda w: p.sum() if p > -1.2 else p.sum() * -math.inf, 1, Descent(4, 1.0), generator=seeded())


# ---- the losses -------------------------------------------------------------------------------------------


@pytest.fixture
def block(generator):
    """A block that is one matrix product, with a token of enormous activations and one of zeros."""
    inputs = torch.randn(3, 5, 4, generator=generator)
    inputs[:, 0] *= 100.0
    weight = torch.randn(4, 4, generator=generator)
    targets = inputs @ weight.T
    targets[1, 3] = 0.0
    return weight, inputs, BlockOutput(lambda weights, windows: inputs[windows] @ weights["w"].T, targets)


@pytest.mark.parametrize("token_weights", ["equal", "plain"])
def test_the_blocks_loss_is_the_sum_over_tokens_of_the_mean_over_channels(token_weights, block, generator):
    weight, inputs, output = block
    changed = weight + 0.1 * torch.randn(4, 4, generator=generator)
    total = 0.0
    for window in (2, 0):
        for x, y in zip(inputs[window].double(), output.targets[window].double(), strict=True):
            importance = 1.0 if token_weights == "plain" else 1.0 / float(y.square().mean())
            total += importance * float((changed.double() @ x - y).square().mean()) / 2
    loss = block_loss(output, lambda: {"w": changed}, token_weights)
    assert float(loss(torch.tensor([2, 0]))) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("token_weights", ["equal", "plain"])
def test_the_original_weights_lose_nothing(token_weights, block):
    weight, _, output = block
    loss = block_loss(output, lambda: {"w": weight}, token_weights)
    assert float(loss(torch.tensor([0, 2]))) == pytest.approx(0.0, abs=1e-6)


def test_a_target_of_zeros_keeps_the_loss_finite(block):
    weight, _, output = block
    assert math.isfinite(float(block_loss(output, lambda: {"w": weight}, "equal")(torch.tensor([1]))))


def test_a_layers_loss_is_its_output_error(correlated, generator):
    sums = StatsAccumulator(12)
    sums.add(correlated(60, 12))
    stats = sums.finish()
    weight, other = torch.randn(2, 8, 12, generator=generator)
    loss = layer_loss(weight, stats, lambda: other)
    assert_close(loss(torch.tensor([0])), output_energy(weight - other, stats.hessian))


def test_orders_are_drawn_on_the_cpu():
    generator = seeded()
    assert cpu_generator(generator) is generator


# ---- going on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 7, 12, 20])
def test_a_descent_that_goes_on_from_a_state_ends_with_the_same_bits(after, generator):
    bottoms = torch.randn(5, 3, generator=generator)

    def descend(**more):
        p, q = leaf(1.0, -2.0, 0.5), leaf(0.1)
        outcome = minimise(
            [p, q], lambda w: ((p * q.exp() - bottoms[w]) ** 2).sum(-1).mean(), 5, Descent(20, 0.05, batch=2),
            generator=seeded(3), units=[1.0, 0.5], **more,
        )  # fmt: skip
        return p.detach(), q.detach(), outcome

    noted = []

    def watch(state):
        tensors = {kind: [tensor.clone() for tensor in own] for kind, own in state.tensors.items()}
        noted.append(State(**vars(state) | {"tensors": tensors}))

    *whole, outcome = descend(watch=watch)
    assert [state.step for state in noted] == list(range(21))
    *resumed, again = descend(state=noted[after])
    assert again == outcome and all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_a_parameter_with_a_unit_takes_the_steps_that_it_takes_counted_in_it():
    p, q = leaf(0.0), leaf(0.0)  # with gradients so small that Adam's epsilon shows
    minimise([p], lambda w: 1e-8 * p.sum(), 1, Descent(10, 0.01), generator=seeded())
    minimise([q], lambda w: 1e-8 * (q / 0.25).sum(), 1, Descent(10, 0.01), generator=seeded(), units=[0.25])
    assert_close(q.detach() / 0.25, p.detach())
    assert -0.04 < float(p.detach()) < -0.01


def test_what_measures_best_is_kept_whatever_the_loss_says():
    p = leaf(0.0)
    outcome = minimise(
        [p], lambda w: p.sum(), 1, Descent(10, 0.01), generator=seeded(), measure=lambda: abs(float(p.detach()) + 0.03)
    )
    assert outcome.step == 4 and outcome.start == pytest.approx(0.03)  # measured after 2, 4, 6, 8 and 10 steps
    assert abs(float(p.detach()) + 0.03) == pytest.approx(outcome.best)
