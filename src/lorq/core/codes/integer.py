"""Integer codes: equally spaced values, a scale (and a zero point) for each row and group of columns."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from lorq.core.half import SMALLEST_SCALE, stored_half
from lorq.core.packing import Layout, pack, pack_columns, packed_width, unpack, unpack_columns, unpack_columns_at


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

    kind: ClassVar[str] = "integer"
    operator: ClassVar[str | None] = "quant_linear"

    @property
    def top(self) -> int:
        """The largest code."""
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
        self.check(*weight.shape)
        return weight.unflatten(1, (-1, self.group_size))

    def span(
        self, low: Float[Tensor, "*shape"], high: Float[Tensor, "*shape"]
    ) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """Scale and zero point of the grid that covers ``[low, high]`` and zero.

            asymmetric:  scale = (high - low) / (2^bits - 1),   zero_point = round(-low / scale)
            symmetric:   scale = max(|low|, |high|) / (2^(bits-1) - 1)   (bits = 1: the maximum itself)

        The scale is rounded to float16, as it is stored, *before* anything is encoded with it, so that the codes fit
        the stored grid. Both come in the dtype of ``low``; the zero point holds whole numbers.

        Raises:
            ValueError: if a scale exceeds what float16 holds.

        Source:
            FLRQ, arXiv:2601.05684, eq. 8 (symmetric) and the authors' code (asymmetric). Zero is always inside our
            range: the code's clamp of the zero point cuts the top off an all-positive group. The symmetric grid also
            has the code 0, one step below the paper's lowest level, which serves clipped ranges.
        """
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        if self.symmetric:
            step = torch.maximum(-low, high) / max(self.middle - 1, 1)
        else:
            step = (high - low) / self.top
        scale = stored_half(step.clamp(min=SMALLEST_SCALE)).to(low.dtype)
        if self.symmetric:
            return scale, torch.full_like(scale, self.middle)
        return scale, (-low / scale).round().clamp(0, self.top)

    def encode(
        self, weight: Float[Tensor, "..."], scale: Float[Tensor, "..."], zero_point: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Nearest codes, ``clamp(round(weight / scale + zero_point), 0, 2^bits - 1)``, as floats; shapes broadcast."""
        return (weight / scale).add_(zero_point).round_().clamp_(0, self.top)

    def decode(
        self, codes: Float[Tensor, "..."], scale: Float[Tensor, "..."], zero_point: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """The values behind codes, ``(codes - zero_point) * scale``; shapes broadcast."""
        return (codes - zero_point).mul_(scale)

    def fit(self, weight: Float[Tensor, "out in"]) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """Scale and zero point that cover each group from its smallest to its largest weight."""
        groups = self.grouped(weight)
        return self.span(groups.amin(-1), groups.amax(-1))

    # -- as the format of stored codes --------------------------------------------------------------------

    def check(self, out: int, in_: int) -> None:
        """Refuse shapes that the groups do not tile.

        Raises:
            ValueError: naming the sizes.
        """
        if in_ % self.group_size:
            raise ValueError(
                f"group_size must divide the layer's width, got group_size {self.group_size} and width {in_}; "
                "choose a divisor of the width, or -1 for one group per row"
            )

    def layout(self, out: int, in_: int) -> Layout:
        groups = in_ // self.group_size
        layout: Layout = {
            "weight_packed": ((out, packed_width(in_, self.bits)), torch.int32),
            "weight_scale": ((out, groups), torch.float16),
        }
        if not self.symmetric:
            layout["weight_zero_point"] = ((packed_width(out, self.bits), groups), torch.int32)
        return layout

    def read(self, tensors: Mapping[str, Tensor], out: int, in_: int) -> "IntCodes":
        zero = None if self.symmetric else unpack_columns(tensors["weight_zero_point"], self.bits, out)
        codes = unpack(tensors["weight_packed"], self.bits, in_)
        return IntCodes(codes, tensors["weight_scale"], zero, self)

    def decode_rows(
        self, tensors: Mapping[str, Tensor], index: Int64[Tensor, "count"], in_: int
    ) -> Float[Tensor, "count in"]:
        zero = None if self.symmetric else unpack_columns_at(tensors["weight_zero_point"], self.bits, index)
        codes = unpack(tensors["weight_packed"].index_select(0, index), self.bits, in_)
        return IntCodes(codes, tensors["weight_scale"].index_select(0, index), zero, self).decode()

    def plain(self, width: int) -> "IntGrid":
        return self


@dataclass(frozen=True)
class IntCodes:
    """Codes on a grid of equally spaced values.

    Attributes:
        scale: float16, in weight units.
        zero_point: the code of 0.0 for each group; None on symmetric grids.
    """

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero_point: UInt8[Tensor, "out groups"] | None
    format: IntGrid

    @classmethod
    def of(
        cls,
        codes: Float[Tensor, "out in"] | UInt8[Tensor, "out in"],
        scale: Float[Tensor, "out groups"],
        zero_point: Float[Tensor, "out groups"],
        grid: IntGrid,
    ) -> "IntCodes":
        """From whole numbers, whatever holds them, and a scale that is exact in float16, as the grid gives both."""
        zero = None if grid.symmetric else zero_point.to(torch.uint8)
        return cls(codes.to(torch.uint8), scale.to(torch.float16), zero, grid)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def decode(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """``(codes - zero_point) * scale``.

        Example:
            >>> codes = torch.tensor([[0, 3, 1, 2]], dtype=torch.uint8)
            >>> IntCodes(codes, torch.tensor([[0.5, 2.0]]), None, IntGrid(2, 2, symmetric=True)).decode()
            tensor([[-1.0000,  0.5000, -2.0000,  0.0000]])
        """
        groups = self.codes.unflatten(1, (self.scale.shape[1], -1)).to(dtype)
        zero = self.zero_points(dtype).unsqueeze(-1)
        return groups.sub_(zero).mul_(self.scale.to(dtype).unsqueeze(-1)).flatten(1)

    def zero_points(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out groups"]:
        """The code of 0.0 for each group, on symmetric grids too."""
        if self.zero_point is None:
            return torch.full_like(self.scale, self.format.middle, dtype=dtype)
        return self.zero_point.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"weight_packed": pack(self.codes, self.format.bits), "weight_scale": self.scale}
        if self.zero_point is not None:
            tensors["weight_zero_point"] = pack_columns(self.zero_point, self.format.bits)
        return tensors

    def continuous(self) -> dict[str, Tensor]:
        """The scales; zero points are whole numbers."""
        return {"weight_scale": self.scale}

    def refitted(self, numbers: Mapping[str, Tensor]) -> "IntCodes":
        return replace(self, scale=numbers["weight_scale"])
