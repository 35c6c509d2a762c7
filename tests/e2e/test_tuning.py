"""Tuning folders: numbers move, codes stay, interrupted runs end in the same bytes, the rest is refused."""

import json

import pytest
import torch
from helpers import folder_digests
from safetensors.torch import load_file

import lorq
from lorq.adapt.settings import Tuning
from lorq.cli import main
from lorq.progress import TUNE, TUNE_BLOCKS
from lorq.storage.folder import LorqFolder
from lorq.storage.names import JOURNAL, MEASURED, TUNED_BLOCKS, TUNING
from lorq.storage.writer import CheckpointWriter

METHODS = {
    "gptq": lorq.GPTQ(bits=3, group_size=32),
    "vectors": lorq.LoPRo(bits=2, codebook="vector", rank=2),
    "lords": lorq.LoRDS(bits=2, group_size=32, steps=1),
    "blocks": lorq.GPTQ(grid="q4_1"),
    "tileq": lorq.TileQ(bits=3, group_size=32, rank=4),
}
CALIBRATION = {"samples": 4, "seq_len": 32}
QUICK = {"samples": 6, "held_out": 2, "seq_len": 24, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def quantized(folder_of, text_file, tmp_path_factory):
    """The folder of a family quantized by a method; made once, not to be changed."""
    made = {}

    def of(name, family="llama"):
        if (name, family) not in made:
            made[name, family] = out = tmp_path_factory.mktemp("plain") / name
            lorq.quantize(folder_of(family), out, METHODS[name], calibration=str(text_file), **CALIBRATION)
        return made[name, family]

    return of


@pytest.fixture
def tune(quantized, folder_of, text_file):
    def run(out, name="gptq", family="llama", *, progress=None, resume=False, overwrite=False, **settings):
        return lorq.tune(
            quantized(name, family), out, reference=folder_of(family), text=str(text_file), progress=progress,
            settings=Tuning(**QUICK | settings), resume=resume, overwrite=overwrite, dtype="float32",
        )  # fmt: skip

    return run


def stored(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    "name, family, settings",
    [
        ("gptq", "gpt2", {"steps": 3, "block_steps": 3}),
        ("gptq", "mixtral", {"steps": 0, "block_steps": 3}),
        ("vectors", "llama", {"steps": 0, "block_steps": 5}),
        ("lords", "llama", {"steps": 5}),
        ("blocks", "llama", {"steps": 3, "block_steps": 3}),
        ("tileq", "mixtral", {"steps": 3}),
    ],
    ids=str,
)
def test_a_tuned_folder_is_nearer_to_the_original_with_the_codes_and_the_size_that_it_had(
    name, family, settings, tune, quantized, tmp_path
):
    plain, before = quantized(name, family), folder_digests(quantized(name, family))
    report = tune(tmp_path / "out", name, family, **settings)
    assert folder_digests(plain) == before
    told = report.run["tuning"]
    assert told["kl_after"] < told["kl_before"] and told["text"] == "text.txt"
    assert report.bytes == lorq.read_report(plain).bytes and report == lorq.read_report(tmp_path / "out")
    assert lorq.verify(tmp_path / "out").faults == ()
    old, new = stored(plain), stored(tmp_path / "out")
    assert {key: (t.shape, t.dtype) for key, t in old.items()} == {key: (t.shape, t.dtype) for key, t in new.items()}
    moved = {key.rpartition(".")[2] for key in old if not torch.equal(old[key].double(), new[key].double())}
    whole = {"weight_packed", "weight_zero_point", "weight_shape", "permutation", "cells"}
    assert moved and not moved & whole
    for (layer, was), (_, is_) in zip(
        LorqFolder.open(plain).layers(), LorqFolder.open(tmp_path / "out").layers(), strict=True
    ):
        if name == "blocks":  # numbers and codes are one tensor
            assert torch.equal(was.codes.codes, is_.codes.codes), layer
            assert not torch.equal(was.codes.scale, is_.codes.scale), layer
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in plain.iterdir()} - {MEASURED}


