"""Adapters: other scale factors for the codes of a LoRDS model; attached, swapped, kept in a folder."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorq.adapt.folder import (
    ADAPTER_CONFIG,
    ADAPTER_TENSORS,
    ADAPTER_VERSION,
    check_formats,
    read_adapter_config,
    untrainable,
)
from lorq.core.codes import CodesFormat, LevelFormat, LowRankScale
from lorq.models.locate import full_path
from lorq.runtime.device import own_defaults
from lorq.runtime.linear import QuantLinear
from lorq.storage.atomic import AGAIN, sha256_of, write_whole
from lorq.storage.config import write_format
from lorq.storage.json_files import damaged, json_bytes, some_of
from lorq.storage.safetensors_file import Header, read_header, read_tensor

# The model's own factors.
BASE = "base"
Factors = tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]


@dataclass
class Adapters:
    """Which factors a model has: by adapter and layer, those of the base included, and which are in its layers."""

    known: dict[str, dict[str, Factors]] = field(default_factory=dict)
    active: str = BASE


def has_product_scale(layer: QuantLinear) -> bool:
    codes = layer.format.codes
    return isinstance(codes, LevelFormat) and codes.scale_rank > 0


def lords_format(layer: QuantLinear) -> LevelFormat:
    """The codes' format of a layer whose scale is a product."""
    codes = layer.format.codes
    assert isinstance(codes, LevelFormat) and has_product_scale(layer), codes
    return codes


def lords_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The layers whose scale is a product, by name; a ValueError if there are none."""
    packed = _packed_layers(model)
    found = {name: layer for name, layer in packed.items() if has_product_scale(layer)}
    if not found:
        raise untrainable("this one", len(packed))
    return found


def _packed_layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def trainable_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The layers that train through the rounding, by name: `lords_layers`, or in a model without them all packed ones.

    Raises:
        ValueError: if there are none, or they are not codes alone.
    """
    packed = _packed_layers(model)
    formats = {name: write_format(layer.format) for name, layer in packed.items()}
    check_formats("this one", "qat", formats, any(layer.shared for layer in packed.values()))
    return {name: layer for name, layer in packed.items() if has_product_scale(layer)} or packed


def adapters_of(model: nn.Module) -> Adapters:
    """The model's adapters; the first look notes its own factors as the base's."""
    state: Adapters | None = getattr(model, "lorq_adapters", None)
    if state is None:
        state = Adapters({BASE: {name: _factors(layer) for name, layer in lords_layers(model).items()}})
        model.lorq_adapters = state  # type: ignore[assignment]
    return state


def _factors(layer: nn.Module) -> Factors:
    return layer.scale_left, layer.scale_right  # type: ignore[return-value]


@own_defaults()
def attach(model: nn.Module, name: str = "default", *, rank: int = -1, seed: int = 0) -> list[nn.Parameter]:
    """Give the model a new adapter that trains, and put it into use; everything else is frozen.

    An adapter is a pair of factors for every layer in place of the base's: ``W = levels[codes] o (left right)``. It
    begins with the base's own, so that the model computes what it did, to the last bit. There is no dropout, no
    scaling and nothing to add when it runs.

    Args:
        model: quantized with lords, loaded.
        name: of the adapter; new.
        rank: of every layer's factors, at least the base's: the columns added to ``left`` are zero, the rows added to
            ``right`` random and as large as its others. -1 keeps each layer's own.
        seed: of these rows.

    Returns:
        What trains: float32 parameters, two a layer, which `transformers.Trainer` and plain loops find in
        ``model.parameters()`` like any others. `save_pretrained` of the model then writes the adapter.

    Raises:
        ValueError: if the model is not quantized with lords, the name is taken, or the rank is below a layer's own or
            above its width.

    Source:
        LoRDS, arXiv:2601.22716, multiplicative fine-tuning. The paper starts all layers at one rank from a
        quantization of that rank; here a base of any smaller rank serves.
    """
    state = adapters_of(model)
    if name in state.known:
        raise ValueError(f"an adapter's name must be new, got {name!r}, known are {', '.join(state.known)}")
    layers, base = lords_layers(model), state.known[BASE]
    narrow = {n: l for n, l in layers.items() if rank > min(l.out_features, l.in_features)}
    wide = {n: base[n][0].shape[1] for n in layers if rank != -1 and rank < base[n][0].shape[1]}
    if narrow or wide:
        n = next(iter(narrow or wide))
        sizes = f"{n} is {layers[n].out_features} x {layers[n].in_features} with rank {base[n][0].shape[1]}"
        raise ValueError(
            f"an adapter's rank must be at least the base's and at most a layer's smaller side, got {rank}: {sizes}; "
            "-1 keeps each layer's own"
        )
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Factors] = {}
    for layer_name in layers:
        left, right = (part.detach().float() for part in base[layer_name])
        more = 0 if rank == -1 else rank - left.shape[1]
        rows = torch.randn(more, right.shape[1], generator=generator).to(right.device) * right.square().mean().sqrt()
        left = torch.cat([left, left.new_zeros(len(left), more)], dim=1)
        made[layer_name] = nn.Parameter(left), nn.Parameter(torch.cat([right, rows]))
    state.known[name] = made
    use_adapter(model, name, trainable=True)
    return [parameter for pair in made.values() for parameter in pair]  # type: ignore[misc]


