"""The quantized linear in whole numbers: activations in 8 bits times codes, on the CPU.

With codes ``a`` of the input on a grid (s_x, z_x) and codes ``c`` of the weight on a grid (s_w, z_w), one for each row,

    y = s_x s_w sum_j (a_j - z_x) (c_j - z_w)
      = s_x s_w (sum_j a_j w_j  -  z_x sum_j w_j  -  z sum_j a_j  +  in z_x z),

    w = c - m,    z = z_w - m,    m = 2^(bits-1)

The first sum is oneDNN's product of unsigned by signed bytes, summed in 32 bits; the others are one number for each row
or token. They come as float32, exact below 2^24; the reference rounds the decoded input and weight to the dtype of
``x`` before it multiplies them.

A trap: processors without VNNI (or AMX) add neighbouring pairs of byte products in saturating 16-bit integers, and
``255 * 128 * 2`` does not fit. Whether this machine does is found out once, by a product whose sum is known. There
weights of up to 7 bits are exact all the same (``255 * 64 * 2 < 2^15``); for 8-bit weights the input's codes are taken
apart, ``a = 16 a_high + a_low``, and both halves go through one product of twice the tokens.

What is given up: memory, a byte a weight in oneDNN's order for as long as the packed tensor lives unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from lorq.core.activations import TOP, quantize_activations
from lorq.core.codes import IntGrid, LevelFormat
from lorq.core.packing import unpack, unpack_columns
from lorq.core.weight import LayerFormat
from lorq.kernels.derived import Derived
from lorq.kernels.operands import declines_input
from lorq.kernels.reference import fake_quantize, quant_linear


def declines(format: LayerFormat, in_features: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why inputs cannot be multiplied as whole numbers; None where they are.

    A layer whose input needs a gradient takes the reference besides, whatever this says, and so does one whose packed
    tensors were made in inference mode: those do not count their changes. Arguments as in
    `lorq.kernels.dispatch.Kernels`.
    """
    why = declines_format(format, in_features, device, dtype)
    if why is None and _products() == "none":
        why = "this build of torch has no exact product of bytes on this processor"
    return why


def declines_format(format: LayerFormat, in_features: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """`declines`, but for what only running something on the machine can tell."""
    codes = format.codes
    if format.input_quantization == "none":
        return "inputs are not quantized"
    if codes.operator is None:
        return f"codes of the kind {codes.kind} have no kernel"
    product_scale = isinstance(codes, LevelFormat) and codes.levels == "integer"
    if not isinstance(codes, IntGrid) and not product_scale:
        return "codes do not stand for whole numbers"
    if not isinstance(codes, IntGrid) or codes.group_size != in_features:
        return "a row has more than one scale"
    if format.rank or format.has_basis:
        return "it has a low-rank part" if format.rank else "its inputs are rotated"
    if in_features * TOP * 2 ** (codes.bits - 1) >= 2**31:
        return f"sums of {in_features} products of {codes.bits} by 8 bits do not fit 32"
    return declines_input("cpu", device, dtype)


@torch.library.custom_op("lorq::int8_linear", mutates_args=())
def int8_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bits: int,
) -> Tensor:
    """``y = fake_quantize(x) decode(codes, scale)^T``, in the dtype of ``x``; without a gradient.

    Args:
        x, packed, scale, zero_point, bits: as of `lorq.kernels.reference.quant_linear`, of one group for each row.
        input_scale, input_zero_point: as of `lorq.kernels.reference.fake_quantize`.

    Returns:
        (..., out). On the CPU the sums are whole numbers in float32, exact below 2^24; elsewhere it is the reference.
    """
    return _reference(x, packed, scale, zero_point, input_scale, input_zero_point, bits)


def _reference(x, packed, scale, zero_point, input_scale, input_zero_point, bits):  # type: ignore[no-untyped-def]
    x = fake_quantize(x, input_scale, input_zero_point)
    return quant_linear(x, packed, scale, zero_point, *[None] * 9, bits)


