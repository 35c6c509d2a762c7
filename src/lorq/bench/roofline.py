"""How fast a quantized linear can be at best: its bytes and operations over what a device moves and computes."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lorq.core.codes import IntGrid
from lorq.core.tile_factors import TileFormat
from lorq.core.weight import LayerFormat


@dataclass(frozen=True)
class Device:
    """A device's rates, by its maker's data sheet.

    The operations are of dense products in bfloat16 on tensor cores; a multiplication and an addition are two.
    """

    name: str
    bytes_per_second: float
    operations_per_second: float


DEVICES = Device("A100 40 GB", 1555e9, 312e12), Device("H100 SXM", 3350e9, 989e12)


@dataclass(frozen=True)
class Work:
    """What a layer must move and compute for some tokens, each number once.

    Bytes are those of the weight as it is stored, of inputs and of outputs, both in 16 bits; operations are of the
    products with the weight and with its low-rank factors.
    """

    bytes: int
    operations: int

    def seconds(self, device: Device) -> float:
        """The longer of moving and computing: no kernel is faster, and a real one is slower."""
        return max(self.bytes / device.bytes_per_second, self.operations / device.operations_per_second)

    def bound(self, device: Device) -> str:
        """Which of the two is longer, "memory" or "compute"."""
        moving = self.bytes / device.bytes_per_second
        return "memory" if moving >= self.operations / device.operations_per_second else "compute"


def work(out: int, in_: int, format: LayerFormat, tokens: int) -> Work:
    """Bytes and operations of a layer.

    Example:
        >>> w = work(4096, 4096, LayerFormat(IntGrid(4, 128, symmetric=True)), tokens=1)
        >>> w.bytes == 4096 * 4096 // 2 + 2 * 4096 * 32 + 2 * (4096 + 4096), w.operations == 2 * 4096 * 4096
        (True, True)
        >>> [f"{w.seconds(device) * 1e6:.2f} us, {w.bound(device)}" for device in DEVICES]
        ['5.57 us, memory', '2.59 us, memory']
    """
    moved = format.stored_bits(out, in_) // 8 + 2 * tokens * (out + in_)
    return Work(moved, 2 * tokens * (out * in_ + format.rank * (out + in_)))


def expert_work(out: int, in_: int, format: LayerFormat, tiles: TileFormat, tokens: int, top_k: int) -> Work:
    """Bytes and operations of a gate or up projection of all experts that the tokens are routed to, ``top_k`` each.

    Tokens choose as different experts as there are, and these lie in as different rows and columns of the grid. The
    experts' own weights, (out, in), have the format, the factors that they share the tiles'; rank 0 is without.

    Example:
        >>> format, tiles = LayerFormat(IntGrid(4, 128, symmetric=True)), TileFormat(8, 8, 60, 32, "int8")
        >>> w = expert_work(1408, 2048, format, tiles, tokens=1, top_k=4)
        >>> w.operations == 2 * (4 * 1408 * 2048 + 4 * 32 * 2048 + 4 * 1408 * 32)
        True
    """
    pairs = tokens * top_k
    experts, rows, columns = (min(count, pairs) for count in (tiles.experts, tiles.rows, tiles.columns))
    read = replace(tiles, rows=rows, columns=columns, experts=experts)
    moved = (experts * format.stored_bits(out, in_) + read.stored_bits(out, in_)) // 8
    return Work(
        moved + 2 * tokens * in_ + 2 * pairs * out,
        2 * (pairs * out * in_ + tokens * rows * tiles.rank * in_ + pairs * tiles.rank * out),
    )


def expert_table() -> str:
    """docs/measured/roofline_experts.csv: 60 of 1408 x 2048, four for a token, groups of 128, a grid of 8 x 8."""
    rows: dict[tuple[int, ...], Work] = {}
    for bits, rank, tokens in itertools.product((2, 4), (0, 32), (1, 16, 512)):
        format, tiles = LayerFormat(IntGrid(bits, 128, symmetric=True)), TileFormat(8, 8, 60, rank, "int8")
        rows[bits, rank, tokens] = expert_work(1408, 2048, format, tiles, tokens, top_k=4)
    return _csv("bits,rank,tokens", rows)


def table() -> str:
    """docs/measured/roofline.csv: 2 to 4 bits in groups of 128, with and without 32 pairs of int8 factors."""
    rows: dict[tuple[int, ...], Work] = {}
    shapes = (4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096)
    for (out, in_), bits, rank, tokens in itertools.product(shapes, (2, 3, 4), (0, 32), (1, 512)):
        format = LayerFormat(IntGrid(bits, 128, symmetric=True), rank, "int8")
        rows[out, in_, bits, rank, tokens] = work(out, in_, format, tokens)
    return _csv("out,in,bits,rank,tokens", rows)


def _csv(head: str, rows: Mapping[tuple[int, ...], Work]) -> str:
    lines = [",".join([head, "megabytes,gflop", *(f"{device.name} us,{device.name} bound" for device in DEVICES)])]
    for key, w in rows.items():
        times = (f"{w.seconds(device) * 1e6:.1f},{w.bound(device)}" for device in DEVICES)
        lines.append(",".join([*map(str, key), f"{w.bytes / 1e6:.2f}", f"{w.operations / 1e9:.3f}", *times]))
    return "\n".join(lines)
