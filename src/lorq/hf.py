"""The transformers hook: `from_pretrained` on a lorq folder builds packed layers, or fails loudly."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorq.linear import QuantLinear, stored_layout
from lorq.safefile import read_header
from lorq.source import resolve_model
from lorq.weight import LayerFormat

FORMAT_VERSION = 1
INDEX_NAME = "lorq.safetensors.index.json"
# transformers only warns about a quant_method it does not know and then returns random weights. So config.json
# names a weights file that does not exist, whose name says what to do; with lorq present, the hook below puts
# the real name in before the files are looked for.
SENTINEL = "this-folder-needs--pip-install-lorq--and--import-lorq.safetensors.index.json"


class LorqConfig(QuantizationConfigMixin):
    """``quantization_config`` of a lorq folder (docs/format.md).

    Args:
        format_version: of the folder; a newer one than this lorq's is refused.
        lorq_version: that wrote it.
        method: name of the method.
        settings: the method's settings.
        layers: for each quantized layer the fields of `lorq.weight.LayerFormat`.

    Raises:
        ValueError: for a newer format version, an unknown or missing key, or a value out of range.
    """

    method: str
    layers: dict[str, Any]

    def __init__(self, **keys: Any):
        self.quant_method = keys.pop("quant_method", "lorq")  # type: ignore[assignment]
        version = keys.pop("format_version", None)
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ValueError(f"format_version of a lorq folder must be a whole number from 1, got {version!r}")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"the folder has lorq format version {version}, this lorq reads up to {FORMAT_VERSION}; "
                "upgrade it: pip install --upgrade lorq"
            )
        self.format_version = version
        for key, kind in (("lorq_version", str), ("method", str), ("settings", dict), ("layers", dict)):
            if not isinstance(keys.get(key), kind):
                raise ValueError(f"quantization_config.{key} must be a {kind.__name__}, got {keys.get(key)!r}")
            setattr(self, key, keys.pop(key))
        if keys:
            raise ValueError(
                f"unknown keys in quantization_config: {', '.join(sorted(keys))}; known are quant_method, "
                "format_version, lorq_version, method, settings, layers"
            )
        self.formats()  # checks them

    def formats(self) -> dict[str, LayerFormat]:
        """The layers' formats by name."""
        return {name: _layer_format(name, entry) for name, entry in self.layers.items()}

    def __repr__(self) -> str:
        # The table of layers is long and transformers prints configs freely.
        return f"LorqConfig(method={self.method!r}, format_version={self.format_version}, layers={len(self.layers)})"


def _layer_format(name: str, entry: Any) -> LayerFormat:
    known = {field.name: field.type for field in fields(LayerFormat)}
    if not isinstance(entry, dict) or set(entry) != set(known):
        got = sorted(entry) if isinstance(entry, dict) else entry
        raise ValueError(f"quantization_config.layers[{name!r}] must have the keys {sorted(known)}, got {got}")
    for key, kind in known.items():
        if type(entry[key]) is not kind:
            raise ValueError(f"quantization_config.layers[{name!r}].{key} must be {kind}, got {entry[key]!r}")
    format = LayerFormat(**entry)
    if not (1 <= format.bits <= 8 and format.group_size >= 1 and format.rank >= 0 and format.factor_bits in (8, 16)):
        raise ValueError(
            f"quantization_config.layers[{name!r}] must have bits 1..8, group_size >= 1, rank >= 0 and factor_bits "
            f"8 or 16, got {asdict(format)}"
        )
    return format


