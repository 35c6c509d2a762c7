"""Outputs are whole or absent, and nothing that is not lorq's is lost."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from lorq.storage.appear import appearing, refuse_used
from lorq.storage.atomic import write_whole
from lorq.storage.names import EXPORTED

KILLED = """
import os, signal, sys
from pathlib import Path
from lorq.storage.appear import appearing
with appearing(Path(sys.argv[1]), {}) as place:
    place.mkdir()
    (place / "half.bin").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def write(out, content="one", **mark):
    with appearing(out, mark) as place:
        assert not out.exists() or out.is_dir()
        place.mkdir()
        (place / "below").mkdir()
        (place / "below" / "a.txt").write_text(content)


def test_a_folder_appears_whole_with_a_mark_of_its_files(tmp_path):
    write(tmp_path / "new" / "out", target="dense")
    # sha256 of "one", by coreutils' sha256sum
    one = "3 bytes, sha256 7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    told = json.loads((tmp_path / "new" / "out" / EXPORTED).read_text())
    assert told == {"files": {"below/a.txt": one}, "target": "dense"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_an_error_leaves_nothing_and_what_was_there_stays(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(KeyError), appearing(tmp_path / "out", {}) as place:
        place.write_text("half")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "below" / "a.txt").read_text() == "one"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_kill_leaves_no_half_under_the_name_and_the_next_run_clears_up(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")])
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["out.lorq.tmp"]
    refuse_used(tmp_path / "out")
    write(tmp_path / "out", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["below", EXPORTED]


def test_what_exists_is_replaced_only_when_asked_and_only_lorqs_own(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    refuse_used(out)  # empty
    write(out)
    with pytest.raises(FileExistsError, match=r"out must be new, it is there; .* --overwrite"):
        refuse_used(out)
    refuse_used(out, overwrite=True)
    write(out, "two")
    assert (out / "below" / "a.txt").read_text() == "two"
    (out / "below" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"it has below/thesis\.txt; choose another name"):
        refuse_used(out, overwrite=True)


def test_what_was_edited_since_is_not_replaced(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out)
    (out / "below" / "a.txt").write_text("two")  # as long as it was
    with pytest.raises(
        FileExistsError, match=r"as lorq exported it to be replaced, below/a\.txt changed since; choose"
    ):
        refuse_used(out, overwrite=True)
    (out / "below" / "a.txt").write_text("one")
    refuse_used(out, overwrite=True)
    monkeypatch.setattr("lorq.storage.appear._LARGE", 2)  # of large files the size is told
    write(out)
    (out / "below" / "a.txt").write_text("two")
    refuse_used(out, overwrite=True)
    (out / "below" / "a.txt").write_text("three")
    with pytest.raises(FileExistsError, match=r"below/a\.txt changed since"):
        refuse_used(out, overwrite=True)


@pytest.mark.parametrize("told", ["[1]", '{"files": 3}', "{"])
def test_a_damaged_mark_gives_nothing_up(told, tmp_path):
    write(tmp_path / "out")
    (tmp_path / "out" / EXPORTED).write_text(told)
    with pytest.raises(FileExistsError, match=r"nothing else, to be replaced, it has below/a\.txt"):
        refuse_used(tmp_path / "out", overwrite=True)


def test_a_file_of_lorqs_is_replaced_when_asked(tmp_path):
    out = tmp_path / "model.gguf"
    for content in ("GGUF lorq.version one", "GGUF lorq.version two"):
        refuse_used(out, overwrite=content.endswith("two"))
        with appearing(out, {}) as place:
            place.write_text(content)
    assert out.read_text() == "GGUF lorq.version two"
    for content, what in (("GGUF three", "another program's"), ("lorq.version", "no GGUF file")):
        out.write_text(content)
        with pytest.raises(FileExistsError, match=f"must be a GGUF file of lorq's to be replaced by one, it is {what}"):
            refuse_used(out, overwrite=True)


def test_two_runs_do_not_write_one_output(tmp_path):
    with appearing(tmp_path / "out", {}) as place:
        with pytest.raises(FileExistsError, match=r"another run is writing .*out\.lorq\.tmp"):
            refuse_used(tmp_path / "out")
        place.mkdir()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("4608 requested and 0 written"),  # numpy's tofile
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors'
    ],
    ids=["python", "numpy", "safetensors"],
)
def test_a_full_disk_is_told_with_the_output(error, tmp_path):
    with pytest.raises(
        OSError, match=rf"no space left in {tmp_path} for out, of which nothing is kept; free some"
    ) as told:
        with appearing(tmp_path / "out", {}) as place:
            place.mkdir()
            raise error
    assert told.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_link_stays_and_leads_to_what_is_made(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "there")
    refuse_used(tmp_path / "out")
    write(tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "there" / "below" / "a.txt").read_text() == "one"
    refuse_used(tmp_path / "out", overwrite=True)
    write(tmp_path / "out", "two")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "there" / "below" / "a.txt").read_text() == "two"


def test_a_file_that_cannot_be_written_is_named_and_what_was_there_stays(tmp_path, monkeypatch):
    write_whole(tmp_path / "page.html", b"one")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"page\.html could not be written \(No space left on device\); choose another"):
        write_whole(tmp_path / "page.html", b"two")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"one"]
