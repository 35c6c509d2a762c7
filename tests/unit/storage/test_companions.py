"""What travels with the weights, and what stays behind and why."""

import os
from pathlib import Path

import pytest
import torch

from lorq.storage import companions
from lorq.storage.companions import find_companions, with_code_of
from lorq.storage.names import INDEX, JOURNAL, REPORT_NAME
from lorq.storage.writer import CheckpointWriter

CONFIG = {"model_type": "llama", "quantization_config": {"quant_method": "lorq", "format_version": 1}}


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_everything_beside_the_weights_is_taken_whatever_its_name(tmp_path: Path) -> None:
    beside = [
        *("tokenizer.json", "tiktoken.model", "qwen.tiktoken", "tekken.json", "LICENSE", "README.md", "vocab.bpe"),
        *("sentencepiece.bpe.model", "processor_config.json", "modeling_own.py", "preprocessor_config.json"),
        *("additional_chat_templates/tools.jinja", "custom_generate/generate.py"),
    ]
    weights = [
        *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "consolidated.00.pth"),
        *("tf_model.h5", "model.gguf", "training_args.bin", "original/consolidated.00.pth", "original/tokenizer.model"),
        *("checkpoint-500/config.json", "checkpoint-500/tokenizer.json"),
    ]
    own = ["config.json", REPORT_NAME, INDEX, JOURNAL, ".git/config", ".gitattributes", "x.lorq.tmp"]
    taken, left = find_companions(fill(tmp_path, *beside, *weights, *own))
    assert sorted(taken) == sorted(beside) and not left
    assert all(file.read_text() == name for name, file in taken.items())


def test_what_is_too_large_or_no_file_of_the_folder_stays_behind_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(tmp_path / "model", "tokenizer.json", "data.parquet", *(f"many/{i}.txt" for i in range(101)))
    os.truncate(folder / "data.parquet", 100_000_001)
    secret = fill(tmp_path, "secret")
    (folder / "linked").symlink_to(secret / "secret")
    (folder / "nowhere").symlink_to("gone")
    (folder / "inside").symlink_to("tokenizer.json")
    (folder / "place").symlink_to(secret)
    os.mkfifo(folder / "pipe")
    (folder / "line\nbreak").touch()
    taken, left = find_companions(folder)
    assert sorted(taken) == ["inside", "tokenizer.json"]
    assert left == {
        "data.parquet": "100000001 bytes, more than 100000000",
        "line\nbreak": "its name is not one for every system",
        "linked": "linked is a link out of the folder, or to nothing",
        "many": "more than 100 files",
        "nowhere": "nowhere is no file, or cannot be read",
        "pipe": "pipe is no file, or cannot be read",
        "place": "a link to a folder",
    }
    monkeypatch.setattr(companions, "MOST_BYTES", 5)
    assert find_companions(folder)[1]["tokenizer.json"] == "14 bytes, more than 5"


def test_loops_of_links_long_names_and_what_holds_no_file_stay_behind_with_the_reason(tmp_path: Path) -> None:
    longest = "n" * 246
    folder = fill(tmp_path / "model", "sub/a.jinja", longest, f"{longest}n", "below/" + "é" * 124)
    (folder / "loop").symlink_to("loop")
    (folder / "empty").mkdir()
    (folder / "sub/none/at/all").mkdir(parents=True)
    (folder / "sub/link").symlink_to("..")
    taken, left = find_companions(folder)
    assert sorted(taken) == [longest, "sub/a.jinja"]
    assert left == {
        "below": "éééééééééééééééé... has a name of more than 246 bytes",
        "empty": "an empty folder",
        "loop": "loop is no file, or cannot be read",
        f"{longest}n": "nnnnnnnnnnnnnnnn... has a name of more than 246 bytes",
        "sub/link": "a link to a folder",
        "sub/none/at/all": "an empty folder",
    }
    writer = CheckpointWriter.create(tmp_path / "out", {})
    writer.write_shard("lorq-00000.safetensors", {"a": torch.zeros(1)}, {})
    writer.finish(config=CONFIG, files=taken)
    assert (tmp_path / "out" / longest).read_text() == longest


