"""How far work is: bars on a terminal, lines in a file; and the consoles that all is printed on."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from lorq.progress import Progress, duration


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # as `print` does, where rich would exit with 1


# What is printed are names and paths of the user, which are no markup and no emoji, whatever brackets and colons they
# have. In a pipe there is no width to fit into, and cut names are of no use to anyone.
console = _Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False, highlight=False)
notes = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)
# A log file has a line of a stage so often, not more.
_LINE_SECONDS = 10
# Steps of a stage that are more than so many are no number to read, but a share.
_COUNTED = 10_000


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A bar per stage on standard error, so that standard output stays clean; lines where that is a file."""
    quiet()
    if not notes.is_terminal:
        yield _ProgressLines()
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), _HowFar(), TimeElapsedColumn(), _TimeLeft(),
    )  # fmt: skip
    bars: dict[str, Any] = {}
    with Bars(*columns, console=notes) as shown:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = shown.add_task(stage, total=total)
            shown.update(bars[stage], completed=done, total=total)

        yield show


class _HowFar(MofNCompleteColumn):
    """Steps, or their share where they are too many to read."""

    def render(self, task: Task) -> Text:
        total = int(task.total or 0)
        return Text(_share(int(task.completed), total)) if total > _COUNTED else super().render(task)


class _TimeLeft(ProgressColumn):
    """By what a stage took so far; rich's own column knows nothing of steps that take minutes."""

    def render(self, task: Task) -> Text:
        return Text(_left(task.elapsed or 0.0, int(task.completed), int(task.total or 0)))


def _left(seconds: float, done: int, total: int) -> str:
    return f"{duration(seconds / done * (total - done))} left" if 0 < done < total else ""


def _share(done: int, total: int) -> str:
    return f"{100 * done // total} %"


def _steps(done: int, total: int) -> str:
    return f"{done} of {total}" if 1 < total <= _COUNTED else ""


class _ProgressLines:
    """A line where a stage begins and ends, and now and then between: how far it is, and what time is left."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}
        self.printed = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        first = stage not in self.began
        seconds = now - self.began.setdefault(stage, now)
        steps = _steps(done, total)
        if done >= total:
            self._print(f"{stage}: {f'{steps}, ' if steps else ''}done in {duration(seconds)}", now)
        elif done and now - self.printed >= _LINE_SECONDS:
            far = [steps, _share(done, total), _left(seconds, done, total)]
            self._print(f"{stage}: {', '.join(filter(None, far))}", now)
        elif first:
            self._print(f"{stage}: {steps}" if steps else stage, now)

    def _print(self, line: str, now: float) -> None:
        notes.print(line)
        self.printed = now


class Notes(logging.Handler):
    """Log lines on standard error, above the bars where there are any."""

    def emit(self, record: logging.LogRecord) -> None:
        notes.print(self.format(record))


def quiet() -> None:
    """Keep transformers' own bars and notices out of ours, without importing it for that."""
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # and transformers, when it is imported, follows
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()


@contextmanager
def download_bars(what: str) -> Iterator[None]:
    """The hub's own bars on a terminal, and a line where a download begins and ends."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    lines = _ProgressLines()
    lines(f"download {what}", 0, 1)
    enable_progress_bars()
    try:
        yield
    finally:
        disable_progress_bars()
    lines(f"download {what}", 1, 1)
