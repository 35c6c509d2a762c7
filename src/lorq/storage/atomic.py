"""Files that are whole or absent, whenever the machine stops."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is whole, or leave what was there.

    Raises:
        OSError: naming the file, such as where the disk is full.
    """
    try:
        rename_synced(write_synced(path, data), path)
    except OSError as error:
        path.with_name(path.name + TEMPORARY).unlink(missing_ok=True)
        raise OSError(error.errno, f"{path} could not be written ({error.strerror}); choose another place") from error


def is_full(error: Exception) -> bool:
    """Whether a disk was full, as Python, safetensors and numpy say it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left" in str(error) or re.search(r"\d+ requested and \d+ written", str(error)) is not None


@contextmanager
def room_for(path: Path, size: int) -> Iterator[None]:
    """Remove the part-written file when writing ``path`` fails, and say what to do when the disk is full."""
    try:
        yield
    except OSError as error:
        path.with_name(path.name + TEMPORARY).unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            error.errno,
            f"no space left in {path.parent}: {path.name} needs {in_words(size)}, {in_words(free)} are free; what is "
            "finished is kept: free some space and continue with --resume",
        ) from error


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
