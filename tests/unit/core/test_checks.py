"""Settings against their annotations."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pytest
import torch

from lorq.core.checks import Range, check_arguments, check_settings


@dataclass(frozen=True)
class Settings:
    word: Literal["one", "two"] = "one"
    share: Annotated[float, Range(0, 1)] = 0.5
    count: Annotated[int, Range(2)] = 2
    found: Annotated[int, Range(3, 8, "what fits")] = -1
    free: str = "anything"
    truth: bool = False
    fixed: ClassVar[str] = "nothing to check"

    def __post_init__(self):
        check_settings(self)


class Inherits(Settings):
    pass


@pytest.mark.parametrize(
    "settings",
    [{"word": "two"}, {"share": 0}, {"share": 1.0}, {"count": 10**12}, {"found": 3}, {"found": 8}, {"free": ""}],
    ids=str,
)
@pytest.mark.parametrize("kind", [Settings, Inherits])
def test_the_ends_of_a_range_are_in_it(kind, settings):
    kind(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"word": "three"}, "word must be one of one, two, got 'three'"),
        ({"share": -0.1}, "share must be between 0 and 1, got -0.1"),
        ({"share": 1.1}, "share must be between 0 and 1, got 1.1"),
        ({"share": math.nan}, "share must be between 0 and 1, got nan"),
        ({"count": 1}, "count must be at least 2, got 1"),
        ({"found": 0}, "found must be between 3 and 8, or -1 for what fits, got 0"),
        ({"found": -2}, "found must be between 3 and 8, or -1 for what fits, got -2"),
        ({"count": 3.0}, r"count must be a whole number \(int\), got 3.0"),
        ({"count": "3"}, r"count must be a whole number \(int\), got '3'"),
        ({"count": True}, r"count must be a whole number \(int\), got True"),
        ({"count": np.float64(3)}, r"count must be a whole number \(int\), got 3.0"),
        ({"count": np.bool_(True)}, r"count must be a whole number \(int\), got True"),
        ({"count": np.ones(1, int)}, r"count must be a whole number \(int\), got array\(\[1\]\)"),
        ({"share": None}, "share must be a number, got None"),
        ({"truth": "no"}, "truth must be True or False, got 'no'"),
        ({"truth": 1}, "truth must be True or False, got 1"),
        ({"free": 1}, "free must be a text, got 1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [Settings, Inherits])
def test_what_an_annotation_excludes_is_refused_with_its_rule_and_the_value(kind, settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        kind(**settings)


def test_numbers_of_numpy_and_torch_become_pythons_own():
    given = {"count": np.int64(3), "share": np.float32(0.5), "truth": np.bool_(True), "found": torch.tensor(4)}
    settings = Settings(**given)
    assert {key: (type(value), value) for key, value in vars(settings).items() if key in given} == {
        "count": (int, 3), "share": (float, 0.5), "truth": (bool, True), "found": (int, 4),
    }  # fmt: skip


def test_arguments_are_checked_by_the_annotations_of_their_function():
    def act(path: str | Path, count: Annotated[int, Range(2)] = 2, word: Literal["one", "two"] = "one") -> None: ...

    count, word, path = check_arguments(act, count=np.int64(7), word="two", path=3)
    assert (type(count), count, word, path) == (int, 7, "two", 3)
    with pytest.raises(ValueError, match=r"^count must be at least 2, got 1$"):
        check_arguments(act, count=1)
