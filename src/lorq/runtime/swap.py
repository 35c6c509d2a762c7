"""Packed modules in the place of a model's linear layers and experts, and whether what is stored fits them."""

from pathlib import Path
from typing import Any

from torch import nn

from lorq.core.faults import tile_value_faults, value_faults
from lorq.core.tile_factors import TileFormat
from lorq.core.weight import LayerFormat
from lorq.models.experts import Experts
from lorq.models.skeleton import find_blocks, find_tied, read_config, skeleton
from lorq.runtime.embedding import QuantEmbedding, TiedHead
from lorq.runtime.experts import QuantExperts, Tiles
from lorq.runtime.linear import QuantLinear
from lorq.runtime.other_class import Renaming, is_of_another_class
from lorq.runtime.packed import PackedWeight
from lorq.storage.folder import LorqFolder
from lorq.storage.safetensors_file import read_header


def swap_layers(model: nn.Module, formats: dict[str, LayerFormat]) -> None:
    """Put empty `QuantLinear` modules, on the meta device, where the named linear layers are, or `QuantEmbedding`.

    A ValueError if a name is no linear layer and no embedding of the model, or its width does not fit the format.
    """
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    for name, format in formats.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear | Conv1D | nn.Embedding):
            raise ValueError(
                f"quantization_config names the layer {name}, which is "
                f"{'not in the model' if layer is None else 'no linear layer'}; the config belongs to another model"
            )
        out, in_ = layer.weight.shape[::-1] if isinstance(layer, Conv1D) else layer.weight.shape
        try:
            format.check(out, in_)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; the config belongs to another model") from None
        new: PackedWeight
        if isinstance(layer, nn.Embedding):
            new = QuantEmbedding(layer, format, device="meta")
        else:
            bias = layer.bias
            dtype = None if bias is None else bias.dtype
            new = QuantLinear(in_, out, format, bias=bias is not None, dtype=dtype, device="meta")
        model.set_submodule(name, new.requires_grad_(False))
        parent = model.get_submodule(name.rpartition(".")[0])
        # Some architectures initialise their children's weights from the parent. There is nothing to initialise
        # (check_tensors has seen to it), and looking at a packed layer's weight would decode it.
        if not parent._parameters and not parent._buffers:
            parent._is_hf_initialized = True  # type: ignore[assignment]


def tie_heads(model: Any, embeddings: dict[str, str]) -> None:
    """Let heads multiply by the packed tables of tokens that they are tied to, after `swap_layers`.

    transformers must not tie what is packed: of such pairs it is not told any more. A ValueError if a name is not in
    the model.
    """
    modules = dict(model.named_modules())
    for table, name in embeddings.items():
        own, head = modules.get(table), modules.get(name)
        if not isinstance(own, QuantEmbedding) or (name and not isinstance(head, nn.Linear)):
            raise ValueError(
                f"quantization_config.embeddings names the table {table} with the head {name!r}, which the model does "
                "not have; the config belongs to another model"
            )
        if isinstance(head, nn.Linear):
            model.set_submodule(name, TiedHead(own, head.bias))
    packed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, PackedWeight | TiedHead)}
    for path, module in model.named_modules():
        for key in ("all_tied_weights_keys", "_tied_weights_keys"):
            if pairs := getattr(module, key, None):
                names = {own: [f"{path}.{n}".removeprefix(".") for n in (own, origin)] for own, origin in pairs.items()}
                setattr(module, key, {own: pairs[own] for own, full in names.items() if packed.isdisjoint(full)})


def swap_experts(model: nn.Module, formats: dict[str, TileFormat]) -> None:
    """Put `QuantExperts` with empty tile factors, on the meta device, where the named experts are.

    A ValueError if a name is not a projection of experts of the model, or their number differs.
    """
    modules: dict[str, dict[str, Tiles]] = {}
    present = dict(model.named_modules())
    for name, format in formats.items():
        path, _, projection = name.rpartition(".tiles.")
        experts = present.get(path)
        known = isinstance(experts, Experts) and projection in dict(experts[0].named_children())
        if not isinstance(experts, Experts) or not known or len(experts) != format.experts:
            raise ValueError(
                f"quantization_config.tiles names {name} with {format.experts} experts, which the model does not have; "
                "the config belongs to another model"
            )
        layer = getattr(experts[0], projection)
        modules.setdefault(path, {})[projection] = Tiles(layer.out_features, layer.in_features, format, device="meta")
    for path, tiles in modules.items():
        model.set_submodule(path, QuantExperts(model.get_submodule(path), tiles))  # type: ignore[arg-type]


def check_values(name: str, module: PackedWeight | Tiles) -> None:
    """Refuse values that nothing can mean, with a ValueError that names the layer or the tile factors.

    Such as an order of channels that is none, cells outside the grid, and numbers that are not finite.
    """
    own = {local: tensor for local, tensor in module.named_buffers() if not tensor.is_meta}
    found = tile_value_faults(own, module.format) if isinstance(module, Tiles) else value_faults(own)
    if wrong := next(found, None):
        raise ValueError(f"{name}.{wrong}; the folder is damaged, download it again")


def check_tensors(model: Any, files: list[Path], change: Renaming = Renaming()) -> None:  # noqa: B008  # frozen
    """Compare what the model needs with what the files hold, before anything is read.

    transformers fills missing tensors with random numbers and drops unexpected ones, with a warning at most. A
    ValueError if one is missing, unexpected, or of another shape or type than its layer's. A model of another class
    than the folder's may lack what that has, and have a head of its own, which is to be trained.
    """
    stored = {change(name): entry for file in files for name, entry in read_header(file).tensors.items()}
    other = change != Renaming() or is_of_another_class(model)
    # What it may have to itself: all but the blocks, and nothing if it is to write.
    fixed = "" if not other or model.can_generate() else find_blocks(model)[0].rpartition(".")[0]
    tied = find_tied(model)
    needed = model.state_dict(keep_vars=True)
    wrong = []
    for name, tensor in needed.items():
        if name not in stored:
            if name not in tied and name.startswith(fixed):
                wrong.append(f"{name} is missing")
        elif tuple(stored[name].shape) != tuple(tensor.shape):
            wrong.append(f"{name} is {tuple(stored[name].shape)}, not {tuple(tensor.shape)}")
        elif tensor.is_floating_point() and not stored[name].dtype.is_floating_point:
            wrong.append(f"{name} is {stored[name].dtype}, not floating point")
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight | Tiles):
            for local, (_, dtype) in module.format.layout(module.out_features, module.in_features).items():
                entry = stored.get(f"{name}.{local}")
                if entry is not None and entry.dtype != dtype:
                    wrong.append(f"{name}.{local} is {entry.dtype}, not {dtype}")
    if not other:
        wrong += [f"{name} has no place in the model" for name in stored if name not in needed]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"the folder's tensors do not fit its config: {'; '.join(wrong[:5])}{more}; download it again")


def check_fits(folder: LorqFolder) -> None:
    """Refuse a folder whose layers and tensors are not those of the model that its config tells of; reads no weights.

    Raises:
        ValueError: naming what does not fit.
    """
    model = skeleton(read_config(folder.path, quantized=True))
    swap_layers(model, folder.formats)
    tie_heads(model, folder.embeddings)
    swap_experts(model, folder.tiles)
    check_tensors(model, [folder.path / name for name in folder.reader.headers])
