"""What multiplies the layers of a folder on this machine."""

from collections.abc import Iterator
from typing import Any

from lorq.kernels import Implementation, declines_experts, implementation
from lorq.runtime.experts_at_once import declines_stored
from lorq.storage.folder import LorqFolder
from lorq.storage.json_files import some_of

# Of a table that nothing is multiplied by.
LOOKUP = Implementation("row by row (torch)", {})


def layer_implementations(folder: LorqFolder) -> dict[str, Implementation]:
    """What multiplies each layer of a folder on this machine: on its accelerator, or the CPU with float32 inputs."""
    place, widths = _place(), _widths(folder)
    return {
        name: LOOKUP if folder.embeddings.get(name) == "" else implementation(format, widths[name], *place)
        for name, format in folder.formats.items()
    }


def expert_lines(folder: LorqFolder) -> Iterator[str]:
    """A line for each way in which experts that share factors run on this machine; nothing where there are none."""
    place, widths, stored = _place(), _widths(folder), set(folder.reader.names)
    alike: dict[str | None, list[str]] = {}
    for path in dict.fromkeys(name.partition(".tiles.")[0] for name in folder.tiles):
        tiled = {n.rpartition(".")[2]: format for n, format in folder.tiles.items() if n.startswith(f"{path}.tiles.")}
        why = declines_stored(path, folder.formats, tiled, stored)
        for name, format in folder.formats.items() if why is None else ():
            if name.startswith(f"{path}."):
                why = why or declines_experts(format, widths[name], *place, 0.0)
        alike.setdefault(why, []).append(path)
    for why, paths in alike.items():
        way = "one call for all those of few tokens" if why is None else f"one after the other: {why}"
        yield f"experts of {some_of(paths)}: {way}"


def _widths(folder: LorqFolder) -> dict[str, int]:
    return {layer.name: layer.shape[1] for layer in folder.report.layers}


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
