"""Exported GGUF files in llama.cpp itself. `LORQ_LLAMA_CPP_PYTHON=... pytest -m slow tests/engines/test_llama_cpp.py`.

The environment variable names a python that has xllamacpp and numpy: docs/engines/llama-cpp.md tells how it is made.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_models import CASES, gguf_folder, piece_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorq
from lorq import GgufOptions
from lorq.core.codes import GgufGrid
from lorq.core.codes.gguf_blocks import TYPES
from lorq.demo import demo_model
from lorq.models.texts import load_text
from lorq.storage.folder import LorqFolder

PYTHON = os.environ.get("LORQ_LLAMA_CPP_PYTHON", "")
WORKER = Path(__file__).with_name("llama_cpp.py")
TEXTS = [
    "The capital of France is Paris, isn't it? WE'LL see: 3.14159 and 12345.",
    "<|im_start|>user\nWhat?\n\n\n  x = y;\tHéllo, 你好 🙂<|im_end|>\n",
]
PROSE = """The river begins in the mountains of the north, where snow lies until the end of May. For the first forty
kilometres it runs through a narrow valley with only a few villages; then it reaches the plain, turns to the east, and
passes the old town, which was founded in 1284 by merchants from the coast. The bridge there was rebuilt three times:
after the flood of 1543, after the war, and in 1962, when the railway was moved to the other bank. Today most people who
live in the town work in the paper mills, in the hospital, or at the university, which has about nine thousand students.
In summer there are concerts in the market square, and the ferry takes visitors to the island with the lighthouse."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="needs LORQ_LLAMA_CPP_PYTHON, a python that has xllamacpp"),
]


