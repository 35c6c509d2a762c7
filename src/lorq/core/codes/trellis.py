"""Trellis codes: each weight is computed from the last bits of a stream that runs down its column."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int16, Int32, Int64, UInt8
from torch import Tensor

from lorq.core.codes.integer import IntGrid
from lorq.core.packing import Layout

# Rows of a tile: their codes fill ``bits`` whole words of 16 bits.
TILE = 16
MOST_BITS = 6
LARGEST_WINDOW = 16
# Rows of a sequence at most: they share a search, and sequences are searched side by side.
_LONGEST = 256
# Weights that are decoded at a time.
_STRIP = 1 << 22
# An odd number whose products have bytes as good as random (docs/log.md has those that were tried).
_MULTIPLIER = 0xC49087BF


@functools.cache
@torch.inference_mode(False)
def trellis_values(window: int, device: torch.device | str = "cpu") -> Float[Tensor, "states"]:
    """What each window of bits stands for: nearly Gaussian numbers of variance 1.33.

        value(n) = (b_0 + b_1 + b_2 + b_3 - 510) / 128,   b the bytes of n * 0xC49087BF mod 2^32

    Source:
        QTIP, arXiv:2406.11235, section 3.1 ("1MAD"), without its addend, which gains nothing.

    Example:
        >>> trellis_values(4)[:3]
        tensor([-3.9844,  1.2188, -1.5547])
    """
    return _values_of(torch.arange(2**window, device=device, dtype=torch.int32))


def _values_of(windows: Int32[Tensor, "*shape"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    product = windows * (_MULTIPLIER - 2**32)  # of 32 bits, and so are the products
    total = (product & 255) + (product >> 8 & 255) + (product >> 16 & 255) + (product >> 24 & 255)
    return (total - 510).to(dtype) / 128


# Their standard deviation, that of the sum of four bytes over 128.
VALUES_DEVIATION = math.sqrt(4 * (256**2 - 1) / 12) / 128


@dataclass(frozen=True)
class TrellisGrid:
    """Weights computed from windows of a stream of codes that runs down each column.

    A code has ``bits`` bits. The value of a weight is that of its window, the last ``window`` bits of the codes up to
    its own (`trellis_values`), times the scale of its row. So each weight costs ``bits`` bits and can be any of
    ``2^window`` values. The rows are cut into sequences: the windows of a sequence's first rows begin with its last
    codes.

    Args:
        bits: stored bits per weight, 1 to 6.
        window: bits that a value depends on; at least ``bits`` + 4, at most 16.
        length: rows of a sequence, a multiple of 16 that divides the height, rounded up to a multiple of 16.
    """

    bits: int
    window: int
    length: int

    kind: ClassVar[str] = "trellis"
    operator: ClassVar[str | None] = "trellis_linear"

    @classmethod
    def of(cls, out: int, bits: int, window: int) -> "TrellisGrid":
        """For a weight of ``out`` rows: in sequences as long as fit, up to 256, an even number of them if there can be.

        Example:
            >>> [TrellisGrid.of(out, 3, 12).length for out in (576, 1536, 4096, 100)]
            [144, 256, 256, 112]
        """
        tiles = -(-out // TILE)
        fits = [n for n in range(1, _LONGEST // TILE + 1) if tiles % n == 0 and n * TILE * bits >= window]
        even = [n for n in fits if tiles // n % 2 == 0 and 2 * n > max(fits)]
        return cls(bits, window, TILE * max(even or fits or [tiles]))

    def rows(self, out: int) -> int:
        """Rows that are stored of ``out``."""
        return -(-out // TILE) * TILE

    def check(self, out: int, in_: int) -> None:
        """Refuse sizes that no stream has.

        Raises:
            ValueError: naming the sizes.
        """
        if not 1 <= self.bits <= MOST_BITS or not self.bits + 4 <= self.window <= LARGEST_WINDOW:
            raise ValueError(
                f"trellis codes have 1 to {MOST_BITS} bits and a window of 4 more at least, {LARGEST_WINDOW} at most, "
                f"got {self.bits} bits and a window of {self.window}; a window of 12 serves all widths"
            )
        if (
            self.length < 1
            or self.length % TILE
            or self.rows(out) % self.length
            or self.length * self.bits < self.window
        ):
            raise ValueError(
                f"a sequence must be a multiple of {TILE} rows that divides the height {out}, rounded up to "
                f"{self.rows(out)}, and hold a window of {self.window} bits, got {self.length}"
            )

    def layout(self, out: int, in_: int) -> Layout:
        return {
            "weight_packed": ((self.rows(out) // TILE, self.bits, in_), torch.int16),
            "weight_scale": ((out, 1), torch.float16),
        }

    def read(self, tensors: Mapping[str, Tensor], out: int, in_: int) -> "TrellisCodes":
        return TrellisCodes(tensors["weight_packed"], tensors["weight_scale"], self)

    def decode_rows(
        self, tensors: Mapping[str, Tensor], index: Int64[Tensor, "count"], in_: int
    ) -> Float[Tensor, "count in"]:
        # Windows reach into the tile before; nothing else is read.
        tile, sequence = index // TILE, self.length // TILE
        before = tile - tile % sequence + (tile - 1) % sequence
        words = torch.stack([tensors["weight_packed"][before, -1], *tensors["weight_packed"][tile].unbind(1)], 1)
        end = (index % TILE + 1) * self.bits
        first = (end - 1) // 16
        pick = first.view(-1, 1, 1).expand(-1, 1, in_)
        upper, lower = (words.gather(1, pick + i).squeeze(1).long() & 0xFFFF for i in (0, 1))
        windows = ((upper << 16) | lower) >> (16 * (first + 1) - end).unsqueeze(1)
        values = trellis_values(self.window, windows.device)[windows & (2**self.window - 1)]
        return values * tensors["weight_scale"].index_select(0, index).float()

    def plain(self, width: int) -> IntGrid:
        """What plain rounding to nearest would use: single weights of as many bits, a range for each row."""
        return IntGrid(self.bits, width)


@dataclass(frozen=True)
class TrellisCodes:
    """Streams of codes, and the scales of the rows.

    Attributes:
        packed: of 16 rows each, the codes of a column one after the other, the highest bit first, in words of 16 bits.
        scale: float16, in weight units; it tells the height.
    """

    packed: Int16[Tensor, "tiles bits in"]
    scale: Float[Tensor, "out 1"]
    format: TrellisGrid

    @classmethod
    def of(cls, codes: UInt8[Tensor, "rows in"], scale: Float[Tensor, "out 1"], grid: TrellisGrid) -> "TrellisCodes":
        """Of single codes; rows past the scales fill the last tile."""
        return cls(pack_streams(codes, grid.bits), scale.to(torch.float16), grid)

    @property
    def shape(self) -> tuple[int, int]:
        return self.scale.shape[0], self.packed.shape[2]

    def decode(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """``scale * value(window)``."""
        return self.values(dtype) * self.scale.to(dtype)

    def values(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The values of the windows, without their scales."""
        g, tiles = self.format, self.format.length // TILE
        # Some sequences at a time: what is made in between takes ten times as much memory as the codes.
        strips = self.packed.split(tiles * max(1, _STRIP // max(1, g.length * self.packed.shape[2])))
        windows = (stream_windows(strip, g.bits, g.window, g.length) for strip in strips)
        values = [torch.stack([_values_of(w, dtype) for w in own], 1).flatten(0, 1) for own in windows]
        return torch.cat(values)[: self.shape[0]]

    def tensors(self) -> dict[str, Tensor]:
        return {"weight_packed": self.packed, "weight_scale": self.scale}

    def continuous(self) -> dict[str, Tensor]:
        """The scales of the rows."""
        return {"weight_scale": self.scale}

    def refitted(self, numbers: Mapping[str, Tensor]) -> "TrellisCodes":
        return replace(self, scale=numbers["weight_scale"])


def pack_streams(codes: UInt8[Tensor, "rows in"], bits: int) -> Int16[Tensor, "tiles {bits} in"]:
    """Codes of each column as words, tile by tile; the number of rows is a multiple of 16.

    Code ``t`` of a tile has the bits ``t bits .. t bits + bits - 1`` of the tile's string, whose bit ``i`` is bit
    ``15 - i % 16`` of word ``i // 16``.

    Example:
        >>> codes = torch.tensor([[1], [0], [3]] + [[0]] * 13, dtype=torch.uint8)
        >>> [bin(w) for w in pack_streams(codes, 2).flatten().tolist()]
        ['0b100110000000000', '0b0']
    """
    tiles = codes.int().unflatten(0, (-1, TILE))
    words = tiles.new_zeros(tiles.shape[0], bits, tiles.shape[2])
    for t in range(TILE):
        first, last = t * bits // 16, (t * bits + bits - 1) // 16
        for word in range(first, last + 1):
            shift = 16 * (word + 1) - (t + 1) * bits
            words[:, word] |= (tiles[:, t] << shift if shift >= 0 else tiles[:, t] >> -shift) & 0xFFFF
    return words.to(torch.int16)


def stream_windows(
    packed: Int16[Tensor, "tiles bits in"], bits: int, window: int, length: int
) -> list[Int32[Tensor, "tiles in"]]:
    """The window of every weight, as lists of the 16 rows of all tiles."""
    words = packed.int() & 0xFFFF
    # The window of a tile's first rows begins in the tile before it, of a sequence's first tile in its last.
    before = words[:, -1].unflatten(0, (-1, length // TILE)).roll(1, 1).flatten(0, 1)
    words = torch.cat([before.unsqueeze(1), words], 1)
    windows = []
    for t in range(TILE):
        end = (t + 1) * bits
        word = (end - 1) // 16
        # int32 has no place for the upper half of 32 bits: the upper word keeps the bits that the window can reach.
        both = ((words[:, word].long() << 16) | words[:, word + 1]) >> (16 * (word + 1) - end)
        windows.append((both & (2**window - 1)).int())
    return windows
