"""Settings and arguments, checked against their own annotations."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from torch import Tensor

# Words that more than one function takes.
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Products = Literal["exact", "bytes"]


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be, as in ``Annotated[int, Range(0, 64)]``.

    Attributes:
        low: the least.
        high: the largest.
        minus_one: what -1 stands for, where it stands for a number that is found later.
        words: that may stand in the place of a number.
    """

    low: float | int
    high: float | int = math.inf
    minus_one: str = ""
    words: tuple[str, ...] = ()

    def __contains__(self, value: float | int | str) -> bool:
        if isinstance(value, str):
            return value in self.words
        return self.low <= value <= self.high or (bool(self.minus_one) and value == -1)

    def __str__(self) -> str:
        rule = f"at least {self.low}" if self.high == math.inf else f"between {self.low} and {self.high}"
        rule += f", or -1 for {self.minus_one}" if self.minus_one else ""
        return f"{rule}, or one of {', '.join(self.words)}" if self.words else rule


def check_settings(settings: Any) -> None:
    """Refuse what a dataclass's annotations exclude: other types, words that are not in a `Literal`, numbers outside a
    `Range`. Numbers of numpy and torch become Python's own.

    Raises:
        ValueError: naming the setting, its rule and the value.
    """
    for name, rule in _rules(settings.__class__).items():
        object.__setattr__(settings, name, _checked(name, getattr(settings, name), *rule))


def check_arguments(function: Callable[..., Any], **given: Any) -> list[Any]:
    """Arguments of a function, checked by its annotations as `check_settings` does; returned in the order given."""
    rules = _rules(inspect.unwrap(function))
    return [_checked(name, value, *rules.get(name, (object, None))) for name, value in given.items()]


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is not known, with a ValueError that has the known ones and, if there is one, the closest."""
    known = list(known)
    if name not in known:
        close = get_close_matches(name, known, 1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {name!r}{meant}")


def _checked(name: str, value: Any, kind: type, rule: "Range | tuple[str, ...] | None") -> Any:
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        value = value.item()
    if isinstance(rule, Range) and isinstance(value, str) and value in rule:
        return value
    # True and False are whole numbers to Python.
    if kind in _TYPES and (not isinstance(value, _TYPES[kind][0]) or (kind is not bool and isinstance(value, bool))):
        raise ValueError(f"{name} must be {_TYPES[kind][1]}, got {value!r}")
    if rule is not None and value not in rule:
        known = str(rule) if isinstance(rule, Range) else f"one of {', '.join(rule)}"
        raise ValueError(f"{name} must be {known}, got {value!r}")
    return value


_TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"), int: ((int,), "a whole number (int)"), float: ((int, float), "a number"),
    str: ((str,), "a text"),
}  # fmt: skip


@functools.cache
def _rules(of: Callable[..., Any]) -> dict[str, tuple[type, Range | tuple[str, ...] | None]]:
    """The type of each setting, and what it may be besides."""
    rules: dict[str, tuple[type, Range | tuple[str, ...] | None]] = {}
    for name, hint in get_type_hints(of, include_extras=True).items():
        if get_origin(hint) is Literal:
            rules[name] = object, get_args(hint)
        elif get_origin(hint) is Annotated:
            ranges = [mark for mark in hint.__metadata__ if isinstance(mark, Range)]
            kind = get_args(hint)[0]
            # A number in whose place a word may stand is checked as a number.
            own = get_args(kind)[0] if ranges and ranges[0].words else kind
            rules[name] = own, ranges[0] if ranges else None
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
