"""Trellis codes on CUDA devices: in which tiles they run, and the launches (docs/kernels.md).

Up to 64 tokens (32 in float32) are multiplied as the codes are stored; for more the weight is decoded and torch
multiplies.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lorq.core.codes import TrellisGrid
from lorq.core.codes.trellis import TILE
from lorq.core.low_rank import LowRank
from lorq.core.weight import LayerFormat
from lorq.kernels.operands import declines_input
from lorq.kernels.reference_trellis import trellis_linear, trellis_linear_reference
from lorq.kernels.triton_linear import (
    MANY_FROM,
    STRIP_BYTES,
    Tile,
    declines_device,
    options,
    projected,
    span_of,
    stored_factor,
)

# By bytes of an input's number, then by the largest number of tokens; compiled for three devices, run on none yet.
TILES = {
    2: {1: Tile(1, 16, 256, 4, 2), 16: Tile(16, 64, 64, 4, 2), 32: Tile(32, 64, 64, 4, 2), 64: Tile(64, 64, 64, 4, 2)},
    4: {1: Tile(1, 16, 256, 4, 2), 16: Tile(16, 32, 64, 4, 2), 32: Tile(32, 32, 64, 4, 2)},
}
_DECODED = Tile(0, 32, 256, 4, 1)


def declines(format: LayerFormat, in_features: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels do not run a layer, see `lorq.kernels.dispatch.Product`; None where they do."""
    return declines_input("cuda", device, dtype) or declines_device(device)


def few_tokens(dtype: torch.dtype) -> int:
    """Tokens up to which weights are multiplied as they are stored."""
    return MANY_FROM.get(dtype.itemsize, 1) - 1


@trellis_linear.register_kernel("cuda")
def multiply(x: Tensor, *arguments: Any) -> Tensor:
    """`lorq.kernels.trellis_linear` on a CUDA device. Args and result are the operator's."""
    *tensors, bits, window, length = arguments
    seen = tuple(None if t is None else (t.shape, t.dtype) for t in tensors)
    covered = _covered(seen, bits, window, length, x.shape[-1]) and declines_input("cuda", x.device, x.dtype) is None
    if not covered or declines_device(x.device) is not None:
        return trellis_linear_reference(x, *arguments)
    with torch.cuda.device(x.device):
        return linear(x, *arguments)


@lru_cache(maxsize=4096)
def _covered(seen: tuple[Any, ...], bits: int, window: int, length: int, in_features: int) -> bool:
    """Whether the tensors, shapes and dtypes, belong together, and their numbers fit 32 bits."""
    packed, scale, left, right, *_ = seen
    grid, out = TrellisGrid(bits, window, length), scale[0][0]
    layout = grid.layout(out, in_features)
    if packed != layout["weight_packed"] or scale != layout["weight_scale"] or packed[0].numel() >= 2**31:
        return False
    if left is not None and (left[0][0] != out or right is None or right[0] != (left[0][1], in_features)):
        return False
    try:
        grid.check(out, in_features)
    except ValueError:
        return False
    return True


def linear(x: Tensor, *arguments: Any) -> Tensor:
    """The operator by the kernels, whatever the device: for operands that they cover."""
    packed, scale, left, right, left_scale, right_scale, bits, window, length = arguments
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = flat.new_empty(flat.shape[0], scale.shape[0])
    weight = [packed.contiguous(), scale.contiguous(), length // TILE]
    sizes = {"BITS": bits, "WINDOW": window}
    if len(flat) >= MANY_FROM[x.dtype.itemsize]:
        _by_decoding(weight, sizes, flat, y)
        if left is not None:
            l, r = LowRank(left, right, left_scale, right_scale).factors(x.dtype)
            y += (flat @ r.T) @ l.T
    elif y.numel():
        _by_tiles(weight, sizes, (left, right, left_scale, right_scale), flat, y)
    return y.view(*x.shape[:-1], y.shape[1])


def _by_tiles(
    weight: list[Any], sizes: dict[str, int], low_rank: tuple[Tensor | None, ...], x: Tensor, y: Tensor
) -> None:
    """Into ``y``: the products of tiles of codes as they are decoded, for few tokens."""
    from lorq.kernels import triton_tile

    (tokens, in_features), out = x.shape, y.shape[1]
    left, right, left_scale, right_scale = low_rank
    stored, e4m3 = (None, False) if left is None else stored_factor(left)
    rank = 0 if left is None else left.shape[1]
    tile = choose_tile(tokens, x.dtype)
    span = span_of(out, in_features, tile)
    rows, splits = -(-out // tile.rows), -(-in_features // span)
    # What tensor cores multiply has the type of the inputs.
    z = projected(x, right, right_scale, x.dtype if splits == 1 and tile.tokens > 1 else torch.float32)
    to = y if splits == 1 else torch.empty(splits, tokens, out, dtype=torch.float32, device=x.device)
    triton_tile.trellis_products[rows, splits](
        x, to, z, stored, left_scale, *weight, tokens, out, in_features, rank, span, **sizes, E4M3=e4m3,
        WHOLE=splits == 1, T=tile.tokens, N=tile.rows, K=tile.columns, R=32, STAGES=tile.stages,
        **options(tile.warps, tile.stages),
    )  # fmt: skip
    if splits > 1:
        triton_tile.finish[-(-out // 128), tokens](
            to, y, z, stored, left_scale, tokens, out, splits, rank, E4M3=e4m3, N=128, R=32, **options()
        )


def choose_tile(tokens: int, dtype: torch.dtype) -> Tile:
    """The default tile for so many tokens."""
    tiles = TILES[dtype.itemsize]
    return tiles[next(most for most in tiles if tokens <= most)]


def _by_decoding(weight: list[Any], sizes: dict[str, int], x: Tensor, y: Tensor) -> None:
    """Into ``y``: torch's product with the decoded weight, for many tokens."""
    from lorq.kernels import triton_tile

    in_features, out, tile = x.shape[1], y.shape[1], _DECODED
    rows = max(tile.rows, STRIP_BYTES // (in_features * x.element_size()) // tile.rows * tile.rows)
    strip = torch.empty(min(rows, out), in_features, dtype=x.dtype, device=x.device)
    for first in range(0, out, rows):
        last = min(first + rows, out)
        triton_tile.trellis_decode[-(-(last - first) // tile.rows), -(-in_features // tile.columns)](
            strip, *weight, first, last, in_features, **sizes, N=tile.rows, K=tile.columns, **options(tile.warps)
        )
        torch.mm(x, strip[: last - first].T, out=y[:, first:last])
