"""Activations in 8 bits: on each token's own range, or on one range fixed by calibration."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

# The largest code of an activation.
TOP = 255
# A token of zeros needs a scale too; the smallest normal float32 is far below.
_SMALLEST = 1e-30
INPUTS = ("none", "token", "tensor")
OUTPUTS = ("none", "token")


@dataclass(frozen=True)
class Activations:
    """What happens to a layer's inputs and outputs besides the multiplication.

    Attributes:
        input: "none"; "token", 8 bits on each token's own range; or "tensor", 8 bits on one range for all.
        output: "none", or "token" as above (what a key-value cache in 8 bits keeps of keys and values).
        scale: step of the input's grid, float32, in activation units; with "tensor" only, as the next.
        zero_point: the code of 0, int32.
    """

    input: str = "none"
    output: str = "none"
    scale: Float[Tensor, "one"] | None = None
    zero_point: Tensor | None = None


def range_grid(
    low: Float[Tensor, "*shape"], high: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Scale and zero point of the 8-bit grid over ``[low, high]`` and zero, float32.

    scale = (high - low) / 255,    zero_point = round(-low / scale)
    """
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    scale = ((high - low) / TOP).clamp(min=_SMALLEST)
    return scale, (-low / scale).round()


def quantize_activations(
    x: Float[Tensor, "*batch in"], scale: Tensor | None = None, zero_point: Tensor | None = None
) -> tuple[Float[Tensor, "*batch in"], Tensor, Tensor]:
    """The codes of activations, ``clamp(round(x / scale) + zero_point, 0, 255)``, whole numbers in float32.

    Without a fixed grid each token has its own range, its largest and smallest channel and zero.

    Returns:
        ``(codes, scale, zero_point)``; the last two (..., 1) or (1,), float32.

    Source:
        LRQ's code: per-token asymmetric 8 bits from the minimum and the maximum over the channels. Deviation: zero is
        always inside the range, so that zero points are codes.
    """
    x = x.float()
    if scale is None or zero_point is None:
        scale, zero = range_grid(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))
    else:
        zero = zero_point.float()
    return ((x / scale).round_() + zero).clamp_(0, TOP), scale, zero
