"""What a GGUF file says of itself: its tensors, and in keys of lorq's own, which llama.cpp passes over, how it was made.

The keys are `GGUF_MARK`, the version; and as JSON ``lorq.report`` (the folder's, that the file was made of),
``lorq.evaluations`` (what `lorq evaluate` found of that folder), and ``lorq.lost``, with ``lorq.command`` as text.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorq.storage.folder import LorqFolder
from lorq.storage.measured import read_measured
from lorq.storage.names import GGUF_MARK
from lorq.storage.report import Report

_LOST_BYTES = 4096  # kept free for it; it is known when the tensors are written, which lie behind it


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file; ``type`` is GGUF's name in small letters, ``shape`` as in the model, experts first."""

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int

    @property
    def weights(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class GgufTold:
    """What a file says.

    Attributes:
        architecture: llama.cpp's name of it.
        is_adapter: it is a LoRA file, of no use by itself.
        version: of the lorq that wrote it; "" if another program did.
        command: that exported it.
        report: of the folder that it was made of; None where it has none.
        evaluations: of that folder.
        lost: on the way from it.
    """

    path: Path
    architecture: str
    is_adapter: bool
    tensors: tuple[GgufTensor, ...]
    version: str = ""
    command: str = ""
    report: Report | None = None
    evaluations: tuple[dict[str, Any], ...] = ()
    lost: Mapping[str, str] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors."""
        return 8 * sum(t.bytes for t in self.tensors) / max(sum(t.weights for t in self.tensors), 1)

    @property
    def types(self) -> str:
        """How many tensors have which type, in words."""
        return ", ".join(f"{n} {name}" for name, n in Counter(tensor.type for tensor in self.tensors).most_common())


def add_told(writer: Any, folder: LorqFolder, command: str) -> None:
    """Add the keys, the last of which `tell_lost` fills."""
    writer.add_string("lorq.command", command)
    writer.add_string("lorq.report", json.dumps(replace(folder.report, checksums={}).as_dict(), sort_keys=True))
    if found := read_measured(folder.path).evaluations:
        writer.add_string("lorq.evaluations", json.dumps(found, sort_keys=True))
    writer.add_string("lorq.lost", " " * _LOST_BYTES)


def tell_lost(file: Path, end: int, lost: Mapping[str, str]) -> None:
    """Put what was lost into a file whose keys end at the byte ``end``."""
    told = json.dumps(lost).encode()
    assert len(told) <= _LOST_BYTES, f"{len(told)} bytes of {lost}"
    with file.open("r+b") as opened:
        opened.seek(end - _LOST_BYTES)
        opened.write(told)


def read_told(path: Path) -> GgufTold:
    """What a GGUF file says.

    Raises:
        ValueError: if it is none, or damaged.
        ImportError: without the gguf package.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("reading a GGUF file needs the gguf package: pip install 'lorq[gguf]'") from error
    with path.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ValueError(f"{path} must begin with GGUF to be a GGUF file, it begins with {magic!r}")
    try:
        reader = GGUFReader(path)
        said = {name: reader.fields[name].contents() for name in reader.fields if not name.startswith("tokenizer.")}
        tensors = tuple(_tensor(tensor) for tensor in reader.tensors)
        told = {name: json.loads(said.get(f"lorq.{name}", "null")) for name in ("report", "evaluations", "lost")}
    except Exception as error:  # of many kinds, the reader believes what a file says
        raise ValueError(f"{path} is a damaged GGUF file ({error}); copy it again") from error
    return GgufTold(
        path, str(said.get("general.architecture")), said.get("general.type") == "adapter", tensors,
        str(said.get(GGUF_MARK, "")), str(said.get("lorq.command", "")),
        None if told["report"] is None else Report.of(told["report"], where=path),
        tuple(told["evaluations"] or ()), told["lost"] or {},
    )  # fmt: skip


def _tensor(tensor: Any) -> GgufTensor:
    size = int(tensor.n_bytes)
    if tensor.data.nbytes != size:
        raise ValueError(f"{tensor.name} must have {size} bytes, it has {tensor.data.nbytes}")
    return GgufTensor(tensor.name, tuple(map(int, reversed(tensor.shape))), tensor.tensor_type.name.lower(), size)


def errors_by_tensor(told: GgufTold) -> dict[str, float]:
    """Output errors of the folder's layers by the names that they have in the file; of experts their mean."""
    if told.report is None:
        return {}
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == told.architecture)
    names = get_tensor_name_map(number, len({t.name.split(".")[1] for t in told.tensors if t.name.startswith("blk.")}))
    found: dict[str, list[float]] = {}
    for layer in told.report.layers:
        own = names.get_name(re.sub(r"(\.experts)\.\d+\.", r"\1.", layer.name))
        if own is not None:
            found.setdefault(f"{own}.weight", []).append(layer.error_after)
    return {name: sum(errors) / len(errors) for name, errors in found.items()}
