"""Models that others have quantized: where each layer's tensors lie, what makes a weight of them, and what must fit."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.weight import QuantizedWeight
from lorq.models.bitsandbytes import STATE, read_eight_bits, read_four_bits, read_state
from lorq.models.decoded import FLOAT8, read_float8
from lorq.models.grouped import awq_columns, gptq_zero_points, read_awq, read_gptq, read_packed, read_plain
from lorq.models.stated import (
    check_bits,
    check_groups,
    check_offset,
    check_order,
    check_symmetry,
    has_order,
    is_symmetric,
    settle,
    stated_by_gptq,
    stated_by_groups,
)
from lorq.storage.json_files import _short, check_kinds, damaged, inconsistent, some_of
from lorq.storage.reader import WeightFiles


@runtime_checkable
class Weight(Protocol):
    """A quantized weight, read."""

    def decode(self) -> Float[Tensor, "out in"]:
        """In float32."""
        ...

    def exact(self) -> QuantizedWeight:
        """In lorq's codes, to the last bit; a ValueError that says why where these cannot have it."""
        ...


@dataclass(frozen=True)
class Packed:
    """Where a quantized weight lies: shape, names of its tensors by local name, and what makes a weight of them."""

    shape: tuple[int, int]
    parts: Mapping[str, str]
    make: Callable[[Mapping[str, Tensor]], Weight]


Found = Iterator[tuple[str, Packed]]


def _parts(
    files: WeightFiles, key: str, others: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, str]]]:
    """The modules that have a tensor ``key``: their tensors by local name.

    Raises:
        ValueError: if one lacks one of the ``others``.
    """
    for module, names in files.by_module.items():
        own = {name.rpartition(".")[2]: name for name in names}
        if key not in own:
            continue
        if lacking := [local for local in others if local not in own]:
            raise damaged(files.folder, f"{module} has {key} and lacks {some_of(lacking)}")
        yield module, {local: own[local] for local in (key, *others, *optional) if local in own}


def _matrix(files: WeightFiles, name: str) -> tuple[int, int]:
    """The shape of a tensor that must be a matrix."""
    shape = files.shape(name)
    if len(shape) != 2:
        raise damaged(files.folder / files.files[name], f"{name} must be a matrix, its shape is {shape}")
    return shape[0], shape[1]


def _words(files: WeightFiles, parts: Mapping[str, str], *local: str) -> None:
    """Refuse codes that are not packed into 32 bits each time."""
    for name in (parts[own] for own in local if own in parts):
        if files.dtype(name) != torch.int32:
            where = files.folder / files.files[name]
            raise ValueError(f"{where}: {name} must be words of 32 bits, got {files.dtype(name)}; pack it as int32")


def _gptq(files: WeightFiles, config: Mapping[str, Any]) -> Found:
    folder, config = files.folder, settle(files.folder, config)
    form = str(config.get("checkpoint_format", "gptq"))
    if form not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
        form = "marlin" if config.get("is_marlin_format") else form
        raise ValueError(f"{folder} must have GPTQ's checkpoint_format gptq or gptq_v2, got {form:.80}")
    if turned := config.get("rotation"):
        raise ValueError(f"{folder} has rotation {_short(turned)}: its weights were turned, by what is not known here")
    offset = 1 if form == "gptq" else 0
    for module, parts in _parts(files, "qweight", ("qzeros", "scales", "g_idx")):
        words, out = _matrix(files, parts["qweight"])
        in_, stated = files.shape(parts["g_idx"])[0], stated_by_gptq(config, module)
        check_bits(folder, module, stated.get("bits"), words=words, columns=in_)
        groups, _ = _matrix(files, parts["scales"])
        _matrix(files, parts["qzeros"])
        check_groups(folder, module, stated.get("group_size"), groups=groups, columns=in_)
        _words(files, parts, "qweight", "qzeros")
        bits = words * 32 // in_
        zero = gptq_zero_points(files.aside().tensor(parts["qzeros"]), bits, out, zero_offset=offset)
        check_offset(folder, module, zero, bits, form)
        check_symmetry(folder, module, zero, bits, said="sym", stated=stated.get("sym"))
        if stated.get("desc_act") is False:
            group = files.aside().tensor(parts["g_idx"])
            check_order(folder, module, group, groups, said="desc_act", stated=False)
        yield module, Packed((out, in_), parts, partial(read_gptq, zero_offset=offset))


