"""Architectures: a model's config, its skeleton without memory, its decoder blocks."""

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from lorq.models.experts import find_experts, split_experts
from lorq.storage.json_files import read_json

# A config's names for how the weights are quantized, the second that of older compressed-tensors.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# Numbers of a tensor that is a weight and no computed buffer: 64 MB in float32, a causal mask of 4096 tokens.
_LARGE = 1 << 24


def read_config(folder: Path, *, quantized: bool = False) -> Any:
    """The folder's transformers config; a ValueError if it is unreadable, needs remote code, or is quantized.

    With ``quantized`` it may be, and the config is that of the dense model.
    """
    config = read_own_config(folder)
    for own in {id(one): one for one in (config, config.get_text_config())}.values():
        for key in QUANTIZATION_KEYS:
            existing = getattr(own, key, None)
            if existing is None:
                continue
            if quantized:
                delattr(own, key)
                continue
            method = existing.get("quant_method") if isinstance(existing, dict) else existing
            raise ValueError(f"{folder} is already quantized ({method}); give the original model")
    return config


def read_own_config(folder: Path) -> Any:
    """The folder's transformers config as it stands there; a ValueError if it is unreadable or needs remote code."""
    from transformers import AutoConfig

    if (folder / "config.json").is_file():
        read_json(folder / "config.json")  # whose errors name the place
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many kinds, some of them of the hub's library
        raise ValueError(f"the config of {folder} could not be read: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Of an error's message, or its kind where there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Held while a model is made: transformers and accelerate change classes for the whole process meanwhile, and two
# threads' models then lack weights.
BUILDING = threading.RLock()


def model_class(config: Any) -> Any:
    """The transformers class that a config's weights are for: a causal language model, or one that also sees or hears.

    Raises:
        ValueError: if transformers has no such class, or the config was made for another.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    tables = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    )
    classes: list[Any] = [table[type(config)] for table in tables if type(config) in table]
    stated = config.architectures or []
    if not classes:
        # Some are for a part of a model that has a class of its own, such as mllama's text model.
        named = [getattr(transformers, name, None) for name in stated]
        classes = [kind for kind in named if kind and kind.config_class is type(config) and kind.can_generate()]
        classes = [] if getattr(config, "is_encoder_decoder", False) else classes
    if not classes:
        raise ValueError(
            f"MODEL must be a causal language model, got the model type {config.model_type!r}, for which "
            "transformers has no AutoModelForCausalLM"
        )
    fitting = [kind for kind in classes if not stated or kind.__name__ in stated]
    if not fitting:
        # BERT and its like have a causal class too, but these weights were not made for it.
        names = " or ".join(dict.fromkeys(kind.__name__ for kind in classes))
        raise ValueError(f"MODEL must be a causal language model ({names}), its config says {', '.join(stated)}")
    return fitting[0]


class _LargeOnMeta(TorchFunctionMode):
    """What is made empty and large is a weight, and never in memory: all experts of a layer in one tensor are tens of
    gigabytes, which accelerate would make first and drop then."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            size = torch.Size(args[0] if args and not isinstance(args[0], int) else args)
            if size.numel() >= _LARGE:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def skeleton(config: Any) -> Any:
    """The model without memory for its parameters; buffers that are computed, not stored, are real.

    Fused experts are taken apart (`lorq.models.experts`).
    """
    from accelerate import init_empty_weights

    kind = model_class(config)
    try:
        with BUILDING, init_empty_weights(include_buffers=False), _LargeOnMeta():
            model = kind._from_config(config, dtype=torch.float32).eval()
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        raise _not_built(kind, error) from error
    split_experts(model)
    return model


def with_weights(config: Any, folder: Path, dtype: Any) -> Any:
    """The model of a config with a folder's weights, as transformers loads it.

    Raises:
        ValueError: if the config makes no model of its class.
    """
    kind = model_class(config)
    try:
        with BUILDING:
            return kind.from_pretrained(folder, dtype=dtype).eval()
    except (ValueError, OSError, RuntimeError, MemoryError, ImportError) as error:
        if not isinstance(error, RecursionError):
            raise
        raise _not_built(kind, error) from error
    except Exception as error:
        raise _not_built(kind, error) from error


def _not_built(kind: Any, error: BaseException) -> ValueError:
    """The error for a config of which its own class makes no model."""
    return ValueError(
        f"config.json does not make a {kind.__name__} ({type(error).__name__}: {first_line(error):.200}); is it one "
        "that this transformers reads, and whole?"
    )


def find_blocks(model: Any) -> list[str]:
    """Names of the decoder blocks of the text model, in order.

    They are the list whose items transformers declares (``_no_split_modules``); where it declares none, or lists of
    other things with it, the list that holds most of the text model's weights.

    Raises:
        ValueError: where there is not exactly one list of them.
    """
    path, decoder = _decoder(model)
    lists: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules(prefix=path):
        if isinstance(module, nn.ModuleList) and len(module) and not name.startswith(tuple(f"{l}." for l in lists)):
            lists[name] = module
    # Models in the text model, such as an encoder of images, have blocks of their own.
    within = tuple(f"{name}." for name, module in decoder.named_modules(prefix=path) if _is_model(module, decoder))
    lists = {name: module for name, module in lists.items() if not name.startswith(within)} or lists
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


def _decoder(model: Any) -> tuple[str, Any]:
    """The text model, and where it is."""
    decoder = model.get_decoder()
    if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        decoder = model.base_model  # some call their head so
    return next(name for name, module in model.named_modules() if module is decoder), decoder


def _is_model(module: nn.Module, whole: nn.Module) -> bool:
    """Whether a part of a model is one of transformers' models."""
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel) and module is not whole


