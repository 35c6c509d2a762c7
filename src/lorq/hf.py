"""The transformers hook: `from_pretrained` on a lorq folder builds packed layers, or fails loudly."""

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

from lorq.basis import check_block
from lorq.config import LorqConfig
from lorq.experts import Experts, fuse_experts, split_experts
from lorq.grids import VectorGrid
from lorq.joined import join_layers
from lorq.linear import QuantLinear, share_rotations, stored_layout
from lorq.safefile import read_header
from lorq.source import resolve_model
from lorq.tiled import QuantExperts, Tiles, tile_layout
from lorq.tiles import TileFormat
from lorq.weight import LayerFormat

INDEX_NAME = "lorq.safetensors.index.json"
# transformers only warns about a quant_method it does not know and then returns random weights. So config.json
# names a weights file that does not exist, whose name says what to do; with lorq present, the hook below puts
# the real name in before the files are looked for.
SENTINEL = "this-folder-needs--pip-install-lorq--and--import-lorq.safetensors.index.json"


class LorqQuantizer(HfQuantizer):
    """Loads lorq folders; quantizing is `lorq.quantize`'s work."""

    requires_calibration = True
    quantization_config: LorqConfig

    def update_attn_implementation(self, config: Any) -> Any:
        # The one hook that sees the model's config before its files are looked for (transformers 5.23).
        if getattr(config, "transformers_weights", None) == SENTINEL:
            config.transformers_weights = INDEX_NAME
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
                check_permutation(name, module)
            elif isinstance(module, Tiles) and not module.cells.is_meta:
                check_cells(name, module)
        share_rotations(model)
        join_layers(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantExperts):
                _replace(model, name, module.dequantize(dtype))
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                _replace(model, name, module.dequantize(dtype))
        fuse_experts(model)  # so that it is transformers' own model again, to be saved like one
        return model

    def is_serializable(self) -> bool:
        # A lorq folder holds more than the state (report, checksums, the guard against loading without lorq),
        # so it is copied, not saved again.
        return False

    # Set where an adapter or quantization-aware training is attached (`lorq.adapters`): codes alone do not train.
    trains = False

    @property
    def is_trainable(self) -> bool:
        return self.trains

    @property
    def is_qat_trainable(self) -> bool:
        return self.trains


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
        _check_fit(name, out, in_, format)
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


def swap_experts(model: nn.Module, formats: dict[str, TileFormat]) -> None:
    """Put `QuantExperts` with empty tile factors, on the meta device, where the named experts are.

    Raises:
        ValueError: if a name is not a projection of experts of the model, or their number differs.
    """
    modules: dict[str, dict[str, Tiles]] = {}
    for name, format in formats.items():
        path, _, projection = name.rpartition(".tiles.")
        experts = dict(model.named_modules()).get(path)
        known = isinstance(experts, Experts) and projection in dict(experts[0].named_children())
        if not isinstance(experts, Experts) or not known or len(experts) != format.experts:
            raise ValueError(
                f"quantization_config.tiles names {name} with {format.experts} experts, which the model does not have; "
                "the config belongs to another model"
            )
        layer = getattr(experts[0], projection)
        modules.setdefault(path, {})[projection] = Tiles(layer.out_features, layer.in_features, format, device="meta")
    for path, tiles in modules.items():
        _replace(model, path, QuantExperts(model.get_submodule(path), tiles))  # type: ignore[arg-type]


def check_permutation(name: str, layer: QuantLinear) -> None:
    """Refuse an order of channels that is none.

    Raises:
        ValueError: naming the layer.
    """
    order = layer.permutation
    if order is not None and not torch.equal(order.long().sort()[0].cpu(), torch.arange(layer.in_features)):
        raise ValueError(
            f"{name}.permutation must hold each of 0 .. {layer.in_features - 1} once, it does not; the folder is "
            "damaged, download it again"
        )


def check_cells(name: str, tiles: Tiles) -> None:
    """Refuse cells outside the grid.

    Raises:
        ValueError: naming the tile factors.
    """
    f, cells = tiles.format, tiles.cells.long()
    limits = torch.tensor([f.rows, f.columns], device=cells.device)
    if bool(((cells < 0) | (cells >= limits)).any()):
        raise ValueError(
            f"{name}.cells must lie in a grid of {f.rows} x {f.columns}, got {cells.amin(0).tolist()} to "
            f"{cells.amax(0).tolist()}; the folder is damaged, download it again"
        )


def _check_fit(name: str, out: int, in_: int, format: LayerFormat) -> None:
    if in_ % format.group_size:
        raise ValueError(f"group_size {format.group_size} must divide the width {in_} of {name}")
    try:
        if format.vector > 1:
            rows, columns = format.codebook_rows, format.codebook_columns
            VectorGrid(format.bits, format.vector, rows, columns, format.group_size).check(out, in_)
        if format.rotation_block:
            check_block(in_, format.rotation_block, format.rotation_skip)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; the config belongs to another model") from None


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
        if isinstance(module, QuantLinear | Tiles):
            layout_of = stored_layout if isinstance(module, QuantLinear) else tile_layout
            layout = layout_of(module.out_features, module.in_features, module.format)  # type: ignore[arg-type]
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


def read_dtype(name: str | torch.dtype, *, auto: bool = True) -> torch.dtype:
    """The activation dtype behind a name.

    Args:
        name: of the dtype.
        auto: the caller takes "auto" too, which errors then tell.

    Raises:
        ValueError: if it is none of the three.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = known.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise ValueError(f"dtype must be {'auto, ' if auto else ''}{', '.join(known)}, got {name!r}")
    return dtype


def register() -> None:
    """Tell transformers about ``quant_method: lorq``. Safe to call twice."""
    if "lorq" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("lorq")(LorqConfig)
        register_quantizer("lorq")(LorqQuantizer)


# The one module of lorq that acts when it is imported: whoever imports it means the registration.
register()
