"""Scales of low rank become those of groups: a folder of lords is rounded anew to codes with fast kernels."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.adapt.adapters import codes_hash, read_factors
from lorq.adapt.folder import untrainable
from lorq.adapt.settings import Groups
from lorq.core.codes import Codes, IntGrid, LevelCodes, LevelFormat, LowRankScale
from lorq.core.rounding import RangeSearch, nearest_levels
from lorq.core.rounding.clip import search_range
from lorq.core.rounding.nearest import encode_on
from lorq.core.weight import QuantizedWeight, layer_bytes
from lorq.models.locate import full_path, resolve_model
from lorq.progress import REGROUP, Progress, no_progress
from lorq.runtime.device import own_defaults
from lorq.storage.companions import find_companions
from lorq.storage.config import write_format
from lorq.storage.folder import LorqFolder
from lorq.storage.json_files import some_of
from lorq.storage.lock import owned
from lorq.storage.names import REPORT_NAME
from lorq.storage.report import LayerReport, Report
from lorq.storage.writer import CheckpointWriter

# Ranges of a group that are tried: 1, 0.975, ... 0.4 of the full one. Two bits want about half.
_SEARCH = RangeSearch(steps=40, depth=0.61, mode="scale")


def regroup(dense: Float[Tensor, "out in"], own: LevelFormat, settings: Groups) -> Codes:
    """A weight on scales of groups, each with the least squared error among shares of the one that covers the group.

    Args:
        own: what the weight is stored as, for its bits and levels where the settings leave these to the layer.

    Raises:
        ValueError: if groups do not tile the width.
    """
    bits, size = own.bits if settings.bits == -1 else settings.bits, settings.group_size
    grid = IntGrid(bits, size)
    grid.check(*dense.shape)
    if settings.grid == "levels":
        return nearest_levels(dense, replace(own.grid, bits=bits), size, shares=tuple(_SEARCH.shares()))
    # Every group a row by itself: all of them have the same white inputs.
    white = torch.eye(size, device=dense.device)
    scale, zero_point = search_range(dense.reshape(-1, size), white, grid, _SEARCH)
    shape = len(dense), dense.shape[1] // size
    return encode_on(dense, scale.view(shape), zero_point.view(shape), grid)


@own_defaults()
def to_groups(
    model: str | Path,
    out: str | Path,
    *,
    adapter: str | Path | None = None,
    settings: Groups = Groups(),  # noqa: B008  # frozen
    progress: Progress | None = None,
) -> Report:
    """Round the layers of a lords folder anew, onto scales of groups: the folder OUT has the fast kernels of others.

    A scale for each weight costs time whenever the model runs; that of a group costs next to none. What the model has
    learned stays, up to what rounding again adds. One layer is in memory at a time, and no calibration is needed.

    Args:
        model: a folder quantized with lords, trained or not.
        out: the new folder, an ordinary one, which adapters of the model do not fit any more.
        adapter: whose factors become the model's own before.
        settings: the codes to round to.
        progress: called as ``progress(stage, done, total)``.

    Returns:
        The report. ``run["regrouped"]`` has ``added`` by layer, the squared error over the weight's squares, and
        ``whole`` for all layers together.

    Raises:
        ValueError: if the model has no scales of low rank, groups do not tile a layer, or the adapter is another's.
        FileExistsError: if the folder is in use.
    """
    folder, out = LorqFolder.open(resolve_model(model)), full_path(out)
    layers = {name: own.codes for name, own in folder.formats.items() if _is_product(own.codes)}
    if not layers:
        raise untrainable(str(model), len(folder.formats))
    shapes: dict[str, tuple[int, int]] = {own.name: own.shape for own in folder.report.layers if own.name in layers}
    if odd := [f"{name} of width {shape[1]}" for name, shape in shapes.items() if shape[1] % settings.group_size]:
        raise ValueError(
            f"group_size must divide each layer's width, got {settings.group_size} and {some_of(odd)}; choose another"
        )
    factors = {} if adapter is None else _adapter(folder, full_path(adapter), layers, shapes)
    name = None if adapter is None else full_path(adapter).name
    info = asdict(settings) | {"adapter": name}
    run = _Run(folder, layers, factors, settings, {}, {})
    with owned(out):
        writer = CheckpointWriter.create(out, info | {"regrouped_from": folder.reader.fingerprint()}, again=True)
        run.write(writer, progress or no_progress)
        return run.finish(writer, info)


def _is_product(codes: Any) -> bool:
    return isinstance(codes, LevelFormat) and codes.scale_rank > 0


def _adapter(
    folder: LorqFolder, adapter: Path, layers: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, LowRankScale]:
    """An adapter's factors by layer, after its codes have been compared with the folder's."""
    own = codes_hash(
        (name, shapes[name], layers[name], folder.reader.tensor(f"{name}.weight_packed")) for name in sorted(layers)
    )
    return {name: LowRankScale(*pair) for name, pair in read_factors(adapter, own, shapes).items()}


@dataclass(frozen=True)
class _Run:
    """The layers that change, and what is found of them: the new weights' reports, and energies of error and weight."""

    folder: LorqFolder
    layers: Mapping[str, Any]
    factors: Mapping[str, LowRankScale]
    settings: Groups
    reports: dict[str, LayerReport]
    energies: dict[str, tuple[float, float]]

    def write(self, writer: CheckpointWriter, progress: Progress) -> None:
        """All files, with the layers rounded anew."""
        source, before = self.folder.reader, {layer.name: layer for layer in self.folder.report.layers}
        progress(REGROUP, 0, len(self.layers))
        for file, header in sorted(source.headers.items()):
            own = sorted(self.layers.keys() & {name.rpartition(".")[0] for name in header.tensors})
            tensors = {
                name: source.tensor(name) for name in header.tensors
                if name.rpartition(".")[0] not in own or name.endswith(".bias")
            }  # fmt: skip
            for name in own:
                weight = self._rounded(name)
                tensors |= {f"{name}.{local}": tensor for local, tensor in weight.tensors().items()}
                error, size = self.energies[name]
                note = (
                    f"scales of groups, which add an error of {error / max(size, 1e-30):.4f}; errors are those before"
                )
                self.reports[name] = replace(
                    before[name], bits=weight.format.bits, rank=0, bytes=layer_bytes(weight.stored_bits()),
                    note="; ".join(filter(None, (before[name].note, note))),
                )  # fmt: skip
                self.formats[name] = write_format(weight.format)
                progress(REGROUP, len(self.reports), len(self.layers))
            writer.write_shard(file, tensors, {"bytes": sum(tensor.nbytes for tensor in tensors.values())})

    @property
    def formats(self) -> dict[str, Any]:
        """Of all layers, as the new folder's config has them."""
        formats: dict[str, Any] = self.folder.config["quantization_config"]["layers"]
        return formats

    def _rounded(self, name: str) -> QuantizedWeight:
        weight = self.folder.weight(name)
        assert isinstance(weight.codes, LevelCodes)
        codes = replace(weight.codes, scale=self.factors.get(name, weight.codes.scale))
        dense = codes.decode()
        new = regroup(dense, codes.format, self.settings)
        self.energies[name] = float((new.decode() - dense).square().sum()), float(dense.square().sum())
        return replace(weight, codes=new)

    def finish(self, writer: CheckpointWriter, info: dict[str, Any]) -> Report:
        """Config and report; with them the folder is one."""
        self.folder.reader.check_unchanged()
        report = self.folder.report
        layers = tuple(self.reports.get(layer.name, layer) for layer in report.layers)
        errors, sizes = (sum(of) for of in zip(*self.energies.values(), strict=True))
        added = {name: error / max(size, 1e-30) for name, (error, size) in self.energies.items()}
        told = info | {"whole": errors / max(sizes, 1e-30), "added": added}
        report = replace(
            report, layers=layers, bytes=sum(record["bytes"] for record in writer.completed.values()),
            checksums=writer.shard_checksums(), run=report.run | {"regrouped": told},
        )  # fmt: skip
        files = find_companions(self.folder.path)[0] | {REPORT_NAME: report.to_bytes()}
        writer.finish(config=self.folder.config, files=files)
        return report
