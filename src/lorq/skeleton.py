"""Architectures: a model's config, its skeleton without memory, its decoder blocks, its tensors' names."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def read_config(folder: Path) -> Any:
    """The folder's transformers config.

    Raises:
        ValueError: if it cannot be read, needs remote code, or is quantized already.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the config of {folder} could not be read: {first}") from error
    existing = getattr(config, "quantization_config", None)
    if existing is not None:
        method = existing.get("quant_method") if isinstance(existing, dict) else existing
        raise ValueError(f"{folder} is already quantized ({method}); give the original model")
    return config


def skeleton(config: Any) -> Any:
    """The model without memory for its parameters; buffers that are computed, not stored, are real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"MODEL must be a causal language model, got the model type {config.model_type!r}, for which "
            "transformers has no AutoModelForCausalLM"
        )
    expected, stated = getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "__name__", ""), config.architectures or []
    if stated and expected not in stated:
        # BERT and its like have a causal class too, but these weights were not made for it.
        raise ValueError(f"MODEL must be a causal language model ({expected}), its config says {', '.join(stated)}")
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()


def find_blocks(model: Any) -> list[str]:
    """Names of the decoder blocks, in order.

    Raises:
        ValueError: if no list of decoder blocks is found.
    """
    declared = set(getattr(model, "_no_split_modules", None) or ())
    lists = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            if all(type(item).__name__ in declared for item in module):
                lists.append((name, module))
    if len(lists) != 1:
        raise ValueError(
            f"{type(model).__name__} is not supported: lorq needs exactly one list of decoder blocks "
            f"({', '.join(sorted(declared)) or 'none declared'}), found {len(lists)}"
        )
    name, module = lists[0]
    return [f"{name}.{i}" for i in range(len(module))]


def renamed(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Stored names by what transformers renames them to when it loads them, such as embed_out to lm_head."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    changes = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    found = {}
    for stored in names:
        name = stored
        for change in changes:
            name, _ = change.rename_source_key(name)
        found[name] = stored
    return found


def get_tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def put_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor
