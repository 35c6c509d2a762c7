"""What methods share: presets, a method's settings under other defaults, and the activation scale."""

from dataclasses import dataclass, fields, replace

import pytest
import torch

from lorq.core.checks import check_settings
from lorq.core.stats import InputStats
from lorq.methods.common import Bits, activation_scale, preset


@dataclass(frozen=True)
class Parent:
    bits: Bits = 4
    rounds: int = 1

    def __post_init__(self):
        check_settings(self)


def test_a_preset_has_its_own_defaults_and_its_parents_rules():
    @preset
    class Child(Parent):
        """Fewer bits."""

        bits = 2

    assert Child() == replace(Child(), bits=2) != Parent(bits=2)
    assert [(field.name, field.default) for field in fields(Child)] == [("bits", 2), ("rounds", 1)]
    with pytest.raises(ValueError, match="bits must be between 2 and 8, got 9"):
        Child(bits=9)


def test_a_preset_of_what_is_no_setting_is_refused():
    with pytest.raises(TypeError, match=r"a preset must name settings of <class .*Parent'>, got bit, method"):

        @preset
        class Child(Parent):
            bit = 2

            def method(self):
                pass


def scale(mean_abs, exponent):
    return activation_scale(InputStats(torch.eye(len(mean_abs)), mean_abs, 1), exponent)


@pytest.mark.parametrize("exponent", [1.0, 2.4, 2.5, 8.0])
@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e-6, 1e4])
def test_the_activation_scale_is_the_power_of_the_means_in_any_unit(exponent, unit):
    # As wide as those of SmolLM2's first block, plain tokens: 1.8e-4 to 0.5. The authors' code lifts all below 0.0215
    # in float16 models, where exponent 2.4 comes to 1e-4.
    means = torch.logspace(-3.74, -0.3, 9, dtype=torch.float64)
    expected = (means / (means[0] * means[-1]).sqrt()) ** exponent
    torch.testing.assert_close(scale((unit * means).float(), exponent).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("exponent", [2.5, 8.0])
@pytest.mark.parametrize("unit", [1.0, 1e-6])
def test_channels_that_are_never_active_have_a_scale_all_the_same(exponent, unit):
    found = scale(unit * torch.tensor([0.0, 1.0, 0.5]), exponent)
    torch.testing.assert_close(found[1] / found[0], torch.tensor(10.0 ** (5 * exponent)), rtol=1e-4, atol=0)
    torch.testing.assert_close(found[2] / found[1], torch.tensor(0.5**exponent))
    assert torch.equal(scale(torch.zeros(4), exponent), torch.ones(4))
