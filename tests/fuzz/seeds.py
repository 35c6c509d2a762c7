"""Small files of every kind that lorq reads, whole: what the fuzzer damages."""

import json
import shutil
from pathlib import Path

import torch
from gguf_models import gguf_folder
from helpers import tiny_folder
from safetensors.torch import load_file, save_file

import lorq
from lorq.storage.writer import CheckpointWriter

WRITTEN = Path(__file__).parents[1] / "unit" / "foreign" / "written_by_others.safetensors"
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"}
_PACKED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
    }}},
}  # fmt: skip
# Of what others have written, the config of each: a layer is all that its folder has.
OTHERS = {
    "gptq4act": _GPTQ | {"desc_act": True}, "gptq3": _GPTQ | {"bits": 3},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "ct4": _PACKED, "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "nf4d": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "fp8": {"quant_method": "fp8", "weight_block_size": [16, 16]}, "modelopt": {"quant_algo": "FP8"},
    "int-quantized": {
        "quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": {
            "targets": ["re:.*proj"], "weights": {"num_bits": 8, "type": "int", "symmetric": True,
                                                  "strategy": "channel"},
        }},
    },
}  # fmt: skip
LAYER = "model.layers.0.mlp.up_proj"


def make_seeds(home: Path) -> dict[str, list[str]]:
    """Make all of them below ``home``; the names of those of each kind that `readers.READERS` has."""
    text = home / "text.txt"
    text.write_text("".join(f"Line {i}: {i * i} is the square of {i}.\n" for i in range(80)), encoding="utf-8")
    run = {"calibration": str(text), "samples": 2, "seq_len": 32}
    gguf_folder(home / "model", "llama", hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    tiny_folder(home / "mixture", "mixtral", num_hidden_layers=1)
    factors = {"budget": 2.0, "min_gain": 0.0, "epochs": 0, "rounding": "nearest"}
    methods = {
        "ranks": lorq.FLRQ(bits=4, group_size=32, symmetric=True, **factors), "gptq": lorq.GPTQ(bits=3, group_size=32),
        "rotated": lorq.LoPRo(bits=3, group_size=32, importance="hessian"), "lords": lorq.LoRDS(bits=3, steps=2),
        "vectors": lorq.LoPRo(bits=2, codebook="vector", group_size=32, rank=2, epochs=0),
        "trellis": lorq.LoPRo(bits=2, codebook="trellis", group_size=-1, rank=2, epochs=0),
        "blocks": lorq.GPTQ(grid="q4_0"),
    }  # fmt: skip
    for name, method in methods.items():
        lorq.quantize(
            home / "model",
            home / name,
            method,
            **run | ({"head": 5, "table_group_size": 32} if name == "ranks" else {}),
        )
    lorq.quantize(home / "mixture", home / "shared", lorq.TileQ(bits=3, group_size=32, rank=2), **run)
    lorq.evaluate(home / "ranks", text=text, window=32, windows=2)
    lorq.export(home / "blocks", home / "model.gguf")
    lorq.export(home / "ranks", home / "packed", to="compressed-tensors", adapter=home / "lora")
    lorq.export(home / "gptq", home / "for-gptq", to="gptq")
    lorq.export(home / "gptq", home / "dense", to="dense")
    loaded = lorq.load(home / "lords", device="cpu")
    lorq.adapt.train(loaded, str(text), steps=1, batch=1, seq_len=16)
    lorq.adapt.save_adapter(loaded, home / "adapter")
    _unfinished(home / "unfinished")
    for name, config in OTHERS.items():
        _by_others(home / name, name, config)
    return {
        "folder": [*methods, "shared"], "adapter": ["adapter"], "source": [*OTHERS, "for-gptq", "packed", "model"],
        "made": ["packed", "lora", "for-gptq", "dense"], "gguf": ["model.gguf"], "unfinished": ["unfinished"],
    }  # fmt: skip


def _by_others(folder: Path, name: str, quantization: dict) -> None:
    """A folder with one layer that another program has packed."""
    folder.mkdir()
    written = {key.partition("/")[2]: t for key, t in load_file(WRITTEN).items() if key.startswith(f"{name}/")}
    if name in ("fp8", "modelopt"):
        scale = {"weight_scale_inv": torch.rand(2, 4)} if name == "fp8" else {"weight_scale": torch.rand(1)}
        written = {"weight": torch.randn(32, 64).to(torch.float8_e4m3fn)} | scale
    if name == "int-quantized":
        written = {"weight": torch.randint(-128, 128, (32, 64)).to(torch.int8), "weight_scale": torch.rand(32, 1)}
    tensors = {f"{LAYER}.{local}": tensor for local, tensor in written.items() if local != "dense"}
    save_file(tensors | {"model.norm.weight": torch.ones(64)}, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if name == "modelopt":
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    else:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


def _unfinished(folder: Path) -> None:
    """A run that was stopped after two shards."""
    writer = CheckpointWriter.create(folder, {"method": {"bits": 3}, "seed": 0, "names": ["a", "b"]})
    for number in (1, 2):
        name = f"lorq-{number:05d}-of-00003.safetensors"
        writer.write_shard(name, {f"{number}.weight": torch.arange(64.0)}, {"layers": [], "source": "0" * 64})


def copy_seed(seed: Path, place: Path) -> Path:
    """A copy that may be damaged."""
    if seed.is_file():
        shutil.copyfile(seed, place / seed.name)
        return place / seed.name
    return Path(shutil.copytree(seed, place / seed.name))
