"""Options and settings: each means one thing, and each is read by something."""

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import house
import pytest

from lorq.adapt import Settings
from lorq.methods import METHODS
from lorq.pipeline.options import Options

# Functions that only look whether a value is one.
VALIDATION = ("__post_init__", "read_options")


def reads(nodes: Iterable[ast.AST], owners: tuple[str, ...]) -> Iterator[str]:
    """Names of attributes that are read from what is called one of `owners`, but for validation."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and node.name in VALIDATION:
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            if getattr(owner, "id", getattr(owner, "attr", None)) in owners:
                yield node.attr
        yield from reads(ast.iter_child_nodes(node), owners)


def unread(settings: type, files: Iterable[Path], *owners: str) -> set[str]:
    """Fields of a dataclass that nothing reads."""
    names = {field.name for field in fields(settings)}
    return names - {name for file in files for name in reads([house.tree(file)], owners)}


def sources(*rooms: str) -> list[Path]:
    return [file for room in rooms for file in (house.SOURCE / room).rglob("*.py")]


@pytest.mark.parametrize("name", METHODS)
def test_no_setting_of_a_method_is_an_option_of_the_run(name):
    # One flag, one key: `--NAME` would set the method's and leave the run's as it is.
    assert not {field.name for field in fields(METHODS[name])} & {field.name for field in fields(Options)}


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_method_is_read(name):
    homes = {sys.modules[kind.__module__].__file__ for kind in METHODS[name].__mro__[:-1]}
    assert not unread(METHODS[name], map(Path, homes), "self", "method")


def test_every_option_of_a_run_is_read():
    assert not unread(Options, sources("pipeline"), "options", "chosen")


def test_every_setting_of_training_is_read():
    assert not unread(Settings, sources("adapt"), "chosen")


def test_a_setting_that_is_only_checked_counts_as_unread(tmp_path):
    @dataclass(frozen=True)
    class Artificial:
        used: int = 0
        checked: int = 0
        written: int = 0
        others: int = 0

    file = tmp_path / "artificial.py"
    file.write_text(
        "class Artificial:\n"
        "    def __post_init__(self):\n        check(self.checked)\n"
        "    def solve(self, stats):\n        self.written = stats.others\n        return self.used\n"
    )
    assert unread(Artificial, [file], "self") == {"checked", "written", "others"}