@pytest.mark.parametrize("family, settings", [("mistral", {"steps": 3}), ("llama", {"steps": 2, "block_steps": 2})])
def test_quantized_tables_are_tuned_with_the_rest_or_stay_and_serve(family, settings, folder_of, text_file, tmp_path):
    """A head of its own learns as other layers do; a table that is head and embedding stays, to the last bit."""
    source, plain, out = folder_of(family), tmp_path / "plain", tmp_path / "out"
    lorq.quantize(
        source, plain, METHODS["gptq"], head=6, table_group_size=32, calibration=str(text_file), **CALIBRATION
    )
    report = lorq.tune(
        plain, out, reference=source, text=str(text_file), settings=Tuning(**QUICK | settings), dtype="float32"
    )
    told, old, new = report.run["tuning"], stored(plain), stored(out)
    assert told["kl_after"] < told["kl_before"] and report.bytes == lorq.read_report(plain).bytes
    moved = {key for key in old if not torch.equal(old[key].double(), new[key].double())}
    assert any("mlp" in key for key in moved)
    assert {key for key in moved if "lm_head" in key or "embed_tokens" in key} == (
        {"lm_head.weight_scale"} if family == "mistral" else set()
    )
    tokens = torch.randint(200, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loaded, dense = lorq.load(out)(tokens).logits, lorq.load(out).dequantize()(tokens).logits
    torch.testing.assert_close(loaded, dense, rtol=1e-3, atol=1e-4)


class PowerCut(Exception):
    pass


def stop_at(stage, number):
    def progress(name, done, total):
        if (name, done) == (stage, number):
            raise PowerCut

    return progress


BOTH = {"steps": 3, "block_steps": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tmp_path_factory.mktemp("whole") / "out"


@pytest.mark.parametrize("stage, number", [(TUNE_BLOCKS, 1), (TUNE, 2)])
def test_an_interrupted_run_goes_on_to_the_same_bytes(stage, number, tune, whole, tmp_path, monkeypatch):
    if not whole.exists():
        tune(whole, **BOTH)
    monkeypatch.setattr("lorq.adapt.fit._CHECKPOINT_SECONDS", 0)
    out = tmp_path / "out"
    with pytest.raises(PowerCut):
        tune(out, progress=stop_at(stage, number), **BOTH)
    assert (out / JOURNAL).exists() and not (out / "config.json").exists()
    assert (out / TUNED_BLOCKS).exists() and (out / TUNING).exists() == (stage == TUNE)
    with pytest.raises(ValueError, match="begun differently: learning_rate"):
        tune(out, resume=True, learning_rate=1e-2, **BOTH)
    tune(out, resume=True, **BOTH)
    assert folder_digests(out) == folder_digests(whole)


@pytest.mark.parametrize("after", [1, 3])
def test_a_run_that_stops_while_it_writes_goes_on_to_the_same_bytes(after, tune, whole, tmp_path, monkeypatch):
    if not whole.exists():
        tune(whole, **BOTH)
    out, write = tmp_path / "out", CheckpointWriter.write_shard

    def stopping(self, *arguments):
        if len(self.completed) == after:
            raise PowerCut
        write(self, *arguments)

    def stopped(self, **arguments):
        raise PowerCut

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(CheckpointWriter, "write_shard", stopping)
        patch.setattr(CheckpointWriter, "finish", stopped)
        tune(out, **BOTH)
    assert len(list(out.glob("lorq-*.safetensors"))) == after
    tune(out, resume=True, **BOTH)
    assert folder_digests(out) == folder_digests(whole)


def test_an_unfinished_run_is_replaced_with_all_that_it_kept(tune, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(PowerCut):
        tune(out, progress=stop_at(TUNE, 3), **BOTH)
    tune(out, overwrite=True, steps=1)
    assert not (out / TUNED_BLOCKS).exists() and not (out / TUNING).exists()


def test_quantize_and_tune_is_one_command_that_goes_on_where_it_was(
    folder_of, text_file, tmp_path, monkeypatch, capsys
):
    out, both = tmp_path / "out", tmp_path / "both"
    flags = ["--method", "gptq", "--bits", "3", "--group-size", "32", "--calibration", str(text_file), "--samples", "4"]
    flags += ["--seq-len", "32", "--tune", "2"]
    assert main(["quantize", str(folder_of("llama")), str(both), *flags]) == 0
    assert not both.with_name("both.untuned").exists()
    told = lorq.read_report(both).run["tuning"]
    assert (told["samples"], told["held_out"], told["steps"]) == (3, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr("lorq.adapt.tuning.fit", lambda *_: (_ for _ in ()).throw(PowerCut()))
        assert main(["quantize", str(folder_of("llama")), str(out), *flags]) == 1
    assert lorq.read_report(out.with_name("out.untuned")).method == "gptq"
    assert main(["quantize", str(folder_of("llama")), str(out), *flags, "--resume", "--exclude", "up_proj"]) == 1
    assert 'was made differently: exclude (folder: [], now: ["up_proj"])' in capsys.readouterr().err
    assert main(["quantize", str(folder_of("llama")), str(out), *flags, "--resume"]) == 0
    assert folder_digests(out) == folder_digests(both) and not out.with_name("out.untuned").exists()
    assert "before tuning" in capsys.readouterr().out


def test_what_cannot_be_tuned_is_refused_before_the_work(tune, quantized, folder_of, text_file, tmp_path):
    plain, out = quantized("gptq"), tmp_path / "out"
    for steps, block_steps, message in ((0, 0, "got 0 for both"), (-1, 5, "steps must be at least 0, got -1")):
        with pytest.raises(ValueError, match=message):
            Tuning(steps=steps, block_steps=block_steps)
    for reference, message in (
        (folder_of("qwen2"), r"must be the original that .* was made of, whose fingerprint is"),
        (plain, "must be the original, .* is quantized itself"),
    ):
        with pytest.raises(ValueError, match=message):
            lorq.tune(plain, out, reference=reference, text=str(text_file), settings=Tuning(**QUICK))
    with pytest.raises(ValueError, match=r"1002 windows of 23 tokens .* need 23046 tokens") as error:
        tune(out, samples=1000)
    assert error.value.__notes__ == ["for tuning on 1000 windows and measuring on 2 (--held-out)"]
    with pytest.raises(FileNotFoundError, match=r"has no lorq_report[.]json"):
        lorq.tune(folder_of("llama"), out, reference=folder_of("llama"))
    with pytest.raises(FileExistsError, match="must not be the model's own"):
        tune(plain)
    with pytest.raises(ValueError, match=r"block_steps must be 0 where experts share factors, as in \d+ projections"):
        tune(out, "tileq", "mixtral", block_steps=1)
    assert not out.exists()


def test_a_model_that_does_not_fit_is_refused_with_the_way_round(tune, tmp_path, monkeypatch):
    monkeypatch.setattr("lorq.adapt.tuning.available_bytes", lambda: 1000)
    with pytest.raises(
        ValueError, match=r"in memory at once, 0.\d+ MB .* 1000 bytes are free; .*--steps 0 --block-steps"
    ):
        tune(tmp_path / "out")
    tune(tmp_path / "out", steps=0, block_steps=1)


def test_the_report_of_a_tuning_is_printed_as_json(quantized, folder_of, text_file, tmp_path, capsys):
    flags = ["--text", str(text_file), "--samples", "4", "--held-out", "1", "--seq-len", "16", "--steps", "1"]
    assert (
        main(
            [
                "tune",
                str(quantized("gptq")),
                str(tmp_path / "o"),
                "--reference",
                str(folder_of("llama")),
                *flags,
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["run"]["tuning"]["steps"] == 1
