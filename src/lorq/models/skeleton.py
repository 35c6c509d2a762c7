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
    except (ValueError, OSError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the config of {folder} could not be read: {first}") from error
    existing = getattr(config, "quantization_config", None)
    if existing is not None:
        method = existing.get("quant_method") if isinstance(existing, dict) else existing
        raise ValueError(f"{folder} is already quantized ({method}); give the original model")
    return config


def model_class(config: Any) -> Any:
    """The transformers class that a config's weights are for: a causal language model, or one that also sees or hears.

    Raises:
        ValueError: if transformers has no such class, or the config was made for another.
    """
    from transformers.models.auto import modeling_auto as auto

    kinds = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    )  # fmt: skip
    classes = [kind[type(config)] for kind in kinds if type(config) in kind]
    if not classes:
        raise ValueError(
            f"MODEL must be a causal language model, got the model type {config.model_type!r}, for which "
            "transformers has no AutoModelForCausalLM"
        )
    stated = config.architectures or []
    fitting = [kind for kind in classes if not stated or kind.__name__ in stated]
    if not fitting:
        # BERT and its like have a causal class too, but these weights were not made for it.
        names = " or ".join(dict.fromkeys(kind.__name__ for kind in classes))
        raise ValueError(f"MODEL must be a causal language model ({names}), its config says {', '.join(stated)}")
    return fitting[0]


def skeleton(config: Any) -> Any:
    """The model without memory for its parameters; buffers that are computed, not stored, are real.

    Fused experts are taken apart (`lorq.models.experts`).
    """
    from accelerate import init_empty_weights

    kind = model_class(config)
    with init_empty_weights(include_buffers=False):
        model = kind._from_config(config, dtype=torch.float32).eval()
    split_experts(model)
    return model


def find_blocks(model: Any) -> list[str]:
    """Names of the decoder blocks of the text model, in order.

    They are the list whose items transformers declares (``_no_split_modules``); where it declares none, or lists of
    other things with it, the list that holds most of the text model's weights.

    Raises:
        ValueError: where there is not exactly one list of them.
    """
    decoder = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is decoder)
    lists: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules(prefix=path):
        if isinstance(module, nn.ModuleList) and len(module) and not name.startswith(tuple(f"{l}." for l in lists)):
            lists[name] = module
    declared = set(getattr(model, "_no_split_modules", None) or ())
    found = [name for name, module in lists.items() if {type(item).__name__ for item in module} <= declared]
    if not found:
        sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in lists.items()}
        found = [name for name, size in sizes.items() if 2 * size > sum(sizes.values())]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} is not supported: lorq needs exactly one list of decoder blocks "
            f"({', '.join(sorted(declared)) or 'none declared'}), found {', '.join(found or lists) or 'none'}"
        )
    return [f"{found[0]}.{i}" for i in range(len(lists[found[0]]))]


def kept_modules(model: Any, blocks: list[str]) -> dict[str, str]:
    """What in the blocks has weights of its own and is neither a linear layer nor a norm, each with the reason to keep it.

    Raises:
        ValueError: where that is most of the blocks' weights.
    """
    from transformers.pytorch_utils import Conv1D

    reasons: dict[str, str] = {}
    kept: dict[str, Tensor] = {}
    rest, routers = 0, {name.rpartition(".")[0] for name in find_experts(model)}
    for block in blocks:
        for path, module in model.get_submodule(block).named_modules(prefix=block):
            own = dict(module.named_parameters(recurse=False))
            if isinstance(module, nn.Linear | Conv1D):
                rest += module.weight.numel()
                continue
            other = {leaf: p for leaf, p in own.items() if p.ndim > 1 or leaf not in ("weight", "bias")}
            kept |= {f"{path}.{leaf}": p for leaf, p in other.items()}
            if other and path.rpartition(".")[0] not in routers:
                reasons[path] = f"{type(module).__name__} is no linear layer: {', '.join(other)} kept"
    size = sum(p.numel() for p in kept.values())
    if size > rest:
        name = max(kept, key=lambda name: kept[name].numel())
        raise ValueError(
            f"{type(model).__name__} is not supported: {size / (size + rest):.0%} of its blocks' weights are outside "
            f"linear layers, such as {name} of shape {tuple(kept[name].shape)}, in no form that lorq takes apart"
        )
    return reasons


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