@own_defaults()
def use_adapter(model: nn.Module, name: str = BASE, *, trainable: bool = False) -> None:
    """Put a known adapter's factors into the layers; "base" puts the model's own back.

    With ``trainable`` it trains on, all else frozen.

    Raises:
        ValueError: if there is no such adapter, or the base is to train.
    """
    state = adapters_of(model)
    if name not in state.known:
        raise ValueError(f"the adapter must be one of {', '.join(state.known)}, got {name!r}; load it first")
    if trainable and name == BASE:
        raise ValueError("the base itself cannot train; attach an adapter to it")
    model.requires_grad_(False)
    for layer_name, layer in lords_layers(model).items():
        put_factors(layer, *state.known[name][layer_name])
        state.known[name][layer_name] = _factors(layer)
        if trainable:
            for factor in _factors(layer):
                factor.requires_grad_(True)
    state.active = name
    let_train(model, trainable, partial(_save_like_transformers, model) if name != BASE else None)


def put_factors(layer: QuantLinear, left: Tensor, right: Tensor) -> None:
    """Other scale factors for a layer: parameters stay parameters, tensors become buffers; on the layer's device."""
    device = layer.weight_packed.device
    for name, tensor in (("scale_left", left), ("scale_right", right)):
        layer._buffers.pop(name, None)
        layer._parameters.pop(name, None)
        if isinstance(tensor, nn.Parameter):
            tensor.data = tensor.data.to(device)
            layer.register_parameter(name, tensor)
        else:
            layer.register_buffer(name, tensor.to(device))
    codes: Any = layer.format.codes
    layer.format = replace(layer.format, codes=replace(codes, scale_rank=left.shape[1]))


def let_train(model: nn.Module, trains: bool, save: Any) -> None:
    """Tell `transformers.Trainer` whether the model trains, and how it is saved; None leaves that to transformers."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.is_qat_trainable = trains
    if save is not None:
        model.save_pretrained = save  # type: ignore[assignment]
    else:
        vars(model).pop("save_pretrained", None)  # the class has its own


def _save_like_transformers(model: nn.Module, save_directory: str | Path, **ignored: Any) -> None:
    save_adapter(model, save_directory)


def half_factors(layer: nn.Module) -> LowRankScale:
    """A layer's factors as they are stored; an ArithmeticError if they are not finite in float16."""
    left, right = (part.detach().to(torch.float16) for part in _factors(layer))
    if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise ArithmeticError("scale factors must be finite in float16, they are not; train with a lower learning rate")
    return LowRankScale(left, right)


def base_hash(model: nn.Module) -> str:
    """`codes_hash` of a model's layers."""
    return codes_hash(
        (name, (layer.out_features, layer.in_features), layer.format.codes, layer.weight_packed)
        for name, layer in sorted(trainable_layers(model).items())
    )


