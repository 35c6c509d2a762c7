"""Settings, checked against their own annotations."""

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be, as in ``Annotated[int, Range(0, 64)]``.

    Attributes:
        low: the least.
        high: the largest.
        minus_one: what -1 stands for, where it stands for a number that is found later.
    """

    low: float | int
    high: float | int = math.inf
    minus_one: str = ""

    def __contains__(self, value: float | int) -> bool:
        return self.low <= value <= self.high or (bool(self.minus_one) and value == -1)

    def __str__(self) -> str:
        rule = f"at least {self.low}" if self.high == math.inf else f"between {self.low} and {self.high}"
        return f"{rule}, or -1 for {self.minus_one}" if self.minus_one else rule


def check_settings(settings: Any) -> None:
    """Refuse what a dataclass's annotations exclude: other types, words that are not in a `Literal`, numbers outside a
    `Range`.

    Raises:
        ValueError: naming the setting, its rule and the value.
    """
    for name, (kind, rule) in _rules(settings.__class__).items():
        value = getattr(settings, name)
        # True and False are whole numbers to Python.
        if kind in _TYPES and (
            not isinstance(value, _TYPES[kind][0]) or (kind is not bool and isinstance(value, bool))
        ):
            raise ValueError(f"{name} must be {_TYPES[kind][1]}, got {value!r}")
        if rule is not None and value not in rule:
            known = str(rule) if isinstance(rule, Range) else f"one of {', '.join(rule)}"
            raise ValueError(f"{name} must be {known}, got {value!r}")


_TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"), int: ((int,), "a whole number (int)"), float: ((int, float), "a number"),
    str: ((str,), "a text"),
}  # fmt: skip


@functools.cache
def _rules(kind: type) -> dict[str, tuple[type, Range | tuple[str, ...] | None]]:
    """The type of each setting, and what it may be besides."""
    rules: dict[str, tuple[type, Range | tuple[str, ...] | None]] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if get_origin(hint) is Literal:
            rules[name] = object, get_args(hint)
        elif get_origin(hint) is Annotated:
            ranges = [mark for mark in hint.__metadata__ if isinstance(mark, Range)]
            rules[name] = get_args(hint)[0], ranges[0] if ranges else None
        elif isinstance(hint, type):
            rules[name] = hint, None
    return rules


def all_finite(values: "Tensor") -> bool:
    """Whether no value is NaN or infinite; ten times as fast as to look at each, since both show in the extremes.

    Example:
        >>> import torch
        >>> all_finite(torch.tensor([1.0, 2.0])), all_finite(torch.tensor([1.0, torch.nan, 2.0]))
        (True, False)
    """
    return not values.numel() or all(math.isfinite(value) for value in values.detach().aminmax())
