"""The operators on CUDA devices: what `lorq.kernels.triton_tile` covers, in which tiles it runs, and its launches.

One token, up to 64 on tensor cores, and more, for which the weight is decoded and torch multiplies, go different ways.
Nothing is tuned at run time: docs/kernels.md has them, the spans of columns and the reasons for the tiles.
"""

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.util import find_spec
from math import gcd, log2
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorq.core.basis import WHOLE
from lorq.core.low_rank import FACTOR_TYPES
from lorq.core.rounding.trellis import encode_trellis, encode_trellis_reference
from lorq.core.weight import LayerFormat
from lorq.kernels.operands import DTYPES, NAMES, Operands, code_sizes, declines_input, format_of, known_sizes
from lorq.kernels.reference import quant_linear, quant_linear_reference, rotate, rotate_reference

_CODE_BITS = (1, 2, 3, 4, 6, 8)  # whole codes in a word, or in 24 bits
_ENTRIES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # one integer for a codebook's entry
_LARGEST_SCALE_RANK = 64
_LARGEST_BLOCK = 4096
_COPIED_AT_ONCE = 1024  # columns of a basis that are moved and not mixed
# Tiles of rows that fill a device without spans; where there are fewer, programs that spans make of them.
_ENOUGH_ROWS = {True: 64, False: 132}  # of one token, whose sums of spans cost a second launch; of more
_PROGRAMS = 528


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut.

    Attributes:
        tokens: of a tile, the power of two that its tokens fit.
        rows, columns: of the weight that are in registers at once; columns are a power of two from 32.
        warps: threads of a program over 32.
        stages: tiles of input and words under way to a program.
    """

    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int


# By bytes of an input's number, then by the largest number of tokens. Measured on an H200 (docs/kernels.md).
TILES = {
    2: {
        1: Tile(1, 8, 1024, 2, 3),
        16: Tile(16, 64, 128, 4, 3),
        32: Tile(32, 64, 128, 4, 3),
        64: Tile(64, 64, 128, 4, 3),
    },
    # Without tensor cores (float32 is not rounded to fewer bits) both factors of a tile's product lie in registers.
    4: {1: Tile(1, 8, 1024, 2, 3), 16: Tile(16, 32, 64, 4, 3), 17: Tile(32, 64, 64, 8, 2)},
}
# One token of codes whose fields are not summed as they are (`lorq.kernels.triton_tile`): a weight is made of each.
_ONE_DECODED = Tile(1, 4, 256, 2, 1)
_ONE_SCALED = Tile(1, 16, 256, 4, 1)  # with a product of tiles for its scales
# By bytes of an input's number: from so many tokens on the weight is decoded, and torch multiplies.
MANY_FROM = {2: 65, 4: 33}
_DECODED, _DECODED_WITH_FACTORS = Tile(0, 32, 256, 4, 1), Tile(0, 128, 128, 8, 1)
STRIP_BYTES = 256 << 20  # of a decoded weight at a time


def declines(format: LayerFormat, in_features: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels do not run a layer, see `lorq.kernels.dispatch.Product`; None where they do."""
    return declines_input("cuda", device, dtype) or declines_format(format) or declines_device(device)


def few_tokens(dtype: torch.dtype) -> int:
    """Tokens up to which weights are multiplied as they are stored."""
    return MANY_FROM.get(dtype.itemsize, 1) - 1


def declines_format(f: LayerFormat) -> str | None:
    """`declines`, as far as the format tells it."""
    c = code_sizes(f.codes)
    if c is None:
        return f"codes of the kind {f.codes.kind} have no kernel"
    if c.bits * c.vector not in _CODE_BITS or c.vector not in _ENTRIES:
        return f"codes take {c.bits * c.vector} bits for {c.vector} weights"
    if c.scale_rank > _LARGEST_SCALE_RANK:
        return f"the scale has rank {c.scale_rank}, more than {_LARGEST_SCALE_RANK}"
    if f.rank and f.factor_type not in FACTOR_TYPES:
        return f"low-rank factors are {f.factor_type}"
    return None


