"""Checkpoints: what is read back, what is refused, and what a crash at any moment leaves behind."""

import errno
import hashlib
import json
import math
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from lorq.storage import json_files
from lorq.storage import writer as checkpoint
from lorq.storage.atomic import TEMPORARY, require_space
from lorq.storage.journal import journal_line
from lorq.storage.names import INDEX, JOURNAL
from lorq.storage.out_folder import check_out
from lorq.storage.reader import WeightFiles, read_weight_map
from lorq.storage.safetensors_file import DTYPES, MAX_HEADER_BYTES, read_header
from lorq.storage.writer import CheckpointWriter

IDENTITY = {"model": "abc", "method": "flrq", "settings": {"bits": 3, "group_size": 64}}
CONFIG = {"model_type": "llama", "quantization_config": {"quant_method": "lorq", "format_version": 1}}
SHARDS = [f"lorq-{i:05d}.safetensors" for i in range(4)]


def tensors_of(i: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(i)
    return {
        f"layer.{i}.packed": torch.randint(-9, 9, (5, 7), generator=generator, dtype=torch.int32),
        f"layer.{i}.scale": torch.randn(3, generator=generator).bfloat16(),
    }


def write_all(writer: CheckpointWriter) -> None:
    """What a run does: every shard that is not completed, then the end."""
    for i, name in enumerate(SHARDS):
        if name not in writer.completed:
            writer.write_shard(name, tensors_of(i), {"block": i, "error": 0.1 * i})
    writer.finish(config=CONFIG, files={"lorq_report.json": b"{}\n", "README.md": b"text"})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def raw_safetensors(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    write_all(CheckpointWriter.create(tmp_path / "whole", IDENTITY))
    return contents(tmp_path / "whole")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A source folder of two shards."""
    folder = tmp_path / "model"
    folder.mkdir()
    weight_map = {}
    for i in range(2):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file(tensors_of(i), folder / file)
        weight_map |= dict.fromkeys(tensors_of(i), file)
    write_index(folder, weight_map)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


# Reading


def test_every_tensor_comes_back(model: Path) -> None:
    source = WeightFiles.open(model)
    expected = tensors_of(0) | tensors_of(1)
    assert source.names == tuple(sorted(expected))
    for name, tensor in expected.items():
        assert torch.equal(source.tensor(name), tensor)
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == tensor.dtype


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file(tensors_of(0), tmp_path / "model.safetensors")
    assert WeightFiles.open(tmp_path).names == tuple(sorted(tensors_of(0)))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_of_the_table_is_the_one_that_safetensors_means(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2, 3).to(dtype), "none": torch.zeros(0, 4)}, tmp_path / "model.safetensors")
    source = WeightFiles.open(tmp_path)
    assert source.tensor("x").dtype == source.dtype("x") == dtype


def test_reading_one_tensor_leaves_the_others_alone(tmp_path: Path) -> None:
    """A sparse file of a TiB, more than any memory: opening and reading touch almost nothing of it."""
    begin, size = 4, 2**40
    header = {
        "small": {"dtype": "I32", "shape": [1], "data_offsets": [0, begin]},
        "huge": {"dtype": "U8", "shape": [size], "data_offsets": [begin, begin + size]},
    }
    path = raw_safetensors(tmp_path / "model.safetensors", header, (7).to_bytes(4, "little"))
    os.truncate(path, path.stat().st_size + size)
    (tmp_path / "config.json").write_text("{}")
    source = WeightFiles.open(tmp_path)
    assert source.tensor("small").tolist() == [7]
    assert source.shape("huge") == (size,)
    assert len(source.fingerprint()) == 64


def sparse(path: Path, sizes: dict[str, list[int]], last: bytes) -> Path:
    """A file of tensors of bytes, in this order, that takes no room; the last bytes of the last one are real."""
    header, at = {}, 0
    for name, shape in sizes.items():
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [at, at := at + math.prod(shape)]}
    raw_safetensors(path, header)
    os.truncate(path, path.stat().st_size + at - len(last))
    with path.open("ab") as file:
        file.write(last)
    return path


@pytest.mark.parametrize("block", [2**28, 2**30, 2**37], ids=["5 GB", "tensors of 1 GB", "3 TB"])
def test_files_as_large_as_models_have_them_are_read_at_their_far_end(block: int, tmp_path: Path) -> None:
    shape = [block // 2**14, 2**14]
    sizes = {f"layer.{i:02}": shape for i in range(5 * 2**30 // block or 20)} | {"last": [3, 2]}
    sparse(tmp_path / "model.safetensors", sizes, bytes(range(6)))
    (tmp_path / "config.json").write_text("{}")
    source = WeightFiles.open(tmp_path)
    assert source.names == tuple(sorted(sizes)) and source.shape("layer.03") == tuple(shape)
    assert source.tensor("last").tolist() == [[0, 1], [2, 3], [4, 5]]
    assert source.tensor("last", 1).tolist() == [2, 3]
    assert source.tensor("layer.04", block // 2**14 - 1).sum() == 0
    assert len(source.fingerprint()) == 64


def test_a_file_cut_after_it_was_opened_is_noticed(model: Path) -> None:
    source = WeightFiles.open(model)
    shard = model / "model-00001-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 4)
    with pytest.raises(ValueError, match=r"truncated: tensor 'layer.0.\w+' has \d+ bytes, file has \d+"):
        for name in source.names:
            source.tensor(name)


def test_files_of_a_hub_cache_are_links(model: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    model.rename(blobs)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    assert WeightFiles.open(snapshot).names == WeightFiles.open(blobs).names


def test_an_unknown_tensor_is_named(model: Path) -> None:
    with pytest.raises(KeyError, match=r"no tensor 'nope' among its 4: layer\.0\.packed"):
        WeightFiles.open(model).tensor("nope")


def test_the_fingerprint_tells_models_apart(model: Path, tmp_path: Path) -> None:
    seen = {WeightFiles.open(model).fingerprint()}
    copy = shutil.copytree(model, tmp_path / "copy")
    assert WeightFiles.open(copy).fingerprint() in seen, "the place does not count"
    shard = copy / "model-00002-of-00002.safetensors"
    for position in (-1, -100):
        data = bytearray(shard.read_bytes())
        data[position] ^= 1
        shard.write_bytes(data)
        seen.add(WeightFiles.open(copy).fingerprint())
    (copy / "config.json").write_text('{"model_type": "lama"}')
    seen.add(WeightFiles.open(copy).fingerprint())
    assert len(seen) == 4
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist; download"):
        WeightFiles.open(copy).fingerprint()


def test_the_fingerprint_covers_two_mebibytes_whole(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2**21 - 100, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    source = WeightFiles.open(tmp_path)
    before = source.fingerprint()
    for position in range(200, 2**21 - 100, 150_001):
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.seek(position)
            file.write(b"\1")
        assert source.fingerprint() != before
        before = source.fingerprint()


# Refusals of a source folder


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone does not exist"):
        WeightFiles.open(tmp_path / "gone")


def test_a_folder_without_weights_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor .*, only: notes.txt"):
        WeightFiles.open(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nor lorq.safetensors.index.json"):
        WeightFiles.open(tmp_path, index_name=INDEX)


def test_pickle_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"pickle weights only \(pytorch_model.bin\).*save_pretrained"):
        WeightFiles.open(tmp_path)


def test_an_unfinished_run_is_no_source(tmp_path: Path) -> None:
    CheckpointWriter.create(tmp_path, IDENTITY).write_shard(SHARDS[0], tensors_of(0), {})
    with pytest.raises(FileNotFoundError, match=r"unfinished lorq run; finish it with --resume"):
        WeightFiles.open(tmp_path, index_name=INDEX)


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "/etc/x.safetensors", "a/../b.safetensors", "a//b.safetensors", "a\\b.safetensors"),
        *(
            "C:b.safetensors",
            "./b.safetensors",
            "",
            ".",
            "..",
            "x.bin",
            "a\0.safetensors",
            "a\n.safetensors",
            "\ud800.safetensors",
        ),
        *(7, None, ["a"]),
    ],
    ids=repr,
)
def test_an_index_may_only_name_files_beside_or_below_it(name: Any, model: Path) -> None:
    write_index(model, {"layer.0.scale": name})
    rule = r"half of a character" if "\ud800" in str(name) else r"\['layer.0.scale'\]: must name a file in or below its"
    with pytest.raises(ValueError, match=rule):
        WeightFiles.open(model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"not valid JSON \(Expecting"),
        ("[1]", r"JSON must be an object, got \[1\]"),
        ("{}", r"weight_map must map tensor names to files, got NoneType"),
        ('{"weight_map": {}}', r"weight_map must map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', r"key 'a' appears twice"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", r"not valid JSON \(maximum recursion"),
        ('{"a": ' + "9" * 5000 + "}", r"not valid JSON \(Exceeds the limit"),
        ("\xff", r"not valid JSON \('utf-8' codec"),
    ],
    ids=["cut", "list", "no map", "empty map", "key twice", "deep", "long number", "not utf-8"],
)
def test_a_damaged_index_is_refused(text: str, message: str, model: Path) -> None:
    (model / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message + r"(.|\n)*download or write it again"):
        WeightFiles.open(model)


def test_missing_shards_are_counted_and_named(model: Path) -> None:
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lists 2 weight files, 1 of them are missing: model-00002"):
        WeightFiles.open(model)


def test_what_an_index_lists_and_no_shard_has_is_absent_and_refused_of_what_lorq_wrote(model: Path) -> None:
    first = "model-00001-of-00002.safetensors"
    write_index(model, {"layer.0.scale": first, "layer.7.scale": first})
    assert WeightFiles.open(model).names == tuple(sorted(tensors_of(0)))
    with pytest.raises(ValueError, match=r"1 tensors are listed but in no shard: layer.7.scale; .*belong together"):
        WeightFiles.open(model, index_name="model.safetensors.index.json")


def test_a_tensor_in_two_shards_must_be_the_same(model: Path) -> None:
    shard = model / "model-00002-of-00002.safetensors"
    save_file(tensors_of(0) | tensors_of(1), shard)
    assert torch.equal(WeightFiles.open(model).tensor("layer.0.scale"), tensors_of(0)["layer.0.scale"])
    save_file(tensors_of(0) | {"layer.0.scale": torch.ones(3).bfloat16()} | tensors_of(1), shard)
    with pytest.raises(
        ValueError, match=r"1 tensors are in model-00002-of-.* otherwise in another shard: layer.0.scale"
    ):
        WeightFiles.open(model)


def test_a_truncated_file_says_both_sizes(model: Path) -> None:
    shard = model / "model-00001-of-00002.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 5)
    with pytest.raises(ValueError, match=rf"00001.*truncated: header says {size} bytes, file has {size - 5}"):
        WeightFiles.open(model)
    os.truncate(shard, 40)
    with pytest.raises(ValueError, match=r"truncated: header ends at byte \d+, file has 40"):
        WeightFiles.open(model)
    os.truncate(shard, 3)
    with pytest.raises(ValueError, match=r"truncated: header ends at byte \d+, file has 3"):
        WeightFiles.open(model)


def entry(dtype: Any = "I32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (entry(dtype="F128"), r"tensor 'x' has dtype 'F128'; lorq reads only BOOL, U8"),
        (entry(dtype=[]), r"has dtype \[\]"),
        (entry(shape=[-2]), r"shape of integers of at least 0, got \[-2\]"),
        (entry(shape=[2.0]), r"shape of integers of at least 0, got \[2.0\]"),
        (entry(shape=[True, 2]), r"got \[True, 2\]"),
        (entry(shape="2"), r"got '2'"),
        (entry(shape=[1] * 65), r"shape of integers"),
        (entry(shape=[0, 2**62, 2**62], offsets=[0, 0]), r"shape of integers"),
        (entry(offsets=[0]), r"must have data_offsets \[begin, end\], got \[0\]"),
        (entry(shape=[2**60], offsets=[0, 2**60]), r"shape of integers"),
        (entry(offsets=[0, 2**60]), r"must have data_offsets"),
        (entry(offsets=[8, 0]), r"must have data_offsets \[begin, end\], got \[8, 0\]"),
        (entry(offsets=[-8, 0]), r"got \[-8, 0\]"),
        (entry(offsets=[0, 7]), r"x': \[2\] of I32 takes 8 bytes, data_offsets say 7"),
        (entry(shape=[2**40], offsets=[0, 8]), r"takes 4398046511104 bytes, data_offsets say 8"),
        (entry(shape=[2**40], offsets=[0, 2**42]), r"truncated: header says 439804651\d+ bytes, file has"),
        (entry(shape=[1], offsets=[4, 8]), r"'x' leaves a gap before it: it begins at 4, not at 0"),
        (entry(shape=[1], offsets=[0, 4]), r"4 too many"),
        (entry(strides=[1]), r"must have dtype, shape and data_offsets"),
        (
            {"x": entry()["x"], "y": entry(shape=[1], offsets=[4, 8])["x"]},
            r"'y' overlaps the tensor before it: it begins at 4, not at 8",
        ),
        ({"x": [1]}, r"'x' must have dtype, shape and data_offsets, got \[1\]"),
        ({"__metadata__": {"a": 1}}, r"__metadata__ must map names to texts, got {'a': 1}"),
        (b'{"x": 1, "x": 2}', r"key 'x' appears twice"),
        (b"{", r"not valid JSON"),
    ],
)
def test_a_header_must_describe_the_file(header: Any, message: str, tmp_path: Path) -> None:
    path = raw_safetensors(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(ValueError, match=r"model.safetensors: .*" + message):
        read_header(path)


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    raw_safetensors(path, {}, length=2**63)
    with pytest.raises(ValueError, match=rf"header length must be at most 100000000 bytes, got {2**63}"):
        read_header(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"git-lfs pointer of 43 bytes; run 'git lfs pull'"):
        read_header(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors does not exist"):
        read_header(path)


def test_json_of_any_length_is_not_read(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setattr(json_files, "MAX_JSON_BYTES", 20)
    with pytest.raises(ValueError, match=r"JSON must be at most 20 bytes, got \d+"):
        WeightFiles.open(model)


def test_json_may_be_longer_than_a_header(tmp_path: Path) -> None:
    """config.json and the index of a mixture with 70,000 projections of experts have 50 MB each; others have more."""
    assert json_files.MAX_JSON_BYTES >= 10 * MAX_HEADER_BYTES == 10 * 100_000_000, "what the safetensors library takes"
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(json_files.MAX_JSON_BYTES + 1)
    with pytest.raises(ValueError, match=r"JSON must be at most 1073741824 bytes, got 1073741825"):
        read_weight_map(tmp_path / INDEX)


# Writing


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of memory")
def test_tensors_are_not_copied_to_be_written(tmp_path: Path) -> None:
    """A block of a large mixture has gigabytes; what is held twice would need as many more."""

    def peak() -> int:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

    writer, large = CheckpointWriter.create(tmp_path / "out", IDENTITY), torch.ones(2**27, dtype=torch.uint8)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before = peak()
    writer.write_shard(SHARDS[0], {"x": large}, {})
    assert peak() - before < 2**25
    assert (tmp_path / "out" / SHARDS[0]).read_bytes() == safetensors_bytes({"x": large}, metadata={"format": "pt"})


def test_what_is_written_can_be_read(whole: dict[str, bytes], tmp_path: Path) -> None:
    assert sorted(whole) == sorted([*SHARDS, INDEX, "README.md", "config.json", "lorq_report.json"])
    index = json.loads(whole[INDEX])
    expected = {name: tensor for i in range(4) for name, tensor in tensors_of(i).items()}
    assert list(index["weight_map"]) == sorted(expected)
    assert index["metadata"]["total_size"] == 4 * (5 * 7 * 4 + 3 * 2)
    assert json.loads(whole["config.json"]) == CONFIG
    source = WeightFiles.open(tmp_path / "whole", index_name=INDEX)
    for name, tensor in expected.items():
        assert torch.equal(source.tensor(name), tensor)
    assert all(torch.equal(load_file(tmp_path / "whole" / SHARDS[2])[k], v) for k, v in tensors_of(2).items())


def test_the_same_run_gives_the_same_bytes(whole: dict[str, bytes], tmp_path: Path) -> None:
    other = tmp_path / "another place"
    writer = CheckpointWriter.create(other, dict(reversed(IDENTITY.items())))
    for i, name in enumerate(SHARDS):
        writer.write_shard(name, dict(reversed(tensors_of(i).items())), {"block": i})
    (tmp_path / "card").write_bytes(b"text")
    files = {"README.md": tmp_path / "card", "lorq_report.json": b"{}\n"}
    writer.finish(config=dict(reversed(CONFIG.items())), files=files)
    assert contents(other) == whole


def test_nothing_can_load_an_unfinished_folder(tmp_path: Path) -> None:
    writer = CheckpointWriter.create(tmp_path, IDENTITY)
    writer.write_shard(SHARDS[0], tensors_of(0), {})
    assert sorted(contents(tmp_path)) == [SHARDS[0], JOURNAL]


def test_tensors_may_be_views_with_gradients(tmp_path: Path) -> None:
    writer = CheckpointWriter.create(tmp_path, IDENTITY)
    weight = torch.arange(12.0, requires_grad=True).view(3, 4)
    writer.write_shard(SHARDS[0], {"t": weight.T}, {})
    assert torch.equal(load_file(tmp_path / SHARDS[0])["t"], weight.detach().T)


# Going on


def start(folder: Path, shards: int = 3) -> CheckpointWriter:
    writer = CheckpointWriter.create(folder, IDENTITY)
    for i in range(shards):
        writer.write_shard(SHARDS[i], tensors_of(i), {"block": i, "error": 0.1 * i})
    return writer


def resume(folder: Path) -> CheckpointWriter:
    return CheckpointWriter.create(folder, IDENTITY, resume=True)


def test_a_resumed_run_knows_what_is_done(whole: dict[str, bytes], tmp_path: Path) -> None:
    first = start(tmp_path / "out")
    writer = resume(tmp_path / "out")
    assert writer.completed == first.completed == {SHARDS[i]: {"block": i, "error": 0.1 * i} for i in range(3)}
    assert writer.shard_checksums() == {name: hashlib.sha256(whole[name]).hexdigest() for name in SHARDS[:3]}
    write_all(writer)
    assert contents(tmp_path / "out") == whole


def cut_journal(folder: Path) -> None:
    os.truncate(folder / JOURNAL, (folder / JOURNAL).stat().st_size - 20)


def spoil_last_line(folder: Path) -> None:
    data = (folder / JOURNAL).read_bytes()
    (folder / JOURNAL).write_bytes(data[:-60] + bytes(59) + b"\n")


def remove_second(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()


def shorten_second(folder: Path) -> None:
    os.truncate(folder / SHARDS[1], 50)


def change_second(folder: Path) -> None:
    data = bytearray((folder / SHARDS[1]).read_bytes())
    data[-1] ^= 1
    (folder / SHARDS[1]).write_bytes(data)


def leave_temporary(folder: Path) -> None:
    (folder / (SHARDS[3] + TEMPORARY)).write_bytes(b"half")


def test_a_changed_digit_in_the_journal_is_seen(tmp_path: Path) -> None:
    start(tmp_path / "out")
    journal = tmp_path / "out" / JOURNAL
    text = journal.read_text()
    assert text.count('"error": 0.1') == 1
    journal.write_text(text.replace('"error": 0.1', '"error": 0.2'))
    with pytest.raises(
        ValueError, match=r"line 3: sha256_of_line must be that of what the line says, .*, got .*; the journal is d"
    ):
        resume(tmp_path / "out")


@pytest.mark.parametrize(
    ("accident", "kept"),
    [
        *((cut_journal, 2), (spoil_last_line, 2)),
        *((remove_second, 1), (shorten_second, 1), (change_second, 1)),
        (leave_temporary, 3),
    ],
)
def test_broken_shards_and_all_after_them_are_made_again(
    accident: Any, kept: int, whole: dict[str, bytes], tmp_path: Path
) -> None:
    start(tmp_path / "out")
    accident(tmp_path / "out")
    writer = resume(tmp_path / "out")
    assert list(writer.completed) == SHARDS[:kept]
    assert not list((tmp_path / "out").glob(f"*{TEMPORARY}"))
    write_all(writer)
    assert contents(tmp_path / "out") == whole


class PowerCut(BaseException):
    """No handler of lorq sees this one."""


class Machine:
    """Stops before the n-th sync, rename or removal; a write that was not synced may have lost its end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, loses_bytes: bool) -> None:
        self.steps_left = 10**9
        self.loses_bytes = loses_bytes
        for name in ("replace", "unlink"):
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))
        monkeypatch.setattr(os, "fsync", self.fsync)

    def step(self) -> None:
        self.steps_left -= 1
        if self.steps_left < 0:
            raise PowerCut

    def counted(self, function: Any) -> Any:
        def counting(*args: Any, **options: Any) -> Any:
            self.step()
            return function(*args, **options)

        return counting

    def fsync(self, handle: int) -> None:
        """Only counts: the machine that runs the test stays up."""
        try:
            self.step()
        except PowerCut:
            if self.loses_bytes and stat.S_ISREG(os.fstat(handle).st_mode):
                os.ftruncate(handle, os.fstat(handle).st_size - 9)
            raise


