"""An interrupted run goes on where it stopped and ends in the same bytes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers import folder_digests, tiny_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorq
from lorq.pipeline.options import Options
from lorq.progress import OPEN
from lorq.storage import writer
from lorq.storage.journal import CHECK, journal_line, read_journal
from lorq.storage.names import JOURNAL, REPORT_NAME
from lorq.storage.reader import WeightFiles

BLOCKS = 4
# Seeded sketches and real statistics, but no search for ranges, which takes most of a run.
SETTINGS = dict(bits=3, group_size=32, budget=0.5, min_gain=0.0, epochs=0, rounding="nearest")
# Imports once; then each command runs in a process of its own, whose number is printed.
RUNNER = """
import json, os, sys
import lorq.cli, lorq.pipeline.quantize, transformers.models.llama
for command in json.load(sys.stdin):
    child = os.fork()
    if not child:
        os._exit(lorq.cli.main(command))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("resume") / "llama", "llama", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def quantize(text_file):
    def run(source, out, method=None, **options):
        calibration = dict(calibration=str(text_file), samples=4, seq_len=64)
        return lorq.quantize(source, out, method or lorq.FLRQ(**SETTINGS), **calibration | options)

    return run


@pytest.fixture(scope="module")
def whole(source, quantize, tmp_path_factory):
    """The digests of an uninterrupted run's folder, by stream."""
    made = {}

    def of(stream="original"):
        if stream not in made:
            out = tmp_path_factory.mktemp("whole") / stream
            quantize(source, out, stream=stream)
            made[stream] = folder_digests(out)
        return made[stream]

    return of


class PowerCut(BaseException):
    pass


@pytest.fixture(scope="module")
def interrupted(source, quantize):
    """Quantize, and stop when ``after`` blocks are solved."""

    def run(out, *, after, **options):
        def stop(stage, done, total):
            if (stage, done) == ("quantize", after):
                raise PowerCut

        with pytest.raises(PowerCut):
            quantize(source, out, progress=stop, **options)
        assert len(list(out.glob("lorq-*.safetensors"))) == after + 1
        return out

    return run


@pytest.fixture(scope="module")
def begun(interrupted, tmp_path_factory):
    """A run stopped after one block, not to be changed."""
    return interrupted(tmp_path_factory.mktemp("begun") / "out", after=1)


def test_a_killed_run_is_resumed_to_the_same_bytes(source, quantize, whole, text_file, tmp_path):
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
    flags += ["--method=flrq", f"--calibration={text_file}", "--samples=4", "--seq-len=64"]
    folders = {after: tmp_path / str(after) for after in (1, 3)}
    with subprocess.Popen(
        [sys.executable, "-c", RUNNER], env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as runner:  # fmt: skip
        runner.stdin.write(json.dumps([["quantize", str(source), str(out), *flags] for out in folders.values()]))
        runner.stdin.close()
        for after, out in folders.items():
            child = int(runner.stdout.readline())
            shard, deadline = out / f"lorq-{after:05d}-of-{BLOCKS:05d}.safetensors", time.monotonic() + 60
            while not shard.exists() and time.monotonic() < deadline:
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
            assert int(runner.stdout.readline()) == -signal.SIGKILL
    for after, out in folders.items():
        assert after + 1 <= len(list(out.glob("lorq-*.safetensors"))) <= BLOCKS + 1
        assert not (out / "config.json").exists()
        quantize(source, out, resume=True)
        assert folder_digests(out) == whole()


@pytest.mark.parametrize(
    ("stream", "after"), [("original", 0), ("original", 2), ("original", BLOCKS), ("quantized", 2)]
)
def test_an_interrupted_run_is_resumed_to_the_same_bytes(stream, after, source, whole, quantize, interrupted, tmp_path):
    out = tmp_path / "out"
    if after:
        interrupted(out, after=after, stream=stream)
    else:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCut):
            patch.setattr(sys.modules["lorq.pipeline.quantize"], "begin_block", _cut)
            quantize(source, out, stream=stream)
    quantize(source, out, resume=True, stream=stream)
    assert folder_digests(out) == whole(stream)


