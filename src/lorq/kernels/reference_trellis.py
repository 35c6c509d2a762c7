"""The operator of trellis codes: the definition that every kernel of theirs is checked against."""

import torch
from torch import Tensor

from lorq.core.codes import TrellisCodes, TrellisGrid
from lorq.core.low_rank import LowRank
from lorq.kernels.reference import decoded_linear

# The operator's tensors as a checkpoint names them, and its numbers, which the codes' format has.
STORED_NAMES = ("weight_packed", "weight_scale", "left", "right", "left_scale", "right_scale")
NUMBERS = ("bits", "window", "length")


def trellis_linear_reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    left_scale: Tensor | None,
    right_scale: Tensor | None,
    bits: int,
    window: int,
    length: int,
) -> Tensor:
    """``y = x decode(codes)^T + (x right^T) left^T``, in the dtype of ``x``.

    Args:
        x: (..., in), floating point, in the weight's basis (`lorq.kernels.reference.rotate`).
        packed: (tiles, bits, in) int16, of `lorq.core.codes.trellis.TrellisCodes`, as the next.
        scale: (out, 1) float16; it and the factors may be trained, and be of other floating-point types then.
        left, right, left_scale, right_scale: of the low-rank part, as of `lorq.kernels.reference.quant_linear`.
        bits, window, length: of `lorq.core.codes.trellis.TrellisGrid`.

    Returns:
        (..., out). The matrix is decoded in float32 and rounded once to the dtype of ``x``.

    Raises:
        ValueError: for tensors that no such codes have.
    """
    weight = TrellisCodes(packed, scale, _grid_of(packed, scale, bits, window, length)).decode()
    factors = None if left is None or right is None else LowRank(left, right, left_scale, right_scale)
    return decoded_linear(x, weight, factors)


def _grid_of(packed: Tensor, scale: Tensor, bits: int, window: int, length: int) -> TrellisGrid:
    """The grid, if these are the tensors of one: others would be decoded to something."""
    if scale.ndim != 2 or packed.ndim != 3:
        raise ValueError(f"scale must be (out, 1) and packed (tiles, bits, in), got {scale.shape} and {packed.shape}")
    grid, out = TrellisGrid(bits, window, length), scale.shape[0]
    grid.check(out, packed.shape[2])
    shape, dtype = grid.layout(out, packed.shape[2])["weight_packed"]
    if packed.shape != shape or packed.dtype != dtype or scale.shape[1] != 1:
        raise ValueError(
            f"{out} scales of {bits} bits belong to codes {shape}, {dtype}, got scales {tuple(scale.shape)} and codes "
            f"{tuple(packed.shape)}, {packed.dtype}"
        )
    return grid


# The function keeps its name: kernels for some devices call it for what they do not cover.
trellis_linear = torch.library.custom_op("lorq::trellis_linear", trellis_linear_reference, mutates_args=())


@trellis_linear.register_fake
def _fake(x, packed, scale, *rest):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], scale.shape[0])


def _keep_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    # The dense weight is never kept; the input is, only where a scale or factor learns.
    x, *ctx.stored, ctx.bits, ctx.window, ctx.length = inputs
    ctx.learns = [t is not None and t.requires_grad for t in ctx.stored]
    ctx.shape = x.shape
    ctx.save_for_backward(*ctx.stored, *([x] if any(ctx.learns) else []))
    del ctx.stored


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    # Codes do not move: the product is made once more, and what learns has the gradients of torch's own operations.
    *stored, x = (*ctx.saved_tensors, None)[:7]
    if x is None:  # what it holds makes no difference to its own gradient
        x = grad.new_zeros(()).expand(ctx.shape)
    wanted = [ctx.needs_input_grad[0], *ctx.learns]
    leaves = [t if t is None else t.detach().requires_grad_(on) for t, on in zip((x, *stored), wanted, strict=True)]
    with torch.enable_grad():
        y = trellis_linear_reference(*leaves, ctx.bits, ctx.window, ctx.length)
    found = iter(torch.autograd.grad(y, [t for t, on in zip(leaves, wanted, strict=True) if on], grad))
    return *(next(found) if on else None for on in wanted), None, None, None


trellis_linear.register_autograd(_backward, setup_context=_keep_for_backward)
