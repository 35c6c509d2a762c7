"""A finished lorq folder, opened: what it says of itself, and its weights one by one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lorq.core.faults import tile_faults
from lorq.core.tile_factors import TileFactors, TileFormat
from lorq.core.weight import LayerFormat, QuantizedWeight, Tile
from lorq.storage.config import LorqConfig, read_format
from lorq.storage.json_files import damaged, inconsistent, read_json
from lorq.storage.names import INDEX, REPORT_NAME
from lorq.storage.reader import WeightFiles
from lorq.storage.report import Report, read_report
from lorq.storage.safetensors_file import read_header


@dataclass(frozen=True)
class LorqFolder:
    """The one way into a folder that lorq has written: ``LorqFolder.open(path).weight(name).dense()`` is a matrix.

    Attributes:
        formats: of the quantized layers, by name.
        tiles: of the factors that experts share, by the names that they are stored under.
        embeddings: names of the quantized tables of tokens, each with the head that multiplies by it, or "".
    """

    path: Path
    reader: WeightFiles
    formats: dict[str, LayerFormat]
    tiles: dict[str, TileFormat]
    embeddings: dict[str, str]

    @classmethod
    def open(cls, path: str | Path) -> "LorqFolder":
        """Read and check config and headers; no weight is read.

        Raises:
            FileNotFoundError: if it is no finished lorq folder, or a file is missing.
            ValueError: if a file is damaged, or of a newer format than this lorq reads.
        """
        path = Path(path).expanduser()
        report = read_report(path)  # tells best what is missing of folders that are not lorq's, or unfinished
        own = read_json(path / "config.json").get("quantization_config")
        if not isinstance(own, dict) or own.get("quant_method") != "lorq":
            raise damaged(path / "config.json", "quantization_config.quant_method must be 'lorq'")
        config = LorqConfig(**own)
        check_report(path, report, config)
        reader = WeightFiles.open(path, index_name=INDEX)
        return cls(path, reader, config.formats(), config.tile_formats(), config.embeddings)

    @classmethod
    def of_shards(cls, path: Path, records: Mapping[str, Any]) -> "LorqFolder":
        """The shards that are written of a folder that need not be finished; it has no report yet.

        ``records`` are of the shards by name, with ``formats`` of their layers, ``tiles`` and ``embeddings`` as
        config.json has them.
        """
        headers = {name: read_header(path / name) for name in records}
        files = {tensor: name for name, header in headers.items() for tensor in header.tensors}
        formats = {n: read_format(n, entry) for record in records.values() for n, entry in record["formats"].items()}
        tiles = {n: TileFormat(**entry) for record in records.values() for n, entry in record["tiles"].items()}
        tables = {table: head for record in records.values() for table, head in record["embeddings"].items()}
        return cls(path, WeightFiles(path, headers, files), formats, tiles, tables)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return read_json(self.path / "config.json")

    @cached_property
    def report(self) -> Report:
        """What was done, layer by layer."""
        return read_report(self.path)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The stored tensors of a quantized layer, or of shared factors, by local name, its bias left out."""
        within = self.reader.by_module.get(name, [])
        return {s.removeprefix(f"{name}."): self.reader.tensor(s) for s in within if not s.endswith(".bias")}

    def weight(self, name: str) -> QuantizedWeight:
        """A quantized layer's weight, an expert's part of shared factors included, without its record.

        Raises:
            KeyError: if there is no such layer.
            ValueError: if its tensors are not those of its format, or have values that nothing can mean.
        """
        if name not in self.formats:
            raise KeyError(f"{self.path} has no quantized layer {name}; the first is {next(iter(self.formats), None)}")
        tensors = self.tensors(name)
        if wrong := next(self.formats[name].faults(tensors), None):
            raise damaged(self.path, f"{name}: {wrong}")
        weight = self.formats[name].read(tensors)
        experts, _, own = name.rpartition(".")
        module, _, number = experts.rpartition(".")
        shared = f"{module}.tiles.{own}"
        if shared not in self.tiles:
            return weight
        factors, format = self.tensors(shared), self.tiles[shared]
        if wrong := next(tile_faults(factors, format, *weight.shape), None):
            raise damaged(self.path, f"{shared}: {wrong}")
        if not number.isdecimal() or not int(number) < format.experts:
            raise damaged(self.path, f"{name} must be one of the {format.experts} experts of {shared}")
        return replace(weight, low_rank=Tile(TileFactors.read(factors), int(number)))

    def layers(self) -> Iterator[tuple[str, QuantizedWeight]]:
        """All quantized layers, in the order of the model; one at a time is in memory."""
        for layer in self.report.layers:
            yield layer.name, self.weight(layer.name)


def check_report(path: Path, report: Report, config: LorqConfig) -> None:
    """Refuse a report, with a ValueError, that is not of the layers that the config names."""
    told = {layer.name for layer in report.layers}
    if told != config.layers.keys():
        other = ", ".join(sorted(told ^ config.layers.keys())[:3])
        raise inconsistent(
            path / REPORT_NAME, f"its layers must be those of config.json; {other} is in one of them alone"
        )