def _cut(*_):
    raise PowerCut


def test_what_follows_a_quantized_block_depends_on_the_stream(whole):
    first, last = (f"lorq-{i:05d}-of-{BLOCKS:05d}.safetensors" for i in (1, BLOCKS))
    assert whole("original")[first] == whole("quantized")[first]
    assert whole("original")[last] != whole("quantized")[last]


def test_finished_blocks_are_not_solved_again(source, tmp_path, quantize, interrupted, monkeypatch):
    out = interrupted(tmp_path / "out", after=3)
    solve, solved = lorq.FLRQ.solve, []
    monkeypatch.setattr(lorq.FLRQ, "solve", lambda *a, **k: solved.append(1) or solve(*a, **k))
    quantize(source, out, resume=True)
    assert len(solved) == 7


@pytest.mark.parametrize("torn", ["config.json", REPORT_NAME, "lorq.safetensors.index.json"])
def test_a_run_stopped_while_closing_is_resumed_to_the_same_bytes(torn, source, whole, tmp_path, quantize, monkeypatch):
    out, rename = tmp_path / "out", writer.rename_synced

    def stop(temporary, path):
        if path.name == torn:
            raise PowerCut
        rename(temporary, path)

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(writer, "rename_synced", stop)
        quantize(source, out)
    with pytest.raises(FileNotFoundError, match=r"unfinished.*--resume"):
        lorq.load(out)
    with pytest.raises(FileNotFoundError, match=r"unfinished.*--resume"):
        lorq.read_report(out)
    quantize(source, out, resume=True)
    assert folder_digests(out) == whole()


def test_an_unfinished_folder_cannot_be_loaded_and_says_how_to_finish_it(source, quantize, interrupted, tmp_path):
    out = interrupted(tmp_path / "out", after=2)
    with pytest.raises(FileNotFoundError, match=r"out is an unfinished.*--resume"):
        lorq.load(out)
    with pytest.raises(FileNotFoundError, match=r"out is an unfinished run.*--resume"):
        lorq.read_report(out)
    with pytest.raises((OSError, ValueError), match="config"):
        AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(FileNotFoundError, match=r"unfinished.*--resume"):
        quantize(out, tmp_path / "again")
    with pytest.raises(FileExistsError, match=r"unfinished lorq run.*--resume.*--overwrite"):
        quantize(source, out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(method=lorq.FLRQ(**SETTINGS | {"bits": 4})), r"settings.bits \(folder: 3, now: 4\)"),
        (dict(method=lorq.GPTQ(bits=3, group_size=32)), r'method \(folder: "flrq", now: "gptq"\)'),
        (dict(seed=7), r"seed \(folder: 0, now: 7\)"),
        (dict(stream="quantized"), r'stream \(folder: "original", now: "quantized"\)'),
        (dict(token_weights="plain"), r'token_weights \(folder: "equal", now: "plain"\)'),
        (dict(exclude=("down_proj",)), r'exclude \(folder: \[\], now: \["down_proj"\]\)'),
        (dict(override=("down_proj:bits=4",)), r'override \(folder: \[\], now: \["down_proj:bits=4"\]\)'),
        (dict(samples=5), r"samples \(folder: 4, now: 5\)"),
        (dict(seq_len=32), r"seq_len \(folder: 64, now: 32\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_resuming_with_other_settings_is_refused_and_names_both(change, message, source, quantize, begun):
    before = folder_digests(begun)
    with pytest.raises(ValueError, match=rf"begun differently: .*{message}"):
        quantize(source, begun, resume=True, **change)
    assert folder_digests(begun) == before


def test_resuming_with_other_threads_or_another_torch_is_refused_and_names_both(source, quantize, begun, monkeypatch):
    before, version = folder_digests(begun), torch.__version__
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match=r"begun differently: threads \(folder: 1, now: 2\)"):
            quantize(source, begun, resume=True)
    finally:
        torch.set_num_threads(1)
    monkeypatch.setattr(torch, "__version__", "1.0")
    with pytest.raises(ValueError, match=rf'torch \(folder: "{re.escape(version)}", now: "1.0"\)'):
        quantize(source, begun, resume=True)
    assert folder_digests(begun) == before


