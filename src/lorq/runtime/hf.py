"""The transformers hook: `from_pretrained` on a lorq folder builds packed layers, or fails loudly."""

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from lorq.models.experts import fuse_experts, split_experts
from lorq.models.locate import resolve_model
from lorq.runtime.device import own_defaults, read_device, read_dtype
from lorq.runtime.experts import QuantExperts, Tiles
from lorq.runtime.linear import QuantLinear
from lorq.runtime.same_input import join
from lorq.runtime.swap import check_cells, check_permutation, check_tensors, swap_experts, swap_layers
from lorq.storage.config import LorqConfig
from lorq.storage.folder import check_report
from lorq.storage.json_files import read_json
from lorq.storage.names import INDEX, REPORT_NAME, SENTINEL
from lorq.storage.report import read_report


class LorqQuantizer(HfQuantizer):
    """Loads lorq folders; quantizing is `lorq.quantize`'s work."""

    requires_calibration = True
    quantization_config: LorqConfig

    def update_attn_implementation(self, config: Any) -> Any:
        # The one hook that sees the model's config before its files are looked for (transformers 5.23).
        if getattr(config, "transformers_weights", None) == SENTINEL:
            config.transformers_weights = INDEX
        return config

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        # The folder has the model's own names, experts one by one; transformers would rename and merge them.
        return []

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        split_experts(model)
        swap_layers(model, self.quantization_config.formats())
        swap_experts(model, self.quantization_config.tile_formats())
        if checkpoint_files:
            check_tensors(model, [Path(file) for file in checkpoint_files])
            self._check_beside(Path(checkpoint_files[0]).parent)
        return model

    def _check_beside(self, folder: Path) -> None:
        """What `LorqFolder.open` refuses of a folder's JSON, as far as it is there: a hub gives no report along."""
        if (folder / "config.json").is_file():
            read_json(folder / "config.json")  # transformers minds no key that is there twice
        if (folder / REPORT_NAME).is_file():
            check_report(folder, read_report(folder), self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear) and not module.weight_shape.is_meta:
                shape = tuple(module.weight_shape.tolist())
                if shape != (module.out_features, module.in_features):
                    raise ValueError(
                        f"{name}.weight_shape must be {(module.out_features, module.in_features)} as the model says, "
                        f"got {shape}; the folder is damaged, download it again"
                    )
                check_permutation(name, module)
            elif isinstance(module, Tiles) and not module.cells.is_meta:
                check_cells(name, module)
        join(model, self.quantization_config.inputs)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantExperts):
                model.set_submodule(name, module.dequantize(dtype))
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                model.set_submodule(name, module.dequantize(dtype))
        fuse_experts(model)  # so that it is transformers' own model again, to be saved like one
        return model

    def is_serializable(self) -> bool:
        # Asked by `save_pretrained` alone, whose own words name no way on.
        raise ValueError(
            "a model that lorq has quantized is not saved again, for its folder holds more than the state; copy the "
            "folder it was loaded from (adapters: lorq.adapt.save)"
        )

    # Set where an adapter or quantization-aware training is attached (`lorq.adapt.adapters`): codes alone do not train.
    is_trainable = is_qat_trainable = False


@own_defaults()
def load(model: str | Path, *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> Any:
    """A model ready to run: `AutoModelForCausalLM.from_pretrained` with lorq's names for things.

    Args:
        model: a lorq folder, or anything that `lorq.quantize` takes.
        device: "auto" takes an accelerator if there is one.
        dtype: of the activations and of what is not quantized: float32, bfloat16, float16, or "auto", which
            is float32 on a CPU and the folder's own type elsewhere.

    Raises:
        FileNotFoundError: if there is no such model, or the folder is unfinished.
        ValueError: if the folder is damaged, or of a newer format than this lorq reads.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve_model(model)
    place = read_device(device)
    automatic = torch.float32 if place.type == "cpu" else "auto"
    kind = automatic if dtype == "auto" else read_dtype(dtype)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    return loaded.to(place).eval()


# Whoever imports this means the registration.
if "lorq" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config("lorq")(LorqConfig)
    register_quantizer("lorq")(LorqQuantizer)
