"""What stands for a weight's values: one file a kind of codes, each with its format and its stored value.

A rounding returns the value that is stored, and nobody takes it apart: its layout, bits, checks, reading and decoding
are methods of the kind. A new kind is a file here and a line in `CODES`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lorq.core.codes.gguf import GgufCodes, GgufGrid
from lorq.core.codes.integer import IntCodes, IntGrid
from lorq.core.codes.levels import (
    LEVEL_KINDS,
    LevelCodes,
    LevelFormat,
    LevelGrid,
    LowRankScale,
    level_values,
    levels,
    start_block,
)
from lorq.core.codes.trellis import TrellisCodes, TrellisGrid
from lorq.core.codes.vectors import Codebook, VectorCodes, VectorGrid
from lorq.core.packing import Layout


@runtime_checkable
class CodesFormat(Protocol):
    """What must be known of a weight's codes to make room for them before their tensors are read.

    A frozen dataclass of numbers, words and truth values, which are its JSON.

    Attributes:
        kind: its name in `CODES`.
        operator: the operator of `lorq.kernels` that multiplies by such codes as they are stored; None where a weight
            is decoded to be multiplied.
        bits: stored bits of a code, per weight.
    """

    kind: ClassVar[str]
    operator: ClassVar[str | None]

    @property
    def bits(self) -> int: ...

    def check(self, out: int, in_: int) -> None:
        """Refuse a weight's shape that such codes do not tile, with a ValueError that names the sizes."""

    def layout(self, out: int, in_: int) -> Layout:
        """Every tensor that is stored of a weight's codes."""
        ...

    def read(self, tensors: Mapping[str, Tensor], out: int, in_: int) -> "Codes":
        """The codes behind stored tensors; the inverse of `Codes.tensors`."""
        ...

    def decode_rows(
        self, tensors: Mapping[str, Tensor], index: Int64[Tensor, "count"], in_: int
    ) -> Float[Tensor, "count in"]:
        """What the codes of some rows alone stand for, of a weight of width ``in_``, without a look at the others'."""
        ...

    def plain(self, width: int) -> IntGrid:
        """What plain rounding to nearest would use in as many bits and groups, to be measured against."""
        ...


@runtime_checkable
class Codes(Protocol):
    """The codes of a weight, whole: what a rounding returns and a folder holds."""

    @property
    def format(self) -> Any: ...

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, (out, in)."""
        ...

    def decode(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The values that the codes stand for."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, by local name (docs/format.md); `CodesFormat.read` is the inverse."""
        ...

    def continuous(self) -> dict[str, Tensor]:
        """What of `tensors`, or inside of one, is numbers and no codes, which tuning may change: scales, codebooks.

        Names are those of stored tensors, but for numbers inside of one.
        """
        ...

    def refitted(self, numbers: Mapping[str, Tensor]) -> "Codes":
        """The same codes with other numbers for `continuous`, of any floating-point type.

        What they `decode` to is differentiable in the numbers.
        """
        ...


CODES: dict[str, type[Any]] = {
    "integer": IntGrid, "levels": LevelFormat, "vectors": VectorGrid, "trellis": TrellisGrid,
    "gguf": GgufGrid,
}  # fmt: skip

__all__ = [
    "CODES", "LEVEL_KINDS", "Codebook", "Codes", "CodesFormat", "GgufCodes", "GgufGrid", "IntCodes", "IntGrid",
    "LevelCodes", "LevelFormat", "LevelGrid", "LowRankScale", "TrellisCodes", "TrellisGrid", "VectorCodes",
    "VectorGrid", "level_values", "levels", "start_block",
]  # fmt: skip