def find_towers(model: Any) -> tuple[str, ...]:
    """Prefixes of the names in models beside the text model, such as one that sees."""
    path = _decoder(model)[0] + "."
    names = [f"{name}." for name, module in model.named_modules() if _is_model(module, model)]
    return tuple(name for name in names if path != "." and not path.startswith(name) and not name.startswith(path))


def find_tied(model: Any) -> dict[str, str]:
    """Names of parameters that share the tensor of another, each with the other's."""
    return dict(getattr(model, "all_tied_weights_keys", {}) or {})


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by its weight and does nothing else; some that are called linear do more."""
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear | Conv1D)
    # A class of its own: tried with a small weight.
    numbers = torch.arange(35, dtype=torch.float32).sin()
    small = {"weight": numbers.view(7, 5)} | ({} if module.bias is None else {"bias": numbers[:7]})
    x = numbers[:15].view(1, 3, 5)
    try:
        out = torch.func.functional_call(module, small, (x,))
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):
        return False
    return isinstance(out, Tensor) and out.shape == (1, 3, 7) and torch.allclose(out, linear(x, **small), atol=1e-5)


def kept_modules(model: Any, blocks: list[str]) -> dict[str, str]:
    """What in the blocks has weights and is neither a linear layer nor a norm, each with the reason to keep it.

    Raises:
        ValueError: where that is most of the blocks' weights.
    """
    reasons: dict[str, str] = {}
    kept: dict[str, Tensor] = {}
    rest, routers = 0, {name.rpartition(".")[0] for name in find_experts(model)}
    for block in blocks:
        for path, module in model.get_submodule(block).named_modules(prefix=block):
            own = dict(module.named_parameters(recurse=False))
            if is_linear(module):
                rest += own["weight"].numel()
                continue
            other = {leaf: p for leaf, p in own.items() if p.ndim > 1 or leaf not in ("weight", "bias")}
            kept |= {f"{path}.{leaf}": p for leaf, p in other.items()}
            if other and path.rpartition(".")[0] not in routers:
                reasons[path] = f"no linear layer ({type(module).__name__}): {', '.join(other)} kept as stored"
    size = sum(p.numel() for p in kept.values())
    if size > rest:
        name = max(kept, key=lambda name: kept[name].numel())
        raise ValueError(
            f"{type(model).__name__} is not supported: {size / (size + rest):.0%} of its blocks' weights are outside "
            f"linear layers, such as {name} of shape {tuple(kept[name].shape)}, in no form that lorq takes apart"
        )
    return reasons


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
