"""Small configs of every model type: sizes by rules on the names of settings, and what these do not make right."""

import inspect
import re
from typing import Any

from helpers import BYTES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Sizes by the name of a setting: the first pattern that fits it decides. Widths are multiples of 16.
SIZES = (
    (r"^(vocab_size|.*_vocab_size|vocab_size_per_layer_input|tokenizer_vocab_size)$", BYTES + 16),
    (r"^(bos|eos|pad)_token_id$", {"bos": BYTES, "eos": BYTES + 1, "pad": 1}),
    (r"_token_(id|index)$", BYTES + 2),
    (r"n_group$|topk_group|num_expert_group", 1),
    (r"(kv|key_value|query_group|kv_n)_?(heads|groups)|num_kv|n_head_kv|num_query_groups", 2),
    (r"experts_per_tok|top_?k(_experts)?$|num_selected|moe_k$|num_experts_per_token|topk", 2),
    (r"shared_experts$", 1),
    (r"^(num|n|moe_num)_?\w*experts$|ffn_config_experts|num_experts$", 4),
    (r"(moe|expert|shared)\w*_(intermediate_size|ffn\w*|size)$", 32),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"num_(mtp|nextn)\w*|mtp_num\w*|num_nextn_predict_layers", 0),
    (r"(q_lora|kv_lora|lora)_rank", 32),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|qk_head_dim|head_dim|\w+_head_dim|attention_head_dim|d_head$", 16),
    (r"^(num|n|encoder|decoder)\w*_?heads?$|attention_heads", 4),
    (r"^(num|n|encoder|decoder)\w*_layers?$|num_hidden_layers|^depth$|num_blocks", 2),
    (r"max_position|n_positions|max_seq_len|max_sequence|n_ctx|max_target|max_source|seq_length|max_context", 128),
    (r"(intermediate|ffn|feed_?forward)\w*(size|dim)|d_ff|d_inner|n_inner|encoder_ffn_dim|decoder_ffn_dim", 128),
    (r"^(hidden_size|d_model|n_embd|dim|(embed|hidden|emb|embedding|model)_dim|width|embedding_size)$", 64),
    (r"^(word_embed_proj_dim|out_hidden_size|text_hidden_size|projection_dim|output_dim|lm_hidden_dim)$", 64),
    (r"state_size|d_state|ssm_state|mamba_d_state", 16),
    (r"sliding_window$|attention_window|local_window|window_size", 8),
    (r"^image_size$", 32),
    (r"^(patch_size|spatial_patch_size)$", 8),
)  # fmt: skip
# What the sizes above do not make right, by model type.
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
# Vision and language: parts of a head of 16 that turn with time, height and width.
_TURNS = {"text_config": {"rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}}}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl", "glm_ocr"), _TURNS),
    **dict.fromkeys(("glm4v", "glm46v", "glmga"), _TURNS),
    "glm4v_moe": {"text_config": {
        "rope_parameters": _ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}, "head_dim": 16,
    }},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "bigbird_pegasus": {"block_size": 8},
    "blt": {
        "patch_in_forward": False,
        "encoder_config": {"hidden_size_global": 64, "hidden_size": 64},
        "decoder_config": {"hidden_size_global": 64, "hidden_size": 64},
        "global_config": {"hidden_size": 64},
        "encoder_hash_byte_group_size": [2, 3], "encoder_hash_byte_group_vocab": 64, "cross_attn_k": 1,
    },
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "codegen": {"rotary_dim": 8},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "ctrl": {"dff": 128},
    "cpmant": {"position_bias_num_buckets": 32, "prompt_length": 4, "dim_ff": 128, "position_bias_max_distance": 64},
    "dbrx": {
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "topk_method": "greedy"},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64, "per_layer_config": {}},
        "audio_config": {"adapter_out_dim": 64, "adapter_input_size": 64},
        "text_config": {"per_layer_config": {}, "head_dim": 32},
    },
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 32},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [128] * 4, "laurel_rank": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.9, 0.0] * 2,
        "hidden_size_per_layer_input": 16,
    },
    "gemma4_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 16,
    },
    "glm5_next": {"text_config": {"index_topk": 16}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": _MAMBA | {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl": {"text_config": {"head_dim": 16}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 32, "zero_expert_num": 2, "expert_ffn_hidden_size": 32},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 16},
    "mistral4": {
        "rope_parameters": _ROPE | {"original_max_position_embeddings": 128, "llama_4_scaling_beta": 0.1},
        "head_dim": 16, "qk_head_dim": 32,
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
        "indexer_compress_ratio": 4, "hc_lowrank": 16,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64},
    "reformer": {
        "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16], "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4, "attention_head_size": 16,
    },
    "step3p7": {"text_config": {"sliding_window": 8}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3, "attention_head_dim": 32,
        "attention_hidden_size": 128, "mamba_dt_rank": 16, "n_mamba_heads": 2, "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3, "attention_head_dim": 32,
        "attention_hidden_size": 128, "n_mamba_heads": 8, "mamba_headdim": 16, "num_key_value_heads": 4,
        "hybrid_layer_ids": [1, 2], "adapter_rank": 16,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}  # fmt: skip
