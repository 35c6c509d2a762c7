"""A lorq folder, looked at from end to end: files, what they say of each other, tensors, values."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorq.core.faults import not_finite, tile_faults
from lorq.core.tile_factors import TileFormat
from lorq.core.weight import LayerFormat, layer_bytes
from lorq.storage.config import LorqConfig, read_format
from lorq.storage.findings import Findings, touching
from lorq.storage.folder import LorqFolder
from lorq.storage.json_files import check_kinds, name_below, plain_name, read_json, some_of
from lorq.storage.measured import read_measured
from lorq.storage.names import INDEX, MEASURED, REPORT_NAME
from lorq.storage.reader import WeightFiles, read_weight_map
from lorq.storage.report import LayerReport, Report, read_report

# Weights whose numbers lie inside of their codes are decoded so many at a time.
_STRIP = 1 << 22


def check_folder(path: Path, found: Findings) -> None:
    """Compare a finished folder with its checksums, and look at every tensor.

    Raises:
        FileNotFoundError: if it is no lorq folder, or not finished.
    """
    report: Report | None = None
    with found.of(REPORT_NAME):
        try:
            report = read_report(path)
        except FileNotFoundError:
            if (path / REPORT_NAME).exists() or not _says_lorq(path):
                raise
            found.add(REPORT_NAME, "must be there, it is missing: without it no checksum is known")
    with found.of(MEASURED):
        read_measured(path)
    config = _config(path, found)
    files, lost = _weights(path, found, report)
    formats, tiles = (config.formats(), config.tile_formats()) if config else (_formats(path, found), {})
    folder = LorqFolder(path, files, formats, tiles, config.embeddings if config else {})
    told = {layer.name: layer for layer in report.layers} if report else {}
    for name in found.each(n for n in formats if n not in lost):
        with found.of(name):
            _check_layer(folder, found, name, formats[name], told.get(name))
    for name, tile in tiles.items():
        if name in lost:
            continue
        with found.of(name):
            _check_tile(folder, found, name, tile, told)
    _check_kept(folder, found)
    if config and report:
        for name in sorted(told.keys() ^ formats.keys()):
            has, lacks = ("report", "config.json") if name in told else ("config.json", "report")
            found.add(name, f"must be a layer of both, config.json and {REPORT_NAME}; the {has} names it, {lacks} not")


def _says_lorq(path: Path) -> bool:
    try:
        own = read_json(path / "config.json").get("quantization_config")
    except (ValueError, OSError):
        return False
    return isinstance(own, dict) and own.get("quant_method") == "lorq"


def _config(path: Path, found: Findings) -> LorqConfig | None:
    with found.of("config.json"):
        own = read_json(path / "config.json").get("quantization_config")
        if not isinstance(own, dict) or own.get("quant_method") != "lorq":
            raise ValueError("quantization_config.quant_method must be 'lorq'")
        return LorqConfig(**own)
    return None


def _formats(path: Path, found: Findings) -> dict[str, LayerFormat]:
    """The layers of a config that has faults, as far as each can be read by itself."""
    layers: Any = None
    with found.of("config.json"):
        own = read_json(path / "config.json").get("quantization_config")
        layers = own.get("layers") if isinstance(own, dict) else None
    formats = {}
    for name, entry in layers.items() if isinstance(layers, dict) else ():
        with found.of("config.json"):
            formats[name] = read_format(name, entry)
    return formats


def _weights(path: Path, found: Findings, report: Report | None) -> tuple[WeightFiles, set[str]]:
    """The weight files whose headers are good, after a look at index and checksums; and the modules in the others."""
    checksums = {}
    for name, checksum in (report.checksums if report else {}).items():
        with found.of(REPORT_NAME):
            checksums[plain_name(name, where="checksums", suffix=".safetensors")] = checksum
    listed: dict[str, str] = {}
    with found.of(INDEX):
        listed = read_weight_map(path / INDEX)
    names = sorted({*listed.values(), *checksums})
    headers = found.headers([name for name in names if (path / name).is_file()])
    holds: dict[str, set[str]] = {name: set() for name in names}
    for tensor, name in [*listed.items(), *((t, name) for name, own in headers.items() for t in own.tensors)]:
        holds[name].add(tensor.rpartition(".")[0])
    found.compare_all({n: checksums.get(n) for n in names}, {n: touching(own) for n, own in holds.items()})
    for name in names:
        if checksums and name not in checksums:
            found.add(name, f"must have a checksum in {REPORT_NAME}, it has none")
    found.leave([*names, INDEX])
    files: dict[str, str] = {}
    for name, header in headers.items():
        if twice := header.tensors.keys() & files.keys():
            found.add(name, f"must not have tensors of another file, it has {some_of(twice)}")
        files |= dict.fromkeys(header.tensors, name)
    _check_index(path, found, listed, files, names)
    stored = sum(header.file_bytes - 8 - len(header.raw) for header in headers.values())
    if report and set(names) == set(headers) and stored != report.bytes:
        found.add(REPORT_NAME, f"bytes must be those of all tensors, {stored}, got {report.bytes}")
    lost = {tensor.rpartition(".")[0] for tensor, name in listed.items() if name not in headers}
    return WeightFiles(path, headers, files), lost


def _check_index(path: Path, found: Findings, listed: dict[str, str], files: dict[str, str], shards: list[str]) -> None:
    """Hold what the index lists against what the weight files have, and its checksums against the other files."""
    good = set(files.values())
    absent = [tensor for tensor, file in listed.items() if file in good and files.get(tensor) != file]
    if absent:
        found.add(INDEX, f"must list what is in the files, {len(absent)} tensors are elsewhere: {some_of(absent)}")
    if listed and (unlisted := files.keys() - listed.keys()):
        found.add(INDEX, f"must list all tensors, {len(unlisted)} are not listed: {some_of(unlisted)}")
    with found.of(INDEX):
        metadata = read_json(path / INDEX).get("metadata", {})
        check_kinds(metadata, {"lorq_files": list, "checksums?": dict}, where=path / INDEX, what="metadata: ")
        known = metadata.get("checksums", {})
        check_kinds(known, dict.fromkeys(known, str), where=path / INDEX, what="metadata: checksums: ")
        beside = {name_below(name, where=path / INDEX) for name in (*metadata["lorq_files"], *known, "config.json")}
        found.compare_all({name: known.get(name) for name in sorted(beside) if name not in shards})


def _check_layer(folder: LorqFolder, found: Findings, name: str, format: LayerFormat, told: LayerReport | None) -> None:
    """A layer's tensors, and what the report says of it."""
    tensors = folder.tensors(name)
    found.tensors += len(tensors)
    wrong = list(format.faults(tensors))
    for fault in wrong:
        found.add(name, fault)
    if wrong:
        return
    out, in_ = folder.reader.told_shape(f"{name}.weight_shape")
    if not any(dtype.is_floating_point for _, dtype in format.codes.layout(out, in_).values()):
        _check_inside(found, name, format, tensors, (out, in_))
    if told is None:
        return
    expected = {"shape": (out, in_), "bits": format.bits, "bytes": _bytes(folder, name, format, (out, in_))}
    for key, value in expected.items():
        if (got := getattr(told, key)) != value:
            found.add(name, f"{key} in {REPORT_NAME} must be {value}, as its tensors have it, got {got}")


