"""The reference implementation of the quantized linear: the definition that every kernel is checked against."""

import torch
from torch import Tensor

from lorq.core.activations import TOP, quantize_activations
from lorq.core.basis import Basis
from lorq.core.codes import level_values
from lorq.core.low_rank import LowRank
from lorq.core.packing import unpack
from lorq.kernels.operands import NAMES, STORED_NAMES, Operands, codes_format

# Entries of the weight's gradient that are in memory at once, 16 MB.
_STRIP_ENTRIES = 1 << 22


def dense_weight(*operands: Tensor | None, bits: int, in_features: int) -> Tensor:
    """``decode(codes, scale)`` of the operator's tensors that tell of codes, (out, in), float32."""
    given = [*operands, *[None] * (len(NAMES) - len(operands))]
    p = Operands(**dict(zip(NAMES, given, strict=True)))
    tensors = dict(zip(STORED_NAMES, given, strict=True))
    return codes_format(p, bits, in_features).read(tensors, len(p.packed), in_features).decode()  # type: ignore[arg-type]


def decoded_linear(x: Tensor, codes: Tensor, low_rank: LowRank | None) -> Tensor:
    """``y = x codes^T + (x right^T) left^T`` for what codes stand for, rounded once to the dtype of ``x``.

    Raises:
        TypeError: for whole numbers, to which a weight would be rounded.
    """
    if not x.is_floating_point():
        raise TypeError(f"inputs of a quantized layer must be floating point, got {x.dtype}; convert them")
    y = torch.nn.functional.linear(x, codes.to(x.dtype))
    if low_rank is not None:
        l, r = low_rank.factors(x.dtype)
        y += (x @ r.T) @ l.T
    return y


def quant_linear_reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    levels: Tensor | None,
    scale_left: Tensor | None,
    scale_right: Tensor | None,
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
        packed: (out, words) int32, see `lorq.core.packing`.
        scale: (out, groups) float16; None where its factors are given.
        zero_point: (words, groups) int32, packed along the rows; None for symmetric grids and codebooks.
        levels: (2^bits,) float32, what codes stand for; None for whole numbers around ``2^(bits-1)``.
        scale_left: (out, scale rank), a scale for each weight as the product of this and the next; or None. Both may be
            trained: they have gradients, and floating-point types other than float16 are taken.
        scale_right: (scale rank, in), or None.
        codebook: (row tiles, column tiles, entries, vector) int8; None where codes stand for single weights.
        codebook_scale: (row tiles, column tiles) float16; likewise.
        left: (out, rank) float16, int8 or float8_e4m3fn; None without a low-rank part, as the next three.
        right: (rank, in) likewise.
        left_scale, right_scale: (rank,) float16; None for 16-bit factors.
        bits: stored bits of a code per weight.

    Returns:
        (..., out). The matrix is decoded in float32 and rounded once to the dtype of ``x``.
    """
    weight = dense_weight(
        packed, scale, zero_point, levels, scale_left, scale_right, codebook, codebook_scale,
        bits=bits, in_features=x.shape[-1],
    )  # fmt: skip
    factors = None if left is None or right is None else LowRank(left, right, left_scale, right_scale)
    return decoded_linear(x, weight, factors)


# The function keeps its name: kernels for some devices call it for what they do not cover.
quant_linear = torch.library.custom_op("lorq::quant_linear", quant_linear_reference, mutates_args=())


@quant_linear.register_fake
def _fake(x, packed, *rest):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _keep_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, *stored, bits = inputs
    # Neither the dense weight nor its gradient is ever kept; the input is, and only where the scale's factors learn.
    ctx.learns = any(factor is not None and factor.requires_grad for factor in stored[4:6])
    ctx.save_for_backward(*stored, *([x] if ctx.learns else []))
    ctx.bits, ctx.in_features = bits, x.shape[-1]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    # Codes do not move: the input has a gradient, and so have factors of the scale.
    saved = ctx.saved_tensors
    *codes, left, right, left_scale, right_scale = saved[:12]
    grads = [None] * 14
    if ctx.needs_input_grad[0]:
        weight = dense_weight(*codes, bits=ctx.bits, in_features=ctx.in_features)
        grads[0] = grad @ weight.to(grad.dtype)
        del weight
        if left is not None:
            l, r = LowRank(left, right, left_scale, right_scale).factors(grad.dtype)
            grads[0] = grads[0] + (grad @ l) @ r
    if ctx.learns:
        grads[5], grads[6] = _scale_gradients(saved[12], grad, *codes, bits=ctx.bits)
    return tuple(grads)


def _scale_gradients(
    x: Tensor, grad: Tensor, packed: Tensor, scale: None, zero_point: None, levels: Tensor | None,
    scale_left: Tensor, scale_right: Tensor, *codebooks: None, bits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``dB = (G o V) A^T`` and ``dA = B^T (G o V)``, with ``G = dy^T x`` made a strip of rows at a time."""
    x, dy = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    l, r, kind = scale_left.float(), scale_right.float(), "integer" if levels is None else "normal-float"
    d_left, d_right = torch.empty_like(l), torch.zeros_like(r)
    rows = max(1, _STRIP_ENTRIES // x.shape[1])
    for start in range(0, len(l), rows):
        strip = slice(start, start + rows)
        values = level_values(unpack(packed[strip], bits, x.shape[1]), kind, bits, table=levels)
        g = (dy[:, strip].T @ x).float().mul_(values)
        d_left[strip] = g @ r.T
        d_right += l[strip].T @ g
    return d_left.to(scale_left.dtype), d_right.to(scale_right.dtype)


quant_linear.register_autograd(_backward, setup_context=_keep_for_backward)


@torch.library.custom_op("lorq::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
    """Activations rounded to 8 bits, in the dtype of ``x``: ``(codes - zero_point) * scale``.

    Args:
        x: (..., in), floating point.
        scale, zero_point: (1,) float32 and int32, of a grid fixed by calibration; None takes each token's own range.

    Returns:
        Of the shape of ``x``. Gradients pass straight through; values outside a fixed range have none.
    """
    codes, step, zero = quantize_activations(x, scale, zero_point)
    return ((codes - zero) * step).to(x.dtype)


@fake_quantize.register_fake
def _fake_fake_quantize(x, scale, zero_point):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _keep_range(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, *grid = inputs
    ctx.fixed = grid[0] is not None
    ctx.save_for_backward(*([x, *grid] if ctx.fixed else []))


def _backward_fake_quantize(ctx, grad):  # type: ignore[no-untyped-def]
    if ctx.fixed:
        x, scale, zero_point = ctx.saved_tensors
        codes = (x.float() / scale).round() + zero_point
        grad = grad * ((codes >= 0) & (codes <= TOP))
    return grad, None, None


fake_quantize.register_autograd(_backward_fake_quantize, setup_context=_keep_range)


def rotate_reference(x: Tensor, permutation: Tensor | None, block: int, skip: int, inverse: bool = False) -> Tensor:
    """``x T`` (or ``x T^T``): into the basis of a weight, or back; see `lorq.core.basis.Basis`.

    Args:
        x: (..., in), floating point.
        permutation, block, skip: of the basis.
        inverse: back into the model's own channels.

    Returns:
        (..., in), in the dtype of ``x``.
    """
    basis = Basis(permutation, block, skip)
    turned = basis.unrotate(x) if inverse else basis.rotate(x)
    # An operator must not return its input.
    return turned.clone(memory_format=torch.contiguous_format) if turned is x else turned


rotate = torch.library.custom_op("lorq::rotate", rotate_reference, mutates_args=())


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
