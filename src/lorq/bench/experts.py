"""Packed random experts, and what their low-rank part needs."""

import math
from typing import Any

import torch
from torch import Tensor

from lorq.bench.timing import Result
from lorq.core.basis import largest_block
from lorq.core.codes import IntGrid
from lorq.core.tile_factors import TileFormat
from lorq.core.weight import LayerFormat
from lorq.models.experts import Experts
from lorq.runtime.experts import QuantExperts, Tiles
from lorq.runtime.linear import QuantLinear


def random_experts(
    experts: int, hidden: int, width: int, rank: int, grid: tuple[int, int], generator: torch.Generator
) -> QuantExperts:
    """A layer of 2-bit experts with random codes and int8 tile factors."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=hidden, intermediate_size=width, num_local_experts=experts)
    with torch.device("meta"):
        split = Experts.split(MixtralExperts(config))
    common = math.gcd(hidden, width)
    format = LayerFormat(IntGrid(2, math.gcd(64, common)), rotation_block=largest_block(common))
    tiles = {}
    for projection in ("gate_proj", "up_proj", "down_proj"):
        out, in_ = (hidden, width) if projection == "down_proj" else (width, hidden)
        for expert in split:
            setattr(expert, projection, QuantLinear(in_, out, format))
        tiles[projection] = Tiles(out, in_, TileFormat(*grid, experts, rank, "int8"))
        cells = torch.arange(experts)
        tiles[projection].cells.copy_(torch.stack([cells % grid[0], cells // grid[0]], 1))
    layer = QuantExperts(split, tiles)
    for name, buffer in layer.named_buffers():
        if buffer.dtype in (torch.int8, torch.int32):
            buffer.random_(-100, 100, generator=generator)
        elif buffer.dtype == torch.float16:
            buffer.fill_(0.01 if "scale" in name else 1.0)
    return layer


def low_rank_work(layer: QuantExperts, index: Tensor, hidden: int, width: int) -> Result:
    """Multiply-adds and bytes of factors of the low-rank part, expert by expert and fused."""
    tiles: Any = next(iter(layer.tiles.values()))
    f: TileFormat = tiles.format
    count, used = index.numel(), index.unique().numel()
    tokens, ends = index.shape[0], hidden + width
    cells = tiles.cells[index.unique()]
    in_rows, in_columns = (len(cells[:, side].unique()) for side in (0, 1))
    products = {
        "each": 3 * count * f.rank * ends,
        # gate and up: every token with all rows, each pair with its column; down: each pair with its row, every
        # token with all columns.
        "fused": f.rank
        * (2 * (tokens * f.rows * hidden + count * width) + count * width + tokens * f.columns * hidden),
    }
    read = {
        "each": 3 * used * f.rank * ends,
        "fused": f.rank * (2 * (f.rows * hidden + in_columns * width) + in_rows * width + f.columns * hidden),
    }
    return {f"{name}_megaproducts": n / 1e6 for name, n in products.items()} | {
        f"{name}_megabytes": n / 1e6 for name, n in read.items()
    }
