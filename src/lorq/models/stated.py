"""What the config of a model that others have quantized states of single layers, held against their tensors."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Integer, Shaped
from torch import Tensor

from lorq.storage.json_files import _short, damaged, inconsistent, read_json

_CONFIG = "config.json"
# Where GPTQ's and AWQ's programs tell the same once more, and their names of a setting, the first of which is ours.
_AGAIN = ("quantize_config.json", "quant_config.json")
_NAMES = (
    ("quant_method", "method"), ("checkpoint_format", "format", "version"), ("bits", "w_bit"),
    ("group_size", "q_group_size"), ("sym",), ("zero_point",), ("desc_act",), ("pack_dtype",), ("dynamic",),
    ("is_marlin_format",),
)  # fmt: skip


def settle(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of GPTQ or AWQ with one name a setting, where all that tell of one tell the same.

    Raises:
        ValueError: naming the two that differ.
    """
    told = {f"{_CONFIG}'s quantization_config": config}
    told |= {name: read_json(folder / name) for name in _AGAIN if (folder / name).is_file()}
    settled = {name: value for name, value in config.items() if value is not None}
    for names in _NAMES:
        found = {
            f"{name} of {file}": own[name] for file, own in told.items() for name in names if own.get(name) is not None
        }
        (first, value), *others = found.items() or [("", None)]
        for other, its in others:
            if _plain(its) != _plain(value):
                raise ValueError(
                    f"{folder} must be told of in one way, {first} is {_short(value)} and {other} is {_short(its)}; "
                    "keep the true one, or download the model again"
                )
        if value is not None:
            settled[names[0]] = _plain(value)
    return settled


def _plain(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def check_symmetry(
    folder: Path, module: str, zero: Integer[Tensor, "..."], bits: int, *, said: str, stated: Any
) -> None:
    """Refuse zero points that are not the middle of the codes where ``said``, which is ``stated``, has them there."""
    middle = 2 ** (bits - 1)
    if stated and (others := int((zero != middle).sum())):
        raise inconsistent(
            folder / _CONFIG,
            f"{module} must have the zero point {middle} everywhere, as {said} of quantization_config, "
            f"{_short(stated)}, says, it has others in {others} places of {zero.numel()}, {int(zero.min())} to "
            f"{int(zero.max())}",
        )


def check_offset(folder: Path, module: str, zero: Integer[Tensor, "..."], bits: int, form: str) -> None:
    """Refuse the one of GPTQ's two formats in which all zero points are beside the middle, where the other has it.

    Nothing else in the tensors tells them apart. Zero points that were fitted are not all the same.
    """
    other, off = ("gptq_v2", 1) if form == "gptq" else ("gptq", -1)
    middle = 2 ** (bits - 1)
    if bool((zero == middle + off).all()):
        raise ValueError(
            f"{folder / _CONFIG}: {module} has the zero point {middle + off} everywhere as checkpoint_format {form} "
            f"stores it, and {middle}, the middle of its codes, as {other} does; set checkpoint_format to {other}, or "
            "download the model again"
        )


def check_order(folder: Path, module: str, group: Shaped[Tensor, "in"], groups: int, *, said: str, stated: Any) -> None:
    """Refuse columns whose groups lie scattered, where ``said``, which is ``stated``, has them side by side.

    Numbers that are no groups are refused where the weight is read.
    """
    if group.is_floating_point() or bool(((group < 0) | (group >= groups)).any()):
        return
    size = -(-len(group) // max(groups, 1))
    if not torch.equal(group.long(), torch.arange(len(group)) // size):
        raise inconsistent(
            folder / _CONFIG,
            f"{module} must have its groups side by side, as {said} of quantization_config, {_short(stated)}, says, "
            "its g_idx has them in another order",
        )


def stated_by_gptq(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """GPTQ's settings for a layer: the config's, with those of the first pattern in ``dynamic`` that fits its name."""
    for pattern, own in (config.get("dynamic") or {}).items():
        if re.match(re.sub(r"^[+-]:", "", pattern), module):
            return {**config, **(own or {})}
    return config


def stated_by_groups(groups: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """What compressed-tensors' config says of a layer's weights, by its name, by a pattern, or as of all layers."""
    rest = None
    for group in groups.values():
        weights = group.get("weights") or {}
        for target in group.get("targets", ()):
            if target == module or (target.startswith("re:") and re.match(target[3:], module)):
                return dict(weights)
            rest = weights if target == "Linear" and rest is None else rest
    return dict(rest or {})


def has_order(stated: Mapping[str, Any]) -> bool:
    """Whether compressed-tensors' config says that a layer's columns tell their groups."""
    return stated.get("actorder") in (True, "group", "dynamic")


def is_symmetric(stated: Mapping[str, Any]) -> bool | None:
    """Whether compressed-tensors' codes have no zero points, as where it says nothing of that; None for no config."""
    return bool(stated.get("symmetric", True)) if stated else None


def check_bits(folder: Path, module: str, stated: Any, *, words: int, columns: int) -> None:
    """Refuse, with a ValueError, words that are not those of so many codes of the stated bits; None states nothing."""
    if stated is None:
        return
    if not isinstance(stated, int) or isinstance(stated, bool) or not 1 <= stated <= 8:
        raise damaged(folder / _CONFIG, f"quantization_config's bits must be 1 to 8, got {_short(stated)} for {module}")
    if words != (needed := -(-columns * stated // 32)):
        raise inconsistent(
            folder / _CONFIG,
            f"{module} must have {needed} words for {columns} codes of {stated} bits, as quantization_config says, its "
            f"tensors have {words}, which are {words * 32 / columns:.3g} bits",
        )


def check_groups(folder: Path, module: str, stated: Any, *, groups: int, columns: int) -> None:
    """The same of scales; None, 0 and -1 state nothing, or a group for each row, which has one group then."""
    if stated is None:
        return
    if not isinstance(stated, int) or isinstance(stated, bool):
        raise damaged(
            folder / _CONFIG, f"quantization_config's group_size must be a number, got {_short(stated)} for {module}"
        )
    needed = 1 if stated <= 0 else -(-columns // stated)
    if groups != needed:
        raise inconsistent(
            folder / _CONFIG,
            f"{module} must have scales for {needed} groups of {columns} columns, since group_size of "
            f"quantization_config is {stated}, it has them for {groups}",
        )
