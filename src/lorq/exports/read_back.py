"""Exports, adapters and files for llama.cpp, read as they lie on the disk."""

from pathlib import Path
from typing import Any

from lorq.exports.gguf_told import read_file
from lorq.exports.made import Made, Part
from lorq.foreign.gguf_form import ADAPTER
from lorq.foreign.peft_form import CONFIG, WEIGHTS
from lorq.models.quantized import QuantizedFiles, read_quantization
from lorq.storage.json_files import check_kinds, damaged, read_json
from lorq.storage.measured import parse_measured
from lorq.storage.names import EXPORTED, REPORT_NAME
from lorq.storage.report import Report, read_report
from lorq.storage.safetensors_file import read_header


def read_made(place: Path) -> Made:
    """What a file for llama.cpp, an export's folder or an adapter's says; lorq folders have a report for that.

    Raises:
        FileNotFoundError, ValueError: if it is none of these, or damaged.
        ImportError: for a GGUF file, without the gguf package.
    """
    if place.is_file():
        return read_file(place)
    if (place / CONFIG).is_file():
        return _adapter(place)
    if (place / ADAPTER).is_file():
        found = read_file(place / ADAPTER)
        return Made(place, found.kind, found.parts, found.version, report=read_report(place))
    if (place / EXPORTED).is_file():
        return _export(place)
    read_report(place)  # whose errors say what it is
    raise FileNotFoundError(f"{place} is a lorq folder and no export")


def _said(place: Path) -> dict[str, Any]:
    """What the mark of an export says, as fields of `Made`; nothing where there is none."""
    path = place / EXPORTED
    if not path.is_file():
        return {}
    mark = read_json(path)
    lost, report = mark.get("lost", {}), mark.get("report")
    if not isinstance(lost, dict) or not isinstance(report, dict):
        raise damaged(path, "lost and report must be objects")
    check_kinds(lost, dict.fromkeys(lost, str), where=path, what="lost: ")
    measured = parse_measured({"evaluations": mark.get("evaluations", [])}, where=path)
    return {
        "version": str(mark.get("lorq_version", "")), "command": str(mark.get("command", "")), "lost": lost,
        "evaluations": measured.evaluations, "report": Report.of(report, where=path),
    }  # fmt: skip


def _adapter(place: Path) -> Made:
    """Of PEFT's."""
    said, base = _said(place), str(read_json(place / CONFIG).get("base_model_name_or_path") or "")
    if not said and (place / REPORT_NAME).is_file():  # by lorq compensate
        report = read_report(place)
        said = {"report": report, "version": str(report.run.get("lorq_version", ""))}
    if not (place / WEIGHTS).is_file():
        raise FileNotFoundError(f"{place} has {CONFIG} and no {WEIGHTS}; copy the adapter again")
    parts = [
        Part(name, t.shape, _words(t.dtype), t.end - t.begin, False)
        for name, t in read_header(place / WEIGHTS).tensors.items()
    ]
    return Made(place, "adapter", tuple(parts), base=base, **said)


def _words(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _export(place: Path) -> Made:
    """A folder for transformers and vLLM."""
    kind, said = str(read_json(place / EXPORTED).get("target")), _said(place)
    files = QuantizedFiles.of(place, read_quantization(place))
    layers = {layer.name: layer for layer in said["report"].layers}
    parts = []
    for name in files.names:
        layer = layers.get(name.removesuffix(".weight"))
        packed = name in files.layers
        type_ = _words(files.dtype(name)) if not packed else f"{layer.bits}-bit codes" if layer else "codes"
        error = layer.error_after if layer else None
        parts.append(Part(name, files.shape(name), type_, files.stored_bytes(name), packed, error))
    return Made(place, kind, tuple(parts), **said)