def test_every_option_is_compared_but_those_that_say_how(begun):
    # A new option belongs to one or the other: the bytes depend on it, or they do not.
    identity = read_journal(begun / JOURNAL).identity
    names = {field.name for field in fields(Options)} | {"device_type", "threads", "torch", "calibration_tokens"}
    names |= {"format_version", "lorq_version", "model", "method", "settings", "budget"}
    how = {"device", "cluster", "spill_bytes", "memory_budget", "dry_run", "resume", "overwrite"}
    assert names - set(identity) == how
    assert set(identity) <= names


def test_a_record_that_lorq_never_wrote_is_refused(quantize, source, begun, tmp_path):
    for number, (spoil, words) in enumerate(
        [
            (lambda record: record.pop("inputs"), "inputs must be a list, got None"),
            (lambda record: record.update(formats=[]), r"formats must be an object, got \[\]"),
            (lambda record: record["layers"][0].update(rank=-1), "bits, rank and bytes must be at least 0"),
        ]
    ):
        out = shutil.copytree(begun, tmp_path / str(number))
        *lines, last = (out / JOURNAL).read_text().splitlines()
        entry = json.loads(last)
        spoil(entry["shard"]["record"])
        line = journal_line({key: value for key, value in entry.items() if key != CHECK})
        (out / JOURNAL).write_bytes("\n".join([*lines, ""]).encode() + line)
        with pytest.raises(ValueError, match=words):
            quantize(source, out, resume=True)


def test_the_report_tells_nothing_of_the_machine(source, quantize, tmp_path):
    quantize(source, tmp_path / "out", lorq.Nearest(group_size=32))
    run = lorq.read_report(tmp_path / "out").run
    assert not {"threads", "torch", "method", "settings"} & set(run) and run["seed"] == 0


def test_resuming_with_another_model_or_text_is_refused_and_names_both(source, quantize, begun, tmp_path):
    before = folder_digests(begun)
    other = tiny_folder(tmp_path / "other", "llama", num_hidden_layers=BLOCKS, seed=1)
    with pytest.raises(ValueError, match=r'model \(folder: "[0-9a-f]{64}", now: "[0-9a-f]{64}"\)'):
        quantize(other, begun, resume=True)
    text = tmp_path / "other.txt"
    text.write_text("Other words, and a good many of them. " * 20, encoding="utf-8")
    with pytest.raises(ValueError, match=r'calibration \(folder: "text.txt", now: "other.txt"\)'):
        quantize(source, begun, resume=True, calibration=str(text))
    assert folder_digests(begun) == before


def test_the_same_text_under_another_name_is_the_same(
    source, whole, quantize, interrupted, text_file, tmp_path, monkeypatch
):
    out, copy = interrupted(tmp_path / "out", after=1), tmp_path / "elsewhere.txt"
    copy.write_bytes(text_file.read_bytes())
    monkeypatch.chdir(tmp_path)
    quantize(source, out, resume=True, calibration="elsewhere.txt")
    assert folder_digests(out) == whole()
    assert lorq.read_report(out).run["calibration"] == "text.txt", "no path: folders of two machines are the same"


