"""Small models for tests."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

BYTES = 256
BOS = 256


def tiny_model(seed: int = 0, **changes):
    settings = {
        "vocab_size": BYTES + 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,  # logits spread enough for the choice of the token to matter
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings | changes))
