"""Outputs that appear whole under their name, or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lorq.storage.atomic import TEMPORARY, is_full, sha256_of, sync_file, sync_folder
from lorq.storage.json_files import json_bytes, read_json, some_of
from lorq.storage.lock import LOCK, owned, refuse_busy
from lorq.storage.names import EXPORTED, GGUF_MARK

_MARKED = 4096  # bytes of a GGUF file, of which lorq's mark is among the first keys
_LARGE = 64 << 20  # bytes


def refuse_used(out: Path, *, overwrite: bool = False) -> None:
    """Refuse an output that exists; with ``overwrite`` only what lorq has not exported, and what was changed since.

    Raises:
        FileExistsError: saying what to do.
    """
    out = Path(os.path.realpath(out))
    refuse_busy(_work(out))
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{out} must be new, it is there; choose another name, or replace it with --overwrite")
    if out.is_file():
        with out.open("rb") as file:
            begin = file.read(_MARKED)
        if begin[:4] != b"GGUF" or GGUF_MARK.encode() not in begin:
            what = "another program's" if begin[:4] == b"GGUF" else "no GGUF file"
            raise FileExistsError(
                f"{out} must be a GGUF file of lorq's to be replaced by one, it is {what}; choose another name, or "
                "delete it yourself"
            )
        return
    own: dict[str, Any] = {}
    with suppress(OSError, ValueError, TypeError, AttributeError):  # whatever stands there, it names no files
        own = dict(read_json(out / EXPORTED).get("files", {}))
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()} if out.is_dir() else {""}
    if foreign := there - {*own, EXPORTED}:
        raise FileExistsError(
            f"{out} must be a file, or a folder that lorq exported and nothing else, to be replaced, it has "
            f"{some_of(foreign)}; choose another name, or delete it yourself"
        )
    if changed := [name for name in there & own.keys() if _content(out / name) != own[name]]:
        raise FileExistsError(
            f"{out} must be as lorq exported it to be replaced, {some_of(changed)} changed since; choose another name, "
            "or delete it yourself"
        )


def _content(path: Path) -> str:
    """What tells an edited file: its size, and its checksum unless it is so large that nobody edits it by hand."""
    size = path.stat().st_size
    return f"{size} bytes" if size > _LARGE else f"{size} bytes, sha256 {sha256_of(path)}"


@contextmanager
def appearing(out: Path, mark: dict[str, Any]) -> Iterator[Path]:
    """A path to write a file or folder to, which is on the disk and has the name ``out`` in the end, all at once.

    What lies there before is replaced then, so check it first. After an error nothing is left; after a kill a folder
    beside ``out`` is, whose name ends in ``.lorq.tmp``, until the same output is made again.

    Args:
        mark: what a folder's `EXPORTED` says, beside the contents of its files; empty when the block begins is fine.
    """
    out = Path(os.path.realpath(out))  # a link stays, and leads to what is made
    work = _work(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _gone(work), owned(work):
        try:
            for leftover in work.iterdir():
                if leftover.name != LOCK:
                    _remove(leftover)
            place = work / out.name
            yield place
            if place.is_dir():
                files = {p.relative_to(place).as_posix(): _content(p) for p in place.rglob("*") if not p.is_dir()}
                (place / EXPORTED).write_bytes(json_bytes(mark | {"files": files}))
            for path in [place, *place.rglob("*")]:
                sync_folder(path) if path.is_dir() else sync_file(path)
            if os.path.lexists(out) and out.is_dir():
                os.replace(out, work / "before")
            os.replace(place, out)
            sync_folder(out.parent)
        except Exception as error:
            if not is_full(error):
                raise
            raise OSError(
                errno.ENOSPC,
                f"no space left in {out.parent} for {out.name}, of which nothing is kept; free some space, or choose "
                "another disk",
            ) from error
        finally:
            for path in work.iterdir():
                if path.name != LOCK:
                    _remove(path)


@contextmanager
def _gone(work: Path) -> Iterator[None]:
    """Remove a folder that is empty in the end, also one that was there before."""
    try:
        yield
    finally:
        with suppress(OSError):
            work.rmdir()


def _work(out: Path) -> Path:
    return out.with_name(f"{out.name}{TEMPORARY}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
