"""Grids: the finite set of values that codes stand for. Fit a range, encode, decode."""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

# The smallest scale a float16 still holds with about one per cent of resolution (denormals end at 6e-8).
# A group of zeros gets it too, so that no scale is ever zero.
SMALLEST_SCALE = 2.0**-17


@dataclass(frozen=True)
class IntGrid:
    """Equally spaced values, one scale (and one zero point) for each row and group of columns.

    A code ``c`` stands for ``(c - zero_point) * scale``. Asymmetric grids store ``zero_point``;
    symmetric ones fix it at ``2^(bits-1)`` and store nothing. Zero is always on the grid.

    Args:
        bits: width of a code, 1..8.
        group_size: input columns that share a scale; must divide the width.
        symmetric: fix the zero point in the middle.
    """

    bits: int
    group_size: int
    symmetric: bool = False

    @property
    def top(self) -> int:
        """The largest code, ``2^bits - 1``."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid, ``2^(bits-1)``."""
        return 2 ** (self.bits - 1)

    def grouped(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out groups size"]:
        """A view of ``weight`` with its columns split into groups.

        Raises:
            ValueError: if the group size does not divide the width.
        """
        if weight.shape[1] % self.group_size:
            raise ValueError(
                f"group_size must divide the layer's width, got group_size {self.group_size} and width "
                f"{weight.shape[1]}; choose a divisor of the width, or -1 for one group per row"
            )
        return weight.unflatten(1, (-1, self.group_size))

    def span(
        self, low: Float[Tensor, "*shape"], high: Float[Tensor, "*shape"]
    ) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """Scale and zero point of the grid that covers ``[low, high]`` and zero.

            asymmetric:  scale = (high - low) / (2^bits - 1),   zero_point = round(-low / scale)
            symmetric:   scale = max(|low|, |high|) / (2^(bits-1) - 1)   (bits = 1: the maximum itself)

        The scale is rounded to float16, the type it is stored in, *before* anything is encoded with it, so
        that the codes fit the stored grid.

        Returns:
            ``(scale, zero_point)``, both in the dtype of ``low``; the zero point holds whole numbers.

        Raises:
            ValueError: if a scale exceeds what float16 holds.

        Source:
            FLRQ, arXiv:2601.05684, eq. 8 (symmetric) and the authors' code (asymmetric). Zero is always
            inside our range: the code's clamp of the zero point cuts the top off an all-positive group.
            The symmetric grid also has the code 0, which stands for one step below the paper's lowest
            level; it costs nothing and serves clipped ranges.
        """
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        if self.symmetric:
            step = torch.maximum(-low, high) / max(self.middle - 1, 1)
        else:
            step = (high - low) / self.top
        if step.numel() and float(step.max()) > torch.finfo(torch.float16).max:
            raise ValueError(
                f"a scale must fit float16 (at most 65504), got {float(step.max()):.4g}; "
                "the weights are too large to be stored, check the checkpoint"
            )
        scale = step.clamp(min=SMALLEST_SCALE).to(torch.float16).to(low.dtype)
        if self.symmetric:
            return scale, torch.full_like(scale, self.middle)
        return scale, (-low / scale).round().clamp(0, self.top)

    def encode(
        self,
        weight: Float[Tensor, "..."],
        scale: Float[Tensor, "..."],
        zero_point: Float[Tensor, "..."],
    ) -> Float[Tensor, "..."]:
        """Nearest codes, ``clamp(round(weight / scale + zero_point), 0, 2^bits - 1)``, as floats; shapes broadcast."""
        return (weight / scale + zero_point).round_().clamp_(0, self.top)

    def decode(
        self,
        codes: Float[Tensor, "..."],
        scale: Float[Tensor, "..."],
        zero_point: Float[Tensor, "..."],
    ) -> Float[Tensor, "..."]:
        """The values behind codes, ``(codes - zero_point) * scale``; shapes broadcast."""
        return (codes - zero_point) * scale

    def fit(self, weight: Float[Tensor, "out in"]) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """Scale and zero point that cover each group from its smallest to its largest weight."""
        groups = self.grouped(weight)
        return self.span(groups.amin(-1), groups.amax(-1))


# Where NormalFloat's outermost quantile lies: halfway between those of the largest of 15 and of 16 normal samples.
_NORMAL_OFFSET = 0.9677083
LEVEL_KINDS = ("integer", "normal-float")


@cache
@torch.inference_mode(False)  # kept: made while measuring, it must serve training too
def levels(kind: str, bits: int, device: torch.device | str = "cpu") -> Float[Tensor, "levels"]:
    """The values behind the codes of a fixed grid, rising, float32; codes are their positions.

        integer:       c - 2^(bits-1)
        normal-float:  quantiles of the normal distribution over the largest: 2^(bits-1) above zero, zero, and
                       2^(bits-1) - 1 below it

    Raises:
        ValueError: for an unknown kind, or bits outside 2..8.

    Source:
        NormalFloat as in QLoRA (arXiv:2305.14314) and LoftQ's code, at any width.

    Example:
        >>> levels("normal-float", 2)
        tensor([-1.0000,  0.0000,  0.3379,  1.0000])
    """
    if kind not in LEVEL_KINDS:
        raise ValueError(f"grid must be one of {', '.join(LEVEL_KINDS)}, got {kind!r}")
    if bits not in range(2, 9):
        raise ValueError(f"bits of a grid of levels must be 2 to 8, got {bits}")
    half = 2 ** (bits - 1)
    if kind == "integer":
        return torch.arange(-half, half, dtype=torch.float32, device=device)

    def quantiles(count: int) -> Tensor:
        steps = torch.linspace(_NORMAL_OFFSET, 0.5, count + 1, dtype=torch.float64)[:-1]
        return torch.special.ndtri(steps)

    all_ = torch.cat([-quantiles(half - 1), torch.zeros(1, dtype=torch.float64), quantiles(half).flip(0)])
    return (all_ / all_.max()).to(device, torch.float32)


@dataclass(frozen=True)
class LevelGrid:
    """Fixed levels times a scale: a code ``c`` stands for ``levels[c] * scale``, whatever shape the scale has.

    Args:
        bits: width of a code, 2..8.
        kind: "integer" or "normal-float", see `levels`.
    """

    bits: int
    kind: str

    def encode(self, weight: Float[Tensor, "..."], scale: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The codes with the least ``(weight - levels[c] scale)^2``, as floats; shapes broadcast.

        For scales of either sign: the square is ``scale^2 (weight / scale - levels[c])^2``, so the nearest level to the
        quotient it is. A scale of 0 gets the nearest level to 0.
        """
        table = levels(self.kind, self.bits, weight.device)
        quotient = torch.nan_to_num(weight / scale, nan=0.0)
        if self.kind == "integer":
            return (quotient + 2 ** (self.bits - 1)).round_().clamp_(0, 2**self.bits - 1)
        return torch.bucketize(quotient, (table[1:] + table[:-1]) / 2, out_int32=True).to(weight.dtype)

    def decode(self, codes: Tensor, scale: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """``levels[codes] * scale``; shapes broadcast."""
        return level_values(codes, self.kind, self.bits, dtype=scale.dtype) * scale


def level_values(codes: Tensor, kind: str, bits: int, *, dtype: torch.dtype = torch.float32) -> Float[Tensor, "..."]:
    """``levels[codes]`` for codes of any integer or floating-point type."""
    if kind == "integer":
        return codes.to(dtype) - 2 ** (bits - 1)
    table = levels(kind, bits, codes.device).to(dtype)
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


@dataclass(frozen=True)
class VectorGrid:
    """Short vectors of weights, each standing for one entry of a codebook times a scale.

    A code stands for ``vector`` neighbouring weights of a row. A codebook of ``2^(bits vector)`` entries serves
    ``rows`` x ``columns`` weights; its entries are int8 with one float16 scale. Each row and group of
    ``group_size`` columns has a scale of its own besides.

    Args:
        bits: stored bits per weight; ``bits * vector`` is the width of a code, at most 8.
        vector: weights that share a code.
        rows: rows that share a codebook; must divide the height.
        columns: columns that share a codebook; a multiple of ``vector`` that divides the width.
        group_size: columns that share a scale; a multiple of ``columns`` that divides the width.
    """

    bits: int
    vector: int
    rows: int
    columns: int
    group_size: int

    @property
    def entries(self) -> int:
        """Entries of a codebook, ``2^(bits vector)``."""
        return 2 ** (self.bits * self.vector)

    def check(self, out: int, in_: int) -> None:
        """Refuse shapes that the codebooks do not tile.

        Raises:
            ValueError: naming the sizes.
        """
        if self.bits < 1 or self.vector < 2 or self.bits * self.vector > 8:
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


@dataclass(frozen=True)
class Codebook:
    """The codebooks of a weight: entry ``k`` of tile ``(r, c)`` is ``entries[r, c, k] * scale[r, c]``.

    Attributes:
        entries: int8.
        scale: float16.
    """

    entries: Int8[Tensor, "row_tiles column_tiles entries vector"]
    scale: Float[Tensor, "row_tiles column_tiles"]

    def values(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "row_tiles column_tiles entries vector"]:
        """The entries with their scale."""
        return self.entries.to(dtype) * self.scale.to(dtype)[:, :, None, None]


def decode_vectors(
    codes: UInt8[Tensor, "out vectors"],
    codebook: Codebook,
    scale: Float[Tensor, "out groups"],
    *,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "out in"]:
    """``scale * codebook[code]`` for a whole matrix of vector codes.

    Example:
        >>> book = Codebook(torch.tensor([[[[1, 2], [3, -4]]]], dtype=torch.int8), torch.tensor([[0.5]]))
        >>> decode_vectors(torch.tensor([[1, 0]], dtype=torch.uint8), book, torch.tensor([[2.0]]))
        tensor([[ 3., -4.,  1.,  2.]])
    """
    values = codebook.values(dtype)
    row_tiles, column_tiles, entries, vector = values.shape
    tiled = codes.long().view(row_tiles, -1, column_tiles, codes.shape[1] // column_tiles)
    first = torch.arange(row_tiles * column_tiles, device=codes.device).view(row_tiles, 1, column_tiles, 1) * entries
    weight = values.view(-1, vector)[tiled + first]  # (row_tiles, rows, column_tiles, vectors, vector)
    grouped = weight.reshape(codes.shape[0], scale.shape[1], -1)
    return (grouped * scale.to(dtype).unsqueeze(-1)).flatten(1)


def dequantize(
    codes: UInt8[Tensor, "out in"],
    scale: Float[Tensor, "out groups"],
    zero_point: UInt8[Tensor, "out groups"] | int,
    *,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "out in"]:
    """``(codes - zero_point) * scale`` for a whole matrix of codes.

    Example:
        >>> codes = torch.tensor([[0, 3, 1, 2]], dtype=torch.uint8)
        >>> dequantize(codes, torch.tensor([[0.5, 2.0]]), 2)
        tensor([[-1.0000,  0.5000, -2.0000,  0.0000]])
    """
    groups = codes.unflatten(1, (scale.shape[1], -1)).to(dtype)
    zero = zero_point if isinstance(zero_point, int) else zero_point.to(dtype).unsqueeze(-1)
    return ((groups - zero) * scale.to(dtype).unsqueeze(-1)).flatten(1)
