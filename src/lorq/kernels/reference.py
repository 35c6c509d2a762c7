"""The reference implementation of the quantized linear: the definition that every kernel is checked against."""

import torch
from torch import Tensor

from lorq.basis import Basis
from lorq.factors import LowRank
from lorq.grids import Codebook, decode_vectors, dequantize
from lorq.packing import unpack, unpack_columns


def dense_weight(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    codebook: Tensor | None,
    codebook_scale: Tensor | None,
    *,
    bits: int,
    in_features: int,
) -> Tensor:
    """``decode(codes, scale)`` of packed tensors, (out, in), float32."""
    if codebook is not None and codebook_scale is not None:
        vector = codebook.shape[-1]
        codes = unpack(packed, bits * vector, in_features // vector)
        return decode_vectors(codes, Codebook(codebook, codebook_scale), scale)
    codes = unpack(packed, bits, in_features)
    zero = 2 ** (bits - 1) if zero_point is None else unpack_columns(zero_point, bits, scale.shape[0])
    return dequantize(codes, scale, zero)


@torch.library.custom_op("lorq::quant_linear", mutates_args=())
def quant_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    codebook: Tensor | None,
    codebook_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    left_scale: Tensor | None,
    right_scale: Tensor | None,
    bits: int,
) -> Tensor:
    """``y = x decode(codes, scale)^T + (x right^T) left^T``, in the dtype of ``x``.

    Args:
        x: (..., in), floating point, in the weight's basis (`rotate`).
        packed: (out, words) int32, see `lorq.packing`.
        scale: (out, groups) float16.
        zero_point: (words, groups) int32, packed along the rows; None for symmetric grids and codebooks.
        codebook: (row tiles, column tiles, entries, vector) int8; None where codes stand for single weights.
        codebook_scale: (row tiles, column tiles) float16; likewise.
        left: (out, rank) float16, int8 or float8_e4m3fn; None without a low-rank part, as the next three.
        right: (rank, in) likewise.
        left_scale: (rank,) float16; None for 16-bit factors.
        right_scale: likewise.
        bits: stored bits of a code per weight.

    Returns:
        (..., out). The matrix is decoded in float32 and rounded once to the dtype of ``x``.
    """
    weight = dense_weight(
        packed, scale, zero_point, codebook, codebook_scale, bits=bits, in_features=x.shape[-1]
    )  # fmt: skip
    y = torch.nn.functional.linear(x, weight.to(x.dtype))
    if left is not None and right is not None:
        l, r = LowRank(left, right, left_scale, right_scale).factors(x.dtype)
        y += (x @ r.T) @ l.T
    return y


@quant_linear.register_fake
def _fake(x, packed, scale, *rest):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], scale.shape[0])


def _keep_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, *stored, bits = inputs
    ctx.save_for_backward(*stored)
    ctx.bits, ctx.in_features = bits, x.shape[-1]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    # Only the input has a gradient: codes do not move, and the dense weight is not kept between passes.
    *codes, left, right, left_scale, right_scale = ctx.saved_tensors
    weight = dense_weight(*codes, bits=ctx.bits, in_features=ctx.in_features)
    grad_x = grad @ weight.to(grad.dtype)
    if left is not None:
        l, r = LowRank(left, right, left_scale, right_scale).factors(grad.dtype)
        grad_x = grad_x + (grad @ l) @ r
    return (grad_x, *[None] * 10)


quant_linear.register_autograd(_backward, setup_context=_keep_for_backward)


@torch.library.custom_op("lorq::rotate", mutates_args=())
def rotate(x: Tensor, permutation: Tensor | None, block: int, skip: int, inverse: bool = False) -> Tensor:
    """``x T`` (or ``x T^T``): into the basis of a weight, or back; see `lorq.basis.Basis`.

    Args:
        x: (..., in), floating point.
        permutation: (in,) integers; None leaves the channels in order.
        block: size of the Walsh-Hadamard blocks; 0 for none.
        skip: columns before the first block.
        inverse: back into the model's own channels.

    Returns:
        (..., in), in the dtype of ``x``.
    """
    basis = Basis(permutation, block, skip)
    turned = basis.unrotate(x) if inverse else basis.rotate(x)
    # An operator must not return its input.
    return turned.clone(memory_format=torch.contiguous_format) if turned is x else turned


@rotate.register_fake
def _fake_rotate(x, permutation, block, skip, inverse=False):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_basis(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, permutation, ctx.block, ctx.skip, ctx.inverse = inputs
    ctx.save_for_backward(*([] if permutation is None else [permutation]))


def _backward_rotate(ctx, grad):  # type: ignore[no-untyped-def]
    # T is orthogonal: the gradient goes back through its inverse.
    permutation = next(iter(ctx.saved_tensors), None)
    return rotate(grad, permutation, ctx.block, ctx.skip, not ctx.inverse), None, None, None, None


rotate.register_autograd(_backward_rotate, setup_context=_keep_basis)
