"""Files that are whole or absent, whenever the machine stops."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
# What helps against what a system says of a file.
MENDS = {
    **dict.fromkeys(FULL, "free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "check the permissions there"),
    errno.EROFS: "make the place writable",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EIO: "see that the disk works",
}
TEMPORARY = ".lorq.tmp"  # appended to the name of a file being written; only lorq's own files end like this


def sha256_of(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, data: bytes) -> Path:
    """Write ``data`` under the temporary name of ``path``, on the disk on return; the temporary path."""
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def sync_file(path: Path) -> None:
    """Have on the disk what another has written to a file."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def rename_synced(temporary: Path, path: Path) -> None:
    """Give a finished file its name; a crash leaves the old file, the new one or none, never a part."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_whole(path: Path, data: bytes, remedy: str = "choose another place, or {mend}") -> None:
    """Write a file that is whole, or leave what was there.

    Raises:
        OSError: naming the file, and what to do (`writing`).
    """
    with writing(path, len(data), remedy):
        rename_synced(write_synced(path, data), path)


def system_error(error: Exception) -> OSError | None:
    """What the system said of a file, as Python, safetensors and numpy tell it; None where nobody asked the system, or
    the error is told already."""
    if isinstance(error, OSError) and error.errno:
        return error if error.strerror == os.strerror(error.errno) else None
    if code := re.search(r"os error (\d+)", str(error)):
        return OSError(int(code[1]), os.strerror(int(code[1])))
    if "No space left" in str(error) or re.search(r"\d+ requested and \d+ written", str(error)):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def mend(error: OSError) -> str:
    """What makes a disk write again."""
    return MENDS.get(error.errno or 0, MENDS[errno.EIO])


# What is to be done where a file cannot be written, beside what mends the disk.
RESUME = "what is finished is kept: {mend} and continue with --resume"
AGAIN = "{mend} and run the same command again"


@contextmanager
def writing(path: Path, size: int, remedy: str = RESUME) -> Iterator[None]:
    """Remove what is part-written of ``path`` when writing it fails or is stopped, and say what to do about a disk.

    Args:
        size: how much it needs, in bytes; 0 where that is not known.
        remedy: the rest of the message, with ``{mend}`` for what makes the disk write again.

    Raises:
        OSError: with the system's number, naming the file.
    """
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            path.with_name(path.name + TEMPORARY).unlink(missing_ok=True)
        if not isinstance(error, Exception) or (said := system_error(error)) is None:
            raise
        what = f"{path} could not be written ({said.strerror})"
        if said.errno in FULL:
            free = in_words(shutil.disk_usage(path.parent).free)
            needs = f"needs {in_words(size)}" if size else "must grow"
            what = f"no space left in {path.parent}: {path.name} {needs}, {free} are free"
        raise OSError(said.errno, f"{what}; {remedy.format(mend=mend(said))}") from error


def sync_folder(folder: Path) -> None:
    """Make renames and removals in ``folder`` last; only POSIX systems can open a folder for that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def in_words(size: int) -> str:
    """Bytes as people say them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size} bytes"


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to begin what the disk has no room for. ``folder`` may not exist yet.

    Raises:
        OSError: (ENOSPC) if fewer than ``needed_bytes`` are free.
    """
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{folder} needs {in_words(needed_bytes)}, {in_words(free)} are free; "
            "free some space or choose another disk",
        )
