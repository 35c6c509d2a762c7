"""The operator's tensors, and what they tell of their layer."""

from types import SimpleNamespace

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.codes import IntGrid, LevelFormat, VectorGrid
from lorq.core.low_rank import FACTOR_TYPES
from lorq.core.weight import LayerFormat

# What inputs may be; float64 is the reference's.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def misplaced(home: str, device: torch.device, dtype: torch.dtype) -> str | None:
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
# The tensors' names in a checkpoint, in the operator's order; levels are not stored, the format tells them.
STORED_NAMES = (
    "weight_packed", "weight_scale", "weight_zero_point", "levels", "scale_left", "scale_right", "codebook",
    "codebook_scale", "left", "right", "left_scale", "right_scale",
)  # fmt: skip


def codes_format(p: Operands, bits: int, in_features: int) -> IntGrid | LevelFormat | VectorGrid:
    """The format of the operator's codes, as its tensors tell it."""
    groups = 1 if p.scale is None else p.scale.shape[1]
    if p.codebook is not None:
        rows, columns, _, vector = p.codebook.shape
        return VectorGrid(bits, vector, len(p.packed) // rows, in_features // columns, in_features // groups)
    if p.levels is not None or p.scale_left is not None:
        rank = 0 if p.scale_left is None else p.scale_left.shape[1]
        return LevelFormat(bits, "integer" if p.levels is None else "normal-float", in_features // groups, rank)
    return IntGrid(bits, in_features // groups, p.zero_point is None)


def decoded(p: Operands, bits: int, in_features: int) -> Float[Tensor, "out in"]:
    """The values that the operator's codes stand for, float32."""
    tensors = {stored: getattr(p, name) for stored, name in zip(STORED_NAMES, NAMES, strict=True)}
    return codes_format(p, bits, in_features).read(tensors, len(p.packed), in_features).decode()


def format_of(p: Operands, bits: int, in_features: int) -> LayerFormat | None:
    """As much of a layer's format as the operator's tensors tell; None where their shapes do not belong together.

    Kernels read what they are told, so that such tensors are left to the reference, which refuses them.
    """
    out, rank = p.packed.shape[0], p.left.shape[1] if p.left is not None else 0
    types = {dtype: name for name, (dtype, _) in FACTOR_TYPES.items()}
    codes = codes_format(p, bits, in_features)
    parts = [in_features // codes.group_size] if p.scale is not None else []
    parts += [] if p.codebook is None else [p.codebook.shape[1] * p.codebook.shape[-1]]
    if any(in_features % part for part in parts) or (p.codebook is not None and out % p.codebook.shape[0]):
        return None
    names = dict(zip(STORED_NAMES, NAMES, strict=True))
    expected = {names[stored]: shape for stored, (shape, _) in codes.layout(out, in_features).items()} | {
        "levels": (2**bits,), "left": (out, rank), "right": (rank, in_features), "left_scale": (rank,),
        "right_scale": (rank,),
    }  # fmt: skip
    if any((tensor := getattr(p, name)) is not None and tensor.shape != expected.get(name) for name in NAMES):
        return None
    return LayerFormat(codes, rank, "float16" if p.left is None else types.get(p.left.dtype, str(p.left.dtype)))
