"""Weights whose numbers were decoded when they were read, and 8-bit floating point with scales."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.weight import QuantizedWeight

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Decoded:
    """A weight of which only the decoded values matter here; ``kind`` says what it was."""

    weight: Float[Tensor, "out in"]
    kind: str

    def decode(self) -> Float[Tensor, "out in"]:
        return self.weight

    def exact(self) -> QuantizedWeight:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self.kind} are not integer codes with groups along the columns")


def read_float8(tensors: Mapping[str, Tensor], *, block: tuple[int, int] | None) -> Decoded:
    """A float8 ``weight``, and one scale for all of it, for each row, or for each block of rows and columns.

    The scale is called ``weight_scale``, or ``weight_scale_inv``, which multiplies all the same.

    Raises:
        ValueError: if there are other numbers of scales.
    """
    weight = tensors["weight"].float()
    (name,) = tensors.keys() - {"weight"}
    scale = tensors[name].float()
    if block is not None and tuple(scale.shape) == tuple(-(-n // b) for n, b in zip(weight.shape, block, strict=True)):
        scale = scale.repeat_interleave(block[0], 0)[: len(weight)]
        scale = scale.repeat_interleave(block[1], 1)[:, : weight.shape[1]]
    elif scale.numel() == 1 or tuple(scale.shape) in ((len(weight),), (len(weight), 1)):
        scale = scale.reshape(-1, 1)
    else:
        raise ValueError(
            f"{name} must be one number, one a row, or one for each block ({block}) of {tuple(weight.shape)}, got "
            f"{tuple(scale.shape)}"
        )
    return Decoded(weight * scale, "8-bit floating point numbers")