def llama_cpp(what, model, given, **options):
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    run = subprocess.run([PYTHON, WORKER, what, model, given, *flags], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip().splitlines()[-1] if run.stdout.strip() else ""


def same_logits(folder, file, tmp_path, vocabulary, **options):
    """llama.cpp's of the file, and ours of the folder."""
    tokens = torch.randint(vocabulary, (2, 48), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    llama_cpp("logits", file, tmp_path / "tokens.npy", out=tmp_path / "logits.npy", **options)
    with torch.no_grad():
        return torch.from_numpy(np.load(tmp_path / "logits.npy")), lorq.load(folder)(tokens).logits


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_says_what_transformers_says(name, tmp_path):
    lorq.quantize(gguf_folder(tmp_path / "dense", name), tmp_path / "out", lorq.Nearest(bits=8, group_size=32))
    file = tmp_path / "model.gguf"
    # Weights as float32, which llama.cpp multiplies by floats; other types it multiplies by inputs of 8 bits.
    lorq.export(tmp_path / "out", file, gguf=GgufOptions(type="f32", embeddings="f32"))
    theirs, ours = same_logits(tmp_path / "out", file, tmp_path, 258)
    # Of GELU llama.cpp has a table of float16 values.
    near = 2e-3 if name.startswith("gemma") else 2e-5
    torch.testing.assert_close(theirs, ours, rtol=0, atol=near * float(ours.std()) * 4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert json.loads(llama_cpp("tokens", file, json.dumps(TEXTS))) == tokenizer(TEXTS)["input_ids"]


@pytest.mark.parametrize("add_prefix", [True, False])
def test_pieces_with_bytes_are_cut_alike(add_prefix, tmp_path):
    tokenizer = piece_tokenizer(PROSE, add_prefix)
    lorq.quantize(
        gguf_folder(tmp_path / "dense", "llama", vocab_size=len(tokenizer)),
        tmp_path / "out",
        lorq.Nearest(group_size=32),
    )
    tokenizer.save_pretrained(tmp_path / "out")
    lorq.export(tmp_path / "out", tmp_path / "model.gguf")
    texts = [*PROSE.split("\n"), "The river, 你好 🙂", "a  b   c"]
    expected = [tokenizer(text)["input_ids"] for text in texts]
    assert json.loads(llama_cpp("tokens", tmp_path / "model.gguf", json.dumps(texts))) == expected
    assert max(map(len, expected)) < 100 and expected[0][0] == 1


@pytest.mark.parametrize(("name", "method"), [("llama", "flrq"), ("mixtral", "flrq"), ("qwen2", "lopro")])
def test_adapters_are_the_low_rank_part(name, method, tmp_path):
    (tmp_path / "text.txt").write_text(PROSE)
    settings = {"flrq": lorq.FLRQ, "lopro": lorq.LoPRo}[method](bits=3, group_size=32)
    calibration = {"calibration": str(tmp_path / "text.txt"), "samples": 4, "seq_len": 64}
    report = lorq.quantize(gguf_folder(tmp_path / "dense", name), tmp_path / "out", settings, **calibration)
    ranks = {layer.rank for layer in report.layers}
    assert method == "lopro" or len(ranks) > 1  # by each layer's own rank nothing may be divided
    file, adapter = tmp_path / "model.gguf", tmp_path / "low-rank.gguf"
    lorq.export(tmp_path / "out", file, adapter=adapter, gguf=GgufOptions(type="f32", embeddings="f32"))
    theirs, ours = same_logits(tmp_path / "out", file, tmp_path, 258, adapter=adapter)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4 * float(ours.std()))
    without, _ = same_logits(tmp_path / "out", file, tmp_path, 258)
    assert float((without - ours).abs().max()) > 0.1 * float(ours.std())


@pytest.mark.parametrize("type", TYPES)
def test_ggml_decodes_blocks_to_the_same_weights(type, generator, tmp_path):
    grid = GgufGrid(type)
    shape = grid.layout(7, 2 * grid.layout_of.block)["weight_blocks"][0]
    blocks = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    np.save(tmp_path / "blocks.npy", blocks.numpy())
    llama_cpp("decode", type, tmp_path / "blocks.npy", out=tmp_path / "values.npy")
    values = grid.read({"weight_blocks": blocks}, 7, 2 * grid.layout_of.block).decode()
    assert np.array_equal(np.load(tmp_path / "values.npy"), values.numpy(), equal_nan=True)


def with_inputs_of_8_bits(model):
    """As llama.cpp multiplies on CPUs: inputs of quantized layers as q8_0, those of the head as float16."""

    def rounded(module, given):
        blocks = given[0].unflatten(-1, (-1, 32))
        step = blocks.abs().amax(-1, keepdim=True) / 127
        return ((blocks / step.clamp(min=1e-30)).round() * step.half().float()).flatten(-2)

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(rounded)
    model.lm_head.register_forward_pre_hook(lambda module, given: given[0].half().float())
    return model


def divergence(ours, theirs):
    """Mean KL (nats) of llama.cpp's predictions from ours."""
    ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


@pytest.mark.parametrize(
    "settings", [{"bits": 4, "symmetric": True}, {"bits": 4}, {"bits": 8, "symmetric": True}, {"grid": "iq4_nl"}]
)
def test_smollm2_has_the_same_perplexity_and_talks(settings, tmp_path):
    folder, file, plain = tmp_path / "out", tmp_path / "model.gguf", tmp_path / "float.gguf"
    lorq.quantize(demo_model(), folder, lorq.Nearest(group_size=32, range_search="scale", **settings))
    assert "rounding" not in lorq.export(folder, file).lost
    lorq.export(folder, plain, gguf=GgufOptions(type="f32", embeddings="f32"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert json.loads(llama_cpp("tokens", file, json.dumps(TEXTS))) == tokenizer(TEXTS)["input_ids"]
    # 8,192 tokens: over fewer of them the 8 bits of llama.cpp's inputs move perplexity by half a per cent by chance.
    tokens = torch.tensor(tokenizer(load_text("python-docs"))["input_ids"][: 16 * 512]).view(16, 512)
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    np.save(tmp_path / "few.npy", tokens[:2].numpy())

    def of_few(which):
        llama_cpp("logits", which, tmp_path / "few.npy", out=tmp_path / "logits.npy")
        return torch.from_numpy(np.load(tmp_path / "logits.npy"))

    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval()
    opened = LorqFolder.open(folder)
    for name in opened.formats:
        model.get_submodule(name).weight.data.copy_(opened.weight(name).dense())
    prompt = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        few, losses = model(tokens[:2]).logits, [float(model(window, labels=window).loss) for window in tokens.split(1)]
        said = model.generate(prompt, max_new_tokens=32, do_sample=False)[0, prompt.shape[1] :]
        rounded = with_inputs_of_8_bits(model)(tokens[:2]).logits
    # With floats llama.cpp computes what we do.
    torch.testing.assert_close(of_few(plain), few, rtol=0, atol=2e-3)
    assert llama_cpp_says(plain) == tokenizer.decode(said, skip_special_tokens=True)
    # By the types' own products it differs as much as inputs of 8 bits make differ, and these do by chance: noise of
    # 1e-6 turns over some of the roundings, each of these others, and in the end as much has changed (KL 0.0023).
    assert divergence(few, of_few(file)) < 1.3 * divergence(few, rounded)
    theirs = json.loads(llama_cpp("figures", file, tmp_path / "tokens.npy"))
    assert theirs["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=0.005)
    assert "Paris" in llama_cpp_says(file)


def llama_cpp_says(file):
    """32 tokens after a prompt, by the package's own server."""
    return json.loads(llama_cpp("generate", file, "The capital of France is"))["choices"][0]["text"]
