"""Whether a folder can be written to."""

import os
from pathlib import Path
from typing import Any

from lorq.storage.atomic import TEMPORARY
from lorq.storage.journal import AGAIN, read_journal
from lorq.storage.json_files import read_json, some_of
from lorq.storage.lock import refuse_busy
from lorq.storage.names import JOURNAL


def check_out(folder: Path, *, overwrite: bool = False, resume: bool = False) -> None:
    """Refuse a folder that another run is writing, and what `check_content` refuses.

    Raises:
        FileExistsError, NotADirectoryError, ValueError: saying what to do.
    """
    refuse_busy(folder)
    check_content(folder, overwrite=overwrite, resume=resume)


def check_content(folder: Path, *, overwrite: bool = False, resume: bool = False, again: bool = False) -> None:
    """Refuse what `lorq.storage.writer.CheckpointWriter.create` refuses by the flags and what is in the folder.

    Raises:
        ValueError: if both flags are given.
        FileExistsError, NotADirectoryError: if the folder has content and no flag allows to use it, or is none, or what
            a link leads to would be replaced.
    """
    if overwrite and resume:
        raise ValueError("--overwrite and --resume exclude each other, got both; give one")
    if os.path.lexists(folder) and not folder.is_dir():
        what = "a file" if folder.exists() else "a link to nothing"
        raise NotADirectoryError(f"{folder} must be a folder, it is {what}; choose another name")
    present = [entry.name for entry in folder.iterdir()] if folder.exists() else []
    present = [name for name in present if not name.endswith(TEMPORARY)]
    state = "unfinished" if JOURNAL in present else "finished" if is_lorq(folder) else "foreign"
    allowed = (resume and state == "unfinished") or (overwrite and state != "foreign")
    allowed |= again and begins_again(folder)
    if present and not allowed:
        raise FileExistsError(_refusal(folder, present, state, resume=resume))
    if present and overwrite and folder.is_symlink():
        raise FileExistsError(linked(folder))


def begins_again(folder: Path) -> bool:
    """Whether a folder holds the unfinished work of a command that never resumes, and begins again instead."""
    try:
        return bool(read_journal(folder / JOURNAL).identity.get(AGAIN))
    except (OSError, ValueError):
        return False


def refuse_source(model: Path, *places: Path) -> None:
    """Refuse to replace or remove a place that the model is, or is in; links are followed.

    Raises:
        FileExistsError: saying what to do.
    """
    for place in places:
        if model.exists() and Path(os.path.realpath(model)).is_relative_to(os.path.realpath(place)):
            raise FileExistsError(
                f"{place} must not be the model's own, the run would replace or remove {model}; choose another name"
            )


def refuse_link(folder: Path) -> None:
    """Refuse a link where a run makes a folder that it removes in the end.

    Raises:
        FileExistsError: saying what to do.
    """
    if folder.is_symlink():
        raise FileExistsError(
            f"{folder} must be no link, the run works there and removes it in the end, it leads to "
            f"{os.path.realpath(folder)}; remove the link, or choose another name for the output"
        )


def linked(out: Path) -> str:
    """Why what a link leads to is not replaced."""
    place = os.path.realpath(out)
    return f"{out} must be no link to be replaced, it leads to {place}; name that instead, or remove the link"


def is_lorq(folder: Path) -> bool:
    """Whether the folder holds a checkpoint that lorq has finished."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return False
    return quant_method(config) == "lorq"


def quant_method(config: dict[str, Any]) -> Any:
    """Who has quantized a model of this config; None for nobody."""
    quantization = config.get("quantization_config")
    return quantization.get("quant_method") if isinstance(quantization, dict) else None


def _refusal(folder: Path, present: list[str], state: str, *, resume: bool) -> str:
    """Why a folder with content is not used as asked, by its state."""
    if state == "finished" and resume:
        return f"{folder} is already complete, nothing to resume; quantize it again with --overwrite"
    what = {
        "unfinished": "it is an unfinished lorq run; continue with --resume, or begin again with --overwrite",
        "finished": "it is a complete lorq checkpoint; replace it with --overwrite",
        "foreign": "lorq did not write it; choose an empty folder (--resume and --overwrite refuse it)",
    }
    return f"{folder} is not empty ({some_of(present)}): {what[state]}"
