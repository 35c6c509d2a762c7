"""What travels with the weights: the files beside them that are not weights themselves."""

import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lorq.storage.atomic import TEMPORARY
from lorq.storage.json_files import name_below
from lorq.storage.names import EXPORTED, JOURNAL, MEASURED, REPORT_NAME

# Weights of any library, and what belongs to them; of these lorq reads safetensors alone.
WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz",
    ".npy", ".pkl", ".tflite", ".mlmodel", ".ot", ".pdparams", ".index.json",
)  # fmt: skip
# A large vocabulary takes 35 MB. What is larger is data.
MOST_BYTES = 100_000_000
_MOST_FILES = 100  # of a folder below
_LONGEST_NAME = 255 - len(TEMPORARY)  # which is appended while it is written
_LINK = "a link to a folder"
# Written anew for every folder; and what other programs' quantized models tell of their codes.
_OWN = (
    "config.json", REPORT_NAME, MEASURED, JOURNAL, EXPORTED, "quantize_config.json", "quant_config.json",
    "hf_quant_config.json",
)  # fmt: skip


def find_companions(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Everything that a model's folder holds beside weights, config and lorq's own files: tokenizer, templates, code.

    Hidden files stay behind without a word; so do folders with weights or a config, which are other models. Of a
    folder below, what can be no file (links to folders, empty folders) stays behind alone, other things with all of it.

    Returns:
        Files by their names, with ``/`` where they are in folders below, and why others stay behind, by name.
    """
    taken: dict[str, Path] = {}
    left: dict[str, str] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.name in _OWN or entry.name.endswith((*WEIGHTS, TEMPORARY)):
            continue
        found = list(islice(_everything(entry), _MOST_FILES + 1))
        files = [place for place, why in found if not why]
        if entry.is_dir() and any(file.name == "config.json" or file.name.endswith(WEIGHTS) for file in files):
            continue
        left |= {place.relative_to(folder).as_posix(): why for place, why in found if why}
        why = _why_not(folder, files)
        if why:
            left[entry.name] = why
        else:
            taken |= {file.relative_to(folder).as_posix(): file for file in files}
    return taken, left


def _everything(entry: Path) -> Iterator[tuple[Path, str]]:
    """A file, or all files below a folder, in order; and what there is no file of, with the reason."""
    if not entry.is_dir():
        yield entry, ""
        return
    if entry.is_symlink():
        yield entry, _LINK
        return
    unread: list[OSError] = []
    for place, folders, names in os.walk(entry, onerror=unread.append):
        folders.sort()
        if not folders and not names:
            yield Path(place), "an empty folder"
        yield from ((Path(place, name), _LINK) for name in folders if Path(place, name).is_symlink())
        yield from ((Path(place, name), "") for name in sorted(names))
    yield from ((Path(error.filename), "a folder that cannot be read") for error in unread)


def _why_not(folder: Path, files: list[Path]) -> str:
    """Why files are not taken; nothing where they are."""
    if len(files) > _MOST_FILES:
        return f"more than {_MOST_FILES} files"
    for file in files:
        if not _is_inside(folder, file):
            return f"{file.name} is a link out of the folder, or to nothing"
        if not file.is_file() or not os.access(file, os.R_OK):
            return f"{file.name} is no file, or cannot be read"
        try:
            name_below(file.relative_to(folder).as_posix(), where=folder)
        except ValueError:
            return "its name is not one for every system"
        if len(os.fsencode(file.name)) > _LONGEST_NAME:
            return f"{file.name[:16]}... has a name of more than {_LONGEST_NAME} bytes"
    size = sum(file.stat().st_size for file in files)
    return f"{size} bytes, more than {MOST_BYTES}" if size > MOST_BYTES else ""


def _is_inside(folder: Path, file: Path) -> bool:
    """Whether a file, links followed, is the folder's own, or its repository's where that is in a hub's cache."""
    real, own = (Path(os.path.realpath(path)) for path in (file, folder))  # `resolve` raises on a loop of links
    return real.is_relative_to(own) or (
        own.parent.name == "snapshots" and real.is_relative_to(own.parents[1] / "blobs")
    )


def with_code_of(config: dict[str, Any], files: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config without references to code (``auto_map``) that is not among the files."""

    def is_there(reference: Any) -> bool:
        # "repository--module.Class" is code of another repository, which is found from everywhere.
        names = reference if isinstance(reference, list | tuple) else [reference]
        return all(
            name is None or (isinstance(name, str) and ("--" in name or f"{name.rpartition('.')[0]}.py" in files))
            for name in names
        )

    known = config.get("auto_map")
    if not isinstance(known, dict):
        return config
    kept = {kind: reference for kind, reference in known.items() if is_there(reference)}
    rest = {key: value for key, value in config.items() if key != "auto_map"}
    return rest | {"auto_map": kept} if kept else rest
