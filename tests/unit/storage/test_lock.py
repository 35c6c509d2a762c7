"""One run at a time writes a folder."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lorq.storage import lock
from lorq.storage.lock import LOCK, owned
from lorq.storage.out_folder import check_out
from lorq.storage.writer import CheckpointWriter

HOLDER = """
import sys, time
from pathlib import Path
from lorq.storage.lock import owned
with owned(Path(sys.argv[1])):
    if sys.argv[2:]:
        import os
        forked, told = os.pipe()
        if not os.fork():  # a child that outlives it
            os.close(1)
            os.write(told, b"here")
            time.sleep(60)
        os.read(forked, 4)
    print(os.getpid() if sys.argv[2:] else 0, flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_at_once_whatever_its_flags(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with owned(out):
        writer = CheckpointWriter.create(out, {"a": 1})
        for flags in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(FileExistsError, match=r"another run is writing .*out: wait until it ends, stop it, or"):
                check_out(out, **flags)
        with pytest.raises(FileExistsError, match="another run is writing"), owned(out):
            pass
        assert writer.completed == {} and (out / LOCK).exists()
    check_out(out, resume=True)
    assert not (out / LOCK).exists()


@pytest.mark.parametrize("with_child", [[], ["child"]], ids=["alone", "with a child that outlives it"])
def test_the_lock_of_a_killed_run_is_nobodys(with_child: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", HOLDER, str(out), *with_child]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as holder:
        assert holder.stdout
        holder.stdout.readline()
        with pytest.raises(FileExistsError, match="another run is writing"):
            check_out(out)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        try:
            assert (out / LOCK).exists()
            check_out(out)
            with owned(out):
                pass
        finally:
            if with_child:
                os.killpg(holder.pid, signal.SIGKILL)
    assert list(out.iterdir()) == []


def test_a_folder_that_stays_empty_is_removed_if_it_was_made_here(tmp_path: Path) -> None:
    for made in (False, True):
        if not made:
            (tmp_path / "out").mkdir()
        with pytest.raises(ValueError, match="no"), owned(tmp_path / "out"):
            raise ValueError("no")
        assert (tmp_path / "out").exists() is not made
        if not made:
            (tmp_path / "out").rmdir()


def test_a_file_system_without_locks_is_said_and_used(tmp_path: Path, monkeypatch, caplog) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with owned(tmp_path / "out"), owned(tmp_path / "out"):
        pass
    assert "has no locks: nothing keeps a second run out of it" in caplog.text
    caplog.clear()
    monkeypatch.setattr(lock, "fcntl", None)
    with owned(tmp_path / "out"):
        pass
    assert "this system has no locks" in caplog.text


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "file").touch()
    monkeypatch.setattr(lock.os, "open", refuse)
    with pytest.raises(OSError, match=r"out cannot be written to \(Permission denied\); choose another folder"):
        owned(tmp_path / "out").__enter__()
    assert not (tmp_path / "out").exists()
    with pytest.raises(OSError, match=r"below cannot be written to \(Not a directory\)"):
        owned(tmp_path / "file" / "below").__enter__()
