"""The operator's tensors, and what they tell of their layer."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from lorq.core.codes import CodesFormat, IntGrid, LevelFormat, VectorGrid
from lorq.core.low_rank import FACTOR_TYPES
from lorq.core.weight import LayerFormat

# What inputs may be; float64 is the reference's.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def declines_input(home: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels of one device type do not take such inputs; None where they do."""
    if device.type != home:
        return f"the device is {device.type}"
    return None if dtype in DTYPES else f"inputs are {dtype}"


@dataclass(frozen=True)
class CodeSizes:
    """What the kernels of `quant_linear` are told of codes of any kind that they know.

    The words are those of `lorq.core.codes`; 0 stands for a scale or a codebook that is not there.
    """

    bits: int
    group_size: int
    levels: str = "integer"
    scale_rank: int = 0
    vector: int = 1
    codebook_rows: int = 0
    codebook_columns: int = 0

    @property
    def whole_numbers(self) -> bool:
        """Whether a code is a whole number under the scale of its group."""
        return self.vector == 1 and self.levels == "integer"


def code_sizes(codes: CodesFormat) -> CodeSizes | None:
    """What kernels are told of codes; None of a kind that they do not know."""
    match codes:
        case IntGrid():
            return CodeSizes(codes.bits, codes.group_size)
        case LevelFormat():
            return CodeSizes(codes.bits, codes.group_size, codes.levels, codes.scale_rank)
        case VectorGrid():
            return CodeSizes(codes.bits, codes.group_size, "integer", 0, codes.vector, codes.rows, codes.columns)
    return None


def known_sizes(format: LayerFormat) -> CodeSizes:
    """`code_sizes` of a layer that a kernel did not decline."""
    sizes = code_sizes(format.codes)
    assert sizes is not None, format.codes.kind
    return sizes


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
STORED_NAMES = ("weight_packed", "weight_scale", "weight_zero_point", *NAMES[3:])


def codes_format(p: Operands, bits: int, in_features: int) -> IntGrid | LevelFormat | VectorGrid:
    """The format of the operator's codes, as its tensors tell it."""
    groups = 1 if p.scale is None else p.scale.shape[1]
    if p.codebook is not None:
        rows, columns, _, vector = p.codebook.shape
        return VectorGrid(bits, vector, p.packed.shape[0] // rows, in_features // columns, in_features // groups)
    if p.levels is not None or p.scale_left is not None:
        rank = 0 if p.scale_left is None else p.scale_left.shape[1]
        return LevelFormat(bits, "integer" if p.levels is None else "normal-float", in_features // groups, rank)
    return IntGrid(bits, in_features // groups, p.zero_point is None)


def format_of(p: Operands, bits: int, in_features: int) -> LayerFormat | None:
    """As much of a layer's format as the operator's tensors tell; None where their shapes do not belong together.

    Kernels read what they are told, so that such tensors are left to the reference, which refuses them.
    """
    out, rank = p.packed.shape[0], p.left.shape[1] if p.left is not None else 0
    types = {dtype: name for name, (dtype, _) in FACTOR_TYPES.items()}
    parts = [p.scale.shape[1]] if p.scale is not None else []
    parts += [] if p.codebook is None else [p.codebook.shape[1] * p.codebook.shape[-1]]
    if any(in_features % part for part in parts) or (p.codebook is not None and out % p.codebook.shape[0]):
        return None
    codes = codes_format(p, bits, in_features)
    names = dict(zip(STORED_NAMES, NAMES, strict=True))
    expected = {names[stored]: shape for stored, (shape, _) in codes.layout(out, in_features).items()} | {
        "levels": (2**bits,), "left": (out, rank), "right": (rank, in_features), "left_scale": (rank,),
        "right_scale": (rank,),
    }  # fmt: skip
    if any((tensor := getattr(p, name)) is not None and tensor.shape != expected.get(name) for name in NAMES):
        return None
    return LayerFormat(codes, rank, "float16" if p.left is None else types.get(p.left.dtype, str(p.left.dtype)))