def _awq(files: WeightFiles, config: Mapping[str, Any]) -> Found:
    folder, config = files.folder, settle(files.folder, config)
    form, bits = str(config.get("checkpoint_format", "gemm")), config.get("bits")
    if form != "gemm" or bits != 4:
        raise ValueError(f"{folder} must have AWQ's version gemm in 4 bits, got {form:.80} in {_short(bits)}")
    for module, parts in _parts(files, "qweight", ("qzeros", "scales")):
        in_, words = _matrix(files, parts["qweight"])
        groups, _ = _matrix(files, parts["scales"])
        _matrix(files, parts["qzeros"])
        check_groups(folder, module, config.get("group_size"), groups=groups, columns=in_)
        _words(files, parts, "qweight", "qzeros")
        if config.get("zero_point") is False:
            zero = awq_columns(files.aside().tensor(parts["qzeros"]))
            check_symmetry(folder, module, zero, 4, said="zero_point", stated="false")
        yield module, Packed((8 * words, in_), parts, read_awq)


def _compressed_tensors(files: WeightFiles, config: Mapping[str, Any]) -> Found:
    known = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
    groups = _groups(files, config)
    forms = {str(group.get("format") or config.get("format")) for group in groups.values()}
    sparse = (config.get("sparsity_config") or {}).get("format") or "dense"
    if unread := sorted((forms | {sparse}) - {*known, "dense"} | forms & {"dense"}):
        raise ValueError(
            f"{files.folder} must have compressed-tensors' format {' or '.join(known)}, got {some_of(unread)}"
        )
    if config.get("transform_config"):
        raise ValueError(
            f"{files.folder} has transform_config: its weights are rotated, and differ from the original's otherwise "
            "than by quantization"
        )
    for module, parts in _parts(
        files, "weight_packed", ("weight_scale", "weight_shape"), ("weight_zero_point", "weight_g_idx")
    ):
        yield module, _packed(files, module, parts, stated_by_groups(groups, module))
    for module, parts in _parts(files, "weight", (), ("weight_scale", "weight_zero_point")):
        if "weight_scale" in parts:
            yield module, _unpacked(files, module, parts, stated_by_groups(groups, module), groups)


def _groups(files: WeightFiles, config: Mapping[str, Any]) -> dict[str, Any]:
    """compressed-tensors' groups of layers, by name, each with its layers and what is said of their weights."""
    where, groups = files.folder / "config.json", config.get("config_groups") or {}
    check_kinds({"config_groups": groups}, {"config_groups": dict}, where=where)
    check_kinds(groups, dict.fromkeys(groups, dict), where=where, what="config_groups: ")
    for name, group in groups.items():
        told = {key: value for key, value in group.items() if value is not None}
        kinds: dict[str, type] = {"targets?": list, "weights?": dict, "format?": str}
        check_kinds(told, kinds, where=where, what=f"config_groups: {name}: ")
        if odd := [target for target in told.get("targets", ()) if not isinstance(target, str)]:
            raise damaged(where, f"config_groups: {name}: targets must be texts, got {odd[0]!r:.80}")
    return groups


def _packed(files: WeightFiles, module: str, parts: dict[str, str], stated: Mapping[str, Any]) -> Packed:
    """A layer of compressed-tensors' "pack-quantized"."""
    folder, bits = files.folder, stated.get("num_bits")
    out, in_ = files.told_shape(parts["weight_shape"])
    check_bits(folder, module, bits, words=_matrix(files, parts["weight_packed"])[1], columns=in_)
    if stated.get("strategy") == "block":
        raise ValueError(
            f"{folder} must have packed codes with scales of rows or groups, {module} has the strategy block; give a "
            "folder of its dequantized weights instead"
        )
    _check_scales(files, module, parts, stated, in_)
    _check_parts(files, module, parts, stated)
    if "weight_g_idx" in parts and "actorder" in stated and not has_order(stated):
        group, groups = files.aside().tensor(parts["weight_g_idx"]), files.shape(parts["weight_scale"])[-1]
        check_order(folder, module, group, groups, said="actorder", stated=stated["actorder"])
    return Packed((out, in_), parts, partial(read_packed, bits=bits, symmetric=bool(is_symmetric(stated))))


def _unpacked(
    files: WeightFiles, module: str, parts: dict[str, str], stated: Mapping[str, Any], groups: Mapping[str, Any]
) -> Packed:
    """One of "int-quantized" or "float-quantized"."""
    shape, dtype = _matrix(files, parts["weight"]), files.dtype(parts["weight"])
    if dtype in FLOAT8:
        scales = {local: name for local, name in parts.items() if local != "weight_zero_point"}
        return Packed(shape, scales, partial(read_float8, block=_block(groups)))
    if dtype != torch.int8:
        raise ValueError(
            f"{files.folder} must have compressed weights (quantization_status compressed), {module}.weight is {dtype} "
            "beside a scale; save it with save_compressed=True"
        )
    _check_parts(files, module, parts, stated)
    block = tuple(stated.get("block_structure") or ()) if stated.get("strategy") == "block" else None
    if block is None:
        _check_scales(files, module, parts, stated, shape[1])
    elif len(block) != 2:
        raise damaged(files.folder / "config.json", f"{module} must have a block_structure of two numbers, got {block}")
    return Packed(shape, parts, partial(read_plain, block=block))