@int8_linear.register_fake
def _fake(x, packed, *rest):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@int8_linear.register_kernel("cpu")
def _on_cpu(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, input_scale: Tensor | None,
    input_zero_point: Tensor | None, bits: int,
) -> Tensor:  # fmt: skip
    if _products() == "none" or packed.is_inference() or (zero_point is not None and zero_point.is_inference()):
        return _reference(x, packed, scale, zero_point, input_scale, input_zero_point, bits)
    in_features = x.shape[-1]
    codes, step, zero = quantize_activations(x.reshape(-1, in_features), input_scale, input_zero_point)
    weight = _WEIGHTS.of([packed, zero_point], bits, in_features)
    # What the zero points take away, as one product with one or two terms in the middle.
    # Bytes have no NaN: the tokens' sums carry it.
    total = codes.sum(-1, keepdim=True)
    tokens = [zero + 0 * total] + ([] if zero_point is None else [total - in_features * zero])
    y = _multiply(codes.to(torch.uint8), weight, halves=bits == 8 and _products() == "halves")
    y.addmm_(torch.cat(tokens, 1), weight.taken, alpha=-1).mul_(scale.flatten().float()).mul_(step)
    return y.to(x.dtype).view(*x.shape[:-1], len(packed))


def _multiply(codes: UInt8[Tensor, "tokens in"], weight: "_Prepared", *, halves: bool) -> Float[Tensor, "tokens out"]:
    """``codes weight^T`` as float32, in two halves of the codes where the pairs' sums would saturate."""
    out = weight.taken.shape[1]
    if not halves:
        return _product(codes, weight.bytes, out)
    high, low = _product(torch.cat([codes >> 4, codes & 15]), weight.bytes, out).chunk(2)
    return low.add_(high, alpha=16)


def _product(codes: UInt8[Tensor, "tokens in"], weight: Tensor, out: int) -> Float[Tensor, "tokens {out}"]:
    """oneDNN's, without zero points and scales; ``weight`` in its order."""
    ones, zeros = torch.ones(out), torch.zeros(out, dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise.default(
        codes, 1.0, 0, weight, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _in_order(weight: Int8[Tensor, "out in"]) -> Tensor:
    """In the order that oneDNN likes best, an opaque tensor."""
    return torch.ops.onednn.qlinear_prepack.default(weight, None)


@cache
def _products() -> str:
    """How this machine multiplies bytes: "whole", in "halves" (see above), or "none" that could be relied upon."""

    def exact(code: int, weight: int) -> bool:
        tokens, width, out = 5, 64, 16
        codes = torch.full((tokens, width), code, dtype=torch.uint8)
        y = _product(codes, _in_order(torch.full((out, width), weight, dtype=torch.int8)), out)
        return bool((y == width * code * weight).all())

    try:
        if exact(TOP, 127) and exact(TOP, -128):
            return "whole"
        return "halves" if exact(TOP, -64) and exact(TOP, 63) and exact(15, 127) and exact(15, -128) else "none"
    except (RuntimeError, AttributeError):
        return "none"


@dataclass(frozen=True)
class _Prepared:
    """A weight's codes less the middle of the grid, as the product wants them.

    Attributes:
        bytes: in oneDNN's order.
        taken: the sum of each row, and below it the zero points less the middle, where there are any.
    """

    bytes: Tensor
    taken: Float[Tensor, "terms out"]


def _prepare(stored: Sequence[Tensor | None], bits: int, in_features: int) -> _Prepared:
    """Of packed codes and zero points, (words, 1), or None."""
    packed, zero_point = stored
    assert packed is not None
    middle = 2 ** (bits - 1)
    codes = (unpack(packed, bits, in_features).to(torch.int16) - middle).to(torch.int8)
    taken = [codes.sum(-1, dtype=torch.int32).float()]
    if zero_point is not None:
        taken.append(unpack_columns(zero_point, bits, len(packed)).flatten().float() - middle)
    return _Prepared(_in_order(codes), torch.stack(taken))


# Beside the layers, whose copies, pickles and state dicts know nothing of it.
_WEIGHTS = Derived(_prepare, copies=True)