def codes_hash(layers: Iterable[tuple[str, tuple[int, int], CodesFormat, Tensor]]) -> str:
    """sha256 (hex) of the codes that adapters belong to: names, shapes, grids and packed words, not their scales.

    ``layers`` come in the order of their names.
    """
    digest = hashlib.sha256()
    for name, (out, in_), codes, words in layers:
        kind = codes.levels if isinstance(codes, LevelFormat) else codes.kind
        head = f"{name} {out} {in_} {codes.bits} {kind} "
        digest.update(head.encode() + len(head).to_bytes(8, "little"))
        digest.update(words.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@own_defaults()
def save_adapter(model: nn.Module, folder: str | Path, name: str | None = None) -> None:
    """Write an adapter: its factors in float16, and which base it belongs to.

    Args:
        model: that has the adapter.
        folder: made if missing; an adapter in it is replaced.
        name: of the adapter; None takes the one in use.

    Raises:
        ValueError: if there is no such adapter, or it is the base, which its own folder has.
        FileExistsError: if the folder is a model's, or a file.
    """
    state, folder = adapters_of(model), full_path(folder)
    name = state.active if name is None else name
    if name not in state.known or name == BASE:
        own = [known for known in state.known if known != BASE]
        raise ValueError(
            f"the adapter to save must be one of {', '.join(own) or 'none so far'}, got {name!r}; name one of them"
        )
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"an adapter needs a folder, {folder} is a file; choose another name")
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} is a model's folder, an adapter needs one of its own; choose another")
    folder.mkdir(parents=True, exist_ok=True)
    tensors, ranks = {}, {}
    for layer, pair in state.known[name].items():
        ranks[layer] = pair[0].shape[1]
        for part, tensor in zip(("scale_left", "scale_right"), pair, strict=True):
            tensors[f"{layer}.{part}"] = tensor.detach().to("cpu", torch.float16).contiguous()
    if bad := [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise ArithmeticError(f"an adapter must be finite in float16, these are not: {some_of(bad)}; train it anew")
    from safetensors.torch import save

    weights = save(tensors)
    config = {
        "lorq_adapter": ADAPTER_VERSION, "base": base_hash(model), "ranks": ranks,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }  # fmt: skip
    for file, data in ((ADAPTER_TENSORS, weights), (ADAPTER_CONFIG, json_bytes(config))):
        write_whole(folder / file, data, AGAIN)


@own_defaults()
def load_adapter(model: nn.Module, folder: str | Path, name: str | None = None, *, trainable: bool = False) -> str:
    """Read an adapter's folder onto its base, and put it into use.

    Args:
        model: the base.
        folder: that `save_adapter` wrote.
        name: to give it; None takes the folder's.
        trainable: let it train on, all else frozen.

    Returns:
        Its name.

    Raises:
        FileNotFoundError: if the folder has no adapter.
        ValueError: if it belongs to another base, is damaged or of a newer version, or the name is taken.
    """
    folder = full_path(folder)
    layers = lords_layers(model)
    shapes = {layer: (own.out_features, own.in_features) for layer, own in layers.items()}
    factors = read_factors(folder, base_hash(model), shapes)
    state = adapters_of(model)
    name = folder.resolve().name if name is None else name
    if name in state.known:
        raise ValueError(
            f"an adapter's name must be new, got {name!r}, known are {', '.join(state.known)}; give it another, or "
            "rename its folder"
        )
    state.known[name] = {layer: (_frozen(left), _frozen(right)) for layer, (left, right) in factors.items()}
    use_adapter(model, name, trainable=trainable)
    return name


def _frozen(factor: Tensor) -> nn.Parameter:
    return nn.Parameter(factor.float(), requires_grad=False)


def read_factors(folder: Path, base: str, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Factors]:
    """An adapter's factors as they are stored, in float16, by layer.

    Args:
        base: what `codes_hash` says of the codes that they are for.
        shapes: of the base's layers.

    Raises:
        FileNotFoundError: if the folder has no adapter.
        ValueError: if it belongs to another base, is damaged or of a newer version.
    """
    config = read_adapter_config(folder)
    if base != config.get("base"):
        raise ValueError(
            f"{folder} is an adapter for the base {str(config.get('base'))[:12]}, this model is {base[:12]}; "
            "load the lorq folder that it was trained on"
        )
    path, ranks = folder / ADAPTER_TENSORS, config.get("ranks")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {ADAPTER_TENSORS}; copy the adapter again")
    if not isinstance(ranks, dict) or set(ranks) != set(shapes):
        raise damaged(folder / ADAPTER_CONFIG, f"ranks must name the base's {len(shapes)} layers")
    header = read_header(path)
    wanted = {f"{name}.{part}" for name in shapes for part in ("scale_left", "scale_right")}
    if more := set(header.tensors) - wanted:
        raise damaged(path, f"it must hold the {len(wanted)} factors of the base's layers alone, got {some_of(more)}")
    factors = {name: _read_pair(path, header, name, ranks[name], shape) for name, shape in shapes.items()}
    if (told := config.get("sha256")) not in (None, found := sha256_of(path)):  # None: written by an earlier lorq
        raise damaged(path, f"it must have the sha256 {str(told)[:12]} of {ADAPTER_CONFIG}, it has {found[:12]}")
    return factors


def _read_pair(path: Path, header: Header, name: str, rank: Any, shape: tuple[int, int]) -> Factors:
    out, in_ = shape
    if not isinstance(rank, int) or not 1 <= rank <= min(shape):
        raise damaged(path.parent / ADAPTER_CONFIG, f"the rank of {name} must fit its layer, got {rank!r}")
    parts = []
    for part, own in (("scale_left", (out, rank)), ("scale_right", (rank, in_))):
        entry = header.tensors.get(f"{name}.{part}")
        if entry is None or entry.shape != own or entry.dtype != torch.float16:
            raise damaged(path, f"{name}.{part} must be float16 of shape {own}")
        tensor = read_tensor(path, header, f"{name}.{part}")
        if not bool(torch.isfinite(tensor).all()):
            raise damaged(path, f"{name}.{part} must be finite")
        parts.append(tensor)
    return parts[0], parts[1]