@pytest.mark.parametrize("loses_bytes", [False, True])
def test_a_crash_at_any_step_is_recovered(
    loses_bytes: bool, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, loses_bytes=loses_bytes)
    crashes = 0
    while True:
        folder = tmp_path / f"crash{crashes}"
        machine.steps_left = crashes
        try:
            write_all(CheckpointWriter.create(folder, IDENTITY))
            break
        except PowerCut:
            machine.steps_left = 10**9
        if (folder / "config.json").exists():  # then it must be complete, whether or not lorq knows
            assert len(WeightFiles.open(folder, index_name=INDEX).names) == 8
        if (folder / "config.json").exists() and not (folder / JOURNAL).exists():
            with pytest.raises(FileExistsError, match="already complete"):
                resume(folder)
        else:
            write_all(resume(folder))
        assert contents(folder) == whole
        crashes += 1
    # 3 steps begin, 5 for each of 4 shards, 1 opens the end, 3 for each of 4 files, 2 close the journal.
    assert crashes == 3 + 5 * 4 + 1 + 3 * 4 + 2


KILL_LOOP = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from lorq.storage.names import JOURNAL
from lorq.storage.writer import CheckpointWriter
torch.set_num_threads(1)
os.fsync = lambda handle: None  # a killed process loses no written bytes; only power cuts do
folder, shards, rng = Path(sys.argv[1]), 20, random.Random(int(sys.argv[2]))
def run():
    writer = CheckpointWriter.create(folder, {"seed": 1}, resume=True)
    for i in range(shards):
        name = f"lorq-{i:05d}.safetensors"
        if name not in writer.completed:
            time.sleep(0.002)  # so that no machine is done before it is killed
            writer.write_shard(name, {f"t{i}": torch.full((50_000,), i, dtype=torch.int32)}, i)
    writer.finish(config={"quantization_config": {"quant_method": "lorq"}}, files={"a.json": b"{}"})
