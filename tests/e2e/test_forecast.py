"""What a run will take, told before it, and the budget of memory that is kept or refused."""

import json
import os
import subprocess
import sys

import pytest
import sizes
import torch
from helpers import byte_tokenizer, folder_digests, tiny_folder

import lorq
from lorq.cli import main
from lorq.pipeline import quantize as stages
from lorq.runtime.device import memory_now, memory_peak, reset_peak
from lorq.storage.measured import read_measured

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's count of memory")


@pytest.fixture
def run(text_file):
    return {"calibration": str(text_file), "samples": 4, "seq_len": 32}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose blocks take more than everything around them: 27 MB each in float32."""
    sizes = {"hidden_size": 768, "intermediate_size": 1536}
    return tiny_folder(tmp_path_factory.mktemp("models") / "wide", "llama", num_hidden_layers=3, **sizes)


@linux
def test_the_peak_of_memory_is_counted_anew():
    torch.ones(25_000_000).sum()
    high = memory_peak()
    reset_peak()
    low = memory_peak()
    assert high - low > 90e6 and abs(low - memory_now()) < 10e6


RUN = """
import json, sys, torch
torch.set_num_threads(1)
import lorq
from pathlib import Path
from lorq.storage.measured import read_measured
source, out, run = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
told = lorq.quantize(source, out, lorq.GPTQ(bits=3, group_size=64), **run, dry_run=True).run["forecast"]
lorq.quantize(source, out, lorq.GPTQ(bits=3, group_size=64), **run, memory_budget="8GB")
print(json.dumps([told, vars(read_measured(out))]))
"""


@linux
def test_a_forecast_is_near_what_the_run_takes(wide, run, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RUN, wide, tmp_path / "out", json.dumps(run)], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    told, found = json.loads(done.stdout.splitlines()[-1])
    assert told["blocks"] == 3 and told["measured"][0] == "model.layers.0"
    assert 0.85 < told["memory"] / found["memory"] < 1.2
    assert 0.85 < found["foretold"] / found["memory"] < 1.2
    assert 0.2 < told["seconds"]["solving"] / found["stages"]["solving"] < 5  # the machine is busy with other tests
    assert told["kept"] == 4 * 4 * 32 * 768 and told["spilled"] == 0
    assert told["written"] >= sum(file.stat().st_size for file in (tmp_path / "out").glob("lorq-*.safetensors")) * 0.98


def test_a_budget_sends_to_files_what_does_not_fit_and_changes_no_byte(folder_of, run, tmp_path, monkeypatch):
    method, spilled = lorq.GPTQ(bits=3, group_size=32), []
    lorq.quantize(folder_of("llama"), tmp_path / "plain", method, **run)
    monkeypatch.setattr("lorq.pipeline.forecast.memory_peak", lambda: 1_000_000)
    told = lorq.quantize(folder_of("llama"), tmp_path / "dry", method, **run, dry_run=True).run["forecast"]
    fit = stages.fitted
    monkeypatch.setattr(stages, "fitted", lambda *given: spilled.append(fit(*given)) or spilled[0])
    budget = (told["memory"] - told["kept"] / 2) / 1e6
    lorq.quantize(folder_of("llama"), tmp_path / "tight", method, **run, memory_budget=f"{budget:.3f}MB")
    plan, memory = spilled[0]
    assert plan.options.spill_bytes < told["kept"] and memory < budget * 1e6
    assert folder_digests(tmp_path / "plain") == folder_digests(tmp_path / "tight")
    assert read_measured(tmp_path / "tight").foretold


def test_a_budget_that_one_block_exceeds_is_refused_before_the_work(folder_of, run, tmp_path, capsys):
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in run.items()]
    command = ["quantize", str(folder_of("llama")), str(tmp_path / "out"), "--method=gptq", "--group-size=32", *flags]
    assert main([*command, "--memory-budget=1MB"]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "memory_budget must hold a block and the solving of its largest layer" in told and "got 1MB; give" in told
    assert not list((tmp_path / "out").glob("lorq-*.safetensors"))
    assert main([*command, "--memory-budget=1MB", "--dry-run"]) == 1
    assert "of it Python, torch and what is read), got 1MB" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--memory-budget=much"]) == 1
    assert "memory_budget must be a number of KB, MB or GB" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "method, flags", [("gptq", []), ("lrq", ["--steps=1"]), ("flrq", ["--token-weights=gradient"]), ("nearest", [])]
)
def test_a_dry_run_prints_what_the_run_takes(method, flags, folder_of, run, tmp_path, capsys):
    options = [f"--{key.replace('_', '-')}={value}" for key, value in run.items()] if method != "nearest" else []
    command = ["quantize", str(folder_of("llama")), str(tmp_path / "out"), f"--method={method}", "--group-size=32"]
    assert main([*command, *options, *flags, "--dry-run"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "peak memory, predicted" in told and "time, predicted" in told and "GB at most" in told
    assert ("solving not predicted" in told) == (method == "lrq")
    assert not (tmp_path / "out").exists()


@linux
def test_shapes_alone_tell_nearly_the_memory_that_a_block_does(wide, run, tmp_path, monkeypatch):
    method = lorq.GPTQ(bits=3, group_size=64)
    tried = lorq.quantize(wide, tmp_path / "out", method, **run, dry_run=True).run["forecast"]
    monkeypatch.setattr(stages, "too_large", lambda _: "it is")
    told = lorq.quantize(wide, tmp_path / "out", method, **run, dry_run=True).run["forecast"]
    assert told["measured"][0] == "shapes"
    assert {key: told[key] for key in ("blocks", "read", "kept", "written")} == {
        key: tried[key] for key in ("blocks", "read", "kept", "written")
    }
    assert 0.7 < told["memory"] / tried["memory"] < 1.4
    with pytest.raises(ValueError, match="it is"):
        lorq.quantize(wide, tmp_path / "out", method, **run)


@linux
@pytest.mark.parametrize("name", ["405b", pytest.param("1t", marks=pytest.mark.slow)])
def test_models_that_fit_no_machine_here_are_planned(name, tmp_path, text_file):
    folder = tmp_path / name
    folder.mkdir()
    assert sizes.write_holes(folder, sizes.PLANNED[name]) > 800e9
    byte_tokenizer(64).save_pretrained(folder)
    done = sizes.run(
        "quantize", folder, tmp_path / "out", "--method", "gptq", "--bits", "3", "--group-size", "128", "--dry-run",
        "--calibration", text_file, "--samples", "4", "--seq-len", "32", "--json",
    )  # fmt: skip
    told = json.loads(done.out)["run"]["forecast"]
    assert done.peak < 3e9 and told["memory"] > 60e9
    assert told["blocks"] == sizes.PLANNED[name].config["num_hidden_layers"]
    assert 0.18 < told["written"] / sizes.write_holes(folder, sizes.PLANNED[name]) < 0.22