def begun(folder: Path, **how: bool) -> CheckpointWriter:
    writer = CheckpointWriter.create(folder, {"x": 1}, **how)
    if not writer.completed:
        writer.write_shard("lorq-00000.safetensors", {"a": torch.zeros(1)}, {})
    return writer


def test_nothing_is_written_through_a_link_out_of_the_folder(tmp_path: Path) -> None:
    elsewhere = fill(tmp_path / "elsewhere", "a.txt")
    writer = begun(tmp_path / "out")
    (tmp_path / "out/sub").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"out/sub/a.txt must lie in .*out, but a link leads out of it; remove"):
        writer.finish(config=CONFIG, files={"sub/a.txt": b"mine"})
    assert [(path.name, path.read_text()) for path in elsewhere.iterdir()] == [("a.txt", "a.txt")]
    (tmp_path / "out/sub").unlink()
    begun(tmp_path / "out", resume=True).finish(config=CONFIG, files={"sub/a.txt": b"mine"})
    assert (tmp_path / "out/sub/a.txt").read_bytes() == b"mine"


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_what_a_closing_that_was_killed_left_in_folders_below_goes(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(temporary: Path, path: Path) -> None:
        if path.name == "a.txt":
            raise KeyboardInterrupt
        temporary.rename(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        writer = begun(tmp_path / "out")
        patch.setattr("lorq.storage.writer.rename_synced", killed)
        writer.finish(config=CONFIG, files={"sub/a.txt": b"1"})
    (tmp_path / "out/sub/a.txt.lorq.tmp").write_bytes(b"half")  # an exception leaves none, a kill does
    begun(tmp_path / "out", **{how: True}).finish(config=CONFIG, files={})
    assert not (tmp_path / "out/sub").exists()


def test_files_of_a_hubs_cache_are_links_and_taken(tmp_path: Path) -> None:
    fill(tmp_path, "models--a--b/blobs/123", "other/blobs/456")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/123")
    (snapshot / "foreign").symlink_to("../../../other/blobs/456")
    taken, left = find_companions(snapshot)
    assert sorted(taken) == ["tokenizer.json"] and sorted(left) == ["foreign"]


def test_code_that_is_not_there_is_not_referred_to() -> None:
    known = {
        "AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own",
        "AutoTokenizer": ["tokenization_own.Own", None], "AutoModel": "org/repo--modeling.Own",
    }  # fmt: skip
    config = {"model_type": "llama", "auto_map": known}
    assert with_code_of(config, {"configuration_own.py": b"", "tokenization_own.py": b""})["auto_map"] == {
        key: value for key, value in known.items() if key != "AutoModelForCausalLM"
    }
    assert with_code_of({"auto_map": {"AutoConfig": "a.B"}}, {}) == {}
    assert with_code_of({"a": 1}, {}) == {"a": 1}


def test_files_in_folders_below_are_written_and_removed_again(tmp_path: Path) -> None:
    def write(files: dict[str, bytes | Path]) -> None:
        writer = CheckpointWriter.create(tmp_path / "out", {"x": 1}, overwrite=True)
        writer.write_shard("lorq-00000.safetensors", {"a": torch.zeros(1)}, {})
        writer.finish(config=CONFIG, files=files)

    write({"a/b/tools.jinja": b"1", "README.md": b"2"})
    assert (tmp_path / "out/a/b/tools.jinja").read_bytes() == b"1"
    (tmp_path / "out/a/mine").touch()
    write({"README.md": b"3"})
    assert sorted(path.name for path in (tmp_path / "out/a").iterdir()) == ["mine"], "what lorq did not write stays"
    write({"c/d": b"4"})
    (tmp_path / "out/c/d").rename(tmp_path / "d")
    (tmp_path / "out/c").rmdir()
    (tmp_path / "out/c").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"out/c/d must lie in .*out, but a link leads out of it"):
        write({})
    assert (tmp_path / "d").exists()
