"""Functions as commands, and what these show: bars, summaries, figures."""

import inspect
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lorq.storage.report import Report

# In a pipe there is no width to fit into, and cut names are of no use to anyone.
console = Console(width=None if sys.stdout.isatty() else 160)
notes = Console(stderr=True)
# After so long a user of a log file wants to see that something moves.
_SILENCE_SECONDS = 20


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar per stage on standard error, so that standard output stays clean; lines where that is a file."""
    quiet()
    bars: dict[str, Any] = {}
    if not notes.is_terminal:
        yield _ProgressLines()
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=notes) as progress:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total)
            progress.update(bars[stage], completed=done, total=total)

        yield show


class _ProgressLines:
    """A line for every tenth of a stage, and for every step of a slow one."""

    def __init__(self) -> None:
        self.printed = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        tenth = done == total or 10 * done // total != 10 * (done - 1) // total
        if tenth or time.monotonic() - self.printed > _SILENCE_SECONDS:
            notes.print(f"{stage}: {done} of {total}", highlight=False)
            self.printed = time.monotonic()


def quiet() -> None:
    """Keep transformers' own bars and notices out of ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def print_summary(report: Report, out: Path | None) -> None:
    ranks = [layer.rank for layer in report.layers]
    size = f"{report.bytes / 1e6:.1f} MB"
    table = Table(show_header=False)
    table.add_row("method", report.method)
    table.add_row("layers", str(len(report.layers)))
    table.add_row("bits per weight", f"{report.bits_per_weight:.3f}" + ("" if out else " at most"))
    table.add_row("weights on disk", size + ("" if out else " at most"))
    if any(ranks):  # of a low-rank part; methods without one have nothing to tell
        table.add_row("rank", f"mean {sum(ranks) / len(ranks):.1f}, {min(ranks)} to {max(ranks)}")
    if out:
        before = sum(layer.error_before for layer in report.layers) / len(report.layers)
        after = sum(layer.error_after for layer in report.layers) / len(report.layers)
        table.add_row("mean output error", f"{after:.4f} (rounding to nearest: {before:.4f})")
        table.add_row("folder", str(out))
    if report.notes:
        table.add_row("with a note", f"{len(report.notes)}, see lorq inspect" if out else str(len(report.notes)))
    if report.seconds:
        parts = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.stages.items())
        table.add_row("seconds", f"{report.seconds:.1f}" + (f" ({parts})" if parts else ""))
    console.print(table)


def command(function: Callable[..., Any], show: Callable[..., None], json: str = "") -> Callable[..., None]:
    """A function as a command: its signature is the flags, its docstring their help, and its result is shown.

    A parameter ``progress`` of it is no flag, it gets bars. ``show`` is called with the result and, if there is
    ``--json``, with whether that was given; ``json`` is what that prints; left out, there is no such flag.
    """
    signature = inspect.signature(function)
    parameters = [_as_flag(parameter) for name, parameter in signature.parameters.items() if name != "progress"]
    if json:
        flag = Annotated[bool, Parameter(name="--json", negative="", help=json)]
        parameters.append(inspect.Parameter("json_", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=flag))

    def run(*arguments: Any, json_: bool = False, **options: Any) -> None:
        with progress_bars() if "progress" in signature.parameters else nullcontext() as progress:
            result = function(*arguments, **options, **({} if progress is None else {"progress": progress}))
        show(result, json_) if json else show(result)

    run.__doc__ = function.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _as_flag(parameter: inspect.Parameter) -> inspect.Parameter:
    """Settings are flags like all others, and what is off unless asked for has no flag that turns it off."""
    if is_dataclass(parameter.annotation):
        return parameter.replace(annotation=Annotated[parameter.annotation, Parameter(name="*")])
    if parameter.default is False:
        return parameter.replace(annotation=Annotated[bool, Parameter(negative="")])
    return parameter


def print_pieces(pieces: Iterable[str]) -> None:
    """Text, each piece when it comes, and the end of the line."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def print_figures(figures: dict[str, Any], as_json: bool) -> None:
    """A table of what there is, or one JSON object."""
    if as_json:
        print(json.dumps(figures))
        return
    table = Table(show_header=False)
    for key, value in figures.items():
        if value is not None:
            table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)


def print_each(rows: Iterable[dict[str, Any]], as_json: bool) -> None:
    """`print_figures` of each row when it comes."""
    for row in rows:
        print_figures(row, as_json)


def print_rows(rows: Iterable[dict[str, Any]], as_json: bool) -> None:
    """Rows with the same keys as one table, or each as a line of JSON when it comes."""
    table: Table | None = None
    for row in rows:
        if as_json:
            print(json.dumps(row), flush=True)
            continue
        # With spaces, names break into lines where there is no room for them.
        table = table or Table(*(key.replace("_", " ") for key in row))
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    if table:
        console.print(table)
