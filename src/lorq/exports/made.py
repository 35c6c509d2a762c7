"""What an export, an adapter or a file for llama.cpp says of itself."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorq.storage.names import EXPORTED, REPORT_NAME
from lorq.storage.report import Report

_ADAPTERS = ("adapter_config.json", "adapter.gguf")  # by which a folder is known as one


def is_for_others(place: Path) -> bool:
    """Whether it is an export, an adapter or a file, and no lorq folder."""
    if place.is_file() or any((place / name).is_file() for name in _ADAPTERS):
        return True
    return (place / EXPORTED).is_file() and not (place / REPORT_NAME).is_file()


@dataclass(frozen=True)
class Part:
    """A tensor, or a quantized weight with all that belongs to it.

    Attributes:
        shape: as the model has it; of stacked experts these first.
        type: of its numbers, by the words of its format.
        is_quantized: it has codes.
        error: of the layer's output, where that is known; of experts their mean.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int
    is_quantized: bool
    error: float | None = None

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Made:
    """What something says of itself.

    Attributes:
        kind: a target of `lorq.exports.TARGETS`; or "adapter", of PEFT's, "gguf adapter".
        version: of the lorq that made it; "" if another program did.
        command: that exported it.
        report: of the lorq folder that it was made of; None where that is not known.
        evaluations: of that folder.
        lost: on the way from it.
        base: of an adapter, what it says that it is for.
        architecture: of a GGUF file, by llama.cpp's name.
    """

    place: Path
    kind: str
    parts: tuple[Part, ...]
    version: str = ""
    command: str = ""
    report: Report | None = None
    evaluations: tuple[dict[str, Any], ...] = ()
    lost: Mapping[str, str] = field(default_factory=dict)
    base: str = ""
    architecture: str = ""

    @property
    def is_adapter(self) -> bool:
        return self.kind.endswith("adapter")

    @property
    def has_adapter(self) -> bool:
        """The low-rank part is beside it, and the errors are those of both together."""
        return not self.is_adapter and "--adapter" in self.command.split()

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def ranks(self) -> list[int]:
        """Of an adapter's layers."""
        return [part.shape[-2] for part in self.parts if part.name.endswith((".lora_A.weight", ".lora_a"))]

    def bits_per_weight(self, *, quantized: bool = True) -> float:
        """Of the parts with codes, or of all."""
        parts = [part for part in self.parts if part.is_quantized or not quantized]
        return 8 * sum(part.bytes for part in parts) / max(sum(part.weights for part in parts), 1)

    def types(self) -> str:
        """How many parts are of which type, in words."""
        return ", ".join(f"{count} {type_}" for type_, count in Counter(p.type for p in self.parts).most_common())
