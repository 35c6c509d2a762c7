"""ggml's block types: what a block of GGUF bytes holds, and where.

A row of weights is cut into blocks of 32 or 256, each of them some fields of bytes, one after the other. `TYPES` is a
table of them: codes lie in planes of bits, scales of groups in one of a few packings; `unpack_blocks` and `pack_blocks`
know no type by name.

Source:
    ggml-common.h and ggml-quants.c of llama.cpp.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int16, UInt8
from torch import Tensor

# The values of iq4_nl's codes, kvalues_iq4nl of ggml.
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Plane:
    """Some bits of every code of a block.

    Byte ``j`` of the ``c``-th ``width`` bytes has those of the codes ``(c n + s) width + j``, for ``s < n = 8 / bits``,
    those of the first one lowest.

    Attributes:
        place: of the lowest of these bits in a code.
        flipped: bits of a byte that are stored as their opposite.
    """

    field: str
    bits: int
    width: int
    place: int = 0
    flipped: int = 0


@dataclass(frozen=True)
class Digits:
    """Codes of base 3, several in a byte.

    Byte ``j`` of a field of ``width`` bytes has the codes ``s width + j``, for ``s < count``, of those that follow the
    codes of the field before. As digits after the point of base 3, the first one the highest, they make a number below
    1, of which the byte is the smallest number of 256ths that is not below it.
    """

    field: str
    count: int


@dataclass(frozen=True)
class BlockType:
    """How the weights of a block are stored.

    A code ``c`` of a group with the whole numbers ``s`` and ``m`` stands for

        (d s) level(c) - dmin m,        level(c) = c - zero,  or the c-th of ``levels``

    where the block has ``d`` and ``dmin``; ``s`` is 1 where groups have none. Of blocks with a ``min`` it stands for
    ``d c + min``.

    Attributes:
        bits: width of a code.
        zero: the code of level 0.
        fields: bytes of each field, in their order.
        planes: where the codes' bits are.
        digits: where the codes are, if they have no planes.
        group: weights that share ``s`` and ``m``; the block where there are none.
        scales: lowest and highest ``s``.
        minima: highest ``m``; 0 where groups have none.
        packing: of ``s`` and ``m``, the name of a function pair in `PACKINGS`.
    """

    bits: int
    zero: int
    fields: Mapping[str, int]
    planes: tuple[Plane, ...]
    block: int = 32
    group: int = 32
    scales: tuple[int, int] = (1, 1)
    minima: int = 0
    packing: str = ""
    levels: tuple[int, ...] = ()
    digits: tuple[Digits, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return sum(self.fields.values())

    @property
    def top(self) -> int:
        """The largest code."""
        return len(self.levels) - 1 if self.levels else 2**self.bits - 1

    @property
    def affine(self) -> bool:
        """Ranges need not be around zero."""
        return "min" in self.fields or "dmin" in self.fields


_SUPER = {"block": 256}
TYPES: dict[str, BlockType] = {
    "q4_0": BlockType(4, 8, {"d": 2, "qs": 16}, (Plane("qs", 4, 16),)),
    "q4_1": BlockType(4, 0, {"d": 2, "min": 2, "qs": 16}, (Plane("qs", 4, 16),)),
    "q5_0": BlockType(5, 16, {"d": 2, "qh": 4, "qs": 16}, (Plane("qs", 4, 16), Plane("qh", 1, 1, 4))),
    "q5_1": BlockType(5, 0, {"d": 2, "min": 2, "qh": 4, "qs": 16}, (Plane("qs", 4, 16), Plane("qh", 1, 1, 4))),
    "q8_0": BlockType(8, 128, {"d": 2, "qs": 32}, (Plane("qs", 8, 32, flipped=128),)),
    "iq4_nl": BlockType(4, 8, {"d": 2, "qs": 16}, (Plane("qs", 4, 16),), levels=NONLINEAR),
    "q2_k": BlockType(
        2, 0, {"scales": 16, "qs": 64, "d": 2, "dmin": 2}, (Plane("qs", 2, 32),),
        block=256, group=16, scales=(0, 15), minima=15, packing="nibbles",
    ),
    "q3_k": BlockType(
        3, 4, {"hmask": 32, "qs": 64, "scales": 12, "d": 2}, (Plane("qs", 2, 32), Plane("hmask", 1, 32, 2)),
        block=256, group=16, scales=(-32, 31), packing="sixteen",
    ),
    "q4_k": BlockType(
        4, 0, {"d": 2, "dmin": 2, "scales": 12, "qs": 128}, (Plane("qs", 4, 32),),
        block=256, group=32, scales=(0, 63), minima=63, packing="eight",
    ),
    "q5_k": BlockType(
        5, 0, {"d": 2, "dmin": 2, "scales": 12, "qh": 32, "qs": 128}, (Plane("qs", 4, 32), Plane("qh", 1, 32, 4)),
        block=256, group=32, scales=(0, 63), minima=63, packing="eight",
    ),
    "q6_k": BlockType(
        6, 32, {"ql": 128, "qh": 64, "scales": 16, "d": 2}, (Plane("ql", 4, 64), Plane("qh", 2, 32, 4)),
        block=256, group=16, scales=(-128, 127), packing="bytes",
    ),
    "tq1_0": BlockType(
        2, 1, {"qs": 32, "last": 16, "qh": 4, "d": 2}, (),
        block=256, group=256, levels=(-1, 0, 1), digits=(Digits("qs", 5), Digits("last", 5), Digits("qh", 4)),
    ),
    "tq2_0": BlockType(2, 1, {"qs": 64, "d": 2}, (Plane("qs", 2, 32),), block=256, group=256),
}  # fmt: skip


@dataclass(frozen=True)
class Blocks:
    """What blocks hold; the first dimension counts them.

    Attributes:
        scale: ``d``, float16.
        minimum: ``dmin`` or ``min``, float16; None where there is neither.
        scales, minima: the groups' whole numbers, or None.
    """

    codes: UInt8[Tensor, "blocks weights"]
    scale: Float[Tensor, "blocks"]
    minimum: Float[Tensor, "blocks"] | None
    scales: Int16[Tensor, "blocks groups"] | None
    minima: Int16[Tensor, "blocks groups"] | None


def unpack_blocks(data: UInt8[Tensor, "blocks size"], type: BlockType) -> Blocks:
    """What is in blocks of bytes.

    Example:
        >>> data = torch.tensor([[0, 60] + [0x98] * 16], dtype=torch.uint8)  # d is 1.0
        >>> blocks = unpack_blocks(data, TYPES["q4_0"])
        >>> blocks.scale.tolist(), blocks.codes[0, [0, 15, 16, 31]].tolist()
        ([1.0], [8, 8, 9, 9])
    """
    fields = dict(zip(type.fields, data.split(list(type.fields.values()), 1), strict=True))
    codes = _read_digits(fields, type) if type.digits else data.new_zeros(len(data), type.block)
    for plane in type.planes:
        shifts = torch.arange(0, 8, plane.bits, dtype=torch.uint8, device=data.device).unsqueeze(1)
        bytes_ = fields[plane.field].bitwise_xor(plane.flipped).unflatten(1, (-1, 1, plane.width))
        codes |= ((bytes_ >> shifts) & (2**plane.bits - 1)).flatten(1) << plane.place
    halves = {
        name: fields[name].contiguous().view(torch.float16)[:, 0] for name in ("d", "dmin", "min") if name in fields
    }
    groups = PACKINGS[type.packing][0](fields["scales"]) if type.packing else (None, None)
    return Blocks(codes, halves["d"], halves.get("dmin", halves.get("min")), *groups)


def pack_blocks(blocks: Blocks, type: BlockType) -> UInt8[Tensor, "blocks size"]:
    """The bytes of blocks; the inverse of `unpack_blocks`."""
    fields: dict[str, Tensor] = _write_digits(blocks.codes, type)
    for plane in type.planes:
        parts = ((blocks.codes >> plane.place) & (2**plane.bits - 1)).unflatten(1, (-1, 8 // plane.bits, plane.width))
        bytes_ = torch.zeros_like(parts[:, :, 0])
        for s, part in enumerate(parts.unbind(2)):
            bytes_ |= part << (s * plane.bits)
        fields[plane.field] = bytes_.flatten(1).bitwise_xor(plane.flipped)
    for name, half in (("d", blocks.scale), ("dmin", blocks.minimum), ("min", blocks.minimum)):
        if name in type.fields:
            assert half is not None
            fields[name] = half.to(torch.float16).contiguous().unsqueeze(1).view(torch.uint8)
    if type.packing:
        fields["scales"] = PACKINGS[type.packing][1](blocks.scales, blocks.minima)
    return torch.cat([fields[name] for name in type.fields], 1)


def _read_digits(fields: Mapping[str, Tensor], type: BlockType) -> UInt8[Tensor, "blocks weights"]:
    """Codes of base 3: what stands after the point is a byte's remainder, which the product of bytes leaves."""
    codes = []
    for digits in type.digits:
        for place in range(digits.count):
            codes.append(((fields[digits.field] * 3**place).short() * 3 >> 8).to(torch.uint8))
    return torch.cat(codes, 1)