@pytest.mark.parametrize("part", ["model.layers.0.mlp.up_proj", "model.embed_tokens", "model.layers.1.mlp.up_proj"])
def test_a_model_that_has_changed_under_a_run_is_refused(part, source, quantize, interrupted, tmp_path, monkeypatch):
    """By the bytes of what is finished, wherever the change lies."""
    monkeypatch.setattr(WeightFiles, "_samples", lambda self: iter(()))  # a change between the stretches looked at
    copy, out = shutil.copytree(source, tmp_path / "copy"), interrupted(tmp_path / "out", after=1)
    tensors = load_file(copy / "model.safetensors")
    tensors[f"{part}.weight"][5, 7] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    if "layers.1" in part:  # not solved yet: all of the folder will be the model that is there
        quantize(copy, out, resume=True)
    else:
        what = "model.layers.0" if "layers" in part else "what lies outside the blocks"
        with pytest.raises(ValueError, match=rf"{what} of .*copy must be as it was when lorq-0000\d.* have changed"):
            quantize(copy, out, resume=True)


def test_every_tensor_is_read_to_look_and_to_work_however_it_is_hashed(
    source, quantize, interrupted, tmp_path, monkeypatch
):
    out, read = interrupted(tmp_path / "out", after=2), []
    tensor = WeightFiles.tensor
    monkeypatch.setattr(
        WeightFiles, "tensor", lambda self, *at: (self.folder == source and read.append(at)) or tensor(self, *at)
    )
    quantize(source, out, resume=True)
    inside = [at for at in read if "layers" in at[0]]
    again = [at for at in inside if ".0." not in at[0]]  # the first is read to see in what form blocks answer
    assert len(again) == 2 * len(set(again)) == 2 * 9 * (BLOCKS - 1)


def test_a_damaged_shard_is_made_again(source, whole, quantize, interrupted, tmp_path):
    out = interrupted(tmp_path / "out", after=3)
    shard = out / f"lorq-00002-of-{BLOCKS:05d}.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    quantize(source, out, resume=True)
    assert folder_digests(out) == whole()


def test_a_complete_folder_has_nothing_to_resume(source, quantize, tmp_path):
    out = tmp_path / "out"
    quantize(source, out, lorq.Nearest(group_size=32))
    with pytest.raises(FileExistsError, match="already complete, nothing to resume"):
        quantize(source, out, lorq.Nearest(group_size=32), resume=True)


def test_a_run_without_a_begun_folder_may_say_resume(source, whole, quantize, tmp_path):
    # A script that always passes --resume works from the first time on.
    quantize(source, tmp_path / "out", resume=True)
    assert folder_digests(tmp_path / "out") == whole()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(source, whole, quantize, tmp_path):
    quantize(source, tmp_path / "again")
    assert folder_digests(tmp_path / "again") == whole()
    quantize(source, tmp_path / "other", seed=1)
    assert (
        folder_digests(tmp_path / "other")[f"lorq-00001-of-{BLOCKS:05d}.safetensors"]
        != (whole()[f"lorq-00001-of-{BLOCKS:05d}.safetensors"])
    )


@pytest.mark.parametrize("stream", ["original", "quantized"])
def test_hidden_states_in_a_file_give_the_same_bytes_and_leave_no_file(stream, source, whole, quantize, tmp_path):
    quantize(source, tmp_path / "out", spill_bytes=0, stream=stream)
    assert folder_digests(tmp_path / "out") == whole(stream)


def test_overwriting_leaves_nothing_of_the_folder_before(source, whole, quantize, tmp_path):
    out = tmp_path / "out"
    quantize(tiny_folder(tmp_path / "deep", "llama", num_hidden_layers=6), out, lorq.Nearest(group_size=32))
    quantize(source, out, overwrite=True)
    assert folder_digests(out) == whole()


def test_the_journal_is_gone_when_the_folder_is_complete(whole):
    assert not [name for name in whole() if name == JOURNAL or Path(name).suffix == ".tmp" or name.startswith(".")]


def test_other_settings_are_refused_before_the_weights_are_checked(source, quantize, begun):
    stages = []
    with pytest.raises(ValueError, match=r"begun differently: settings\.bits"):
        other = lorq.FLRQ(**SETTINGS | {"bits": 4})
        quantize(source, begun, resume=True, method=other, progress=lambda stage, *_: stages.append(stage))
    assert set(stages) == {OPEN}
