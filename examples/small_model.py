"""A random model of two blocks with a tokenizer of bytes, for who has no model at hand."""

import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def model_path() -> str:
    """The path on the command line, or that of a new random model."""
    return sys.argv[1] if len(sys.argv) > 1 else str(small_model(Path(tempfile.mkdtemp()) / "model"))


def small_model(folder: Path) -> Path:
    """Write a random Llama of 100,000 weights as a Hugging Face folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, initializer_range=0.2, bos_token_id=256, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", model_max_length=256).save_pretrained(folder)
    return folder