def _check_scales(
    files: WeightFiles, module: str, parts: dict[str, str], stated: Mapping[str, Any], columns: int
) -> None:
    """Hold the number of a row's scales against the stated groups."""
    if stated.get("strategy") in ("group", "channel"):
        shape = files.shape(parts["weight_scale"])
        groups = shape[-1] if len(shape) == 2 else 1
        check_groups(files.folder, module, stated.get("group_size") or -1, groups=groups, columns=columns)


def _check_parts(files: WeightFiles, module: str, parts: dict[str, str], stated: Mapping[str, Any]) -> None:
    """Hold what a layer has against what the config says that it has."""
    if (kind := stated.get("type", "int")) != "int":
        raise inconsistent(files.folder / "config.json", f"{module} has integer codes, its type is {_short(kind)}")
    if has_order(stated) and "weight_packed" in parts and "weight_g_idx" not in parts:
        raise inconsistent(
            files.folder / "config.json",
            f"{module} must have a weight_g_idx, since its actorder is {_short(stated['actorder'])}, it has none",
        )
    symmetric, own = is_symmetric(stated), parts.get("weight_zero_point")
    by_default = "" if "symmetric" in stated else " where the config does not say"
    # Programs wrote zeros there once.
    if symmetric and own and bool(files.aside().tensor(own).any()):
        raise inconsistent(
            files.folder / "config.json",
            f"{module} must have no zero points, since symmetric is true{by_default}, its weight_zero_point has some",
        )
    if symmetric is False and not own:
        raise inconsistent(
            files.folder / "config.json",
            f"{module} must have a weight_zero_point, since symmetric is false, it has none",
        )


def _block(groups: Mapping[str, Any]) -> tuple[int, int] | None:
    """The rows and columns of compressed-tensors' blocks; None where there are none."""
    stated = [(group.get("weights") or {}).get("block_structure") for group in groups.values()]
    found = {tuple(block) for block in stated if block}
    if len(found) > 1:
        raise ValueError(f"compressed-tensors' blocks must be of one size, got {some_of(map(str, sorted(found)))}")
    return found.pop() if found else None


def _float8(files: WeightFiles, config: Mapping[str, Any]) -> Found:
    block = config.get("weight_block_size")
    make = partial(read_float8, block=tuple(block) if block else None)
    for module, parts in _parts(files, "weight", (), ("weight_scale_inv", "weight_scale")):
        if len(parts) > 1:
            yield module, Packed(_matrix(files, parts["weight"]), parts, make)


def _modelopt(files: WeightFiles, config: Mapping[str, Any]) -> Found:
    if (kind := config.get("quant_algo")) != "FP8":
        raise ValueError(
            f"{files.folder} must have ModelOpt's quant_algo FP8, got {_short(kind)}; give a folder of its "
            "dequantized weights"
        )
    return _float8(files, {})


def _bitsandbytes(files: WeightFiles, config: Mapping[str, Any]) -> Found:
    names: dict[str, dict[str, str]] = {}
    for name in files.names:
        module, found, local = name.partition(".weight.")
        if found:
            names.setdefault(module, {"weight": f"{module}.weight"})[f"weight.{local}"] = name
    for module, parts in names.items():
        states = [name for local, name in parts.items() if local.startswith(STATE)]
        if parts["weight"] not in files.files:
            raise damaged(files.folder, f"{module} has {some_of(parts)} and lacks weight")
        if len(states) != 1:
            raise damaged(files.folder, f"{module} must have one quant_state, got {some_of(states) or 'none'}")
        yield module, Packed(read_state(files.aside().tensor(states[0]))["shape"], parts, read_four_bits)
    for module, parts in _parts(files, "weight", (), ("SCB", "weight_format")):
        if "SCB" in parts:
            yield module, Packed(_matrix(files, parts["weight"]), parts, read_eight_bits)


# By quant_method: the modules that are packed, each with where and how.
FORMATS: dict[str, Callable[[WeightFiles, Mapping[str, Any]], Found]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
    "fp8": _float8,
    "modelopt": _modelopt,
}
