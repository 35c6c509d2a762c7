"""8-bit activations against hand-made tokens, half-step bounds and a plain loop."""

import pytest
import torch
from torch.testing import assert_close

from lorq.core.activations import TOP, quantize_activations, range_grid

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def test_the_grid_of_a_range_made_by_hand():
    low, high = torch.tensor([-2.0, 0.0, -51.0, 3.0, -4.0]), torch.tensor([0.55, 2.55, 204.0, 5.1, -1.0])
    scale, zero = range_grid(low, high)
    # Zero belongs to every range: [3, 5.1] counts as [0, 5.1], [-4, -1] as [-4, 0].
    assert_close(scale, torch.tensor([0.01, 0.01, 1.0, 0.02, 4 / 255]))
    assert torch.equal(zero, torch.tensor([200.0, 0.0, 51.0, 0.0, 255.0]))
    assert scale.dtype == zero.dtype == torch.float32


def test_a_range_of_nothing_has_a_grid_on_which_zero_is_exact():
    scale, zero = range_grid(torch.zeros(2), torch.zeros(2))
    assert (scale > 0).all() and torch.equal(zero, torch.zeros(2))
    codes, scale, zero = quantize_activations(torch.zeros(3, 4))
    assert not ((codes - zero) * scale).any()


def test_a_token_made_by_hand():
    codes, scale, zero = quantize_activations(torch.tensor([[-1.0, 0.0, 0.26, 1.55], [0.0, 5.1, 0.011, 0.0]]))
    assert_close(scale, torch.tensor([[0.01], [0.02]]))
    assert torch.equal(zero, torch.tensor([[100.0], [0.0]]))
    assert torch.equal(codes, torch.tensor([[0.0, 100.0, 126.0, 255.0], [0.0, 255.0, 1.0, 0.0]]))


@dtypes
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0], ids=["around zero", "all positive", "all negative"])
def test_each_token_is_kept_to_half_a_step_of_its_own(shift, dtype, generator):
    loudness = torch.logspace(-4, 3, 12)[:, None]
    x = ((torch.randn(12, 40, generator=generator) + shift) * loudness).to(dtype)
    codes, scale, zero = quantize_activations(x)
    assert codes.shape == x.shape and scale.shape == zero.shape == (12, 1)
    assert codes.dtype == scale.dtype == zero.dtype == torch.float32
    for part in (codes, zero):
        assert torch.equal(part, part.round()) and 0 <= part.min() and part.max() <= TOP
    # A whole step at the two ends, where the zero point was rounded; half a step inside.
    error, inside = ((codes - zero) * scale - x.double()).abs(), (codes > 0) & (codes < TOP)
    assert (error <= (1 + 1e-4) * scale).all()
    assert (error <= (0.5 + 1e-4) * scale)[inside].all()
    reach = torch.maximum(x.double().amax(1), torch.zeros(12)) - torch.minimum(x.double().amin(1), torch.zeros(12))
    assert_close(scale[:, 0].double(), reach / TOP)


def test_a_fixed_grid_clamps_what_lies_outside():
    grid = torch.tensor([0.5]), torch.tensor([10], dtype=torch.int32)
    x = torch.tensor([[-100.0, -5.0, -0.3, 0.0, 0.6, 122.5, 123.0]])
    codes, scale, zero = quantize_activations(x, *grid)
    assert torch.equal(codes, torch.tensor([[0.0, 0.0, 9.0, 10.0, 11.0, 255.0, 255.0]]))
    assert torch.equal((codes - zero) * scale, torch.tensor([[-5.0, -5.0, -0.5, 0.0, 0.5, 122.5, 122.5]]))


@pytest.mark.parametrize("fixed", [False, True], ids=["token", "tensor"])
def test_the_formula_in_a_plain_loop(fixed, generator):
    x = torch.randn(5, 9, generator=generator)
    grid = (torch.tensor([0.02]), torch.tensor([130], dtype=torch.int32)) if fixed else (None, None)
    codes, scale, zero = quantize_activations(x, *grid)
    for i, row in enumerate(x.tolist()):
        s = float(scale[0]) if fixed else (max(*row, 0.0) - min(*row, 0.0)) / 255
        z = 130 if fixed else round(-min(*row, 0.0) / s)
        # Python and torch both round half to even; no quotient here is near a half.
        assert codes[i].tolist() == [min(max(round(value / s) + z, 0), 255) for value in row]
        assert float(zero.expand(5, 1)[i]) == z


def test_tokens_and_channels_go_their_own_way_and_inputs_are_left_alone(generator):
    x = torch.randn(2, 3, 16, generator=generator)
    before = x.clone()
    codes, scale, zero = quantize_activations(x)
    assert torch.equal(x, before)
    one = quantize_activations(x[1, 2])
    for whole, alone in zip((codes, scale, zero), one, strict=True):
        assert torch.equal(whole[1, 2], alone)
    order = torch.randperm(16, generator=generator)
    assert torch.equal(quantize_activations(x[..., order])[0], codes[..., order])
    twice = quantize_activations(x * 4)
    assert torch.equal(twice[0], codes) and torch.equal(twice[1], scale * 4) and torch.equal(twice[2], zero)
