"""Architectures as llama.cpp has them: names of tensors, order of rows, metadata, and what it cannot run."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|bias)$")


@dataclass(frozen=True)
class Architecture:
    """A model type of transformers as an architecture of llama.cpp.

    Attributes:
        name: llama.cpp's.
        permuted: the rows of q and k lie as in Meta's files, the two halves of what rotary embeddings turn by turns.
        norm_offset: what llama.cpp's weights of norms have more than transformers'.
        activation: the only one that llama.cpp computes there.
        fixed: settings of the config that llama.cpp has no word for, and their only values.
    """

    name: str
    permuted: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    fixed: Mapping[str, Any] = ()  # type: ignore[assignment]


_NO_WINDOW = {"use_sliding_window": False}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "mixtral": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2", fixed=_NO_WINDOW),
    "qwen3": Architecture("qwen3", fixed=_NO_WINDOW),
    "qwen2_moe": Architecture(
        "qwen2moe", fixed=_NO_WINDOW | {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []}
    ),
    "qwen3_moe": Architecture(
        "qwen3moe", fixed=_NO_WINDOW | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    ),
    "olmoe": Architecture("olmoe", fixed={"norm_topk_prob": False, "clip_qkv": None}),
    "gemma3_text": Architecture(
        "gemma3", norm_offset=1.0, activation="gelu_pytorch_tanh", fixed={"attn_logit_softcapping": None}
    ),
    "phi3": Architecture("phi3"),
}  # fmt: skip


def architecture_of(config: Any) -> Architecture:
    """What llama.cpp calls a model.

    Raises:
        ValueError: if it has none of the name, or computes something else.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"--to gguf holds the model types {', '.join(ARCHITECTURES)}, the folder's is {kind}; try dense"
        )
    found = ARCHITECTURES[kind]
    rules = dict(found.fixed) | {"hidden_activation" if kind == "gemma3_text" else "hidden_act": found.activation}
    for name, value in rules.items():
        own = getattr(config, name, value)
        if own != value and not (value is None and own is False):
            raise ValueError(f"llama.cpp runs {kind} with {name} {value!r} alone, the folder's config has {own!r}")
    if kind == "gemma3_text":
        _check_gemma3(config)
    if kind == "olmoe" and config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            f"llama.cpp runs olmoe with as many heads of keys as of queries alone, the folder's config has "
            f"{config.num_key_value_heads} and {config.num_attention_heads}"
        )
    return found


def _check_gemma3(config: Any) -> None:
    """Refuse what llama.cpp does otherwise: every sixth layer attends to all, the scale is of a head's width."""
    told = [kind == "full_attention" for kind in config.layer_types]
    if told != [number % 6 == 5 for number in range(config.num_hidden_layers)]:
        raise ValueError(
            f"llama.cpp lets every sixth layer of Gemma 3 attend to all, layer_types is {config.layer_types}"
        )
    heads = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim
    if config.query_pre_attn_scalar != heads:
        raise ValueError(
            f"llama.cpp scales Gemma 3's attention by {heads}^-0.5, query_pre_attn_scalar is "
            f"{config.query_pre_attn_scalar}"
        )
    if (near := config.rope_parameters["sliding_attention"]).get("rope_type") != "default":
        raise ValueError(f"llama.cpp leaves the rotary embedding of Gemma 3's windows unscaled, the config has {near}")


# ---- names and rows ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where a tensor of the file comes from.

    Attributes:
        name: in the file.
        parameters: of the model; several are experts, in their order, which lie one after the other.
        heads: of which the rows are permuted; 0 for none.
        offset: to be added.
    """

    name: str
    parameters: tuple[str, ...]
    heads: int = 0
    offset: float = 0.0

    @property
    def is_stacked(self) -> bool:
        return "_exps." in self.name

    def rows(self, values: Tensor) -> Tensor:
        """A tensor, or bytes, whose first dimension is rows, in llama.cpp's order of them."""
        return values if self.heads == 0 else permuted(values, self.heads)


def permuted(values: Shaped[Tensor, "rows ..."], heads: int) -> Shaped[Tensor, "rows ..."]:
    """Rows of q or k in the order of Meta's files: a head's halves by turns.

    Example:
        >>> permuted(torch.arange(8), 2)
        tensor([0, 2, 1, 3, 4, 6, 5, 7])
    """
    return values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


_TOWER = "model.language_model."  # where models that also see or hear have the one that speaks


def language_names(names: Sequence[str], *, alone: bool) -> dict[str, str]:
    """The parameters of the language model, by their names in a model that is nothing else.

    Args:
        names: of all parameters.
        alone: the model is nothing else.
    """
    own = names if alone else [name for name in names if name.startswith((_TOWER, "lm_head."))]
    return {f"model.{name.removeprefix(_TOWER)}" if name.startswith(_TOWER) else name: name for name in own}


