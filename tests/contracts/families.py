"""The table of families: every causal architecture of transformers, built small, from the folder to the answer.

    python tests/contracts/families.py              # prints a line for each
    python tests/contracts/families.py gemma3 llama # those model types
    python tests/contracts/families.py --record     # writes src/lorq/families.csv, which `lorq families` prints; with
                                                    # model types only their rows

A family is a class that transformers builds from a model type. Each is looked at in a process of its own, forked
from this one, so that a trace or an endless loop in one is a line of the table and stops nothing.
"""

import csv
import inspect
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import transformers
from helpers import BYTES, byte_tokenizer
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

import lorq

TABLE = Path(__file__).parents[2] / "src" / "lorq" / "families.csv"
SECONDS = 120
WORKS, REFUSED, BROKEN, UNBUILT = "works", "refused", "broken", "not built"
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


def families() -> list[tuple[str, str]]:
    """Every model type with its causal class, and those that only a class with images or sounds is for."""
    causal = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    found = list(causal.items())
    for mapping in (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ):
        found += [(kind, name) for kind, name in mapping.items() if (kind, name) not in found]
    return found


def build(kind: str, name: str, folder: Path) -> None:
    """A random model in a folder, with a tokenizer of bytes."""
    torch.manual_seed(0)
    config = small(CONFIG_MAPPING[kind], OWN.get(kind, {}))
    config.is_decoder = True
    chosen = getattr(transformers, name)
    if chosen.config_class is not type(config):  # the language model of a composite
        parts = [getattr(config, part, None) for part in config.sub_configs]
        config = next((part for part in parts if type(part) is chosen.config_class), config)
    model = chosen(config).eval().float()
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1 and not leaf.startswith(("A_", "dt", "D")):
                # A fresh model has norms of 1 and biases of 0, which would hide that one is forgotten.
                parameter.data += 0.1 * torch.randn(parameter.shape)
            elif isinstance(module, nn.Linear | Conv1D) or "expert" in path.lower():
                parameter.data = 0.15 * torch.randn(parameter.shape)
            elif isinstance(module, nn.Embedding):
                parameter.data = 0.5 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    byte_tokenizer(128).save_pretrained(folder)


def look(kind: str, name: str, work: Path) -> tuple[str, str]:
    """The verdict on a family, and the reason."""
    try:
        build(kind, name, work / "m")
        chosen = getattr(transformers, name)
        dense, info = chosen.from_pretrained(work / "m", dtype=torch.float32, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            return (
                UNBUILT,
                f"transformers does not find {missing[0]} and {len(missing) - 1} more when it loads what it saved",
            )
        windows = torch.randint(BYTES, (2, 24), generator=torch.Generator().manual_seed(5))
        if not torch.isfinite(logits(dense.eval(), windows)).all():
            return UNBUILT, "logits of the small model are not finite"
    except Exception as error:
        return UNBUILT, said(error)
    (work / "text.txt").write_text("".join(f"Line {i}: {i * i} is the square of {i}.\n" for i in range(40)))
    for method, options in ((lorq.Nearest, {}), (lorq.GPTQ, dict(calibration=str(work / "text.txt")))):
        out = work / method.__name__
        try:
            quantize(work / "m", out, method, options)
        except (ValueError, ImportError) as error:
            return (REFUSED, said(error)) if mine(error) else (BROKEN, said(error))
        packed = load(name, out)
        expected, got = logits(twin(dense, packed), windows), logits(packed, windows)
        largest = expected.abs().max().item()
        if not torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * largest):
            return BROKEN, f"logits differ by {(got - expected).abs().max().item() / largest:.1e} of the largest"
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    try:
        expected = dense.generate(windows[:1, :12], **options)
    except Exception as error:
        return WORKS, f"but transformers does not generate with it: {said(error)}"
    if packed.generate(windows[:1, :12], **options).shape != expected.shape:
        return BROKEN, "generates another number of tokens"
    return WORKS, ""


