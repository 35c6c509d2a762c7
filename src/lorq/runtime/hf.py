"""The transformers hook: `from_pretrained` on a lorq folder builds packed layers, or fails loudly."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from lorq.models.experts import find_experts, fuse_experts, split_experts
from lorq.models.locate import load_dense, resolve_model
from lorq.models.quantized import is_foreign, read_quantization
from lorq.models.skeleton import read_own_config, with_weights
from lorq.runtime.device import own_defaults, read_device, read_dtype
from lorq.runtime.embedding import QuantEmbedding, TiedHead
from lorq.runtime.experts import QuantExperts, Tiles
from lorq.runtime.linear import QuantLinear
from lorq.runtime.other_class import Renaming, is_of_another_class, renaming
from lorq.runtime.packed import PackedWeight
from lorq.runtime.same_input import join
from lorq.runtime.swap import check_tensors, check_values, swap_experts, swap_layers, tie_heads
from lorq.storage.config import LorqConfig
from lorq.storage.folder import LorqFolder, check_report
from lorq.storage.json_files import read_json
from lorq.storage.names import INDEX, REPORT_NAME, SENTINEL
from lorq.storage.report import read_report


class LorqQuantizer(HfQuantizer):
    """Loads lorq folders; quantizing is `lorq.quantize`'s work."""

    requires_calibration = True
    quantization_config: LorqConfig
    _renaming = Renaming()

    def update_attn_implementation(self, config: Any) -> Any:
        # The one hook that sees the model's config before its files are looked for (transformers 5.23).
        # The text model's part of a config has no name of weights.
        if getattr(config, "transformers_weights", None) in (None, SENTINEL):
            config.transformers_weights = INDEX
        return config

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        # The folder has the model's own names, experts one by one; transformers would rename and merge them.
        change = self._renaming
        return [WeightRenaming("^" + re.escape(change.old), change.new)] if change.old else []

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        split_experts(model)
        for name in find_experts(model):
            # Some architectures initialise fused experts from the parent; there are none any more.
            model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True
        formats, tiles = self.quantization_config.formats(), self.quantization_config.tile_formats()
        self._renaming = change = renaming(model, formats)
        modules, other = dict(model.named_modules()), is_of_another_class(model)  # which may have no such head
        swap_layers(model, {change(n): f for n, f in formats.items() if not other or change(n) in modules})
        heads = self.quantization_config.embeddings.items()
        tie_heads(model, {change(t): change(n) if not other or change(n) in modules else "" for t, n in heads})
        swap_experts(model, {change(name): format for name, format in tiles.items()})
        if checkpoint_files:
            check_tensors(model, [Path(file) for file in checkpoint_files], change)
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
            if isinstance(module, PackedWeight) and not module.weight_shape.is_meta:
                shape = tuple(module.weight_shape.tolist())
                if shape != (module.out_features, module.in_features):
                    raise ValueError(
                        f"{name}.weight_shape must be {(module.out_features, module.in_features)} as the model says, "
                        f"got {shape}; the folder is damaged, download it again"
                    )
            if isinstance(module, PackedWeight | Tiles):
                check_values(name, module)
        join(model, [[self._renaming(name) for name in names] for names in self.quantization_config.inputs])
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        heads: dict[str, TiedHead] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantExperts):
                model.set_submodule(name, module.dequantize(dtype))
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear | QuantEmbedding):
                model.set_submodule(name, module.dequantize(dtype))
            elif isinstance(module, TiedHead):
                heads[name] = module
        for name, head in heads.items():
            model.set_submodule(name, head.dequantize())
        if heads:
            vars(model).pop("_tied_weights_keys", None)
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        fuse_experts(model)  # so that it is transformers' own model again, to be saved like one
        return model

    def is_serializable(self) -> bool:
        # Asked by `save_pretrained` alone, whose own words name no way on.
        raise ValueError(
            "a model that lorq has quantized is not saved again, for its folder holds more than the state; copy the "
            "folder it was loaded from (adapters: lorq.adapt.save)"
        )

    # Codes alone do not train: `transformers.Trainer` asks for an adapter of peft (lora.py here) unless the
    # second is set, as it is where lorq's own or quantization-aware training is attached (`lorq.adapt.adapters`).
    is_trainable, is_qat_trainable = True, False


@own_defaults()
def load(model: str | Path, *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> Any:
    """A model ready to run: `from_pretrained` of the class that the folder names, with lorq's names for things.

    Args:
        model: a lorq folder, or anything that `lorq.quantize` takes; what others have quantized is dequantized.
        device: "auto" takes an accelerator if there is one.
        dtype: of the activations and of what is not quantized: float32, bfloat16, float16, or "auto", which
            is float32 on a CPU and the folder's own type elsewhere.

    Raises:
        FileNotFoundError: if there is no such model, or the folder is unfinished.
        ValueError: if the folder is damaged, or of a newer format than this lorq reads.
    """
    folder = resolve_model(model)
    place = read_device(device)
    automatic = torch.float32 if place.type == "cpu" else "auto"
    kind = automatic if dtype == "auto" else read_dtype(dtype)
    config = read_own_config(folder)
    if is_foreign(folder):
        stored: Any = config.get_text_config().dtype or torch.float32
        return load_dense(folder, stored if kind == "auto" else kind).to(place).eval()  # type: ignore[arg-type]
    if (read_quantization(folder) or {}).get("quant_method") == "lorq" and (folder / REPORT_NAME).is_file():
        LorqFolder.open(folder)  # whose errors name the place
    return with_weights(config, folder, kind).to(place)


# Whoever imports this means the registration.
if "lorq" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config("lorq")(LorqConfig)
    register_quantizer("lorq")(LorqQuantizer)
