"""Architectures: a model's config, its skeleton without memory, its decoder blocks, its tensors' names."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorq.models.experts import FusedPart, find_experts, split_experts
from lorq.storage.reader import WeightFiles


def read_config(folder: Path) -> Any:
    """The folder's transformers config; a ValueError if it is unreadable, needs remote code, or is quantized."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the config of {folder} could not be read: {first}") from error
    existing = getattr(config, "quantization_config", None)
    if existing is not None:
        method = existing.get("quant_method") if isinstance(existing, dict) else existing
        raise ValueError(f"{folder} is already quantized ({method}); give the original model")
    return config


def skeleton(config: Any) -> Any:
    """The model without memory for its parameters; buffers that are computed, not stored, are real.

    Fused experts are taken apart (`lorq.models.experts`).
    """
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
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    split_experts(model)
    return model


def find_blocks(model: Any) -> list[str]:
    """Names of the decoder blocks, in order; a ValueError where there is not exactly one list of them."""
    declared = set(getattr(model, "_no_split_modules", None) or ())
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and {type(item).__name__ for item in module} <= declared
    ]
    if len(lists) != 1:
        raise ValueError(
            f"{type(model).__name__} is not supported: lorq needs exactly one list of decoder blocks "
            f"({', '.join(sorted(declared)) or 'none declared'}), found {len(lists)}"
        )
    name, module = lists[0]
    return [f"{name}.{i}" for i in range(len(module))]


@dataclass(frozen=True)
class Stored:
    """Where a parameter's values are: in a stored tensor, or, where experts are stored fused, in a part of one."""

    name: str
    part: FusedPart | None = None

    def shape(self, checkpoint: WeightFiles) -> tuple[int, ...]:
        """Shape of the parameter, from the header."""
        shape = checkpoint.shape(self.name)
        return shape if self.part is None else tuple(self.part.of(torch.empty(shape[1:], device="meta")).shape)

    def read(self, checkpoint: WeightFiles) -> Tensor:
        """The parameter; of a fused tensor only the one expert is read."""
        if self.part is None:
            return checkpoint.tensor(self.name)
        # A copy, so that the rest of the expert's tensor is given back.
        return self.part.of(checkpoint.tensor(self.name, self.part.expert)).clone(memory_format=torch.contiguous_format)


def find_stored(model: Any, checkpoint: WeightFiles) -> dict[str, Stored]:
    """Where each of the model's parameters and stored buffers lies, as far as the checkpoint has them.

    Names are changed as transformers changes them when it loads, such as embed_out to lm_head. Experts may be
    stored one by one, which transformers would merge, or fused; a ValueError for ways that lorq does not read.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    changes = get_model_conversion_mapping(model)
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    own, experts = set(model.state_dict(keep_vars=True)), find_experts(model)
    fused: dict[str, list[tuple[str, FusedPart]]] = {}  # fused tensor -> the parameters that are parts of it
    for path, module in experts.items():
        for local, tensor, part in module.parts():
            fused.setdefault(f"{path}.{tensor}", []).append((f"{path}.{local}", part))
    known, prefix = own | set(fused), model.base_model_prefix + "."

    def find(name: str) -> str:
        # Some checkpoints were saved from the bare model, without the head's prefix.
        return next((like for like in (name, name.removeprefix(prefix), prefix + name) if like in known), "")

    found: dict[str, Stored] = {}
    for stored in checkpoint.names:
        name = stored
        for change in changes:
            if isinstance(change, WeightRenaming):
                name, _ = change.rename_source_key(name)
        # At most one converter takes a tensor.
        taken = next(((c, *hit) for c in converters if (hit := c.rename_source_key(name))[1] is not None), None)
        if taken and (place := find(taken[1])) in fused:
            converter, _, pattern = taken
            found[_one_of(converter, str(pattern), name, place, experts)] = Stored(stored)
            continue
        # Like transformers: a name that only fits before it is renamed is kept.
        place = find(name) or find(stored)
        if place in own:
            found[place] = Stored(stored)
        elif place in fused:
            count, shape = len(experts[place.rpartition(".")[0]]), checkpoint.shape(stored)
            if len(shape) not in (2, 3) or shape[0] != count:
                raise ValueError(
                    f"{checkpoint.folder}: {stored} must hold {count} experts as the config says, its shape is "
                    f"{shape}; config.json belongs to another model"
                )
            found |= {parameter: Stored(stored, part) for parameter, part in fused[place]}
    return found


def _one_of(converter: Any, pattern: str, name: str, fused: str, experts: dict[str, Any]) -> str:
    """The parameter of one expert that transformers would merge into a fused tensor."""
    path, _, tensor = fused.rpartition(".")
    halves = ("gate_proj", "up_proj") if tensor.startswith("gate_up_proj") else ("down_proj",)
    merge = ["MergeModulelist(dim=0)", "Concatenate(dim=1)"][: len(halves)]
    steps = [repr(step) for step in converter.operations]
    number = re.search(pattern.replace("*.", r"(\d+)\."), name)
    plain = steps == merge and len(converter.source_patterns) == len(halves) and experts[path].takes_apart_in_order
    if not (plain and number):
        raise ValueError(
            f"{name} is stored in a way that lorq does not read: transformers makes {fused} by {', '.join(steps)}"
        )
    leaf = "bias" if tensor.endswith("_bias") else "weight"
    return f"{path}.{int(number[1])}.{halves[converter.source_patterns.index(pattern)]}.{leaf}"


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
