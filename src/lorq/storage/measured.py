"""What was measured of a folder: how long it took to make, and how good it is.

It lies beside the report, in a file of its own, since it is never the same twice: the same run gives the same bytes in
all other files. A folder without it is whole.
"""

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lorq.storage.atomic import write_whole
from lorq.storage.json_files import damaged, is_kind, json_bytes, read_json
from lorq.storage.names import MEASURED

_log = logging.getLogger(__name__)
# What two evaluations must share for their figures to be comparable.
PROTOCOL = ("reference", "text", "window", "windows", "start_token", "adapter", "dtype", "products")

# Numbers of an evaluation, or None: of a reference, and standard errors, which one window has none of and older files
# do not have.
_FIGURES = ("perplexity", "kl_mean", "top1", "perplexity_stderr", "kl_stderr", "ratio_stderr")


@dataclass(frozen=True)
class Measured:
    """Measurements of one folder.

    Attributes:
        seconds, stages: wall time of the run that made it, and of its calibration and solving; of a resumed run, what
            came after the interruption. 0 and empty where it is not known.
        memory, foretold: of that run's process at its peak, in bytes, and what a forecast said; 0 where nobody knows.
        evaluations: what `lorq.evaluate` found, the last one last, one for each `PROTOCOL`.
    """

    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    evaluations: tuple[dict[str, Any], ...] = ()
    memory: int = 0
    foretold: int = 0


def read_measured(folder: Path) -> Measured:
    """The measurements of a lorq folder; empty ones where it has none.

    Raises:
        ValueError: if the file is damaged.
    """
    path = folder / MEASURED
    if not path.is_file():
        return Measured()
    return parse_measured(read_json(path), where=path)


def parse_measured(content: dict[str, Any], *, where: Path) -> Measured:
    """What a file says; a ValueError that names ``where`` if it is damaged."""
    rule = "it must hold seconds, stages (numbers by name) and evaluations (figures by name), or be deleted"
    wrong = damaged(where, rule)
    stages, evaluations = content.get("stages", {}), content.get("evaluations", [])
    if not isinstance(stages, dict) or not isinstance(evaluations, list):
        raise wrong
    if not all(isinstance(entry, dict) and {"perplexity", *PROTOCOL} <= set(entry) for entry in evaluations):
        raise wrong
    if not all(isinstance(entry.get("tasks", {}), dict) for entry in evaluations):
        raise wrong
    tasks = [metrics for entry in evaluations for metrics in entry.get("tasks", {}).values()]
    if not all(isinstance(metrics, dict) for metrics in tasks):
        raise wrong
    figures = [entry.get(key) for entry in evaluations for key in _FIGURES]
    memory = [content.get(key, 0) for key in ("memory", "foretold")]
    numbers = [
        content.get("seconds", 0.0),
        *memory,
        *stages.values(),
        *(figure for figure in figures if figure is not None),
    ]
    numbers += [entry["perplexity"] for entry in evaluations] + [value for one in tasks for value in one.values()]
    if not all(is_kind(number, float) for number in numbers):
        raise wrong
    return Measured(content.get("seconds", 0.0), stages, tuple(evaluations), *memory)


def add_times(folder: Path, seconds: float, stages: dict[str, float], *, memory: int = 0, foretold: int = 0) -> None:
    """Keep how long the run took that has just made a folder, and its memory at its peak; where that cannot be written,
    a warning says so."""
    try:
        _write(folder, Measured(seconds, stages, memory=memory, foretold=foretold))
    except OSError as error:  # the folder is whole without
        _log.warning("how long the run took is not kept: %s", error.strerror)


def add_evaluation(folder: Path, entry: dict[str, Any]) -> None:
    """Keep what an evaluation found, in place of an earlier one by the same `PROTOCOL`, whose other tasks stay."""
    known = read_measured(folder)
    same = [old for old in known.evaluations if all(old[key] == entry[key] for key in PROTOCOL)]
    others = [old for old in known.evaluations if old not in same]
    tasks = {task: metrics for one in (*same, entry) for task, metrics in one.get("tasks", {}).items()}
    _write(folder, replace(known, evaluations=(*others, entry | ({"tasks": tasks} if tasks else {}))))


def _write(folder: Path, measured: Measured) -> None:
    write_whole(folder / MEASURED, json_bytes(asdict(measured)), "{mend}; the folder is whole without it")
