"""Parts of a quantized weight, for machines that share a layer: rows of it, or columns."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from lorq.core.codes import Codes, GgufCodes, IntCodes, LevelCodes, LowRankScale, TrellisCodes, VectorCodes
from lorq.core.codes.trellis import TILE
from lorq.core.codes.vectors import Codebook
from lorq.core.low_rank import LowRank
from lorq.core.weight import QuantizedWeight


def take_rows(weight: QuantizedWeight, start: int, stop: int) -> tuple[QuantizedWeight, int]:
    """Rows ``start`` to ``stop`` of a weight, and a few before and after where codes cannot be cut there.

    Returns:
        The weight of these rows, and which of them is the first that was asked for.

    Raises:
        ValueError: for codes of a kind that is not known here.
    """
    step = _row_step(weight.codes)
    low, high = start // step * step, min(-(-stop // step) * step, weight.shape[0])
    return replace(
        weight, codes=_code_rows(weight.codes, low, high), low_rank=_left(weight.low_rank, low, high)
    ), start - low


def take_columns(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Columns ``start`` to ``stop`` of what a weight stores: of its basis, where it has one, which the result has not.

    Raises:
        ValueError: for codes that cannot be cut there, or of a kind that is not known here.
    """
    own = weight.low_rank
    if own is not None and not isinstance(own, LowRank):
        raise _unknown(own)
    right = None if own is None else replace(own, right=own.right[:, start:stop].contiguous())
    return replace(weight, codes=_code_columns(weight.codes, start, stop), low_rank=right, basis=None)


def _row_step(codes: Codes) -> int:
    """Where codes can be cut: streams between sequences, vectors between codebooks."""
    if isinstance(codes, TrellisCodes):
        return codes.format.length
    return codes.format.rows if isinstance(codes, VectorCodes) else 1


def _code_rows(codes: Codes, low: int, high: int) -> Codes:
    if isinstance(codes, IntCodes):
        zero = None if codes.zero_point is None else codes.zero_point[low:high]
        return replace(codes, codes=codes.codes[low:high], scale=codes.scale[low:high], zero_point=zero)
    if isinstance(codes, LevelCodes):
        s = codes.scale
        scale = replace(s, left=s.left[low:high]) if isinstance(s, LowRankScale) else s[low:high]
        return replace(codes, codes=codes.codes[low:high], scale=scale)
    if isinstance(codes, TrellisCodes):
        return replace(codes, packed=codes.packed[low // TILE : -(-high // TILE)], scale=codes.scale[low:high])
    if isinstance(codes, VectorCodes):
        books = slice(low // codes.format.rows, high // codes.format.rows)
        book = Codebook(codes.codebook.entries[books], codes.codebook.scale[books])
        return replace(codes, codes=codes.codes[low:high], scale=codes.scale[low:high], codebook=book)
    if isinstance(codes, GgufCodes):
        return _each(codes, lambda part: part[low:high])
    raise _unknown(codes)


def _each(codes: GgufCodes, cut: Callable[[Tensor], Tensor]) -> GgufCodes:
    """The same part of every tensor."""
    own: dict[str, Any] = {field.name: getattr(codes, field.name) for field in fields(codes)}
    parts: dict[str, Any] = {name: cut(t).contiguous() for name, t in own.items() if isinstance(t, Tensor)}
    return replace(codes, **parts)


def _left(own: object, low: int, high: int) -> LowRank | None:
    if own is None or isinstance(own, LowRank):
        return None if own is None else replace(own, left=own.left[low:high].contiguous())
    raise _unknown(own)


def _code_columns(codes: Codes, start: int, stop: int) -> Codes:
    width, f = stop - start, codes.format
    if isinstance(codes, TrellisCodes):
        return replace(codes, packed=codes.packed[:, :, start:stop].contiguous())
    if isinstance(codes, LevelCodes) and isinstance(codes.scale, LowRankScale):
        right = codes.scale.right[:, start:stop].contiguous()
        return replace(
            codes, codes=codes.codes[:, start:stop], scale=replace(codes.scale, right=right),
            format=replace(f, group_size=width),
        )  # fmt: skip
    if isinstance(codes, IntCodes | LevelCodes):
        assert isinstance(codes.scale, Tensor)
        size = _size(f.group_size, codes.shape[1], start, width)
        scale = _groups(codes.scale, f.group_size, size, start, stop)
        format, cut = replace(f, group_size=size), codes.codes[:, start:stop]
        if isinstance(codes, LevelCodes):
            return replace(codes, codes=cut, scale=scale, format=format)
        zero = codes.zero_point
        zero = None if zero is None else _groups(zero, f.group_size, size, start, stop)
        return replace(codes, codes=cut, scale=scale, zero_point=zero, format=format)
    if isinstance(codes, VectorCodes):
        if start % f.columns or stop % f.columns:
            raise ValueError(
                f"columns {start} to {stop} must be cut between codebooks, which serve {f.columns} columns each; take "
                "a --tensor-parallel-size whose parts of the width are multiples of that"
            )
        books = slice(start // f.columns, stop // f.columns)
        book = Codebook(codes.codebook.entries[:, books], codes.codebook.scale[:, books])
        size = _size(f.group_size, codes.shape[1], start, width)
        return replace(
            codes, codes=codes.codes[:, start // f.vector : stop // f.vector], codebook=book,
            scale=_groups(codes.scale, f.group_size, size, start, stop), format=replace(f, group_size=size),
        )  # fmt: skip
    if isinstance(codes, GgufCodes):
        block, whole = f.layout_of.block, codes.shape[1]
        if start % block or stop % block:
            raise ValueError(
                f"columns {start} to {stop} must be cut between blocks of {f.type}, which have {block} columns; take a "
                "--tensor-parallel-size whose parts of the width are multiples of that"
            )
        return _each(codes, lambda part: part[:, start * part.shape[1] // whole : stop * part.shape[1] // whole])
    raise _unknown(codes)


def _size(size: int, whole: int, start: int, width: int) -> int:
    """Of groups that fit between the cuts, none of which reaches over two of before."""
    return width if size == whole else math.gcd(size, start, width)


def _groups(values: Tensor, before: int, size: int, start: int, stop: int) -> Tensor:
    """The values of groups of another size, a part of those of before."""
    if values.shape[1] == 1:
        return values
    return values.repeat_interleave(before // size, 1)[:, start // size : stop // size].contiguous()


def _unknown(what: object) -> ValueError:
    return ValueError(
        f"{type(what).__name__} must be of a kind that can be shared by several devices (--tensor-parallel-size 1 "
        "serves every kind); take that, or another method"
    )
