"""The operator of packed experts: every input by the weight of its own expert, all experts in one call."""

import torch
from torch import Tensor

from lorq.core.weight import LayerFormat
from lorq.kernels.operands import code_sizes
from lorq.kernels.reference import dense_weight


def expert_linear_reference(
    x: Tensor, expert: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, levels: Tensor | None,
    codebook: Tensor | None, codebook_scale: Tensor | None, left: Tensor | None, left_scale: Tensor | None,
    cells: Tensor | None, projected: Tensor | None, bits: int,
) -> Tensor:  # fmt: skip
    """``y_p = x_t W_e^T + left_j P_ti`` for each pair ``p`` of a token ``t`` and its expert ``e``, in cell ``(i, j)``.

    A token has as many pairs, one after the other, as there are pairs for each row of ``x``: ``t = p // places``.

    Args:
        x: (rows, in), floating point, in the basis of the weights.
        expert: (pairs,) integers; numbers past the last expert stand for none, whose output is zero.
        packed, scale, zero_point, codebook, codebook_scale: of all experts, experts first, as
            `lorq.kernels.reference.quant_linear` takes them of one; the last three or None.
        levels: (2^bits,) float32, the same for all experts, or None.
        left: (grid columns, out, rank) of `lorq.core.tile_factors.TileFactors`; None without shared factors, as the
            next three.
        left_scale: (grid columns, rank) float16; None for 16-bit factors.
        cells: (experts, 2) int16, row and column of each expert.
        projected: (rows, grid rows, rank), ``P = x right_i^T`` for every grid row, in the dtype of ``x``.
        bits: stored bits of a code per weight.

    Returns:
        (pairs, out), in the dtype of ``x``.
    """
    y = x.new_zeros(expert.shape[0], packed.shape[1])
    places = expert.shape[0] // max(1, x.shape[0])
    for number in expert.unique().tolist():
        if number >= len(packed):
            continue
        pair = torch.where(expert == number)[0]
        token = pair // places
        zero, entries, steps = (t if t is None else t[number] for t in (zero_point, codebook, codebook_scale))
        weight = dense_weight(
            packed[number], scale[number], zero, levels, None, None, entries, steps, bits=bits, in_features=x.shape[1]
        )
        y[pair] = torch.nn.functional.linear(x[token], weight.to(x.dtype))
        if left is not None and cells is not None and projected is not None:
            row, column = cells[number].tolist()
            l = left[column].to(x.dtype)
            l = l if left_scale is None else l * left_scale[column].to(x.dtype)
            y[pair] += projected[token, row] @ l.T
    return y


# The function keeps its name: kernels for some devices call it for what they do not cover.
expert_linear = torch.library.custom_op("lorq::expert_linear", expert_linear_reference, mutates_args=())


@expert_linear.register_fake
def _fake(x, expert, packed, *rest):  # type: ignore[no-untyped-def]
    return x.new_empty(expert.shape[0], packed.shape[1])


def declines_experts(format: LayerFormat) -> str | None:
    """Why no kernel runs all experts of a format in one call; None where one may."""
    sizes = code_sizes(format.codes)
    if sizes is None:
        return f"codes of the kind {format.codes.kind} are multiplied one expert after the other"
    if sizes.scale_rank:
        return f"experts have scales of rank {sizes.scale_rank}"
    if format.rank:
        return f"experts have low-rank factors of their own, of rank {format.rank}"
    if (format.input_quantization, format.output_quantization) != ("none", "none"):
        return "experts quantize their inputs or outputs"
    return None
