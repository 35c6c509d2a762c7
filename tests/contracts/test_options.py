"""Options, settings and flags: each means one thing, and each is read by something."""

import ast
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import cyclopts
import house
import pytest

from lorq.adapt import Settings
from lorq.adapt.settings import Tuning
from lorq.bench.commands import bench_app
from lorq.cli import app
from lorq.exports.request import GgufOptions
from lorq.methods import METHODS
from lorq.option_groups import GROUPS, OWN, in_groups
from lorq.pipeline.options import Options
from lorq.pipeline.presets import PRESETS
from lorq.progress import Progress
from lorq.quantizing import quantize_command
from lorq.show import command

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


def test_every_option_of_a_gguf_file_is_read():
    assert not unread(GgufOptions, sources("exports"), "options", "gguf")


def test_every_setting_of_tuning_is_read():
    assert not unread(Tuning, sources("adapt"), "chosen", "settings")


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


# ---- flags ------------------------------------------------------------------------------------------------

# The functions that commands are, by file; those that are commands by `lorq.show.command` have its flags.
COMMANDS = {
    "compensation.py": {"compensate"},
    "evaluation.py": {"evaluate"},
    "exporting.py": {"export"},
    "generation.py": {"generate"},
    "publishing.py": {"push"},
    "quantizing.py": {"quantize"},
    "tuning.py": {"tune"},
    "reporting.py": {"report"},
    "bench/commands.py": {"bench_sketch", "bench_experts", "bench_decode", "bench_adapt", "bench_quantize"},
    "inspection.py": {"inspect"},
    "verifying.py": {"verify"},
    "cli.py": {"adapt", "merge", "demo", "families"},
}


def uses(node: ast.AST) -> Iterator[str]:
    """Names that are read, but for calls and conditions that only look whether a value is one."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")).startswith("check_"):
        return
    if isinstance(node, ast.If) and all(isinstance(line, ast.Raise) for line in node.body):
        return
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield node.id
    for child in ast.iter_child_nodes(node):
        yield from uses(child)


def unused(function: ast.FunctionDef) -> set[str]:
    """Parameters of a function that it only checks, or not even that."""
    names = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    return (
        names - {name for line in function.body for name in uses(line)} - {"method", "preset"}
    )  # which chose the settings


@pytest.mark.parametrize("file", COMMANDS)
def test_every_flag_of_a_command_is_used(file):
    found = {node.name: node for node in ast.walk(house.tree(house.SOURCE / file)) if isinstance(node, ast.FunctionDef)}
    assert COMMANDS[file] <= set(found)
    assert not {name: flags for name in COMMANDS[file] if (flags := unused(found[name]))}


def test_every_command_is_among_them():
    listed = {name.removeprefix("bench_") for names in COMMANDS.values() for name in names}
    registered = {name for group in (app, bench_app) for name in group if not name.startswith("-")} - {"bench"}
    assert registered == listed


def test_a_flag_that_is_only_checked_counts_as_unused():
    (function,) = ast.parse(
        "def f(used, checked, refused, set_, *, ignored):\n"
        "    cpu.check_products(checked)\n    if refused < 1:\n        raise ValueError(refused)\n"
        "    set_ = 1\n    return used\n"
    ).body
    assert unused(function) == {"checked", "refused", "set_", "ignored"}


def test_what_is_given_on_the_command_line_reaches_the_function():
    def measure(
        model: str | Path,
        *sizes: str,
        bits: Sequence[int] = (4,),
        rate: float = 0.5,
        chat: bool = True,
        fast: bool = False,
        settings: Settings = Settings(),  # noqa: B008
        progress: Progress | None = None,
    ) -> dict:
        return {key: value for key, value in locals().items() if key != "progress"} | {"bars": callable(progress)}

    shown = []
    commands = cyclopts.App(result_action="return_value")
    commands.command(command(measure, lambda *result: shown.append(result), json="JSON."), name="measure")
    commands("measure m 1x2 3x4 --bits 2 --bits 3 --rate 2 --no-chat --fast --steps 7 --json".split())
    commands(["measure", "m"])
    own = {"bits": [2, 3], "rate": 2.0, "chat": False, "fast": True, "settings": Settings(steps=7), "bars": True}
    left = {"bits": (4,), "rate": 0.5, "chat": True, "fast": False, "settings": Settings(), "bars": True}
    assert shown == [
        ({"model": "m", "sizes": ("1x2", "3x4"), **own}, True),
        ({"model": "m", "sizes": (), **left}, False),
    ]


# ---- groups of the help ----------------------------------------------------------------------------------

MOST = 15  # options of a group


def flags_of(command):
    """Options of a command, without dashes."""
    return [
        argument.name.removeprefix("--") for argument in command.assemble_argument_collection().filter_by(show=True)
    ]


def quantize_flags(method):
    """Options of quantize with a method."""
    commands = cyclopts.App()
    commands.command(quantize_command(METHODS[method](), Options(), tuple(METHODS), tuple(PRESETS)), name="quantize")
    return flags_of(commands["quantize"])


@pytest.mark.parametrize(
    "command", [name for name in app if not name.startswith("-") and name not in ("quantize", "bench")]
)
def test_every_option_of_a_long_help_has_a_group(command):
    flags = flags_of(app[command])
    if command not in GROUPS:
        assert len(flags) < MOST
        return
    groups = in_groups(command, flags)
    assert OWN not in groups and max(map(len, groups.values())) <= MOST
    assert sorted(flags) == sorted(flag for named in GROUPS[command].values() for flag in named.split())


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_quantize_has_a_group_or_is_the_methods_own(method):
    flags = quantize_flags(method)
    groups = in_groups("quantize", flags)
    assert sorted(flags) == sorted(flag for named in groups.values() for flag in named)
    assert max(map(len, groups.values())) <= MOST
    settings = {field.name.replace("_", "-") for field in fields(METHODS[method])}
    assert set(groups.get(OWN, [])) <= settings


def test_no_group_of_quantize_names_what_is_no_option():
    named = [flag for line in GROUPS["quantize"].values() for flag in line.split()]
    assert set(named) <= {flag for method in METHODS for flag in quantize_flags(method)}
    assert len(named) == len(set(named))
