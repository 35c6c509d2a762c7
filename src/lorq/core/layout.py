"""How a quantized weight lies in a checkpoint: its tensors by local name, their shapes and types, and back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorq.core.activations import Activations
from lorq.core.basis import Basis
from lorq.core.grids import Codebook
from lorq.core.low_rank import FACTOR_TYPES, LowRank, factor_bits
from lorq.core.packing import pack, pack_columns, packed_width, unpack, unpack_columns
from lorq.core.scale_factors import LowRankScale
from lorq.core.weight import LayerFormat, QuantizedWeight, permutation_dtype

# In the operator's order; "levels" are not stored, the format tells them.
OPERANDS = (
    "weight_packed", "weight_scale", "weight_zero_point", "levels", "scale_left", "scale_right", "codebook",
    "codebook_scale", "left", "right", "left_scale", "right_scale",
)  # fmt: skip
_STORED = (
    *(name for name in OPERANDS if name != "levels"), "weight_shape", "permutation", "input_scale", "input_zero_point",
)  # fmt: skip


def pack_weight(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a quantized weight as they are stored, by their local names (docs/format.md)."""
    tensors = {
        "weight_packed": pack(weight.codes, weight.format.code_bits),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.scale is not None:
        tensors["weight_scale"] = weight.scale.to(torch.float16)
    if weight.scale_factors is not None:
        tensors |= {"scale_left": weight.scale_factors.left, "scale_right": weight.scale_factors.right}
    if weight.zero_point is not None:
        tensors["weight_zero_point"] = pack_columns(weight.zero_point, weight.bits)
    if weight.codebook is not None:
        tensors |= {"codebook": weight.codebook.entries, "codebook_scale": weight.codebook.scale}
    if weight.basis is not None and weight.basis.permutation is not None:
        tensors["permutation"] = weight.basis.permutation.to(permutation_dtype(weight.shape[1]))
    if weight.low_rank is not None:
        parts = weight.low_rank
        tensors |= {"left": parts.left, "right": parts.right}
        if parts.left_scale is not None and parts.right_scale is not None:
            tensors |= {"left_scale": parts.left_scale, "right_scale": parts.right_scale}
    if weight.activations.scale is not None and weight.activations.zero_point is not None:
        tensors |= {"input_scale": weight.activations.scale, "input_zero_point": weight.activations.zero_point}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def stored_layout(
    out_features: int, in_features: int, format: LayerFormat
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that a layer of this format stores; the inverse is `pack_weight`."""
    groups, rank = in_features // format.group_size, format.rank
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight_packed": ((out_features, packed_width(in_features // format.vector, format.code_bits)), torch.int32),
        "weight_shape": ((2,), torch.int64),
    }
    if format.scale_rank:
        layout["scale_left"] = ((out_features, format.scale_rank), torch.float16)
        layout["scale_right"] = ((format.scale_rank, in_features), torch.float16)
    else:
        layout["weight_scale"] = ((out_features, groups), torch.float16)
    if not format.symmetric:
        layout["weight_zero_point"] = ((packed_width(out_features, format.bits), groups), torch.int32)
    if format.vector > 1:
        tiles = out_features // format.codebook_rows, in_features // format.codebook_columns
        layout["codebook"] = ((*tiles, 2**format.code_bits, format.vector), torch.int8)
        layout["codebook_scale"] = (tiles, torch.float16)
    if format.permuted:
        layout["permutation"] = ((in_features,), permutation_dtype(in_features))
    if rank:
        kind = FACTOR_TYPES[format.factor_type][0]
        layout |= {"left": ((out_features, rank), kind), "right": ((rank, in_features), kind)}
        if factor_bits(format.factor_type) == 8:
            layout |= {"left_scale": ((rank,), torch.float16), "right_scale": ((rank,), torch.float16)}
    if format.input_quantization == "tensor":
        layout |= {"input_scale": ((1,), torch.float32), "input_zero_point": ((1,), torch.int32)}
    return layout


def unpack_weight(tensors: Mapping[str, Tensor], format: LayerFormat) -> QuantizedWeight:
    """The quantized weight behind stored tensors, without its record; the inverse of `pack_weight`."""
    out_features, in_features = tensors["weight_shape"].tolist()
    zero, low_rank, codebook, basis = tensors.get("weight_zero_point"), None, None, None
    factors = LowRankScale(tensors["scale_left"], tensors["scale_right"]) if format.scale_rank else None
    if format.rank:
        low_rank = LowRank(tensors["left"], tensors["right"], tensors.get("left_scale"), tensors.get("right_scale"))
    if format.vector > 1:
        codebook = Codebook(tensors["codebook"], tensors["codebook_scale"])
    if format.has_basis:
        basis = Basis(tensors.get("permutation"), format.rotation_block, format.rotation_skip)
    return QuantizedWeight(
        codes=unpack(tensors["weight_packed"], format.code_bits, in_features // format.vector),
        scale=tensors.get("weight_scale"),
        zero_point=None if zero is None else unpack_columns(zero, format.bits, out_features),
        bits=format.bits,
        low_rank=low_rank,
        codebook=codebook,
        basis=basis,
        grid=format.grid,
        scale_factors=factors,
        activations=Activations(
            format.input_quantization, format.output_quantization, tensors.get("input_scale"),
            tensors.get("input_zero_point"),
        ),
    )  # fmt: skip
