"""Benchmark: packed experts, without low rank, expert by expert, and fused."""

import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lorq.bench.timing import Result, seconds_of
from lorq.core.basis import largest_block
from lorq.core.codes import IntGrid
from lorq.core.tile_factors import TileFormat
from lorq.core.weight import LayerFormat
from lorq.models.experts import Experts
from lorq.runtime.device import read_device, read_dtype
from lorq.runtime.experts import QuantExperts, Tiles
from lorq.runtime.linear import QuantLinear


def bench_experts(
    experts: int = 60,
    *,
    hidden: int = 2048,
    width: int = 1408,
    rank: int = 32,
    rows: int = 8,
    columns: int = 8,
    top_k: int = 4,
    tokens: Iterable[int] = (1, 16, 256),
    repeats: int = 5,
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 0,
) -> Iterator[Result]:
    """Time a layer of packed random experts: without low rank, with it expert by expert, and fused.

    The three forms take turns, after an untimed round; seconds are medians. Products and bytes count what the
    low-rank part alone needs for these tokens: a factor that several experts use is read once where it is used once.

    Args:
        experts: of the layer; with the next two, a shape such as Qwen1.5-MoE's.
        hidden: width of the layer's input.
        width: of an expert.
        rank: of the shared factors, int8.
        rows: of the grid.
        columns: of the grid.
        top_k: experts of a token, chosen at random.
        tokens: batch sizes to try.
        repeats: timed rounds.
        dtype: of the inputs.
        device: "auto" takes an accelerator if there is one.
        seed: of weights, inputs and routes.

    Yields:
        For each batch size: ``none_seconds``, ``each_seconds``, ``fused_seconds``, their ratios to ``none``, and
        ``each_`` and ``fused_`` ``megaproducts`` (millions of multiply-adds) and ``megabytes`` of factors read.

    Raises:
        ValueError: for sizes, repeats or tokens below 1, or more experts than the grid has cells.
    """
    generator = torch.Generator().manual_seed(seed)
    if repeats < 1 or min(tokens := list(tokens), default=0) < 1:
        raise ValueError(f"repeats and tokens must be at least 1, got {repeats} and {tokens}")
    if min(experts, hidden, width, rank, rows, columns) < 1 or not 1 <= top_k <= experts <= rows * columns:
        raise ValueError(
            f"sizes must be at least 1, top_k at most the experts, and these at most the grid's cells, got experts "
            f"{experts} of {hidden} x {width}, rank {rank}, a grid of {rows} x {columns}, top_k {top_k}"
        )
    place, kind = read_device(device), read_dtype(dtype, auto=False)
    layer = random_experts(experts, hidden, width, rank, (rows, columns), generator).to(place)
    for count in tokens:
        x = torch.randn(count, hidden, generator=generator).to(place, kind)
        index = torch.rand(count, experts, generator=generator).topk(top_k).indices.to(place)
        weights = torch.full((count, top_k), 1 / top_k).to(x)
        seconds: dict[str, list[float]] = {"none": [], "each": [], "fused": []}
        for round_ in range(repeats + 1):
            for name in seconds:
                layer.fused = name != "each"
                layer.low_rank = name != "none"
                with torch.no_grad():
                    taken = seconds_of(lambda: layer(x, index, weights), place)  # noqa: B023
                if round_:
                    seconds[name].append(taken)
        median = {name: statistics.median(taken) for name, taken in seconds.items()}
        result: Result = {"tokens": count}
        result |= {f"{name}_seconds": value for name, value in median.items()}
        result |= {f"{name}_over_none": median[name] / median["none"] for name in ("each", "fused")}
        yield result | low_rank_work(layer, index, hidden, width)


def random_experts(
    experts: int, hidden: int, width: int, rank: int, grid: tuple[int, int], generator: torch.Generator
) -> QuantExperts:
    """A layer of 2-bit experts with random codes and int8 tile factors."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=hidden, intermediate_size=width, num_local_experts=experts)
    with torch.device("meta"):
        split = Experts(MixtralExperts(config))
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
