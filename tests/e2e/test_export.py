"""lorq export: what other programs read stands for the same model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorq
from lorq.cli import main
from lorq.exports import TARGETS

TOKENS = torch.arange(7, 39)[None]


@pytest.fixture(scope="module")
def quantized(folder_of, tmp_path_factory):
    """A tiny model of a family, rounded to nearest; made once, not to be changed."""
    made = {}

    def of(family, method=lorq.Nearest(bits=4, group_size=16), **options):  # noqa: B008  # frozen
        key = (family, method, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("export") / family
            lorq.quantize(folder_of(family), made[key], method, **options)
        return made[key]

    return of


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss"])
def test_dense_folders_say_what_the_quantized_ones_do(family, quantized, folder_of, tmp_path):
    folder = quantized(family)
    done = lorq.export(folder, tmp_path / "dense", to="dense", dtype="float32")
    assert float(done.lost["rounding"].split()[5]) == 0
    torch.testing.assert_close(logits(dense(tmp_path / "dense")), logits(lorq.load(folder)), rtol=1e-4, atol=1e-4)
    # The same names, shapes and config as the original's, but for the type.
    original = load_file(folder_of(family) / "model.safetensors")
    ours = load_file(tmp_path / "dense" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in original.items()}
    configs = [json.loads((f / "config.json").read_text()) for f in (folder_of(family), tmp_path / "dense")]
    assert {key: configs[1].get(key) for key in configs[0]} == configs[0]
    assert {"quantization_config", "transformers_weights"}.isdisjoint(configs[1])
    tokens = [AutoTokenizer.from_pretrained(f)("abc").input_ids for f in (folder_of(family), tmp_path / "dense")]
    assert tokens[0] == tokens[1]


def test_rounding_to_a_type_is_measured(quantized, tmp_path):
    done = lorq.export(quantized("llama"), tmp_path / "half", to="dense", dtype="bfloat16")
    assert 5e-4 < float(done.lost["rounding"].split()[5]) < 4e-3  # half a step of 8 bits is at most 2^-9
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}


def test_many_tensors_go_to_several_files(quantized, tmp_path, monkeypatch):
    monkeypatch.setattr("lorq.exports.plain._MOST_BYTES", 100_000)
    lorq.export(quantized("llama"), tmp_path / "dense", to="dense", dtype="float32")
    index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2
    torch.testing.assert_close(logits(dense(tmp_path / "dense")), logits(lorq.load(quantized("llama"))))


def test_the_command_prints_what_was_written_and_lost(quantized, tmp_path, capsys):
    out = tmp_path / "dense"
    assert main(["export", str(quantized("llama")), str(out), "--to", "dense", "--dtype", "float16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"wrote {out}, {(out / 'model.safetensors').stat().st_size / 1e6:.1f} MB"
    assert lines[1].startswith("lost, rounding: float16 changes the weights by 0.0")
    assert main(["export", str(quantized("llama")), str(out), "--to", "dense"]) == 1
    assert f"{out} must be new, it is there" in capsys.readouterr().err
    assert main(["export", str(quantized("llama")), str(out), "--to", "dense", "--overwrite"]) == 0


def test_targets_say_what_they_refuse(quantized, tmp_path):
    folder = quantized("llama")
    with pytest.raises(ValueError, match=r"--to dense has the low-rank part in its matrices, --adapter .*lora is none"):
        lorq.export(folder, tmp_path / "out", to="dense", adapter=tmp_path / "lora")
    with pytest.raises(FileExistsError, match="must be three places"):
        lorq.export(folder, tmp_path / "out", to="dense", adapter=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_too_large_for_a_type_are_refused(folder_of, tmp_path):
    from helpers import save_folder, tiny_model

    model = tiny_model()
    model.model.norm.weight.data[0] = 1e5
    lorq.quantize(save_folder(model, tmp_path / "model"), tmp_path / "q", lorq.Nearest(bits=4, group_size=8))
    with pytest.raises(ArithmeticError, match=r"model\.norm\.weight must fit float16, its largest value is 1e\+05"):
        lorq.export(tmp_path / "q", tmp_path / "out", to="dense", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_every_target_is_told_in_the_help():
    own = lorq.export.__doc__.split("        to: ")[1].split("        dtype:")[0]
    assert all(name in own for name in TARGETS)
