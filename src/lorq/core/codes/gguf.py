"""GGUF codes: ggml's own blocks, byte for byte, so that a GGUF file is a copy of them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int16, Int64, UInt8
from torch import Tensor

from lorq.core.codes.gguf_blocks import TYPES, Blocks, BlockType, pack_blocks, unpack_blocks
from lorq.core.codes.integer import IntGrid
from lorq.core.packing import Layout


@dataclass(frozen=True)
class GgufGrid:
    """Codes in blocks of one of ggml's types, such as "q4_0" and "q4_k" (`lorq.core.codes.gguf_blocks.TYPES`)."""

    type: str

    kind: ClassVar[str] = "gguf"
    operator: ClassVar[str | None] = None

    @property
    def layout_of(self) -> BlockType:
        """What the blocks of the type are like.

        Raises:
            ValueError: if there is no such type.
        """
        if self.type not in TYPES:
            raise ValueError(f"a GGUF type must be one of {', '.join(TYPES)}, got {self.type!r}")
        return TYPES[self.type]

    @property
    def bits(self) -> int:
        return self.layout_of.bits

    def check(self, out: int, in_: int) -> None:
        """Refuse a width that the type's blocks do not tile.

        Raises:
            ValueError: naming the sizes.
        """
        block = self.layout_of.block
        if in_ % block:
            small = [name for name, type in TYPES.items() if in_ % type.block == 0]
            remedy = f"take {', '.join(small)} for such a layer" if small else "leave such a layer as it is"
            raise ValueError(f"blocks of {self.type} have {block} columns, which must divide the width {in_}; {remedy}")

    def layout(self, out: int, in_: int) -> Layout:
        type = self.layout_of
        return {"weight_blocks": ((out, in_ // type.block * type.size), torch.uint8)}

    def read(self, tensors: Mapping[str, Tensor], out: int, in_: int) -> "GgufCodes":
        type, data = self.layout_of, tensors["weight_blocks"]
        count, blocks = in_ // type.block, unpack_blocks(data.reshape(-1, type.size), type)

        def rows(part: Tensor | None) -> Any:
            return None if part is None else part.reshape(len(data), count * part.shape[1:].numel())

        minimum, scales, minima = rows(blocks.minimum), rows(blocks.scales), rows(blocks.minima)
        return GgufCodes(blocks.codes.view(-1, in_), rows(blocks.scale), minimum, scales, minima, self)

    def decode_rows(
        self, tensors: Mapping[str, Tensor], index: Int64[Tensor, "count"], in_: int
    ) -> Float[Tensor, "count in"]:
        own = tensors["weight_blocks"].index_select(0, index)
        return self.read({"weight_blocks": own}, len(index), in_).decode()

    def plain(self, width: int) -> IntGrid:
        """What plain rounding to nearest would use: as many bits in as large groups, with or without zero points."""
        type = self.layout_of
        return IntGrid(type.bits, type.group, symmetric=not type.affine)


@dataclass(frozen=True)
class GgufCodes:
    """What a weight's blocks hold (`lorq.core.codes.gguf_blocks.BlockType` tells what it stands for).

    Attributes:
        scale: ``d`` of the blocks, float16.
        minimum: their ``dmin`` or ``min``, or None.
        scales, minima: whole numbers of the groups, or None.
    """

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out blocks"]
    minimum: Float[Tensor, "out blocks"] | None
    scales: Int16[Tensor, "out groups"] | None
    minima: Int16[Tensor, "out groups"] | None
    format: GgufGrid

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def decode(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """What ggml decodes: every product is exact in float32, so that the order of operations does not matter.

        Example:
            >>> codes = torch.arange(32, dtype=torch.uint8)[None] % 16
            >>> GgufCodes(codes, torch.tensor([[0.5]]), None, None, None, GgufGrid("q4_0")).decode()[0, :4]
            tensor([-4.0000, -3.5000, -3.0000, -2.5000])
        """
        type = self.format.layout_of
        step, low = group_values(self.scale.to(dtype), self._minimum(dtype), self.scales, self.minima, type)
        values = level_of(self.codes, type, dtype).unflatten(1, (step.shape[1], -1)) * step.unsqueeze(-1)
        return (values if low is None else values - low.unsqueeze(-1)).flatten(1)

    def _minimum(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.minimum is None else self.minimum.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        type, out = self.format.layout_of, self.shape[0]

        def blocks(part: Tensor | None, count: int) -> Any:
            return None if part is None else part.reshape(-1, count)

        groups = type.block // type.group
        scale, minimum = (None if half is None else half.flatten() for half in (self.scale, self.minimum))
        assert scale is not None
        whole = blocks(self.scales, groups), blocks(self.minima, groups)
        packed = pack_blocks(Blocks(blocks(self.codes, type.block), scale, minimum, *whole), type)
        return {"weight_blocks": packed.view(out, -1)}

    def continuous(self) -> dict[str, Tensor]:
        """``d`` of the blocks, and their ``dmin`` or ``min``, which are stored inside of them."""
        return {"block_scale": self.scale} | ({} if self.minimum is None else {"block_minimum": self.minimum})

    def refitted(self, numbers: Mapping[str, Tensor]) -> "GgufCodes":
        return replace(self, scale=numbers["block_scale"], minimum=numbers.get("block_minimum"))


def level_of(codes: Tensor, type: BlockType, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """What codes stand for under a step of 1; ``codes`` may be of any type."""
    if not type.levels:
        return codes.to(dtype) - type.zero
    table = torch.tensor(type.levels, dtype=dtype, device=codes.device)
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def group_values(
    scale: Float[Tensor, "out blocks"],
    minimum: Float[Tensor, "out blocks"] | None,
    scales: Int16[Tensor, "out groups"] | None,
    minima: Int16[Tensor, "out groups"] | None,
    type: BlockType,
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"] | None]:
    """Step and what is subtracted of every group, in the dtype of ``scale``."""
    each = type.block // type.group
    step = scale if scales is None else scale.repeat_interleave(each, 1) * scales.to(scale.dtype)
    if minimum is None:
        return step, None
    return step, -minimum if minima is None else minimum.repeat_interleave(each, 1) * minima.to(scale.dtype)
