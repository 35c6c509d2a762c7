"""Outputs that appear whole under their name, or not at all."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lorq.storage.atomic import FULL, TEMPORARY, mend, sha256_of, sync_file, sync_folder, system_error
from lorq.storage.json_files import damaged, json_bytes, name_below, read_json, some_of
from lorq.storage.lock import LOCK, owned, refuse_busy
from lorq.storage.names import EXPORTED
from lorq.storage.out_folder import linked
from lorq.storage.seal import is_gguf, is_marked, is_sealed, seal

_BEFORE = "before"
Seen = Mapping[str, tuple[int, ...]]
"""A place's files as no change leaves them: number in the file system, size, and time of the last change."""


def refuse_used(out: Path, *, overwrite: bool = False) -> Seen:
    """Refuse an output that exists; with ``overwrite`` only what lorq has not exported, and what was changed since.

    A link to where nothing is leads to what will be made. What a link leads to is not replaced.

    Returns:
        What is there, for `appearing`.

    Raises:
        FileExistsError: saying what to do.
    """
    given, out = out, Path(os.path.realpath(out))
    clear_up(out)
    if not (seen := _seen(out)):
        return seen
    if not overwrite:
        raise FileExistsError(f"{given} must be new, it is there; choose another name, or replace it with --overwrite")
    if given.is_symlink():
        raise FileExistsError(linked(given))
    _check_file(out) if out.is_file() else _check_folder(out)
    return seen


def _seen(out: Path) -> Seen:
    """Everything at and below a path but folders that have something in them; nothing where an empty folder is."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return {}
    places = [out] if not out.is_dir() else [p for p in out.rglob("*") if p.is_symlink() or not _is_full(p)]
    stats = {path.relative_to(out).as_posix(): path.lstat() for path in places}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def _is_full(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())


def _refuse_late(out: Path, seen: Seen, kept: str) -> None:
    """Refuse to replace what has come to ``out``, or was changed there, since it was ``seen``."""
    if (now := _seen(out)) != seen:
        others = [out.name if name == "." else name for name in {*now, *seen} if now.get(name) != seen.get(name)]
        raise FileExistsError(
            f"{out} must stay as it was when the work began, {some_of(others)} came there or was changed since and is "
            f"kept; {kept}"
        )


def _check_file(out: Path) -> None:
    """Refuse a file that is not as lorq wrote it."""
    if not is_marked(out):
        what = "another program's" if is_gguf(out) else "no GGUF file"
        raise FileExistsError(
            f"{out} must be a GGUF file of lorq's to be replaced by one, it is {what}; choose another name, or delete "
            "it yourself"
        )
    if not is_sealed(out):
        raise FileExistsError(
            f"{out} must be as lorq wrote it to be replaced, its content is not what its checksum says: it was changed "
            "since, or cut short; choose another name, or delete it yourself"
        )


def _check_folder(out: Path) -> None:
    """Refuse a folder with anything in it that is not as lorq exported it."""
    own: dict[str, Any] = {}
    with suppress(OSError, ValueError, TypeError, AttributeError):  # whatever stands there, it names no files
        own = dict(read_json(out / EXPORTED).get("files", {}))
    there = {path.relative_to(out).as_posix() for path in _files(out)} if out.is_dir() else {""}
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


def sealed_files(folder: Path) -> dict[str, str]:
    """The sha256 (hex) of an exported folder's files, by name, as its mark has them.

    Raises:
        ValueError: if the mark is damaged, or names a place outside the folder.
    """
    own = read_json(folder / EXPORTED).get("files")
    if not isinstance(own, dict) or not all(isinstance(told, str) for told in own.values()):
        raise damaged(folder / EXPORTED, f"files must be an object of texts, got {own!r:.80}")
    return {
        name_below(name, where=folder / EXPORTED): told.rpartition("sha256 ")[2]
        for name, told in own.items()
        if told != "a link"
    }


def _files(folder: Path) -> Iterator[Path]:
    """Everything in and below a folder but folders; links are not followed."""
    return (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _content(path: Path) -> str:
    """What tells an edited file. Large ones too are read whole: a model that was trained on has its size still."""
    return "a link" if path.is_symlink() else f"{path.stat().st_size} bytes, sha256 {sha256_of(path)}"


@contextmanager
def appearing(out: Path, mark: dict[str, Any], seen: Seen | None = None) -> Iterator[Path]:
    """A path to write a file or folder to, which is on the disk and has the name ``out`` in the end, all at once.

    What lies there before is replaced then, so check it first. A GGUF file of lorq's gets its checksum. After an error
    nothing is left; after a kill a folder beside ``out`` is, whose name ends in ``.lorq.tmp``, until the same output is
    made again.

    Args:
        mark: what a folder's `EXPORTED` says, beside the contents of its files; empty when the block begins is fine.
        seen: what `refuse_used` found there; left out, what is there when the block begins.

    Raises:
        FileExistsError: if something else is there in the end; what was made is kept in the folder beside it.
    """
    out = Path(os.path.realpath(out))  # a link stays, and leads to what is made
    work, kept = _work(out), False
    seen = _seen(out) if seen is None else seen
    _refuse_late(out, seen, "choose another name, or begin again")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _gone(work), owned(work):
        try:
            for leftover in work.iterdir():
                if leftover.name != LOCK:
                    _remove(leftover)
            place = work / out.name
            yield place
            if place.is_dir():
                files = {path.relative_to(place).as_posix(): _content(path) for path in _files(place)}
                (place / EXPORTED).write_bytes(json_bytes(mark | {"files": files}))
            else:
                seal(place)
            for path in [place, *place.rglob("*")]:
                sync_folder(path) if path.is_dir() else sync_file(path)
            kept = True
            _refuse_late(out, seen, f"the finished work is in {place}: move it to another name")
            kept = False
            _put(place, out, work / _BEFORE)
        except Exception as error:
            if (said := system_error(error)) is None or not _is_in(work, said):
                raise
            what = f"{out} could not be written ({said.strerror}), nothing of it is kept"
            if said.errno in FULL:
                what = f"no space left in {out.parent} for {out.name}, of which nothing is kept"
            raise OSError(said.errno, f"{what}; {mend(said)}, or choose another disk") from error
        else:
            sync_folder(out.parent)
        finally:
            for path in work.iterdir():
                if path.name != LOCK and not (kept and path == place):
                    _remove(path)


def clear_up(out: Path) -> None:
    """Remove what a run that was killed has left beside an output; what it was to replace comes back.

    Raises:
        FileExistsError: if a run is at work there.
    """
    work = _work(Path(os.path.realpath(out)))
    refuse_busy(work, lambda work: _clear(work, out))
    with suppress(OSError):  # it has what was kept, or is not there
        work.rmdir()


def _clear(work: Path, out: Path) -> None:
    if not os.path.lexists(out) and (work / _BEFORE).exists():
        os.replace(work / _BEFORE, out)
    shutil.rmtree(work)


def _put(place: Path, out: Path, before: Path) -> None:
    """Give what is made its name; a folder that has it is moved away first, and comes back if that fails."""
    if not (os.path.lexists(out) and out.is_dir()):
        os.replace(place, out)
        return
    os.replace(out, before)
    try:
        os.replace(place, out)
    except BaseException:
        os.replace(before, out)
        raise


def _is_in(work: Path, error: OSError) -> bool:
    """Whether an error of the system, which may name no file, is about what is written."""
    return error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(work)


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
