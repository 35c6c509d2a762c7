"""Where models and what is made of them are found, and what is said where there is no place for it."""

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from lorq.models import locate
from lorq.models.locate import _content_of, cache_dir, check_model, full_path, make_room
from lorq.models.texts import load_text

DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with a user id of its own."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("LORQ_CACHE", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 123_456)


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(10**9, 10**9 - 1000, 1000))


def test_without_a_home_folder_it_is_said_what_to_set(no_home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"in the home folder, and there is none; set LORQ_CACHE to a folder"):
        cache_dir()
    for use in (full_path, check_model, load_text):
        with pytest.raises(ValueError, match=r"~/model names a home folder, and there is none; give the whole path"):
            use("~/model")
    monkeypatch.setenv("LORQ_CACHE", "/somewhere")
    assert cache_dir() == Path("/somewhere")


def test_a_cache_without_room_is_said_before_the_work(small_disk: None, tmp_path: Path) -> None:
    make_room(tmp_path / "cache", 1000)
    with pytest.raises(OSError, match=r"cache needs 1001 bytes, 1000 bytes are free") as caught:
        make_room(tmp_path / "cache", 1001)
    assert caught.value.errno == errno.ENOSPC
    assert "set LORQ_CACHE to another folder that can be written to" in caught.value.__notes__[0]


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as caught:
        make_room(tmp_path / "file" / "cache", 0)
    assert "set LORQ_CACHE" in caught.value.__notes__[0]

    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(locate.tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError) as caught:
        make_room(tmp_path, 0)
    assert "set LORQ_CACHE" in caught.value.__notes__[0]


def test_a_file_is_known_by_its_content_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORQ_CACHE", str(tmp_path / "cache"))
    reads, hashed = [], locate.sha256_of
    monkeypatch.setattr(locate, "sha256_of", lambda path: reads.append(path) or hashed(path))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"a" * (1 << 20) + b"1")
    first, stat = _content_of(file), file.stat()
    assert _content_of(file) == first and len(reads) == 1
    file.write_bytes(b"a" * (1 << 20) + b"2")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as unpacking does: only the content tells
    second = _content_of(file)
    assert second != first and len(reads) == 2
    (tmp_path / "other").mkdir()
    shutil.copy2(file, tmp_path / "other" / "model.gguf")
    assert _content_of(tmp_path / "other" / "model.gguf") == second and len(reads) == 3


def test_a_hub_gives_what_may_travel_and_no_weights_of_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda _, **rest: asked.update(rest) or "/cache")
    assert locate.resolve_model("some/where") == Path("/cache")
    wanted = [
        *("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"),
        *("qwen.tiktoken", "modeling_own.py", "LICENSE", "chat_template.jinja", "additional_chat_templates/a.jinja"),
    ]
    others = ["pytorch_model.bin", "consolidated.safetensors", "original/params.json", "model.gguf", "onnx/model.onnx"]
    assert list(filter_repo_objects([*wanted, *others], **asked)) == wanted
