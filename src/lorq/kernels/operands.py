"""The operator's tensors, and what they tell of their layer."""

from types import SimpleNamespace

import torch
from torch import Tensor

from lorq.core.low_rank import FACTOR_TYPES
from lorq.core.packing import packed_width
from lorq.core.weight import LayerFormat

# What inputs may be; float64 is the reference's.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def declines_input(home: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels of one device type do not take such inputs; None where they do."""
    if device.type != home:
        return f"the device is {device.type}"
    return None if dtype in DTYPES else f"inputs are {dtype}"


class Operands(SimpleNamespace):
    """The operator's tensors by name."""

    packed: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    levels: Tensor | None
    scale_left: Tensor | None
    scale_right: Tensor | None
    codebook: Tensor | None
    codebook_scale: Tensor | None
    left: Tensor | None
    right: Tensor | None
    left_scale: Tensor | None
    right_scale: Tensor | None


NAMES = tuple(Operands.__annotations__)


def format_of(p: Operands, bits: int, in_features: int) -> LayerFormat | None:
    """As much of a layer's format as the operator's tensors tell; None where their shapes do not belong together.

    Kernels read what they are told, so that such tensors are left to the reference, which refuses them.
    """
    out = p.packed.shape[0]
    vector, tiles = 1, None
    if p.codebook is not None and p.codebook_scale is not None:
        vector, tiles = p.codebook.shape[-1], p.codebook_scale.shape
    groups = p.scale.shape[1] if p.scale is not None else 1
    rank = p.left.shape[1] if p.left is not None else 0
    types = {dtype: name for name, (dtype, _) in FACTOR_TYPES.items()}
    format = LayerFormat(
        bits, in_features // groups, p.zero_point is None, rank,
        "float16" if p.left is None else types.get(p.left.dtype, str(p.left.dtype)), vector,
        out // tiles[0] if tiles else 0, in_features // tiles[1] if tiles else 0,
        grid="integer" if p.levels is None else "normal-float",
        scale_rank=0 if p.scale_left is None else p.scale_left.shape[1],
    )  # fmt: skip
    expected = {
        "packed": (out, packed_width(in_features // vector, bits * vector)), "scale": (out, groups),
        "zero_point": (packed_width(out, bits), groups), "levels": (2**bits,),
        "scale_left": (out, format.scale_rank), "scale_right": (format.scale_rank, in_features),
        "codebook": (*(tiles or (0, 0)), 2 ** (bits * vector), vector),
        "left": (out, rank), "right": (rank, in_features), "left_scale": (rank,), "right_scale": (rank,),
    }  # fmt: skip
    found = {name: tensor.shape for name in expected if (tensor := getattr(p, name)) is not None}
    whole = in_features % (groups * vector) == 0 and (not tiles or not (out % tiles[0] or in_features % tiles[1]))
    return format if whole and all(shape == expected[name] for name, shape in found.items()) else None
