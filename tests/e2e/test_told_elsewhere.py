"""Quantized sources whose config says so somewhere else than usual, or nowhere: read by what is told, or refused."""

import json

import pytest
import torch
from gguf_models import gguf_folder
from helpers import tiny_folder
from safetensors.torch import load_file, save_file

import lorq
from lorq.models.quantized import read_dense
from lorq.storage.folder import LorqFolder

METHOD = lorq.Nearest(bits=8, group_size=16)
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "float-quantized",
    "config_groups": {"group": {"targets": ["Linear"], "weights": WEIGHTS}},
}  # fmt: skip
FP8 = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}


def with_float8(folder, scale="weight_scale"):
    """Make a model's projections float8, each with one scale; what they stand for, by name."""
    (file,) = folder.glob("*.safetensors")
    tensors, values = load_file(file), {}
    for name in [name for name in tensors if name.endswith("proj.weight") and "vision" not in name]:
        step = tensors[name].abs().max() / 448
        tensors[name.replace("weight", scale)] = step.reshape(1)
        tensors[name] = (tensors[name] / step).to(torch.float8_e4m3fn)
        values[name] = tensors[name].float() * step
    save_file(tensors, file, metadata={"format": "pt"})
    return values


def tell(folder, **told):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | told))


@pytest.mark.parametrize("where", ["compression_config", "hf_quant_config.json", "modelopt"])
def test_float8_is_read_with_its_scales_wherever_it_is_told_of(where, tmp_path):
    source = tiny_folder(tmp_path / "source", "llama", tie_word_embeddings=False)
    values = with_float8(source)
    if where == "compression_config":
        tell(source, compression_config=COMPRESSED)
    elif where == "modelopt":
        tell(source, quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
    else:
        (source / where).write_text(json.dumps(FP8))
    lorq.quantize(source, tmp_path / "out", METHOD)
    for name, weight in LorqFolder.open(tmp_path / "out").layers():
        value = values.pop(f"{name}.weight")
        torch.testing.assert_close(weight.dense(), value, rtol=0, atol=float(value.abs().max()) / 100)
    assert not values
    config = (tmp_path / "out/config.json").read_text()
    assert "compress" not in config and not (tmp_path / "out/hf_quant_config.json").exists()
    assert torch.equal(
        lorq.load(source, device="cpu").get_decoder().layers[0].mlp.up_proj.weight,
        read_dense(source, torch.float32).tensor("model.layers.0.mlp.up_proj.weight"),
    )


def test_what_the_config_of_the_text_model_says_is_read(tmp_path):
    source = gguf_folder(tmp_path / "source", "gemma3-sees", vocab_size=272)
    values = with_float8(source)
    text = json.loads((source / "config.json").read_text())["text_config"]
    tell(source, text_config=text | {"quantization_config": COMPRESSED})
    lorq.quantize(source, tmp_path / "out", METHOD)
    found = {name.split("layers.")[1]: weight.dense() for name, weight in LorqFolder.open(tmp_path / "out").layers()}
    for name, value in values.items():
        weight = found[name.split("layers.")[1].removesuffix(".weight")]
        torch.testing.assert_close(weight, value, rtol=0, atol=float(value.abs().max()) / 100)
    assert "compressed" not in (tmp_path / "out/config.json").read_text()
    tell(source, quantization_config=COMPRESSED | {"format": "dense"})
    with pytest.raises(ValueError, match=r"text_config\.quantization_config must be as what is told before it"):
        read_dense(source, torch.float32)


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv"])
def test_float8_with_scales_that_nobody_tells_of_is_refused(scale, tmp_path):
    source = tiny_folder(tmp_path / "source", "llama", tie_word_embeddings=False)
    with_float8(source, scale)
    words = rf"source must say in config.json .* nothing of \S+proj.weight \(torch.float8_e4m3fn\) and its \S+{scale};"
    plain = tiny_folder(tmp_path / "plain", "llama", tie_word_embeddings=False)
    lorq.quantize(plain, tmp_path / "quantized", METHOD)
    for refused in (
        lambda: lorq.quantize(source, tmp_path / "out", METHOD),
        lambda: lorq.load(source),
        lambda: lorq.evaluate(tmp_path / "quantized", reference=source, text="python-docs-odd", windows=1, window=16),
    ):
        with pytest.raises(ValueError, match=words):
            refused()
    (source / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    with pytest.raises(ValueError, match=r"must have ModelOpt's quant_algo FP8, got 'NVFP4'; give a folder"):
        lorq.quantize(source, tmp_path / "out", METHOD)


def test_integers_in_blocks_are_read_by_what_the_config_says(tmp_path):
    source = tiny_folder(tmp_path / "source", "llama", tie_word_embeddings=False)
    tensors, values = load_file(source / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        blocks = tensors[name].unflatten(0, (-1, 8)).unflatten(2, (-1, 8))
        scale = blocks.abs().amax((1, 3)) / 127
        spread = scale.repeat_interleave(8, 0).repeat_interleave(8, 1)
        tensors[name.replace("weight", "weight_scale")] = scale
        tensors[name] = (tensors[name] / spread).round().to(torch.int8)
        values[name] = tensors[name] * spread
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "strategy": "block", "block_structure": [8, 8]}
    group = {"targets": ["Linear"], "weights": weights}
    told = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group": group}}
    tell(source, quantization_config=told)
    files = read_dense(source, torch.float32)
    for name, value in values.items():
        torch.testing.assert_close(files.tensor(name), value)
    weights["block_structure"] = None
    tell(source, quantization_config=told)
    with pytest.raises(ValueError, match=r"proj must have a block_structure of two numbers, got \(\)"):
        read_dense(source, torch.float32)
    weights |= {"strategy": "group", "group_size": 32}
    tell(source, quantization_config=told)
    with pytest.raises(ValueError, match=r"must have scales for 4 groups of 128 columns, .* it has them for 16"):
        read_dense(source, torch.float32)


def test_codes_are_symmetric_where_compressed_tensors_config_does_not_say(tmp_path):
    """As compressed-tensors itself has it: `QuantizationArgs.symmetric` is True by default.

    A file that has lost its zero points, and the word of them, can then not be told from a symmetric one.
    """
    plain = tiny_folder(tmp_path / "plain", "llama", tie_word_embeddings=False)
    lorq.quantize(plain, tmp_path / "q", lorq.Nearest(bits=4, group_size=16, symmetric=False))
    lorq.export(tmp_path / "q", tmp_path / "source", to="compressed-tensors")
    told = json.loads((tmp_path / "source/config.json").read_text())["quantization_config"]
    weights = told["config_groups"]["group_0"]["weights"]
    assert not weights.pop("symmetric")
    tell(tmp_path / "source", quantization_config=told)
    words = r"no zero points, since symmetric is true where the config does not say, its weight_zero_point has some"
    with pytest.raises(ValueError, match=words):
        read_dense(tmp_path / "source", torch.float32)
    weights["strategy"] = "block"
    tell(tmp_path / "source", quantization_config=told)
    with pytest.raises(ValueError, match=r"packed codes with scales of rows or groups, \S+ has the strategy block"):
        read_dense(tmp_path / "source", torch.float32)
