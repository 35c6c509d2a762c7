"""Numbers that are stored in float16."""

import torch
from jaxtyping import Float
from torch import Tensor

# The smallest scale a float16 still holds with about one per cent of resolution (denormals end at 6e-8).
# A group of zeros gets it too, so that no scale is ever zero.
SMALLEST_SCALE = 2.0**-17
LARGEST_HALF = torch.finfo(torch.float16).max


def stored_half(values: Float[Tensor, "*shape"], what: str = "a scale") -> Float[Tensor, "*shape"]:
    """``values`` in float16.

    Raises:
        ValueError: if one exceeds what float16 holds, or is not a number.
    """
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not largest <= LARGEST_HALF:
        raise ValueError(
            f"{what} must fit float16 (at most 65504), got {largest:.4g}; "
            "the weights are too large to be stored, check the checkpoint"
        )
    return values.to(torch.float16)
