"""Packed experts on CUDA devices: one launch for all pairs of a token and an expert of a projection (docs/kernels.md).

Pairs are put in the order of their experts and cut into tiles of one expert each. Nothing is fetched from the device
for that: there are as many programs as the worst routing has tiles, and those without one return at once.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorq.core.weight import LayerFormat
from lorq.kernels import triton_linear
from lorq.kernels.operands import NAMES, Operands, format_of, known_sizes
from lorq.kernels.reference_experts import declines_experts, expert_linear, expert_linear_reference
from lorq.kernels.triton_linear import Tile, choose_tile

# The operator's tensors that tell of the experts' codes, in its order.
_WEIGHT = ("packed", "scale", "zero_point", "levels", "codebook", "codebook_scale")


def declines(
    format: LayerFormat, in_features: int, device: torch.device, dtype: torch.dtype, pairs: float
) -> str | None:
    """Why the kernel does not run experts of one format; None where it does, however many ``pairs`` an expert has.

    Other arguments are those of `triton_linear.declines`.
    """
    return declines_experts(format) or triton_linear.declines(format, in_features, device, dtype)


def tile_of(pairs: int, experts: int, dtype: torch.dtype, format: LayerFormat, in_features: int) -> Tile:
    """The default tile: of one pair where an expert hardly has two, else for twice the mean, as experts differ."""
    size = 1 if 4 * pairs <= experts else max(2, 2 * pairs // experts)
    tile = choose_tile(size, dtype, format, in_features)
    # Wider tiles of float32 spill on sm_90, and those of codebooks with 64 rows on sm_100 (triton 3.9).
    narrow = dtype == torch.float32 and tile.tokens > 16
    rows = 32 if narrow and known_sizes(format).vector > 1 else 64
    return replace(tile, rows=min(tile.rows, rows), columns=32 if narrow else tile.columns)


def plan_tiles(expert: Tensor, experts: int, size: int) -> tuple[Tensor, Tensor]:
    """Cut pairs into tiles of one expert each.

    Args:
        expert: (pairs,) expert of each pair; numbers from ``experts`` on stand for none.
        experts: how many there are.
        size: pairs of a tile at most.

    Returns:
        The pairs in the order of their experts, and (3, tiles) int32: the expert of each tile, ``experts`` for tiles
        that nobody needs, and the places in the order where its pairs begin and end, the end being its expert's.

    Example:
        >>> order, plan = plan_tiles(torch.tensor([1, 0, 1, 2, 1]), experts=2, size=2)
        >>> order.tolist(), plan.tolist()
        ([1, 0, 2, 4, 3], [[0, 1, 1, 2], [0, 1, 3, 5], [1, 4, 4, 4]])
    """
    pairs, device = len(expert), expert.device
    sorted_, order = expert.sort(stable=True)
    bounds = torch.searchsorted(sorted_, torch.arange(experts + 1, device=device))
    tiles = (bounds.diff() + size - 1) // size
    ends = tiles.cumsum(0)
    # Every expert that has pairs has at most one tile that is not full.
    tile = torch.arange(min(pairs, pairs // size + min(pairs, experts)), device=device)
    owner = torch.searchsorted(ends, tile, right=True)
    known = owner.clamp(max=experts - 1)
    first = bounds[known] + (tile - (ends - tiles)[known]) * size
    return order, torch.stack([owner, first, bounds[known + 1]]).int()


def linear(x: Tensor, expert: Tensor, *operands: Any) -> Tensor:
    """`expert_linear` by the kernel, whatever the device: for operands that it does not decline."""
    from lorq.kernels import triton_tile

    *weight, left, left_scale, cells, projected, bits = operands
    pairs, in_features, (count, out, words) = len(expert), x.shape[1], weight[0].shape
    y = x.new_zeros(pairs, out)
    if not y.numel():
        return y
    format = _format(weight, bits, in_features)
    assert format is not None
    codes = known_sizes(format)
    tile = tile_of(pairs, count, x.dtype, format, in_features)
    order, plan = (None, None) if tile.tokens == 1 else plan_tiles(expert, count, tile.tokens)
    tiles = pairs if plan is None else plan.shape[1]
    if weight[4] is not None:
        weight[4] = weight[4].contiguous().view(triton_linear._ENTRIES[codes.vector])
    factor, e4m3 = (None, False) if left is None else triton_linear.stored_factor(left)
    arrays = [t if t is None else t.contiguous() for t in (*weight, factor, left_scale, projected, cells)]
    grid_rows, rank = (1, 1) if projected is None else projected.shape[1:]
    triton_tile.experts[tiles, -(-out // tile.rows)](
        x.contiguous(), y, expert.contiguous(), order, plan, *arrays, pairs // len(x), tiles, count, out, in_features,
        words, 0 if weight[2] is None else weight[2][0].numel(), grid_rows, rank, BITS=codes.bits,
        VECTOR=codes.vector, GROUP=codes.group_size, BOOK_ROWS=codes.codebook_rows,
        BOOK_COLUMNS=codes.codebook_columns, E4M3=e4m3, T=tile.tokens, N=tile.rows, K=tile.columns, R=32,
        STAGES=tile.stages, **triton_linear.options(tile.warps, tile.stages),
    )  # fmt: skip
    return y


def _format(weight: Sequence[Tensor | None], bits: int, in_features: int) -> LayerFormat | None:
    """What the tensors of `_WEIGHT` tell of the experts' format; None where they do not belong together."""
    given = {name: tensor for name, tensor in zip(_WEIGHT, weight, strict=True) if tensor is not None}
    levels = given.pop("levels", None)
    if any(len(tensor) != len(given["packed"]) for tensor in given.values()):
        return None
    one = dict.fromkeys(NAMES) | {name: tensor[0] for name, tensor in given.items()} | {"levels": levels}
    return format_of(Operands(**one), bits, in_features)


def _fits(
    x: Tensor, packed: Tensor, left: Tensor | None, left_scale: Tensor | None, cells: Tensor | None,
    projected: Tensor | None,
) -> bool:  # fmt: skip
    """Whether the shared factors belong to the experts and their inputs; those that do not are the reference's."""
    if left is None:
        return True
    if cells is None or projected is None or projected.ndim != 3:
        return False
    columns, rank = len(left), projected.shape[2]
    scaled = left_scale is None or left_scale.shape == (columns, rank)
    whole = left.shape == (columns, packed.shape[1], rank) and cells.shape == (len(packed), 2)
    return scaled and whole and len(projected) == len(x)


@expert_linear.register_kernel("cuda")
def linear_or_reference(x: Tensor, expert: Tensor, *operands: Any) -> Tensor:
    *weight, left, left_scale, cells, projected, bits = operands
    format = _format(weight, bits, x.shape[1])
    # Kernels number one expert's words, scales and entries, and the left factors, in 32 bits.
    large = any(t is not None and t[0].numel() >= 2**31 for t in (weight[0], weight[1], weight[4]))
    large |= left is not None and left.numel() >= 2**31
    fits = format is not None and not large and _fits(x, weight[0], left, left_scale, cells, projected)
    if format is None or not fits or declines(format, x.shape[1], x.device, x.dtype, 1.0) is not None:
        return expert_linear_reference(x, expert, *operands)
    with torch.cuda.device(x.device):
        return linear(x, expert, *operands)
