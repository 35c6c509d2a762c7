"""Outputs are whole or absent, and nothing that is not lorq's is lost."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from lorq.storage.appear import appearing, refuse_used
from lorq.storage.atomic import write_whole
from lorq.storage.names import EXPORTED, GGUF_SEAL
from lorq.storage.seal import mark

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


def test_what_was_edited_since_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    write(out)
    (out / "below" / "a.txt").write_text("two")  # as long as it was
    with pytest.raises(
        FileExistsError, match=r"as lorq exported it to be replaced, below/a\.txt changed since; choose"
    ):
        refuse_used(out, overwrite=True)
    (out / "below" / "a.txt").write_text("one")
    refuse_used(out, overwrite=True)


def test_a_large_file_that_was_trained_on_is_not_replaced(tmp_path):
    with appearing(tmp_path / "out", {}) as place:
        place.mkdir()
        with (place / "model.safetensors").open("wb") as file:
            file.truncate(65 << 20)
    refuse_used(tmp_path / "out", overwrite=True)
    with (tmp_path / "out" / "model.safetensors").open("rb+") as file:
        file.write(b"other weights")
    with pytest.raises(FileExistsError, match=r"model\.safetensors changed since"):
        refuse_used(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("told", ["[1]", '{"files": 3}', "{"])
def test_a_damaged_mark_gives_nothing_up(told, tmp_path):
    write(tmp_path / "out")
    (tmp_path / "out" / EXPORTED).write_text(told)
    with pytest.raises(FileExistsError, match=r"nothing else, to be replaced, it has below/a\.txt"):
        refuse_used(tmp_path / "out", overwrite=True)


def write_gguf(path, values):
    """A GGUF file as the exports write it."""
    writer = GGUFWriter(path, "llama")
    mark(writer)
    writer.add_string("general.name", "one")
    writer.add_tensor("weight", np.array(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_of_lorqs_is_replaced_when_asked(tmp_path):
    out = tmp_path / "model.gguf"
    for number in (1, 2):
        refuse_used(out, overwrite=number == 2)
        with appearing(out, {}) as place:
            write_gguf(place, [number] * 5000)
    assert GGUFReader(out).tensors[0].data.tolist() == [2] * 5000
    # sha256 of the file before it had one, by hand
    told = GGUFReader(out).fields[GGUF_SEAL].contents()
    assert hashlib.sha256(out.read_bytes().replace(told.encode(), b" " * 64)).hexdigest() == told
    for content, what in (("GGUF three", "another program's"), ("lorq.version", "no GGUF file")):
        out.write_text(content)
        with pytest.raises(FileExistsError, match=f"must be a GGUF file of lorq's to be replaced by one, it is {what}"):
            refuse_used(out, overwrite=True)


def edit_name(out):
    GGUFReader(out, "r+").fields["general.name"].parts[-1][0] = ord("O")


def edit_tensor(out):
    GGUFReader(out, "r+").tensors[0].data[-1] = 3


def edit_checksum(out):
    GGUFReader(out, "r+").fields[GGUF_SEAL].parts[-1][0] = ord("x")


def cut(out):
    os.truncate(out, out.stat().st_size - 1)


def copy_without_checksum(out):
    """As lorq wrote files when these had none."""
    out.write_bytes(out.read_bytes().replace(GGUF_SEAL.encode(), b"lorq.sha255"))


@pytest.mark.parametrize("edit", [edit_name, edit_tensor, edit_checksum, cut, copy_without_checksum])
def test_a_gguf_file_that_was_changed_since_is_not_replaced(edit, tmp_path):
    out = tmp_path / "model.gguf"
    with appearing(out, {}) as place:
        write_gguf(place, [1] * 5000)
    refuse_used(out, overwrite=True)
    edit(out)
    with pytest.raises(
        FileExistsError, match=r"as lorq wrote it to be replaced, .* changed since, or cut short; choose"
    ):
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
def test_a_link_to_nothing_stays_and_leads_to_what_is_made(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "there")
    refuse_used(tmp_path / "out")
    write(tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "there" / "below" / "a.txt").read_text() == "one"


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_what_a_link_leads_to_is_not_replaced(tmp_path):
    write(tmp_path / "there")
    with appearing(tmp_path / "there.gguf", {}) as place:
        write_gguf(place, [1])
    for suffix in ("", ".gguf"):
        out, there = tmp_path / f"out{suffix}", tmp_path / f"there{suffix}"
        out.symlink_to(there)
        with pytest.raises(
            FileExistsError, match=rf"out{suffix} must be no link to be replaced, it leads to {there}; name that"
        ):
            refuse_used(out, overwrite=True)
        refuse_used(there, overwrite=True)


@pytest.mark.skipif(os.name != "posix", reason="links")
@pytest.mark.parametrize("name", ["below/a.txt", "below/b.txt", "more"], ids=["in its place", "beside it", "folder"])
def test_links_in_a_folder_are_not_lorqs_and_what_they_lead_to_stays(name, tmp_path):
    out, there = tmp_path / "out", tmp_path / "disk"
    write(out)
    there.mkdir()
    (there / "a.txt").write_text("one")  # the same content
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(there if name == "more" else there / "a.txt")
    with pytest.raises(FileExistsError, match=f"{name.replace('.', '[.]')}( changed since)?; choose another name"):
        refuse_used(out, overwrite=True)
    write(out, "two")  # as after a check
    assert (there / "a.txt").read_text() == "one" and (out / "below" / "a.txt").read_text() == "two"


def test_a_file_that_cannot_be_written_is_named_and_what_was_there_stays(tmp_path, monkeypatch):
    write_whole(tmp_path / "page.html", b"one")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"page\.html needs 3 bytes, .* are free; choose another place, or free some"):
        write_whole(tmp_path / "page.html", b"two")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"one"]


@pytest.mark.parametrize("kind", ["file", "folder", "late"])
def test_what_comes_to_the_output_meanwhile_is_kept_and_so_is_the_work(kind, tmp_path):
    out = tmp_path / "out"
    seen = refuse_used(out)
    if kind == "late":  # before the work has begun
        out.write_text("mine")
        with pytest.raises(
            FileExistsError, match=r"out must stay as it was .*, out came there .*; choose another name"
        ):
            with appearing(out, {}, seen):
                pytest.fail("the work begins")
        assert {path.name for path in tmp_path.iterdir()} == {"out"}
        return
    place = tmp_path / "out.lorq.tmp" / "out"
    with pytest.raises(FileExistsError, match=rf"came there .* is kept; the finished work is in {place}: move it"):
        with appearing(out, {}, seen) as work:
            work.write_text("work")
            if kind == "folder":
                out.mkdir()
                (out / "thesis.txt").write_text("mine")
            else:
                out.write_text("mine")
    assert (out / "thesis.txt" if kind == "folder" else out).read_text() == "mine"
    assert place.read_text() == "work" and [path.name for path in place.parent.iterdir()] == ["out"]
    write(tmp_path / "other")
    shutil.move(out, tmp_path / "mine")
    write(out, "again")  # and the next run is not in the way of what was kept
    assert {path.name for path in tmp_path.iterdir()} == {"out", "mine", "other"}


@pytest.mark.parametrize("name", ["new.txt", "below/a.txt", "empty"])
def test_what_is_put_into_a_folder_that_is_being_replaced_is_kept(name, tmp_path):
    out = tmp_path / "out"
    write(out)
    seen = refuse_used(out, overwrite=True)
    with pytest.raises(FileExistsError, match=rf"{name} came there or was changed since and is kept"):
        with appearing(out, {}, seen) as work:
            work.mkdir()
            (out / name).mkdir() if name == "empty" else (out / name).write_text("two")
    assert (out / name).is_dir() if name == "empty" else (out / name).read_text() == "two"