@cache
def declines_device(device: torch.device) -> str | None:
    """Why no kernel runs on a CUDA device; asked at every forward."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.version.hip is not None:
        return "the device is not NVIDIA's"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"the device has compute capability {capability}, less than (8, 0)"


@dataclass(frozen=True, eq=False)
class Plan:
    """How a call goes: what its tensors tell, and the tile for its number of tokens; None for too many of them."""

    format: LayerFormat
    tile: Tile | None
    span: int  # columns that one program sums


def linear(x: Tensor, *operands: Any) -> Tensor:
    """`quant_linear` by the kernels, whatever the device: for operands that they do not decline."""
    plan = _plan(x, *operands)
    assert plan is not None
    return _by_plan(plan, x, *operands)


def _plan(x: Tensor, *operands: Any) -> Plan | None:
    """The plan of a call; None where its tensors do not belong together, or are too large."""
    *tensors, bits = operands
    seen = tuple(None if t is None else (t.shape, t.dtype) for t in tensors)
    tokens = min(x.numel() // max(1, x.shape[-1]), MANY_FROM.get(x.dtype.itemsize, 0))
    return _plan_of(seen, bits, tokens, x.shape[-1], x.dtype)


class _Seen(NamedTuple):
    """What a plan depends on of a tensor."""

    shape: torch.Size
    dtype: torch.dtype


@lru_cache(maxsize=4096)
def _plan_of(
    seen: tuple[tuple[torch.Size, torch.dtype] | None, ...], bits: int, tokens: int, in_features: int,
    dtype: torch.dtype,
) -> Plan | None:  # fmt: skip
    tensors = [t if t is None else _Seen(*t) for t in seen]
    # Kernels number a weight's words and scales in 32 bits.
    if any(t is not None and t.shape.numel() >= 2**31 for t in tensors):
        return None
    format = format_of(Operands(**dict(zip(NAMES, tensors, strict=True))), bits, in_features)
    if format is None or tokens >= MANY_FROM.get(dtype.itemsize, 0):
        return None if format is None else Plan(format, None, in_features)
    tile = choose_tile(tokens, dtype, format, in_features)
    assert tensors[0] is not None
    return Plan(format, tile, span_of(tensors[0].shape[0], in_features, tile))


def _by_plan(plan: Plan, x: Tensor, *operands: Any) -> Tensor:
    p = Operands(**dict(zip(NAMES, operands[:-1], strict=True)))
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = flat.new_empty(flat.shape[0], p.packed.shape[0])
    if y.numel():
        if plan.tile is None:
            _by_decoding(plan.format, p, flat, y)
        else:
            _by_tiles(plan.format, plan.tile, plan.span, p, flat, y)
    return y.view(*x.shape[:-1], y.shape[1])


def _by_tiles(format: LayerFormat, tile: Tile, span: int, p: Operands, x: Tensor, y: Tensor) -> None:
    """Into ``y``: the products of tiles of codes as they are decoded, for few tokens."""
    from lorq.kernels import triton_tile

    (tokens, in_features), out, words = x.shape, y.shape[1], p.packed.shape[1]
    scale_rank = known_sizes(format).scale_rank
    weight, sizes = _weight_arguments(p, format)
    left, e4m3 = (None, False) if p.left is None else stored_factor(p.left)
    rows, splits = -(-out // tile.rows), -(-in_features // span)
    sizes |= {"T": tile.tokens, "N": tile.rows, "K": tile.columns, "STAGES": tile.stages}
    how = options(tile.warps, tile.stages)
    # What tensor cores multiply has the type of the inputs.
    z = projected(x, p.right, p.right_scale, x.dtype if splits == 1 and tile.tokens > 1 else torch.float32)
    if splits == 1:
        triton_tile.whole_rows[(rows * -(-tokens // tile.tokens),)](
            x, y, z, left, p.left_scale, *weight, tokens, out, in_features, words, scale_rank, format.rank,
            **sizes, E4M3=e4m3, R=32, **how,
        )  # fmt: skip
        return
    partial = torch.empty(splits, tokens, out, dtype=torch.float32, device=x.device)
    triton_tile.spans[rows, splits](
        x, partial, *weight, tokens, out, in_features, words, scale_rank, span, **sizes, **how
    )
    triton_tile.finish[-(-out // 128), tokens](
        partial, y, z, left, p.left_scale, tokens, out, splits, format.rank, E4M3=e4m3, N=128, R=32, **options()
    )


def _by_decoding(format: LayerFormat, p: Operands, x: Tensor, y: Tensor) -> None:
    """Into ``y``: torch's product with the decoded weight, for many tokens."""
    from lorq.kernels import triton_tile

    in_features, out, words = x.shape[1], y.shape[1], p.packed.shape[1]
    scale_rank = known_sizes(format).scale_rank
    weight, sizes = _weight_arguments(p, format)
    left, right, e4m3 = None, None, False
    if p.left is not None and p.right is not None:
        (left, e4m3), (right, _) = stored_factor(p.left), stored_factor(p.right)
    rows = max(32, STRIP_BYTES // (in_features * x.element_size()) // 32 * 32)
    strip = torch.empty(min(rows, out), in_features, dtype=x.dtype, device=x.device)
    tile = _DECODED if left is None else _DECODED_WITH_FACTORS
    columns = _columns(tile.columns, format, in_features)
    for first in range(0, out, rows):
        last = min(first + rows, out)
        triton_tile.decode[-(-(last - first) // tile.rows), -(-in_features // columns)](
            strip, *weight, left, p.left_scale, right, p.right_scale, first, last, in_features, words,
            scale_rank, format.rank, **sizes, E4M3=e4m3, N=tile.rows, K=columns, R=32, **options(tile.warps),
        )  # fmt: skip
        torch.mm(x, strip[: last - first].T, out=y[:, first:last])


def options(warps: int = 4, stages: int = 3) -> dict[str, int | bool]:
    """How a kernel is compiled. Products and sums fuse: Triton 3.9 wants that said."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def choose_tile(tokens: int, dtype: torch.dtype, format: LayerFormat, in_features: int) -> Tile:
    """The default tile for so many tokens, in columns that fit the groups and the width."""
    tiles = TILES[dtype.itemsize]
    tile = tiles[next((most for most in tiles if tokens <= most), max(tiles))]
    codes = known_sizes(format)
    if tokens == 1:
        if codes.scale_rank:
            tile = _ONE_SCALED
        elif not codes.whole_numbers:
            tile = _ONE_DECODED
        elif codes.bits <= 3:
            tile = replace(tile, rows=4 if codes.bits == 3 else tile.rows, stages=1)
    elif tokens > 32 and (codes.scale_rank or codes.vector > 1):
        tile = replace(tile, columns=64)  # wider ones spill on sm_80
    return replace(tile, columns=_columns(tile.columns, format, in_features))


def _columns(most: int, format: LayerFormat, in_features: int) -> int:
    """Columns of a tile: narrower until tiles are whole groups or groups whole tiles, down to 32."""
    most = min(most, 1 << max(5, (in_features - 1).bit_length()))
    group = known_sizes(format).group_size
    return most if most % group == 0 else max(32, gcd(most, group))


def span_of(out_features: int, in_features: int, tile: Tile) -> int:
    """Columns that one program sums for few tokens: whole tiles, at least two where there are two."""
    rows, tiles = -(-out_features // tile.rows), -(-in_features // tile.columns)
    splits = 1 if rows >= _ENOUGH_ROWS[tile.tokens == 1] else max(1, min(-(-_PROGRAMS // rows), tiles // 2))
    return -(-tiles // splits) * tile.columns


def _weight_arguments(p: Operands, format: LayerFormat) -> tuple[list[Tensor | None], dict[str, int]]:
    """The kernels' arguments that tell of the weight: tensors, and what they are compiled for."""
    codes = known_sizes(format)
    book = None if p.codebook is None else p.codebook.contiguous().view(_ENTRIES[codes.vector])
    factors = [t if t is None or t.dtype in DTYPES else t.float() for t in (p.scale_left, p.scale_right)]
    if factors[0] is not None and factors[1] is not None and factors[0].dtype != factors[1].dtype:
        factors = [t if t is None else t.float() for t in factors]
    tensors = [p.packed, p.scale, p.zero_point, p.levels, *factors, book, p.codebook_scale]
    sizes = {
        "BITS": codes.bits, "VECTOR": codes.vector, "GROUP": codes.group_size,
        "BOOK_ROWS": codes.codebook_rows, "BOOK_COLUMNS": codes.codebook_columns,
        "S": max(16, 1 << (codes.scale_rank - 1).bit_length()) if codes.scale_rank else 0,
    }  # fmt: skip
    return [t if t is None else t.contiguous() for t in tensors], sizes


def stored_factor(factor: Tensor) -> tuple[Tensor, bool]:
    """A factor as the kernels read it, and whether its bytes are e4m3."""
    e4m3 = factor.dtype == torch.float8_e4m3fn
    return (factor.view(torch.uint8) if e4m3 else factor).contiguous(), e4m3


def projected(x: Tensor, right: Tensor | None, right_scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``x right^T``, (tokens, rank); None without factors."""
    from lorq.kernels import triton_tile

    if right is None:
        return None
    (tokens, in_features), (stored, e4m3) = x.shape, stored_factor(right)
    z = torch.empty(tokens, right.shape[0], dtype=dtype, device=x.device)
    # One token's products wait for this: many short programs.
    rank, rows = right.shape[0], 1 if tokens == 1 else 8
    columns = min(4096 // rows, 1 << max(5, (in_features - 1).bit_length()))
    triton_tile.project[tokens, -(-rank // rows)](
        x, stored, right_scale, z, in_features, rank, E4M3=e4m3, R=rows, K=columns, **options(8)
    )
    return z


def turn(x: Tensor, permutation: Tensor | None, block: int, skip: int, inverse: bool = False) -> Tensor:
    """`rotate` by the kernel, whatever the device: for bases that it does not decline."""
    from lorq.kernels import triton_tile

    flat = x.contiguous()
    y = torch.empty_like(flat)
    width = x.shape[-1]
    if not y.numel():
        return y
    size, kept = (block, skip) if block else (_COPIED_AT_ONCE, width)
    blocks = (width - kept) // size
    triton_tile.turn[y.numel() // width, blocks + -(-kept // size)](
        flat, y, None if permutation is None else permutation.contiguous(), width, kept, blocks, INVERSE=inverse,
        BLOCK=size, STEPS=int(log2(block)) if block else 0, NORM=size**-0.5, **options(max(1, min(8, size // 256))),
    )  # fmt: skip
    return y


def declines_basis(block: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel does not take inputs into a basis; None where it does. Arguments as those of `declines`."""
    fits = block == 0 or 2 <= block <= _LARGEST_BLOCK
    of = "the whole width" if block == WHOLE else str(block)
    why = None if fits else f"blocks of {of} are not between 2 and {_LARGEST_BLOCK}"
    return declines_input("cuda", device, dtype) or why or declines_device(device)


@quant_linear.register_kernel("cuda")
def multiply(x: Tensor, *operands: Any) -> Tensor:
    plan = _plan(x, *operands)
    if plan is None or declines(plan.format, x.shape[-1], x.device, x.dtype) is not None:
        return quant_linear_reference(x, *operands)
    with torch.cuda.device(x.device):
        return _by_plan(plan, x, *operands)


@rotate.register_kernel("cuda")
def turn_or_reference(x: Tensor, permutation: Tensor | None, block: int, skip: int, inverse: bool = False) -> Tensor:
    if declines_basis(block, x.device, x.dtype) is not None:
        return rotate_reference(x, permutation, block, skip, inverse)
    with torch.cuda.device(x.device):
        return turn(x, permutation, block, skip, inverse)


@encode_trellis.register_kernel("cuda")
def encode(columns: Tensor, scale: Tensor, upper: Tensor, *sizes: int) -> tuple[Tensor, Tensor]:
    if declines_device(columns.device) is not None:
        return encode_trellis_reference(columns, scale, upper, *sizes)
    from lorq.kernels import triton_encoder

    with torch.cuda.device(columns.device):
        return triton_encoder.encode(columns, scale, upper, *sizes)
