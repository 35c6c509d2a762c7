"""Small models that call their blocks in their own ways."""

from pathlib import Path

import torch
from helpers import save_folder
from transformers import AutoConfig, AutoModelForCausalLM

SPECIAL = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": None, "pad_token_id": None}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
GEMMA = {
    **SIZES, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "hidden_size_per_layer_input": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": 257,
    "num_kv_shared_layers": 2,
}  # fmt: skip
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 8}
MODELS = {
    # blocks answer with tuples
    "falcon": SIZES,
    "bloom": {"hidden_size": 64, "n_head": 4, "n_layer": 2},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "gptj": GPT,
    "codegen": GPT,
    "gpt_neo": {
        "hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "window_size": 8, "max_position_embeddings": 128,
    },
    "trocr": {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 128},
    # inputs of each block depend on the tokens; keys and values go from block to block in a mapping
    "gemma4_text": GEMMA | {"global_head_dim": 16, "num_global_key_value_heads": 2},
    # likewise, and four hidden states for each token
    "gemma3n_text": GEMMA | {"laurel_rank": 8, "altup_num_inputs": 4, "activation_sparsity_pattern": [0.0] * 4},
    # part of a block's answer goes to the next
    "glm_moe_dsa": SIZES | {
        "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
        "index_topk": 8, "index_n_heads": 2, "index_head_dim": 32, "n_group": 1, "topk_group": 1,
        "indexer_types": ["full", "shared", "full", "shared"],
    },
}  # fmt: skip

EXCLUDED = {"gemma3n_text": ("altup", "laurel")}  # layers of four and eight columns


def kind_folder(folder: Path, kind: str) -> Path:
    """A random model of one model type as a Hugging Face folder with a byte-level tokenizer; `folder` is made."""
    config = AutoConfig.for_model(kind, **SPECIAL | MODELS[kind])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float()
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            size = 0.5 if "emb" in name or "wte" in name else 0.15
            parameter.data = parameter.data + 0.1 * noise if parameter.ndim == 1 else size * noise
    return save_folder(model, folder)