OWN["qwen4_exp"] = {"text_config": OWN["qwen4_exp_text"]}
OWN["gemma3n"] = {"text_config": OWN["gemma3n_text"], "vision_config": {"architecture": "mobilenetv3_small_050"}}


def small(kind: type, own: dict[str, Any]) -> Any:
    """A config of a class with small sizes, those of its parts' configs included."""
    fields: dict[str, Any] = {}
    defaults = _defaults(kind)
    for name, value in defaults.items():
        part = getattr(kind, "sub_configs", {}).get(name)
        if part is not None and isinstance(part, type) and part.__name__ != "AutoConfig":
            continue
        if isinstance(value, dict) and "mrope_section" in value:
            fields[name] = value | {"mrope_section": _sections(value)}
        for pattern, size in SIZES:
            if found := re.search(pattern, name):
                if isinstance(size, dict):  # tokens
                    fields[name] = size[found[1]]
                elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    fields[name] = size
                break
    if defaults.get("kv_lora_rank"):
        fields["num_key_value_heads"] = 4
    return _nested(kind, fields | _layer_kinds(defaults), own)


def _layer_kinds(defaults: dict[str, Any]) -> dict[str, Any]:
    """As few layers as have one of every kind."""
    count = next((name for name in ("num_hidden_layers", "num_layers") if name in defaults), "")
    kinds = {
        name: list(dict.fromkeys(value))
        for name, value in defaults.items()
        if isinstance(value, list) and value and isinstance(value[0], str) and len(value) == defaults.get(count)
    }
    most = max(map(len, kinds.values()), default=1)
    if most == 1:
        return {name: value * 2 for name, value in kinds.items()}
    return {name: value + value[-1:] * (most - len(value)) for name, value in kinds.items()} | {count: most}


def _nested(kind: type, fields: dict[str, Any], own: dict[str, Any]) -> Any:
    for name, part in getattr(kind, "sub_configs", {}).items():
        mine = own.get(name, {})
        if part.__name__ == "AutoConfig":
            default = _defaults(kind).get(name)
            like = mine.get("model_type") or (default or {}).get("model_type")
            if not like:
                continue
            part = CONFIG_MAPPING[like]
        fields[name] = small(part, {key: value for key, value in mine.items() if key != "model_type"})
    return kind(**fields | {key: value for key, value in own.items() if key not in getattr(kind, "sub_configs", {})})


def _sections(rope: dict[str, Any]) -> list[int]:
    """Parts of a head of 16 that turn with time, height and width."""
    half = int(16 * rope.get("partial_rotary_factor", 1)) // 2
    return [half - 2 * (half // 3), half // 3, half // 3]


def _defaults(kind: type) -> dict[str, Any]:
    """Settings of a config class and their values where nothing is given."""
    given = {
        name: p.default
        for name, p in inspect.signature(kind.__init__).parameters.items()
        if name not in ("self", "kwargs") and p.default is not inspect.Parameter.empty
    }
    try:
        return kind().to_dict()
    except Exception:
        return given
