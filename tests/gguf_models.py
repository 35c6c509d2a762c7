"""Small models of every architecture that is exported to llama.cpp, with a tokenizer that it reads."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

_COMMON = {
    "vocab_size": 264, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 257,
    "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
_ROPE = {"rope_theta": 10000.0}
_EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4}
_GEMMA = {
    "head_dim": 32, "num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 32,
    "tie_word_embeddings": True,
}  # fmt: skip
_NEAR = {"rope_type": "default", "rope_theta": 5000.0}
# name -> model type, and what its config has besides
CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {"head_dim": 32, "rope_parameters": _ROPE | {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }}),
    "llama-linear": ("llama", {"rope_parameters": _ROPE | {"rope_type": "linear", "factor": 4.0}}),
    "llama-yarn": ("llama", {"rope_parameters": _ROPE | {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
    }}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen2-moe": ("qwen2_moe", _EXPERTS | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}),
    "qwen3-moe": ("qwen3_moe", _EXPERTS | {"moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 32}),
    "olmoe": ("olmoe", _EXPERTS | {"num_key_value_heads": 4}),
    "gemma3": ("gemma3_text", _GEMMA),
    "gemma3-linear": ("gemma3_text", _GEMMA | {"rope_parameters": {
        "full_attention": _ROPE | {"rope_type": "linear", "factor": 8.0}, "sliding_attention": _NEAR,
    }}),
    "gemma3-sees": ("gemma3", {
        "text_config": _COMMON | _GEMMA | {"model_type": "gemma3_text"}, "mm_tokens_per_image": 4,
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8,
        },
        "image_token_index": 260, "boi_token_index": 261, "eoi_token_index": 262,
    }),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3-longrope": ("phi3", {
        "sliding_window": None, "max_position_embeddings": 4096, "original_max_position_embeddings": 1024,
        "rope_parameters": _ROPE | {
            "rope_type": "longrope", "partial_rotary_factor": 0.75, "original_max_position_embeddings": 1024,
            "long_factor": [1 + i / 3 for i in range(6)], "short_factor": [1 + i / 7 for i in range(6)],
        },
    }),
}  # fmt: skip


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a few pairs."""
    alphabet, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n")]
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    vocabulary |= {"".join(pair): 258 + number for number, pair in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocab=vocabulary | {"<s>": 256, "</s>": 257}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    opened = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    opened.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return opened


def piece_tokenizer(text: str, add_prefix: bool) -> PreTrainedTokenizerFast:
    """As of Llama 2, with a space before a text, and of Gemma, without: pieces of the text, bytes for all else."""
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")][not add_prefix :]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(steps)
    trained.train_from_iterator(text.split("\n"), trainers.BpeTrainer(vocab_size=400, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    merges = [tuple(merge) for merge in learned["merges"]]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(steps)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if add_prefix else parts)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gguf_config(name: str, **changes):
    kind, own = CASES[name]
    return AutoConfig.for_model(kind, **({} if "text_config" in own else _COMMON) | own | changes)


def gguf_folder(folder: Path, name: str, **changes) -> Path:
    """A random model of a case as a Hugging Face folder; `folder` is made."""
    config = gguf_config(name, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sees = hasattr(config, "vision_config")
        model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(config).float()
        for parameter_name, parameter in model.named_parameters():
            size = 0.1 if parameter.ndim == 1 else 0.5 if "embed" in parameter_name else 0.15
            parameter.data = parameter.data * (parameter.ndim == 1) + size * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    merging_tokenizer().save_pretrained(folder)
    return folder