def _write_digits(codes: UInt8[Tensor, "blocks weights"], type: BlockType) -> dict[str, Tensor]:
    """The bytes of such fields; of other types there are none."""
    fields: dict[str, Tensor] = {}
    sizes = [type.fields[digits.field] * digits.count for digits in type.digits]
    for digits, own in zip(type.digits, codes.split(sizes, 1) if sizes else (), strict=True):
        number = torch.zeros_like(codes[:, : type.fields[digits.field]], dtype=torch.int32)
        for place, part in enumerate(own.unflatten(1, (digits.count, -1)).unbind(1)):
            number += part.int() * 3 ** (4 - place)
        fields[digits.field] = ((number * 256 + 242) // 243).to(torch.uint8)
    return fields


# ---- the groups' whole numbers --------------------------------------------------------------------------


def _read_nibbles(data: Tensor) -> tuple[Tensor, Tensor]:
    """16 bytes: a scale in the lower half of each, a minimum in the upper."""
    return (data & 15).short(), (data >> 4).short()


def _write_nibbles(scales: Tensor, minima: Tensor) -> Tensor:
    return (scales | (minima << 4)).to(torch.uint8)


def _read_bytes(data: Tensor) -> tuple[Tensor, None]:
    """16 signed bytes."""
    return data.contiguous().view(torch.int8).short(), None


def _write_bytes(scales: Tensor, minima: None) -> Tensor:
    return scales.to(torch.int8).view(torch.uint8)


def _read_sixteen(data: Tensor) -> tuple[Tensor, None]:
    """16 of 6 bits, 32 more than they are: the lower 4 in 8 bytes, the upper 2 in the last 4."""
    lower = torch.cat([data[:, :8] & 15, data[:, :8] >> 4], 1)
    upper = torch.cat([(data[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    return (lower | (upper << 4)).short() - 32, None


def _write_sixteen(scales: Tensor, minima: None) -> Tensor:
    raised = (scales + 32).to(torch.uint8)
    lower, upper = raised & 15, (raised >> 4).unflatten(1, (4, 4))
    last = upper[:, 0] | (upper[:, 1] << 2) | (upper[:, 2] << 4) | (upper[:, 3] << 6)
    return torch.cat([lower[:, :8] | (lower[:, 8:] << 4), last], 1)


def _read_eight(data: Tensor) -> tuple[Tensor, Tensor]:
    """8 scales and 8 minima of 6 bits: the first 4 of both in a byte each, whose upper 2 bits are the last 4's."""
    scales, minima, last = data.split(4, 1)
    read = (torch.cat([scales & 63, (last & 15) | ((scales >> 2) & 48)], 1),
            torch.cat([minima & 63, (last >> 4) | ((minima >> 2) & 48)], 1))  # fmt: skip
    return read[0].short(), read[1].short()


def _write_eight(scales: Tensor, minima: Tensor) -> Tensor:
    s, m = scales.to(torch.uint8), minima.to(torch.uint8)
    first = [part[:, :4] | ((part[:, 4:] >> 4) << 6) for part in (s, m)]
    return torch.cat([*first, (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], 1)


# Reads and writes of the field "scales".
PACKINGS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "nibbles": (_read_nibbles, _write_nibbles), "bytes": (_read_bytes, _write_bytes),
    "sixteen": (_read_sixteen, _write_sixteen), "eight": (_read_eight, _write_eight),
}  # fmt: skip