def find_sources(names: Mapping[str, str], config: Any, architecture: Architecture) -> list[Source]:
    """The tensors of the file, in the model's order.

    Args:
        names: of parameters, as `language_names` gives them.

    Raises:
        ValueError: if one has no place there.
    """
    name_in_file = _namer(config, architecture)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    grouped: dict[str, list[str]] = {}
    for name in sorted(names, key=_natural):
        found = _EXPERT.fullmatch(name)
        grouped.setdefault(f"{found[1]}.{found[3]}.{found[4]}" if found else name, []).append(names[name])
    sources = []
    for name, parameters in grouped.items():
        own = name_in_file(name)
        if own is None:
            raise ValueError(f"--to gguf has no place for {name} in llama.cpp's {architecture.name}; try dense")
        turned = heads.get(name.rsplit(".", 2)[-2], 0) if architecture.permuted else 0
        offset = architecture.norm_offset if own.endswith("norm.weight") else 0.0
        sources.append(Source(own, tuple(parameters), turned, offset))
    return sources


def _natural(name: str) -> list[Any]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _namer(config: Any, architecture: Architecture) -> Callable[[str], str | None]:
    from gguf import get_tensor_name_map

    names = get_tensor_name_map(number_of(architecture), config.num_hidden_layers)
    return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))  # type: ignore[no-any-return]


def number_of(architecture: Architecture) -> Any:
    """The gguf package's number of an architecture."""
    from gguf import MODEL_ARCH_NAMES

    return {name: number for number, name in MODEL_ARCH_NAMES.items()}[architecture.name]


# ---- metadata ---------------------------------------------------------------------------------------------


def write_metadata(writer: Any, config: Any, architecture: Architecture) -> list[str]:
    """Sizes and settings, by the writer's own words; what llama.cpp does otherwise, in words."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(head)
    writer.add_value_length(head)
    experts = next((n for key in ("num_local_experts", "num_experts") if (n := getattr(config, key, 0))), 0)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if width := getattr(config, "moe_intermediate_size", 0):
        writer.add_expert_feed_forward_length(width)
    if width := getattr(config, "shared_expert_intermediate_size", 0):
        writer.add_expert_shared_feed_forward_length(width)
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)
    _write_rope(writer, config, head)
    return _write_window(writer, config)


def _write_window(writer: Any, config: Any) -> list[str]:
    """The reach of attention; llama.cpp has windows for Gemma 3 of these architectures."""
    window = getattr(config, "sliding_window", None)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(window)
        return []
    if config.model_type == "phi3":
        writer.add_sliding_window(0)  # it must be said
    said = []
    if window and window < config.max_position_embeddings:
        said.append(
            f"attention reaches back over all tokens, the model's over {window}: past these it is another model"
        )
    if rope_of(config).get("rope_type") == "longrope":
        said.append(
            "llama.cpp takes the long rotary factors for any context (-c) past "
            f"{config.original_max_position_embeddings} tokens, transformers for texts past it"
        )
    return said


def _write_rope(writer: Any, config: Any, head: int) -> None:
    """How positions turn queries and keys, as far as numbers say it; factors are tensors (`rope_tensors`).

    Raises:
        ValueError: for a scaling that llama.cpp does not compute.
    """
    from gguf import RopeScalingType

    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if config.model_type == "gemma3_text":
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    known = {"default": (), "llama3": (), "linear": ("factor",), "yarn": ("factor",), "longrope": ()}
    foreign = {key for key in ("mscale", "mscale_all_dim", "truncate") if rope.get(key) not in (None, True)}
    if kind not in known or foreign or (kind == "yarn" and rope.get("attention_factor") is not None):
        raise ValueError(f"llama.cpp scales rotary embeddings by {', '.join(known)}, the folder's config has {rope}")
    original = getattr(config, "original_max_position_embeddings", None) or rope.get("original_max_position_embeddings")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(original or config.max_position_embeddings)
    if kind == "yarn":
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
    if kind == "longrope":
        writer.add_rope_scaling_attn_factors(_inverse_frequencies(config)[1])


def rope_of(config: Any) -> dict[str, Any]:
    """Of the layers that attend to all."""
    rope: dict[str, Any] = config.rope_parameters
    return rope.get("full_attention", rope)


def _inverse_frequencies(config: Any) -> tuple[Float[Tensor, "pairs"], float]:
    """As transformers scales them, with the factor of its attention."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, factor = ROPE_INIT_FUNCTIONS[rope_of(config)["rope_type"]](config, torch.device("cpu"))
    return frequencies, float(factor)


def rope_tensors(config: Any) -> dict[str, Tensor]:
    """Factors of the rotary frequencies that llama.cpp reads as tensors of the file."""
    rope = rope_of(config)
    if rope.get("rope_type") == "llama3":
        scaled, _ = _inverse_frequencies(config)
        plain = rope["rope_theta"] ** -(torch.arange(len(scaled), dtype=torch.float64) / len(scaled))
        return {"rope_freqs.weight": (plain / scaled.double()).float()}
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"]) for which in ("long", "short")}
    return {}