class LorqQuantizer(HfQuantizer):
    """Loads lorq folders; quantizing is `lorq.quantize`'s work."""

    requires_calibration = True
    quantization_config: LorqConfig

    def update_attn_implementation(self, config: Any) -> Any:
        # The one hook that sees the model's config before its files are looked for (transformers 5.23).
        if getattr(config, "transformers_weights", None) == SENTINEL:
            config.transformers_weights = INDEX_NAME
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        swap_layers(model, self.quantization_config.formats())
        if checkpoint_files:
            check_tensors(model, [Path(file) for file in checkpoint_files])
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear) and not module.weight_shape.is_meta:
                shape = tuple(module.weight_shape.tolist())
                if shape != (module.out_features, module.in_features):
                    raise ValueError(
                        f"{name}.weight_shape must be {(module.out_features, module.in_features)} as the model says, "
                        f"got {shape}; the folder is damaged, download it again"
                    )
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                _replace(model, name, module.dequantize(dtype))
        return model

    def is_serializable(self) -> bool:
        # A lorq folder holds more than the state (report, checksums, the guard against loading without lorq),
        # so it is copied, not saved again.
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def swap_layers(model: nn.Module, formats: dict[str, LayerFormat]) -> None:
    """Put empty `QuantLinear` modules, on the meta device, where the named linear layers are.

    Raises:
        ValueError: if a name is not a linear layer of the model, or its width does not fit the format.
    """
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    for name, format in formats.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear | Conv1D):
            raise ValueError(
                f"quantization_config names the layer {name}, which is "
                f"{'not in the model' if layer is None else 'no linear layer'}; the config belongs to another model"
            )
        out, in_ = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
        if in_ % format.group_size:
            raise ValueError(f"group_size {format.group_size} must divide the width {in_} of {name}")
        bias = layer.bias
        new = QuantLinear(
            in_, out, format, bias=bias is not None, dtype=None if bias is None else bias.dtype, device="meta"
        )
        _replace(model, name, new.requires_grad_(False))
        parent = model.get_submodule(name.rpartition(".")[0])
        # Some architectures initialise their children's weights from the parent. There is nothing to initialise
        # (check_tensors has seen to it), and looking at a packed layer's weight would decode it.
        if not parent._parameters and not parent._buffers:
            parent._is_hf_initialized = True  # type: ignore[assignment]


def check_tensors(model: Any, files: list[Path]) -> None:
    """Compare what the model needs with what the files hold, before anything is read.

    transformers fills missing tensors with random numbers and drops unexpected ones, with a warning at most.

    Raises:
        ValueError: if a tensor is missing, unexpected, or of another shape or type than its layer's.
    """
    stored = {name: entry for file in files for name, entry in read_header(file).tensors.items()}
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    needed = model.state_dict(keep_vars=True)
    wrong = []
    for name, tensor in needed.items():
        if name not in stored:
            if name not in tied:
                wrong.append(f"{name} is missing")
        elif tuple(stored[name].shape) != tuple(tensor.shape):
            wrong.append(f"{name} is {tuple(stored[name].shape)}, not {tuple(tensor.shape)}")
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            layout = stored_layout(module.out_features, module.in_features, module.format)
            for local, (_, dtype) in layout.items():
                entry = stored.get(f"{name}.{local}")
                if entry is not None and entry.dtype != dtype:
                    wrong.append(f"{name}.{local} is {entry.dtype}, not {dtype}")
    wrong += [f"{name} has no place in the model" for name in stored if name not in needed]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"the folder's tensors do not fit its config: {'; '.join(wrong[:5])}{more}; download it again")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, module)


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
    if dtype == "auto":
        kind: Any = torch.float32 if place.type == "cpu" else "auto"
    else:
        kind = read_dtype(dtype)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    return loaded.to(place).eval()


def read_device(name: str | torch.device) -> torch.device:
    """The device behind a name; "auto" takes an accelerator if there is one.

    Raises:
        ValueError: if this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("meta tensors hold nothing")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device must be auto, cpu or an accelerator of this machine, got {name!r} ({reason})"
        ) from None
    return device


def read_dtype(name: str | torch.dtype) -> torch.dtype:
    """The activation dtype behind a name.

    Raises:
        ValueError: if it is none of the three.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = known.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise ValueError(f"dtype must be auto, {', '.join(known)}, got {name!r}")
    return dtype


def register() -> None:
    """Tell transformers about ``quant_method: lorq``. Safe to call twice."""
    if "lorq" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("lorq")(LorqConfig)
        register_quantizer("lorq")(LorqQuantizer)


# The one module of lorq that acts when it is imported: whoever imports it means the registration.
register()
