"""Vector codes: each stands for a few neighbouring weights, an entry of a codebook times a scale."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int8, Int64, UInt8
from torch import Tensor

from lorq.core.codes.integer import IntGrid
from lorq.core.packing import Layout, pack, packed_width, unpack

# Weights of a vector by bits, as GPTVQ (arXiv:2402.15319) has them.
VECTOR_LENGTHS = {2: 4, 3: 2, 4: 2}


@dataclass(frozen=True)
class VectorGrid:
    """Short vectors of weights, each standing for one entry of a codebook times a scale.

    A codebook's ``2^(bits vector)`` entries are int8 with one float16 scale; each row and group of columns has a scale
    of its own besides.

    Args:
        bits: stored bits per weight; ``bits * vector`` is the width of a code, at most 8.
        vector: neighbouring weights of a row that share a code.
        rows: rows that share a codebook; must divide the height.
        columns: columns that share a codebook; a multiple of ``vector`` that divides the width.
        group_size: columns that share a scale; a multiple of ``columns`` that divides the width.
    """

    bits: int
    vector: int
    rows: int
    columns: int
    group_size: int

    kind: ClassVar[str] = "vectors"
    operator: ClassVar[str | None] = "quant_linear"

    @property
    def code_bits(self) -> int:
        """Width of a code, ``bits * vector``."""
        return self.bits * self.vector

    @property
    def entries(self) -> int:
        """Entries of a codebook, ``2^(bits vector)``."""
        return 2**self.code_bits

    def check(self, out: int, in_: int) -> None:
        """Refuse shapes that the codebooks do not tile.

        Raises:
            ValueError: naming the sizes.
        """
        if self.bits < 1 or self.vector < 2 or self.code_bits > 8:
            raise ValueError(
                f"a vector code must stand for at least 2 weights and take bits * vector bits, at most 8, "
                f"got {self.bits} * {self.vector}; codebooks serve 1 to 4 bits"
            )
        sizes = (out, self.rows), (in_, self.columns), (self.columns, self.vector)
        if any(part < 1 or whole % part for whole, part in sizes):
            raise ValueError(
                f"a codebook's {self.rows} rows and {self.columns} columns must divide a weight of shape {(out, in_)} "
                f"into vectors of {self.vector}; choose divisors, or -1 for sizes that fit"
            )
        if self.group_size < 1 or self.group_size % self.columns or in_ % self.group_size:
            raise ValueError(
                f"group_size must be a multiple of a codebook's {self.columns} columns that divides the width {in_}, "
                f"got {self.group_size}; choose {in_} for one scale per row"
            )

    def layout(self, out: int, in_: int) -> Layout:
        tiles = out // self.rows, in_ // self.columns
        return {
            "weight_packed": ((out, packed_width(in_ // self.vector, self.code_bits)), torch.int32),
            "weight_scale": ((out, in_ // self.group_size), torch.float16),
            "codebook": ((*tiles, self.entries, self.vector), torch.int8),
            "codebook_scale": (tiles, torch.float16),
        }

    def read(self, tensors: Mapping[str, Tensor], out: int, in_: int) -> "VectorCodes":
        codes = unpack(tensors["weight_packed"], self.code_bits, in_ // self.vector)
        book = Codebook(tensors["codebook"], tensors["codebook_scale"])
        return VectorCodes(codes, tensors["weight_scale"], book, self)

    def decode_rows(
        self, tensors: Mapping[str, Tensor], index: Int64[Tensor, "count"], in_: int
    ) -> Float[Tensor, "count in"]:
        tiles = index // self.rows  # each row gets codebooks of its own
        own = {name: tensors[name].index_select(0, index) for name in ("weight_packed", "weight_scale")}
        own |= {name: tensors[name].index_select(0, tiles) for name in ("codebook", "codebook_scale")}
        return replace(self, rows=1).read(own, len(index), in_).decode()

    def plain(self, width: int) -> IntGrid:
        """What plain rounding to nearest would use: single weights of as many bits, a range for each group."""
        return IntGrid(self.bits, self.group_size)


@dataclass(frozen=True)
class Codebook:
    """The codebooks of a weight: entry ``k`` of tile ``(r, c)`` is ``entries[r, c, k] * scale[r, c]``.

    Entries are int8 where they are stored.
    """

    entries: (
        Int8[Tensor, "row_tiles column_tiles entries vector"] | Float[Tensor, "row_tiles column_tiles entries vector"]
    )
    scale: Float[Tensor, "row_tiles column_tiles"]

    def values(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "row_tiles column_tiles entries vector"]:
        """The entries with their scale."""
        return self.entries.to(dtype) * self.scale.to(dtype)[:, :, None, None]


@dataclass(frozen=True)
class VectorCodes:
    """Vector codes and the codebooks they point into.

    Attributes:
        codes: one for each ``vector`` neighbouring columns.
        scale: float16, in weight units.
    """

    codes: UInt8[Tensor, "out vectors"]
    scale: Float[Tensor, "out groups"]
    codebook: Codebook
    format: VectorGrid

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * self.format.vector

    def decode(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """``scale * codebook[code]``.

        Example:
            >>> book = Codebook(torch.tensor([[[[1, 2], [3, -4]]]], dtype=torch.int8), torch.tensor([[0.5]]))
            >>> codes = torch.tensor([[1, 0]], dtype=torch.uint8)
            >>> VectorCodes(codes, torch.tensor([[2.0]]), book, VectorGrid(1, 2, 1, 4, 4)).decode()
            tensor([[ 3., -4.,  1.,  2.]])
        """
        values = self.codebook.values(dtype)
        row_tiles, column_tiles, entries, vector = values.shape
        codes = self.codes
        tiled = codes.long().view(row_tiles, self.format.rows, column_tiles, codes.shape[1] // column_tiles)
        first = torch.arange(0, row_tiles * column_tiles * entries, entries, device=codes.device)
        first = first.view(row_tiles, 1, column_tiles, 1)
        weight = values.view(-1, vector)[tiled + first]  # (row_tiles, rows, column_tiles, vectors, vector)
        grouped = weight.reshape(codes.shape[0], self.scale.shape[1], self.format.group_size)
        return (grouped * self.scale.to(dtype).unsqueeze(-1)).flatten(1)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "weight_packed": pack(self.codes, self.format.code_bits),
            "weight_scale": self.scale,
            "codebook": self.codebook.entries,
            "codebook_scale": self.codebook.scale,
        }

    def continuous(self) -> dict[str, Tensor]:
        """The codebooks' entries, and the scales of rows and of codebooks."""
        book = self.codebook
        return {"weight_scale": self.scale, "codebook": book.entries, "codebook_scale": book.scale}

    def refitted(self, numbers: Mapping[str, Tensor]) -> "VectorCodes":
        book = Codebook(numbers["codebook"], numbers["codebook_scale"])
        return replace(self, scale=numbers["weight_scale"], codebook=book)
