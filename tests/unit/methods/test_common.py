"""Presets: a method's settings under other defaults."""

from dataclasses import dataclass, fields, replace

import pytest

from lorq.core.checks import check_settings
from lorq.methods.common import Bits, preset


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
