"""A budget for the whole model, from the command to the folder: kept, resumed, shown, and refused before the work."""

import json
import re

import pytest
from helpers import folder_digests, tiny_folder

import lorq
import lorq.pipeline.quantize as stages
from lorq.cli import main
from lorq.storage.folder import LorqFolder

NEAREST = lorq.Nearest(group_size=32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("budget") / "llama", "llama")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("budget") / "small", "llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def run(text_file):
    return {"calibration": str(text_file), "samples": 2, "seq_len": 32, "token_weights": "gradient"}


def test_a_budget_is_kept_and_goes_on_where_it_was_interrupted(source, run, tmp_path, monkeypatch):
    options = run | {"bits_per_weight": 4.1, "widths": (2, 4, 8)}
    report = lorq.quantize(source, tmp_path / "whole", NEAREST, **options)
    assert 3.6 < report.bits_per_weight <= 4.1
    assert len({layer.bits for layer in report.layers}) > 1
    solve, predict = stages.begin_block, stages.predict

    def stop_at_the_second(model, plan, visit, probe, executor):
        if visit.part.name.endswith(".1"):
            raise KeyboardInterrupt
        return solve(model, plan, visit, probe, executor)

    monkeypatch.setattr(stages, "begin_block", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        lorq.quantize(source, tmp_path / "parts", NEAREST, **options)
    monkeypatch.setattr(stages, "begin_block", solve)
    monkeypatch.setattr(stages, "predict", None)  # what was chosen is known
    with pytest.raises(ValueError, match=r"begun differently: bits_per_weight \(folder: 4.1, now: 5.0\)"):
        lorq.quantize(source, tmp_path / "parts", NEAREST, **options | {"bits_per_weight": 5.0}, resume=True)
    lorq.quantize(source, tmp_path / "parts", NEAREST, **options, resume=True)
    assert folder_digests(tmp_path / "whole") == folder_digests(tmp_path / "parts")
    monkeypatch.setattr(stages, "predict", predict)
    dry = lorq.quantize(source, tmp_path / "dry", NEAREST, **options, dry_run=True)
    assert [layer.bits for layer in dry.layers] == [layer.bits for layer in report.layers]
    assert dry.bytes == report.bytes and not (tmp_path / "dry").exists()


def test_a_budget_chooses_between_the_types_of_gguf_that_fit(small, run, tmp_path):
    report = lorq.quantize(small, tmp_path / "out", lorq.GPTQ(grid="q4_0"), **run, bits_per_weight=5.2)
    assert 4.7 < report.bits_per_weight <= 5.2
    types = {weight.format.codes.type for _, weight in LorqFolder.open(tmp_path / "out").layers()}
    assert len(types) > 1 and not any(type.endswith("_k") for type in types)
    with pytest.raises(ValueError, match=r"widths are those of integer codes, gptq as it is chooses grid; leave --wid"):
        lorq.quantize(small, tmp_path / "no", lorq.GPTQ(grid="q4_0"), **run, bits_per_weight=5.2, widths=(3, 4))


def test_a_size_is_that_of_the_weight_files(small, run, tmp_path):
    flrq, run = lorq.FLRQ(group_size=32, epochs=0), run | {"widths": (3, 8)}
    with pytest.raises(ValueError, match=r"size must be at most [0-9.]+ MB") as refused:
        lorq.quantize(small, tmp_path / "out", flrq, **run, size="1GB")
    most = 1000 * float(re.search(r"at most ([0-9.]+)", str(refused.value))[1])
    lorq.quantize(small, tmp_path / "out", flrq, **run, size=f"{0.9 * most:.3f}KB")
    files = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 810 * most < files <= 900 * most


def test_the_command_shows_what_was_chosen(small, run, tmp_path, capsys):
    words = [word for key, value in run.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    words += ["--method", "nearest", "--group-size", "32"]
    assert main(["quantize", str(small), str(tmp_path / "out"), *words, "--bits-per-weight", "4.1"]) == 0
    out = capsys.readouterr().out
    assert "predicted divergence" in out and "layers" in out
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["run"]["budget"]["curve"]) > 1
    assert main(["quantize", str(small), str(tmp_path / "no"), *words, "--bits-per-weight", "1.1"]) == 1
    assert "bits_per_weight must be at least" in capsys.readouterr().err and not (tmp_path / "no").exists()
