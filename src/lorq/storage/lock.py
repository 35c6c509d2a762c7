"""One run at a time writes a folder: a lock that ends with its process, however that ends."""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorq.storage.atomic import TEMPORARY

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)
LOCK = f"run{TEMPORARY}"
_UNKNOWN = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)  # of file systems without locks
_held: set[int] = set()


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Make ``folder`` if need be, and keep other runs out of it meanwhile.

    A folder that is empty at the end is removed again if it was made here. On a file system without locks a warning
    says so, and nothing is kept out.

    Raises:
        FileExistsError: if another run has it.
        OSError: if nothing can be written there.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _locked(folder)
    except FileExistsError:
        raise
    except OSError as error:
        _remove_empty(folder, made)
        raise OSError(
            error.errno, f"{folder} cannot be written to ({error.strerror}); choose another folder, or make it writable"
        ) from error
    _held.add(handle)
    try:
        yield
    finally:
        if handle in _held:  # not a forked child
            _held.discard(handle)
            with suppress(OSError):  # the lock of a process that has ended is nobody's
                (folder / LOCK).unlink(missing_ok=True)  # before it is given up: who gets it sees that it is gone
            os.close(handle)
            _remove_empty(folder, made)


def _remove_empty(folder: Path, made: bool) -> None:
    if made:
        with suppress(OSError):  # it is not empty, or not there
            folder.rmdir()


def remove_temporary(folder: Path, *, lock: bool = True) -> None:
    """Remove what is part-written in a folder, and the lock too, or leave that; who calls this has the folder."""
    for leftover in folder.glob(f"*{TEMPORARY}"):
        if lock or leftover.name != LOCK:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def refuse_busy(folder: Path, clear: Callable[[Path], None] = remove_temporary) -> None:
    """Refuse a folder that another run is writing.

    Args:
        clear: called where a run was killed, whose lock is there still; it removes what is half, and the lock.

    Raises:
        FileExistsError: saying what to do.
    """
    try:
        handle = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return  # nobody's, or not to be read: then it cannot be written either
    try:
        _lock(handle, folder)
        with suppress(OSError):
            clear(folder)
    finally:
        os.close(handle)


def _locked(folder: Path) -> int:
    """A handle of the folder's lock, taken."""
    while True:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle, folder)
            if os.path.exists(folder / LOCK) and os.path.samestat(os.fstat(handle), os.stat(folder / LOCK)):
                return handle
        except OSError:
            os.close(handle)
            raise
        os.close(handle)  # its owner has removed it in between


def _lock(handle: int, folder: Path) -> None:
    if fcntl is None:
        return _log.warning("this system has no locks: nothing keeps a second run out of %s", folder)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileExistsError(
            f"another run is writing {folder}: wait until it ends, stop it, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        _log.warning("the file system of %s has no locks: nothing keeps a second run out of it", folder)


def _let_go() -> None:
    """A forked child has no part in its parent's locks: they end with the parent."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