def quantize(folder: Path, out: Path, method: Any, options: dict[str, Any]) -> None:
    """In groups of 16 where they fit, else by rows."""
    options = dict(samples=4, seq_len=32, device="cpu") | options
    try:
        lorq.quantize(folder, out, method(bits=4, group_size=16), **options)
    except ValueError as error:
        if "group_size" not in str(error):
            raise
        lorq.quantize(folder, out, method(bits=4, group_size=-1), **options)


def load(name: str, folder: Path) -> Any:
    kind = json.loads((folder / "config.json").read_bytes())["model_type"]
    if modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) == name:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lorq.load(folder, dtype="float32", device="cpu")


def twin(dense: Any, packed: Any) -> Any:
    """The original with every quantized weight replaced by what its stored tensors stand for."""
    import copy

    from lorq.models.experts import split_experts
    from lorq.runtime.linear import QuantLinear

    model = copy.deepcopy(dense)
    split_experts(model)
    layers = {name: layer for name, layer in packed.named_modules() if isinstance(layer, QuantLinear)}
    assert layers
    for name, layer in layers.items():
        weight = layer.format.read(layer.stored()).dense()
        own = model.get_submodule(name)
        own.weight.data = weight.T.contiguous() if isinstance(own, Conv1D) else weight
    return model


@torch.no_grad()
def logits(model: Any, windows: torch.Tensor) -> torch.Tensor:
    return model(input_ids=windows, use_cache=False).logits


def said(error: BaseException) -> str:
    """An error in a line, without what differs from run to run."""
    text = str(error).strip().splitlines()
    line = " ".join(text[:3]) if "Strict" in type(error).__name__ else text[0] if text else ""
    line = re.sub(r"/\S*/(m|Nearest|GPTQ)\b", "MODEL", line)
    return line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}"


def mine(error: BaseException) -> bool:
    """Whether lorq has refused, and not something below it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{os.sep}lorq{os.sep}" in last.filename or isinstance(error, ImportError)


def in_a_process(kind: str, name: str) -> tuple[str, str]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def work() -> None:
        with tempfile.TemporaryDirectory(prefix="lorq-families-") as folder:
            os.environ["LORQ_CACHE"] = f"{folder}/cache"
            try:
                found = look(kind, name, Path(folder))
            except BaseException as error:
                if "LORQ_TRACE" in os.environ:
                    traceback.print_exc()
                place = traceback.extract_tb(error.__traceback__)[-1]
                found = BROKEN, f"{type(error).__name__}: {said(error)} ({Path(place.filename).name}:{place.lineno})"
        there.send(found)

    process = context.Process(target=work)
    process.start()
    there.close()
    try:
        found = here.recv() if here.poll(SECONDS) else (BROKEN, f"not done after {SECONDS} seconds")
    except EOFError:
        found = BROKEN, "the process died"
    process.kill()
    process.join()
    return found


def main(arguments: list[str]) -> None:
    lorq.quantize, lorq.load, lorq.Nearest  # noqa: B018  # imported before the processes fork
    torch.set_num_threads(1)
    logging.disable()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    wanted = set(arguments) - {"--record"}
    chosen = [family for family in families() if not wanted or wanted & {*family}]
    rows = []
    for kind, name in chosen:
        began = time.monotonic()
        rows.append((kind, name, *in_a_process(kind, name)))
        print(*rows[-1], f"{time.monotonic() - began:.1f}", sep=" | ", flush=True)
    counts = {v: sum(row[2] == v for row in rows) for v in (WORKS, REFUSED, BROKEN, UNBUILT)}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if "--record" in arguments:
        known = {} if not wanted else {tuple(row[:2]): row for row in csv.reader(TABLE.open(encoding="utf-8"))}
        known |= {tuple(row[:2]): row for row in rows}
        rows = [known[family] for family in families()]
        with TABLE.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("model_type", "class", "verdict", "reason"), *rows])


if __name__ == "__main__":
    main(sys.argv[1:])