kills = 0
while not (folder / "config.json").exists() or (folder / JOURNAL).exists():
    child = os.fork()
    if child == 0:
        run()
        os._exit(0)
    if kills < 40:
        time.sleep(rng.uniform(0.0, 0.02 + 0.002 * kills))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if status not in (0, signal.SIGKILL):
        raise SystemExit(f"the run failed after {kills} kills, status {status}")
    kills += status != 0
print(kills)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(checkpoint.__file__).parents[2])}
    command = [sys.executable, "-c", KILL_LOOP, str(tmp_path / "out"), "7"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 2
    writer = CheckpointWriter.create(tmp_path / "whole", {"seed": 1})
    for i in range(20):
        tensors = {f"t{i}": torch.full((50_000,), i, dtype=torch.int32)}
        writer.write_shard(f"lorq-{i:05d}.safetensors", tensors, i)
    writer.finish(config={"quantization_config": {"quant_method": "lorq"}}, files={"a.json": b"{}"})
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_identity_is_refused_with_every_difference(tmp_path: Path) -> None:
    start(tmp_path, 1)
    other = {"model": "abc", "method": "lopro", "settings": {"bits": 4, "group_size": 64}, "seed": 1}
    with pytest.raises(ValueError) as caught:
        CheckpointWriter.create(tmp_path, other, resume=True)
    for part in (
        'method (folder: "flrq", now: "lopro")',
        "settings.bits (folder: 3, now: 4)",
        "seed (folder: absent, now: 1)",
    ):
        assert part in str(caught.value)
    assert "group_size" not in str(caught.value) and "--overwrite" in str(caught.value)


def test_tuples_and_lists_are_the_same_identity(tmp_path: Path) -> None:
    CheckpointWriter.create(tmp_path, {"layers": (1, 2)})
    assert CheckpointWriter.create(tmp_path, {"layers": [1, 2]}, resume=True).completed == {}
    with pytest.raises(ValueError, match="layers"):
        CheckpointWriter.create(tmp_path, {"layers": (2, 1)}, resume=True)


def test_checking_a_folder_changes_nothing(tmp_path: Path) -> None:
    check_out(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    start(tmp_path / "out", 1)
    leave_temporary(tmp_path / "out")
    before = contents(tmp_path / "out")
    check_out(tmp_path / "out", resume=True)
    check_out(tmp_path / "out", overwrite=True)
    with pytest.raises(FileExistsError, match=r"\(lorq-00000.safetensors, lorq_journal.jsonl\): it is an unf"):
        check_out(tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_an_empty_folder_is_begun_by_every_flag(tmp_path: Path) -> None:
    for options in ({}, {"resume": True}, {"overwrite": True}):
        folder = tmp_path / f"out{len(options)}{next(iter(options), '')}"
        assert CheckpointWriter.create(folder, IDENTITY, **options).completed == {}


_SHARD = {"name": "x.safetensors", "sha256": 1, "size": 1, "tensors": [], "record": 0}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([b"{}"], r"line 1: this lorq reads journal version 2, got None"),
        ([b'{"journal_version": 3}'], r"reads journal version 2, got 3; go on with the lorq that wrote it"),
        ([b'{"journal_version": 2, "identity": {}}'], r"line 1: sha256_of_line must be that of what the line says"),
        ([{"journal_version": 2, "identity": 3}], r"first line must hold the run's identity, got 3"),
        ([b"{"], r"line 1: not valid JSON"),
        ([], r"first line must hold the run's identity, got None"),
        ([None, b"{", b"{}"], r"line 2: not valid JSON"),
        ([None, b'{"closing": []}', b"{}"], r"line 2: sha256_of_line must be that of what the line says"),
        ([None, {"shard": 3}, b"{}"], r"line 2: must describe one shard, got 3"),
        ([None, {"closing": ["../x"]}], r"line 2: must name a file in or below its folder, got '../x'"),
        (
            [None, {"shard": _SHARD | {"name": "/x.safetensors"}}],
            r"must name a plain file name ending in .safetensors, without a folder, got '/x.safetensors'",
        ),
        ([None, {"shard": _SHARD}], r"must give sha256, size and tensor names"),
    ],
)
def test_a_damaged_journal_is_refused(lines: list[bytes | dict[str, Any] | None], message: str, tmp_path: Path) -> None:
    CheckpointWriter.create(tmp_path, IDENTITY)
    first = (tmp_path / JOURNAL).read_bytes()
    written = (
        journal_line(line) if isinstance(line, dict) else first if line is None else line + b"\n" for line in lines
    )
    (tmp_path / JOURNAL).write_bytes(b"".join(written))
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(ValueError, match=message):
            CheckpointWriter.create(tmp_path, IDENTITY, **options)


# Whose folder is it


def test_a_folder_in_use_says_what_it_is(whole: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=r"not empty \(README.md, .* and 3 more\): .* with --overwrite"):
        CheckpointWriter.create(tmp_path / "whole", IDENTITY)
    with pytest.raises(FileExistsError, match=r"already complete, nothing to resume; .* --overwrite"):
        CheckpointWriter.create(tmp_path / "whole", IDENTITY, resume=True)
    start(tmp_path / "part", 1)
    with pytest.raises(FileExistsError, match=r"unfinished lorq run; continue with --resume, .*--overwrite"):
        CheckpointWriter.create(tmp_path / "part", IDENTITY)
    with pytest.raises(ValueError, match=r"--overwrite and --resume exclude each other"):
        CheckpointWriter.create(tmp_path / "part", IDENTITY, resume=True, overwrite=True)
    with pytest.raises(NotADirectoryError, match=r"config.json must be a folder, it is a file"):
        CheckpointWriter.create(tmp_path / "whole" / "config.json", IDENTITY)
    assert contents(tmp_path / "whole") == whole


@pytest.mark.parametrize("config", [None, "{}", "[", '{"quantization_config": {"quant_method": "gptq"}}'])
@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}], ids=repr)
def test_a_strangers_files_are_never_touched(config: str | None, options: dict[str, bool], tmp_path: Path) -> None:
    (tmp_path / "thesis.safetensors").write_text("years of work")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    before = contents(tmp_path)
    message = r"thesis.safetensors\): lorq did not write it; choose"
    with pytest.raises(FileExistsError, match=message):
        CheckpointWriter.create(tmp_path, IDENTITY, **options)
    with pytest.raises(FileExistsError, match=message):
        check_out(tmp_path, **options)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("finished", [True, False])
