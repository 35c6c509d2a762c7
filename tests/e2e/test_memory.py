"""Memory is bounded by one block, not by the model."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import byte_tokenizer
from safetensors.torch import save_file
from transformers import LlamaConfig

WIDTH, INNER = 512, 1024
BLOCK_BYTES = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)  # float32, as a block is worked on
# Imports once; then each command runs in a process of its own, whose peak is printed, in bytes.
RUNNER = """
import json, os, sys
import torch
import lorq.cli, lorq.pipeline.quantize, transformers.models.llama
torch.set_num_threads(1)
for command in json.load(sys.stdin):
    child = os.fork()
    if not child:
        os._exit(lorq.cli.main(command))
    _, status, usage = os.wait4(child, 0)
    print("status", os.waitstatus_to_exitcode(status), "peak", usage.ru_maxrss * 1024, flush=True)
"""


def deep_folder(folder, blocks):
    """A Llama of ``blocks`` equal blocks of 10.5 MB each in float32, written without making a model."""
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=257, max_position_embeddings=64, tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"], dtype="float16",
    )  # fmt: skip
    config.save_pretrained(folder)
    byte_tokenizer(64).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).half()

    block = {f"self_attn.{name}_proj.weight": random(WIDTH, WIDTH) for name in "qkvo"}
    block |= {f"mlp.{name}_proj.weight": random(INNER, WIDTH) for name in ("gate", "up")}
    block |= {"mlp.down_proj.weight": random(WIDTH, INNER)}
    block |= {f"{name}_layernorm.weight": torch.ones(WIDTH).half() for name in ("input", "post_attention")}
    tensors = {f"model.layers.{i}.{name}": tensor.clone() for i in range(blocks) for name, tensor in block.items()}
    tensors |= {"model.embed_tokens.weight": random(257, WIDTH), "model.norm.weight": torch.ones(WIDTH).half()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_peak_does_not_grow_with_the_number_of_blocks(tmp_path):
    depths = (4, 16)
    folders = {blocks: deep_folder(tmp_path / f"deep-{blocks}", blocks) for blocks in depths}
    commands = [
        ["quantize", str(folder), str(tmp_path / f"out-{blocks}"), "--method=nearest"]
        for blocks, folder in folders.items()
    ]
    shallow, deep = peaks_of(commands)
    assert deep < 1.1 * shallow
    # 126 MB more weights; what is held for each of them would be a multiple of this.
    assert deep - shallow < 0.25 * (depths[1] - depths[0]) * BLOCK_BYTES


def peaks_of(commands):
    """Peak memory of each command, in bytes.

    glibc keeps freed memory below a bound that moves: some blocks' worth, and another number in every run. Here all
    from 64 KB on goes back at once, so that the peak is what is in use.
    """
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps([[*command, "--overwrite"] for command in commands]),
        env=os.environ | settings, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    answers = [line.split() for line in run.stdout.splitlines() if line.startswith("status")]
    assert [answer[1] for answer in answers] == ["0", "0"], run.stderr
    return [int(answer[3]) for answer in answers]
