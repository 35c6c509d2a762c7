"""What `lorq evaluate` has found of a folder, kept in its report."""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorq.storage.atomic import rename_synced, write_synced
from lorq.storage.names import REPORT_NAME
from lorq.storage.report import read_report, weights_of

_log = logging.getLogger(__name__)


def record(folder: Path, text: Mapping[str, Any], tasks: Mapping[str, Any]) -> None:
    """Keep figures in the report of a finished folder, in the place of earlier ones on the same text, or task.

    A folder that cannot be written to, or is a hub's, stays as it is, with a line in the log.

    Args:
        text: of a text by their names, ``text`` among them; those that are None leave what is known on the same
            windows.
        tasks: the metrics of tasks, by name.
    """
    path = folder / REPORT_NAME
    if path.is_symlink() or not os.access(folder, os.W_OK):
        _log.info("the figures are not kept in %s, which is a hub's or cannot be written to", path)
        return
    report = read_report(folder)
    known = report.figures
    before = known.get("texts", {}).get(text["text"], {})
    alike = all(before.get(key) == text[key] for key in ("window", "windows", "start_token"))
    found = {key: value for key, value in text.items() if value is not None}
    new = {
        "texts": known.get("texts", {}) | {text["text"]: (before if alike else {}) | found},
        "tasks": known.get("tasks", {}) | dict(tasks),
    }
    data = replace(report, measured=new | {"weights": weights_of(report.checksums)}).to_bytes()
    rename_synced(write_synced(path, data), path)
