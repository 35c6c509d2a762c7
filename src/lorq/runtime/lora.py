"""The peft hook: LoRA on a loaded lorq model is attached, trained and saved as on any other.

Imported when peft's own ``peft.tuners.lora.model`` is (`lorq._autoload`), which has a place for kinds of layers that it
does not know, ``LoraConfig._register_custom_module``; each config is told of ours when layers are made from it.
"""

from typing import Any

import torch
from peft.tuners import tuners_utils
from peft.tuners.lora import layer as peft_layers
from peft.tuners.lora import model as peft_model
from torch import nn

from lorq.runtime.linear import QuantLinear

# Ways to begin that leave the base's weight as it is (peft 0.21); the others change it, and codes cannot follow.
_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")


class QuantLoraLinear(peft_layers.Linear):
    """Peft's LoRA layer on a packed one: ``y = x W^T + b + scaling (x A^T) B^T``; ``A`` and ``B`` learn."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, *args: Any, **kwargs: Any):
        if packed_of(base_layer).shared is not None:
            raise ValueError(
                f"{kwargs.get('target_name', 'a layer')} belongs to experts that share factors (tileq), which run "
                "together and take no adapter; name other target_modules, such as those of the attention"
            )
        super().__init__(base_layer, adapter_name, *args, **kwargs)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("config")
        start = getattr(config, "init_lora_weights", True)
        if start not in _STARTS or getattr(config, "kasa_config", None) is not None:
            way = "kasa_config" if start in _STARTS else f"init_lora_weights {start!r}"
            raise ValueError(
                f"{way} changes the weights of the base, or may, and codes stay as they are; take init_lora_weights "
                "True, 'gaussian', 'orthogonal', 'eva' or 'mica', or load the model and .dequantize() it first"
            )
        super().update_layer(adapter_name, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "an adapter cannot be merged into codes, which would have to be chosen anew; merge into dense weights: "
            "model = lorq.load(FOLDER).dequantize(), then "
            "PeftModel.from_pretrained(model, ADAPTER).merge_and_unload(); or leave the adapter beside the model"
        )

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        packed = packed_of(module)
        return packed.in_features, packed.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        packed = packed_of(base_layer)  # whose weight peft would decode for this
        device = next(iter(packed.state_dict(keep_vars=True).values())).device
        return device, torch.float32 if packed.bias is None else packed.bias.dtype


def packed_of(layer: nn.Module) -> QuantLinear:
    """A packed layer, which peft may have put something around."""
    base: Any = layer.get_base_layer() if isinstance(layer, tuners_utils.BaseTunerLayer) else layer
    assert isinstance(base, QuantLinear)
    return base


def _extend() -> None:
    """Let peft make `QuantLoraLinear`, and find packed layers where it looks for all linear ones."""
    make, replace = peft_model.LoraModel._create_new_module, peft_model.LoraModel._replace_module
    find = tuners_utils._maybe_include_all_linear_layers

    def with_packed(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        lora_config._register_custom_module({QuantLinear: QuantLoraLinear})
        made: nn.Module = make(lora_config, adapter_name, target, **kwargs)
        return made

    def replace_packed(self: Any, parent: nn.Module, name: str, new: nn.Module, child: nn.Module) -> None:
        if isinstance(new, QuantLoraLinear | QuantLinear):
            setattr(parent, name, new)  # on its device already, for which peft would decode the weight 18 times
        else:
            replace(self, parent, name, new, child)

    def find_with_packed(config: Any, model: Any) -> Any:
        every = str(getattr(config, "target_modules", "")).lower() == "all-linear"
        config = find(config, model)
        if every:
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            packed = {n for n, m in model.named_modules() if isinstance(m, QuantLinear) and m is not head}
            config.target_modules |= {name for name in packed if not name.endswith(".base_layer")}
        return config

    peft_model.LoraModel._create_new_module = staticmethod(with_packed)  # type: ignore[method-assign]
    peft_model.LoraModel._replace_module = replace_packed  # type: ignore[method-assign]
    tuners_utils._maybe_include_all_linear_layers = find_with_packed  # type: ignore[assignment]


if not getattr(peft_model.LoraModel, "_lorq", False):
    _extend()
    peft_model.LoraModel._lorq = True  # type: ignore[attr-defined]
