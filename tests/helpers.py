"""Small models for tests."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lorq
from lorq.core.codes import IntGrid, LevelFormat, VectorGrid
from lorq.core.problem import Problem
from lorq.core.stats import PreparedHessian
from lorq.core.weight import LayerFormat
from lorq.storage.names import MEASURED

BYTES = 256
BOS = 256


def byte_tokenizer(length: int = 32) -> PreTrainedTokenizerFast:
    """One token per byte, and ``<s>`` before a text unless told otherwise."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", model_max_length=length)


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


def packed_model(pack):
    """`tiny_model` with the layers that ``pack`` makes of its blocks' weights."""
    model = tiny_model()
    for block in model.model.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, torch.nn.Linear):
                block.set_submodule(name, pack(module.weight.detach()))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


class Straight(torch.autograd.Function):
    """A rounding that passes gradients on unchanged, for autograd to do the rest."""

    @staticmethod
    def forward(ctx, x, rounded):
        return rounded

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def prepared(hessian, damping=0.01):
    """A Hessian as roundings take it."""
    return PreparedHessian(hessian, damping)


def solve_one(method, weight, stats=None, *, seed=0, name="layer"):
    """One layer by itself, as a method of any scope solves it."""
    return method.solve(Problem({name: weight}, {} if stats is None else {name: stats}, seed))[name]


# ---- formats ----------------------------------------------------------------------------------------------


def layer_format(
    bits: int,
    group_size: int,
    symmetric: bool,
    rank: int = 0,
    factor_type: str = "float16",
    vector: int = 1,
    codebook_rows: int = 0,
    codebook_columns: int = 0,
    *,
    grid: str = "integer",
    scale_rank: int = 0,
    **rest,
) -> LayerFormat:
    """A layer's format in one line, its codes of the kind that the arguments tell of."""
    if vector > 1:
        codes = VectorGrid(bits, vector, codebook_rows, codebook_columns, group_size)
    elif scale_rank or grid != "integer":
        codes = LevelFormat(bits, grid, group_size, scale_rank)
    else:
        codes = IntGrid(bits, group_size, symmetric)
    return LayerFormat(codes, rank, factor_type, **rest)


def with_codes(format: LayerFormat, **changes) -> LayerFormat:
    """The same format with other sizes of its codes."""
    return replace(format, codes=replace(format.codes, **changes))


def same_codes(a, b) -> bool:
    """Whether two weights' codes are the same, bit for bit."""
    a, b = a.tensors(), b.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[name].double(), b[name].double()) for name in a)


# ---- folders ----------------------------------------------------------------------------------------------

_GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
# family -> (its config without "Config", what that has besides or instead of the common settings)
FAMILIES = {
    "llama": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
    "mistral": ("Mistral", {"sliding_window": 8, "num_key_value_heads": 2, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {**_GROUPED, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {**_GROUPED, **_SLIDING, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}),
    "gemma3": ("Gemma3Text", {**_GROUPED, **_SLIDING}),
    "opt": ("OPT", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5, "tie_word_embeddings": False}),
    "gpt-neox": ("GPTNeoX", {"rotary_pct": 0.25, "tie_word_embeddings": False}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 128}),
}
_EXPERTS = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
# Mixtures of experts, likewise; each has what the others lack.
MOE = {
    "mixtral": ("Mixtral", {**_EXPERTS, **_GROUPED, "num_local_experts": 4, "intermediate_size": 96}),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            **_EXPERTS, "num_experts": 5, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
            "norm_topk_prob": True, "decoder_sparse_step": 2, "num_key_value_heads": 2,
        },
    ),
    "qwen3-moe": ("Qwen3Moe", {**_EXPERTS, **_GROUPED, "num_experts": 4, "moe_intermediate_size": 32}),
    "olmoe": ("Olmoe", {**_EXPERTS, "num_experts": 4, "intermediate_size": 64}),
    "deepseek-v3": (
        "DeepseekV3",
        {
            **_EXPERTS, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 4,
            "topk_group": 2, "moe_intermediate_size": 32, "q_lora_rank": 32, "kv_lora_rank": 32,
            "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4,
            "num_mtp_layers": 0,
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            **_EXPERTS, **_GROUPED, "num_local_experts": 4, "intermediate_size": 32, "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}  # fmt: skip
TIED = {"llama", "qwen3", "gemma2", "gemma3", "opt", "gpt2"}
_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_SPECIAL = {"vocab_size": BYTES + 1, "bos_token_id": BOS, "eos_token_id": None, "pad_token_id": None}


def tiny_folder(folder: Path, family: str, *, seed: int = 0, **changes) -> Path:
    """A random model of one family as a Hugging Face folder with a byte-level tokenizer; `folder` is made."""
    name, own = (FAMILIES | MOE)[family]
    common = {} if family == "gpt2" else _COMMON
    if family == "opt":
        common = {key: value for key, value in common.items() if key != "intermediate_size"}
    config = getattr(transformers, f"{name}Config")(**common | _SPECIAL | own | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            # A fresh model has norms of 1 and biases of 0, which would hide that one is forgotten.
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn(parameter.shape)
            elif "embed" not in name:
                parameter.data = 0.15 * torch.randn(parameter.shape)
            else:
                parameter.data = 0.5 * torch.randn(parameter.shape)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += 0.2 * torch.randn(buffer.shape)
    return save_folder(model, folder)


def save_folder(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer(128).save_pretrained(folder)
    return folder


def folder_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder, by name, but for its times: equal digests are equal folders."""
    files = [path for path in sorted(folder.iterdir()) if path.name != MEASURED]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass(frozen=True)
class Recorder(lorq.Nearest):
    """Rounds to nearest and keeps the problems that it is given: weights and statistics, by layer."""

    needs_stats = True
    seen: ClassVar = {}

    def solve(self, problem):
        self.seen.update({name: (weight.clone(), problem.stats[name]) for name, weight in problem.weights.items()})
        return super().solve(problem)

    @property
    def stats(self):
        return {name: stats for name, (_, stats) in self.seen.items()}


@torch.no_grad()
def inputs_of(model, names, windows):
    """What enters modules of transformers' own model: each positional argument, one row a token."""
    seen = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args))
        for name in names
    ]
    for window in windows:
        model(input_ids=window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {
        name: [torch.cat([part.flatten(0, -2) for part in parts]) for parts in zip(*args, strict=True)]
        for name, args in seen.items()
    }
