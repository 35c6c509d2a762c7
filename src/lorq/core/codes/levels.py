"""Level codes: positions in a fixed table of values, under a scale for each group or for each weight."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from lorq.core.codes.integer import IntGrid
from lorq.core.packing import Layout, pack, packed_width, unpack

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

    Bits (2..8) and kind are those of `levels`.
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


def level_values(
    codes: Tensor,
    kind: str,
    bits: int,
    *,
    dtype: torch.dtype = torch.float32,
    table: Float[Tensor, "levels"] | None = None,
) -> Float[Tensor, "..."]:
    """``levels[codes]`` for codes of any integer or floating-point type.

    ``table`` has the levels, where they are at hand: a program that is being traced must not meet the kept ones.
    """
    if kind == "integer":
        return codes.to(dtype) - 2 ** (bits - 1)
    table = (levels(kind, bits, codes.device) if table is None else table).to(dtype)
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def start_block(in_: int, rank: int) -> int:
    """Columns of a block before a scale of low rank is fitted: ``in // rank``, lowered until it divides the width.

    Source:
        LoRDS, arXiv:2601.22716, the authors' code. Blocks this wide have a matrix of scales of rank ``in / block``,
        which is the rank itself wherever that divides.
    """
    return next(block for block in range(max(1, in_ // rank), 0, -1) if in_ % block == 0)


@dataclass(frozen=True)
class LevelFormat:
    """Of codes that stand for fixed levels.

    Attributes:
        bits: width of a code.
        levels: their name, see `levels`.
        group_size: input columns that share a scale; the width where the scale is low rank.
        scale_rank: rank of the matrix of scales, one for each weight; 0 where groups have one.
    """

    bits: int
    levels: str
    group_size: int
    scale_rank: int = 0

    kind: ClassVar[str] = "levels"
    operator: ClassVar[str | None] = "quant_linear"

    @property
    def grid(self) -> LevelGrid:
        return LevelGrid(self.bits, self.levels)

    def check(self, out: int, in_: int) -> None:
        IntGrid(self.bits, self.group_size).check(out, in_)

    def layout(self, out: int, in_: int) -> Layout:
        layout: Layout = {"weight_packed": ((out, packed_width(in_, self.bits)), torch.int32)}
        if not self.scale_rank:
            return layout | {"weight_scale": ((out, in_ // self.group_size), torch.float16)}
        return layout | {
            "scale_left": ((out, self.scale_rank), torch.float16),
            "scale_right": ((self.scale_rank, in_), torch.float16),
        }

    def read(self, tensors: Mapping[str, Tensor], out: int, in_: int) -> "LevelCodes":
        scale: Tensor | LowRankScale
        if self.scale_rank:
            scale = LowRankScale(tensors["scale_left"], tensors["scale_right"])
        else:
            scale = tensors["weight_scale"]
        return LevelCodes(unpack(tensors["weight_packed"], self.bits, in_), scale, self, tensors.get("levels"))

    def decode_rows(
        self, tensors: Mapping[str, Tensor], index: Int64[Tensor, "count"], in_: int
    ) -> Float[Tensor, "count in"]:
        of_rows = "weight_packed", "weight_scale", "scale_left"
        own = {name: t.index_select(0, index) if name in of_rows else t for name, t in tensors.items()}
        return self.read(own, len(index), in_).decode()

    def plain(self, width: int) -> IntGrid:
        """What plain rounding to nearest would use: for a scale of low rank, the groups that its fit started from."""
        group = start_block(self.group_size, self.scale_rank) if self.scale_rank else self.group_size
        return IntGrid(self.bits, group, symmetric=True)


@dataclass(frozen=True)
class LowRankScale:
    """The scale of every weight, ``S = left right``, signs included.

    They are B and A of the paper, float16 where they are stored.
    """

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in"]

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The full matrix of scales, multiplied in ``dtype``."""
        return self.left.to(dtype) @ self.right.to(dtype)


@dataclass(frozen=True)
class LevelCodes:
    """Codes of fixed levels and the scale they are under.

    Attributes:
        scale: of each group, float16; or one of low rank for each weight.
        table: the levels, where they were read with the codes; they are not stored.
    """

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"] | LowRankScale
    format: LevelFormat
    table: Float[Tensor, "levels"] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def decode(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """``levels[codes] * scale``."""
        values = level_values(self.codes, self.format.levels, self.format.bits, dtype=dtype, table=self.table)
        if isinstance(self.scale, LowRankScale):
            return values * self.scale.dense(dtype)
        return (values.unflatten(1, (self.scale.shape[1], -1)) * self.scale.to(dtype).unsqueeze(-1)).flatten(1)

    def tensors(self) -> dict[str, Tensor]:
        packed = {"weight_packed": pack(self.codes, self.format.bits)}
        if isinstance(self.scale, LowRankScale):
            return packed | {"scale_left": self.scale.left, "scale_right": self.scale.right}
        return packed | {"weight_scale": self.scale}

    def continuous(self) -> dict[str, Tensor]:
        """The scales, or their factors."""
        if isinstance(self.scale, LowRankScale):
            return {"scale_left": self.scale.left, "scale_right": self.scale.right}
        return {"weight_scale": self.scale}

    def refitted(self, numbers: Mapping[str, Tensor]) -> "LevelCodes":
        if isinstance(self.scale, LowRankScale):
            return replace(self, scale=LowRankScale(numbers["scale_left"], numbers["scale_right"]))
        return replace(self, scale=numbers["weight_scale"])
