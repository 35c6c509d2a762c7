"""What the command line shows: bars, summaries, figures."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lorq.checkpoint import INDEX, SourceCheckpoint
from lorq.grouped import why_not_alike
from lorq.kernels import Implementation, implementation, why_not_experts
from lorq.report import Report, read_report
from lorq.safefile import read_json, some_of

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


def layer_implementations(folder: Path) -> dict[str, Implementation]:
    """What multiplies each layer of a folder on this machine: on its accelerator, or the CPU with float32 inputs."""
    formats, place = _config(folder).formats(), _place()
    widths = {layer.name: layer.shape[1] for layer in read_report(folder).layers}
    return {name: implementation(format, widths[name], *place) for name, format in formats.items()}


def expert_lines(folder: Path) -> Iterator[str]:
    """A line for each way in which experts that share factors run on this machine; nothing where there are none."""
    config = _config(folder)
    formats, tiles, place = config.formats(), config.tile_formats(), _place()
    widths = {layer.name: layer.shape[1] for layer in read_report(folder).layers}
    stored = set(SourceCheckpoint.open(folder, index_name=INDEX).names) if tiles else set()
    alike: dict[str | None, list[str]] = {}
    for path in dict.fromkeys(name.partition(".tiles.")[0] for name in tiles):
        tiled = {name.rpartition(".")[2]: format for name, format in tiles.items() if name.startswith(f"{path}.tiles.")}
        why = why_not_alike(path, formats, tiled, stored)
        for name in formats if why is None else ():
            if name.startswith(f"{path}."):
                why = why or why_not_experts(formats[name], widths[name], *place, 0.0)
        alike.setdefault(why, []).append(path)
    for why, paths in alike.items():
        way = "one call for all those of few tokens" if why is None else f"one after the other: {why}"
        yield f"experts of {some_of(paths)}: {way}"


def _config(folder: Path) -> Any:
    from lorq.config import LorqConfig

    return LorqConfig(**read_json(folder / "config.json")["quantization_config"])


def _place() -> tuple[Any, Any]:
    """The device that models run on unasked, and the type of their inputs there."""
    import torch

    from lorq.hf import read_device

    device = read_device("auto")
    return device, torch.float32 if device.type == "cpu" else torch.bfloat16


def implementation_lines(runs: dict[str, Implementation]) -> Iterator[str]:
    """A line for each way in which layers run: how many, by what, and why nothing faster."""
    alike: dict[tuple[str, tuple[tuple[str, str], ...]], list[str]] = {}
    for name, by in runs.items():
        alike.setdefault((by.name, tuple(by.declined.items())), []).append(name)
    for (name, declined), layers in alike.items():
        why = "; ".join(f"not {other}: {reason}" for other, reason in declined)
        which = some_of(layers) if len(alike) > 1 else "all of them"
        yield f"runs on {name}: {len(layers)} layers, {which}" + (f" ({why})" if why else "")


def print_figures(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures))
        return
    table = Table(show_header=False)
    for key, value in figures.items():
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)


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
