"""What the config of a model that others have quantized states of single layers, held against their tensors."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorq.storage.json_files import damaged, inconsistent

_CONFIG = "config.json"


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


def check_bits(folder: Path, module: str, stated: Any, *, words: int, columns: int) -> None:
    """Refuse, with a ValueError, words that are not those of so many codes of the stated bits; None states nothing."""
    if stated is None:
        return
    if not isinstance(stated, int) or isinstance(stated, bool) or not 1 <= stated <= 8:
        raise damaged(folder / _CONFIG, f"quantization_config's bits must be 1 to 8, got {stated!r} for {module}")
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
            folder / _CONFIG, f"quantization_config's group_size must be a number, got {stated!r} for {module}"
        )
    needed = 1 if stated <= 0 else -(-columns // stated)
    if groups != needed:
        raise inconsistent(
            folder / _CONFIG,
            f"{module} must have scales for {needed} groups of {columns} columns, since group_size of "
            f"quantization_config is {stated}, it has them for {groups}",
        )
