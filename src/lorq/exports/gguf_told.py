"""What a GGUF file says of how lorq made it, in keys of lorq's own, which llama.cpp passes over.

The keys begin with ``lorq.``: the version (`GGUF_MARK`), ``command``, as text; and as JSON ``report`` (of the folder
that the file was made of), ``evaluations`` (what `lorq evaluate` found of that folder) and ``lost``.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorq.exports.made import Made, Part
from lorq.storage.folder import LorqFolder
from lorq.storage.gguf_header import GgufTensor, read_gguf_header
from lorq.storage.json_files import check_kinds
from lorq.storage.measured import parse_measured, read_measured
from lorq.storage.names import GGUF_MARK
from lorq.storage.report import Report

_LOST_BYTES = 4096  # kept free for it; it is known when the tensors are written, which lie behind it
_FLOATS = ("f64", "f32", "f16", "bf16")


def told_of(folder: LorqFolder, command: str) -> dict[str, str]:
    """The keys that are known before anything is written."""
    report = json.dumps(replace(folder.report, checksums={}).as_dict(), sort_keys=True)
    found = read_measured(folder.path).evaluations
    measured = {"lorq.evaluations": json.dumps(found, sort_keys=True)} if found else {}
    return {"lorq.command": command, "lorq.report": report} | measured


def add_told(writer: Any, folder: LorqFolder, command: str) -> None:
    """Add the keys, the last of which `tell_lost` fills."""
    for key, text in told_of(folder, command).items():
        writer.add_string(key, text)
    writer.add_string("lorq.lost", " " * _LOST_BYTES)


def tell_lost(file: Path, end: int, lost: Mapping[str, str]) -> None:
    """Put what was lost into a file whose keys end at the byte ``end``."""
    told = json.dumps(lost).encode()
    assert len(told) <= _LOST_BYTES, f"{len(told)} bytes of {lost}"
    with file.open("r+b") as opened:
        opened.seek(end - _LOST_BYTES)
        opened.write(told)


def read_file(path: Path) -> Made:
    """What a GGUF file says, whoever wrote it.

    Raises:
        ValueError: if it is none, or damaged.
        ImportError: without the gguf package.
    """
    tensors = read_gguf_header(path)
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        said = {name: key.contents() for name, key in reader.fields.items() if not name.startswith("tokenizer.")}
        told = {name: json.loads(said.get(f"lorq.{name}", "null")) for name in ("report", "evaluations", "lost")}
        parts, lost = [_part(tensor) for tensor in tensors], dict(told["lost"] or {})
    except Exception as error:  # of many kinds, as of texts that are no JSON
        raise ValueError(f"{path} is a damaged GGUF file ({error}); copy it again") from error
    check_kinds(lost, dict.fromkeys(lost, str), where=path, what="lorq.lost: ")
    measured = parse_measured({"evaluations": told["evaluations"] or []}, where=path)
    report = None if told["report"] is None else Report.of(told["report"], where=path)
    architecture = str(said.get("general.architecture"))
    errors = {} if report is None else _errors(report, architecture, [part.name for part in parts])
    return Made(
        path, "gguf adapter" if said.get("general.type") == "adapter" else "gguf",
        tuple(replace(part, error=errors.get(part.name)) for part in parts),
        str(said.get(GGUF_MARK, "")), str(said.get("lorq.command", "")), report, measured.evaluations,
        lost, architecture=architecture,
    )  # fmt: skip


def _part(tensor: GgufTensor) -> Part:
    return Part(tensor.name, tensor.shape, tensor.type, tensor.end - tensor.begin, tensor.type not in _FLOATS)


def _errors(report: Report, architecture: str, tensors: Sequence[str]) -> dict[str, float]:
    """Output errors of a folder's layers by their names in the file; of experts their mean."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next((number for number, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if number is None:
        return {}
    names = get_tensor_name_map(number, len({name.split(".")[1] for name in tensors if name.startswith("blk.")}))
    found: dict[str, list[float]] = {}
    for layer in report.layers:
        own = names.get_name(re.sub(r"(\.experts)\.\d+\.", r"\1.", layer.name))
        found.setdefault(f"{own}.weight", []).append(layer.error_after)
    return {name: sum(errors) / len(errors) for name, errors in found.items()}
