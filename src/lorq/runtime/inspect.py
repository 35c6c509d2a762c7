"""What multiplies the layers of a folder on this machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorq.kernels import Implementation, declines_experts, implementation
from lorq.runtime.experts_at_once import declines_stored
from lorq.storage.json_files import read_json, some_of
from lorq.storage.names import INDEX
from lorq.storage.reader import SourceCheckpoint
from lorq.storage.report import read_report


def layer_implementations(folder: Path) -> dict[str, Implementation]:
    """What multiplies each layer of a folder on this machine: on its accelerator, or the CPU with float32 inputs."""
    formats, place = _config(folder).formats(), _place()
    widths = {layer.name: layer.shape[1] for layer in read_report(folder).layers}
    return {name: implementation(format, widths[name], *place) for name, format in formats.items()}


def expert_lines(folder: Path) -> Iterator[str]:
    """A line for each way in which experts that share factors run on this machine; nothing where there are none."""
    config = _config(folder)
    formats, tiles, place = config.formats(), config.tile_formats(), _place()
    widths = {layer.name: layer.shape[1] for layer in read_report(folder).layers}
    stored = set(SourceCheckpoint.open(folder, index_name=INDEX).names) if tiles else set()
    alike: dict[str | None, list[str]] = {}
    for path in dict.fromkeys(name.partition(".tiles.")[0] for name in tiles):
        tiled = {name.rpartition(".")[2]: format for name, format in tiles.items() if name.startswith(f"{path}.tiles.")}
        why = declines_stored(path, formats, tiled, stored)
        for name in formats if why is None else ():
            if name.startswith(f"{path}."):
                why = why or declines_experts(formats[name], widths[name], *place, 0.0)
        alike.setdefault(why, []).append(path)
    for why, paths in alike.items():
        way = "one call for all those of few tokens" if why is None else f"one after the other: {why}"
        yield f"experts of {some_of(paths)}: {way}"


def _config(folder: Path) -> Any:
    from lorq.storage.config import LorqConfig

    return LorqConfig(**read_json(folder / "config.json")["quantization_config"])


def _place() -> tuple[Any, Any]:
    """The device that models run on unasked, and the type of their inputs there."""
    import torch

    from lorq.runtime.device import read_device

    device = read_device("auto")
    return device, torch.float32 if device.type == "cpu" else torch.bfloat16


def implementation_lines(runs: dict[str, Implementation]) -> Iterator[str]:
    """A line for each way in which layers run: how many, by what, and why nothing faster."""
    alike: dict[tuple[str, tuple[tuple[str, str], ...]], list[str]] = {}
    for name, by in runs.items():
        alike.setdefault((by.name, tuple(by.declined.items())), []).append(name)
    for (name, declined), layers in alike.items():
        why = "; ".join(f"not {other}: {reason}" for other, reason in declined)
        which = some_of(layers) if len(alike) > 1 else "all of them"
        yield f"runs on {name}: {len(layers)} layers, {which}" + (f" ({why})" if why else "")
