"""The reference implementation of the quantized linear: the definition that every kernel is checked against."""

import torch
from torch import Tensor

from lorq.grids import dequantize
from lorq.packing import unpack, unpack_columns
from lorq.weight import LowRank


def dense_weight(packed: Tensor, scale: Tensor, zero_point: Tensor | None, *, bits: int, in_features: int) -> Tensor:
    """``decode(codes, scale)`` of packed tensors, (out, in), float32."""
    codes = unpack(packed, bits, in_features)
    zero = 2 ** (bits - 1) if zero_point is None else unpack_columns(zero_point, bits, scale.shape[0])
    return dequantize(codes, scale, zero)


@torch.library.custom_op("lorq::quant_linear", mutates_args=())
def quant_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    left_scale: Tensor | None,
    right_scale: Tensor | None,
    bits: int,
) -> Tensor:
    """``y = x decode(codes, scale)^T + (x right^T) left^T``, in the dtype of ``x``.

    Args:
        x: (..., in), floating point.
        packed: (out, words) int32, see `lorq.packing`.
        scale: (out, groups) float16.
        zero_point: (words, groups) int32, packed along the rows; None for symmetric grids.
        left: (out, rank) float16 or int8; None without a low-rank part, as the next three.
        right: (rank, in) likewise.
        left_scale: (rank,) float16; None for 16-bit factors.
        right_scale: likewise.
        bits: width of a code.

    Returns:
        (..., out). The matrix is decoded in float32 and rounded once to the dtype of ``x``.
    """
    weight = dense_weight(packed, scale, zero_point, bits=bits, in_features=x.shape[-1])
    y = torch.nn.functional.linear(x, weight.to(x.dtype))
    if left is not None and right is not None:
        l, r = LowRank(left, right, left_scale, right_scale).factors(x.dtype)
        y += (x @ r.T) @ l.T
    return y


@quant_linear.register_fake
def _fake(x, packed, scale, zero_point, left, right, left_scale, right_scale, bits):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], scale.shape[0])


def _keep_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, packed, scale, zero_point, left, right, left_scale, right_scale, bits = inputs
    ctx.save_for_backward(packed, scale, zero_point, left, right, left_scale, right_scale)
    ctx.bits, ctx.in_features = bits, x.shape[-1]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    # Only the input has a gradient: codes do not move, and the dense weight is not kept between passes.
    packed, scale, zero_point, left, right, left_scale, right_scale = ctx.saved_tensors
    weight = dense_weight(packed, scale, zero_point, bits=ctx.bits, in_features=ctx.in_features)
    grad_x = grad @ weight.to(grad.dtype)
    if left is not None:
        l, r = LowRank(left, right, left_scale, right_scale).factors(grad.dtype)
        grad_x = grad_x + (grad @ l) @ r
    return (grad_x, *[None] * 8)


quant_linear.register_autograd(_backward, setup_context=_keep_for_backward)