def _check_inside(
    found: Findings, name: str, format: LayerFormat, tensors: dict[str, Tensor], shape: tuple[int, int]
) -> None:
    """Numbers that lie inside of the codes, as those of GGUF blocks: seen in what some rows at a time stand for."""
    out, in_ = shape
    for rows in torch.arange(out).split(max(1, _STRIP // in_)):
        if wrong := not_finite(format.codes.decode_rows(tensors, rows, in_)):
            found.add(name, f"what the codes of rows {int(rows[0])} to {int(rows[-1])} stand for {wrong}")


def _bytes(folder: LorqFolder, name: str, format: LayerFormat, shape: tuple[int, int]) -> int:
    """What the report has for a layer of this format, a share of what experts have together included."""
    experts, _, own = name.rpartition(".")
    tile = folder.tiles.get(f"{experts.rpartition('.')[0]}.tiles.{own}")
    return layer_bytes(format.stored_bits(*shape) + (tile.share(*shape) if tile else 0))


def _check_tile(folder: LorqFolder, found: Findings, name: str, tile: TileFormat, told: dict[str, LayerReport]) -> None:
    """Factors that experts share; their sizes are those of the experts' weights."""
    path, _, own = name.rpartition(".tiles.")
    experts = [f"{path}.{number}.{own}" for number in range(min(tile.experts, len(folder.formats)))]
    if len(experts) < tile.experts or (absent := [n for n in experts if n not in folder.formats]):
        lacking = some_of(absent) if len(experts) == tile.experts else f"all but {len(experts)}"
        found.add(name, f"must have {tile.experts} experts that are layers, config.json lacks {lacking}")
        return
    out, in_ = folder.reader.told_shape(f"{experts[0]}.weight_shape")
    tensors = folder.tensors(name)
    found.tensors += len(tensors)
    for fault in tile_faults(tensors, tile, out, in_):
        found.add(name, fault)


def _check_kept(folder: LorqFolder, found: Findings) -> None:
    """What was left in full precision must be numbers."""
    packed = {*folder.formats, *folder.tiles}
    for name in folder.reader.names:
        layer, _, local = name.rpartition(".")
        if layer in packed and local != "bias":
            continue
        found.tensors += 1
        with found.of(name):
            if wrong := not_finite(folder.reader.tensor(name)):
                found.add(name, wrong)
