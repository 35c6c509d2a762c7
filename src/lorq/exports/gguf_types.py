"""Weights in GGUF's types: which holds a layer's codes exactly, and what it costs where none does."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

import lorq.kernels  # noqa: F401  without it the search for steps is torch's, three times slower
from lorq.core.codes import IntCodes
from lorq.core.codes.gguf import GgufCodes, GgufGrid
from lorq.core.codes.gguf_blocks import TYPES
from lorq.core.rounding.gguf import gguf_nearest
from lorq.core.weight import QuantizedWeight

FLOATS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
# Types that a scale and whole numbers, and a smallest value, make up; the smaller first.
_SIGNED = ("q4_0", "q5_0", "q8_0")
_SHIFTED = ("q4_1", "q5_1")
# Weights whose error is measured at a time, in float64.
_STRIP = 1 << 22


def type_number(name: str) -> Any:
    """The gguf package's number of a type."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[name.upper()]


def fits(type_: str, width: int) -> bool:
    """Whether a type's blocks tile a row."""
    return type_ not in TYPES or width % TYPES[type_].block == 0


def row_bytes(type_: str, width: int) -> int:
    """Bytes of a row."""
    if type_ in TYPES:
        return width // TYPES[type_].block * TYPES[type_].size
    return width * (4 if type_ == "f32" else 2)


def exact_type(weight: QuantizedWeight) -> str | None:
    """The smallest type that holds a weight's codes as they are, by their format and scales; None where none does.

    Values of integer codes are ``d * q`` with ``q = code - zero_point``, so that a type of signed whole numbers holds
    asymmetric codes too, in one bit more.
    """
    codes = weight.codes
    if weight.low_rank is not None or weight.basis is not None:
        return None
    if not isinstance(codes, IntCodes):
        return None
    if codes.format.bits == 4 and not codes.format.symmetric and bool((_offset(codes) == _offset(codes).half()).all()):
        signed: tuple[str, ...] = ("q4_1",)
    else:
        signed = _SIGNED
    return next((name for name in signed if _holds(name, codes)), None)


def _holds(type_: str, codes: IntCodes) -> bool:
    """Whether a type has room for integer codes."""
    grid, type = codes.format, TYPES[type_]
    if grid.group_size % type.block:
        return False
    if type_ in _SHIFTED:
        return grid.top <= type.top
    low, high = (-grid.middle, grid.top - grid.middle) if grid.symmetric else (-grid.top, grid.top)
    return -type.zero <= low and high <= type.top - type.zero


def _offset(codes: IntCodes) -> Float[Tensor, "out groups"]:
    """m of ``d * code + m``."""
    return -codes.zero_points() * codes.scale.float()


def moved(codes: IntCodes, type_: str) -> GgufCodes:
    """Integer codes as those of a type that has room for them; ``m`` of ``d * code + m`` is rounded to float16."""
    type, size = TYPES[type_], codes.scale.shape[1]
    repeats = codes.format.group_size // type.block
    whole, zero = codes.codes.unflatten(1, (size, -1)), codes.zero_points().int().unsqueeze(-1)
    shifted = whole if type_ in _SHIFTED else whole.int() - zero + type.zero
    least = _offset(codes).half().repeat_interleave(repeats, 1) if type_ in _SHIFTED else None
    scale = codes.scale.repeat_interleave(repeats, 1)
    return GgufCodes(shifted.to(torch.uint8).flatten(1), scale, least, None, None, GgufGrid(type_))


@dataclass(frozen=True)
class Encoded:
    """Rows in a type, as bytes, and what they lost.

    Attributes:
        changed: sum of squared differences from the weight.
        whole: its sum of squares.
    """

    rows: UInt8[Tensor, "out bytes"]
    changed: float
    whole: float


def encode(weight: QuantizedWeight | Tensor, type_: str) -> Encoded:
    """A weight in a type whose blocks tile it: its codes where the type has room for them, else its values rounded."""
    if not isinstance(weight, QuantizedWeight):
        return _encoded(weight.float(), rounded(weight.float(), type_), type_)
    codes, plain = weight.codes, weight.low_rank is None and weight.basis is None
    values = weight.dense()
    if plain and isinstance(codes, IntCodes) and type_ in (*_SIGNED, *_SHIFTED) and _holds(type_, codes):
        rows = moved(codes, type_).tensors()["weight_blocks"]
    else:
        rows = rounded(values, type_)
    return _encoded(values, rows, type_)


def _encoded(values: Float[Tensor, "out in"], rows: UInt8[Tensor, "out bytes"], type_: str) -> Encoded:
    changed, whole, step = 0.0, 0.0, max(1, _STRIP // values.shape[1])
    for own, part in zip(rows.split(step), values.split(step), strict=True):
        changed += float((decoded(own, type_) - part).double().square().sum())
        whole += float(part.double().square().sum())
    return Encoded(rows, changed, whole)


def decoded(rows: UInt8[Tensor, "out bytes"], type_: str) -> Float[Tensor, "out in"]:
    """What a type's bytes stand for, by the gguf package."""
    from gguf import dequantize

    view = {"f32": np.float32, "f16": np.float16}.get(type_, np.uint8)
    return torch.from_numpy(dequantize(rows.numpy().view(view), type_number(type_)).astype(np.float32, copy=False))


def rounded(values: Float[Tensor, "out in"], type_: str) -> UInt8[Tensor, "out bytes"]:
    """Values to nearest."""
    if type_ not in TYPES:
        dtype = {short: getattr(torch, long) for long, short in FLOATS.items()}[type_]
        return values.to(dtype).contiguous().view(torch.uint8)
    return gguf_nearest(values, GgufGrid(type_)).tensors()["weight_blocks"]


def without_factors(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight whose low-rank part goes elsewhere."""
    return replace(weight, low_rank=None)