def test_overwrite_removes_what_lorq_wrote_and_nothing_else(
    finished: bool, whole: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    writer = start(folder)
    if finished:
        write_all(writer)
    (folder / "thesis.safetensors").write_text("years of work")
    (folder / "own.index.json").write_text('{"metadata": null}')
    (folder / "notes").mkdir()
    CheckpointWriter.create(folder, {"bits": 2}, overwrite=True)
    left = sorted(path.name for path in folder.iterdir())
    assert left == sorted([JOURNAL, "notes", "own.index.json", "thesis.safetensors"])


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_overwrite_does_not_remove_what_a_link_leads_to(whole: dict[str, bytes], tmp_path: Path) -> None:
    out, there = tmp_path / "out", tmp_path / "whole"
    out.symlink_to(there)
    with pytest.raises(FileExistsError, match=f"{out} must be no link to be replaced, it leads to {there}; name that"):
        CheckpointWriter.create(out, IDENTITY, overwrite=True)
    assert contents(there) == whole
    start(tmp_path / "part", 1)
    (tmp_path / "begun").symlink_to(tmp_path / "part")
    assert list(CheckpointWriter.create(tmp_path / "begun", IDENTITY, resume=True).completed) == SHARDS[:1]


def test_overwrite_does_not_follow_a_hostile_index(whole: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    index = json.loads(whole[INDEX])
    index["metadata"]["lorq_files"] = ["../precious"]
    (tmp_path / "whole" / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"must name a file in or below its folder, got '../precious'"):
        CheckpointWriter.create(tmp_path / "whole", IDENTITY, overwrite=True)
    assert (tmp_path / "precious").exists()


# Wrong calls, full disks


def test_a_shard_is_written_once_and_a_tensor_in_one_shard(tmp_path: Path) -> None:
    writer = start(tmp_path, 1)
    with pytest.raises(ValueError, match=r"lorq-00000.safetensors is already written, as one of 1; skip it"):
        writer.write_shard(SHARDS[0], tensors_of(5), {})
    with pytest.raises(ValueError, match=r"lorq-00001.* repeats 2 tensors of lorq-00000.*: layer.0.packed"):
        writer.write_shard(SHARDS[1], tensors_of(0), {})
    with pytest.raises(ValueError, match=r"shard: must name a plain file name ending in .safetensors"):
        writer.write_shard("../x.safetensors", tensors_of(5), {})
    with pytest.raises(TypeError, match=r"not JSON serializable"):
        writer.write_shard(SHARDS[1], tensors_of(1), {"x": torch.zeros(1)})


def test_a_checkpoint_ends_as_lorqs_own(tmp_path: Path) -> None:
    writer = CheckpointWriter.create(tmp_path, IDENTITY)
    for config, method in (({}, None), ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'")):
        with pytest.raises(ValueError, match=rf'quant_method "lorq", got {method}'):
            writer.finish(config=config, files={})
    with pytest.raises(ValueError, match=r"needs at least 1 shard to finish, got 0"):
        writer.finish(config=CONFIG, files={})
    writer.write_shard(SHARDS[0], tensors_of(0), {})
    for name in ("config.json", INDEX, JOURNAL, SHARDS[0]):
        with pytest.raises(ValueError, match=rf"must have names of their own, got {name}"):
            writer.finish(config=CONFIG, files={name: b""})
    with pytest.raises(ValueError, match=r"extra file: must name a file in or below its folder, got '../x'"):
        writer.finish(config=CONFIG, files={"../x": b""})
    with pytest.raises(ValueError, match=r"index_name: must name a plain .* ending in .index.json.* got 'x'"):
        writer.finish(config=CONFIG, files={}, index_name="x")
    with pytest.raises(FileNotFoundError, match="gone"):
        writer.finish(config=CONFIG, files={"a": tmp_path / "gone"})
    assert sorted(contents(tmp_path)) == [SHARDS[0], JOURNAL]


def test_room_is_asked_for_before_the_run(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(OSError, match=r"^\[Errno 28\] .*out needs 1152921504.61 GB, [0-9.]+ GB are free") as caught:
        require_space(tmp_path / "out", 2**60)
    assert caught.value.errno == errno.ENOSPC and free < 2**60


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a device that is always full")
def test_a_full_disk_keeps_what_is_finished(
    whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    writer = start(folder, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:  # what safetensors says of a disk, in the words of the system
        with pytest.raises(OSError, match="File too large") as caught:
            writer.write_shard(SHARDS[2], tensors_of(2), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG and sorted(contents(folder)) == [*SHARDS[:2], JOURNAL]

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    size = sum(tensor.nbytes for tensor in tensors_of(2).values())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match=rf"no space left in .*out: lorq-00002.* needs {size} bytes, .* are free"):
            writer.write_shard(SHARDS[2], tensors_of(2), {})
    assert sorted(contents(folder)) == [*SHARDS[:2], JOURNAL]
    writer.write_shard(SHARDS[2], tensors_of(2), {})
    (folder / (INDEX + TEMPORARY)).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"index.json needs \d+ bytes.*what is finished is kept.*--resume"):
        write_all(writer)
    write_all(resume(folder))
    assert contents(folder) == whole


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_journal_line_that_does_not_fit_is_taken_back(
    code: int, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    writer = start(folder, 1)
    before = contents(folder)
    real_fsync, calls = os.fsync, []

    def full_at_the_journal(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(code, os.strerror(code))
        real_fsync(handle)

    monkeypatch.setattr(os, "fsync", full_at_the_journal)
    message = r"needs \d+ bytes" if code == errno.ENOSPC else os.strerror(code)
    with pytest.raises(OSError, match=message) as caught:
        writer.write_shard(SHARDS[1], tensors_of(1), {})
    assert caught.value.errno == code and contents(folder) == before
    write_all(resume(folder))
    assert contents(folder) == whole
