"""Basis: permute the input channels, then mix the less important ones by block Walsh-Hadamard transforms."""

import functools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Blocks that are worth a transform; a smaller one hardly spreads an outlier.
SMALLEST_BLOCK = 4
# Largest block that is chosen unasked; the paper's size.
_USUAL_BLOCK = 256


@functools.cache
@torch.inference_mode(False)  # kept: made while measuring, it must serve training too
def hadamard(size: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Sylvester's Hadamard matrix over ``sqrt(size)``: symmetric, orthogonal, its own inverse.

    Made once and kept, since every forward needs it: not to be changed.

    Raises:
        ValueError: if the size is not a power of two.

    Example:
        >>> hadamard(2, dtype=torch.float64) * 2**0.5
        tensor([[ 1.,  1.],
                [ 1., -1.]], dtype=torch.float64)
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"the size of a Walsh-Hadamard block must be a power of two, got {size}")
    matrix = torch.ones(1, 1, dtype=torch.float64, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / math.sqrt(size)).to(dtype)


def largest_block(width: int) -> int:
    """The largest power of two, up to the paper's 256, that divides the width.

    Example:
        >>> largest_block(576), largest_block(1536), largest_block(4096)
        (64, 256, 256)
    """
    return math.gcd(width, _USUAL_BLOCK)


def check_block(width: int, block: int, skip: int) -> None:
    """Refuse blocks that do not tile the columns after the first ``skip``.

    Raises:
        ValueError: naming the width and the blocks that fit it.
    """
    fits = [size for size in (2**k for k in range(2, 14)) if size <= width - skip and (width - skip) % size == 0]
    if block & (block - 1) or block < SMALLEST_BLOCK or skip < 0 or skip >= width or (width - skip) % block:
        raise ValueError(
            f"a rotation block must be a power of two from {SMALLEST_BLOCK} that divides the width less the columns "
            f"left alone, got block {block} for width {width} less {skip}; "
            f"blocks that fit: {', '.join(map(str, fits)) or 'none'}"
        )


@dataclass(frozen=True)
class Basis:
    """An orthogonal change of the input channels, ``T = P Q``.

    ``P`` puts channel ``permutation[j]`` at place ``j``, if there is one. ``Q`` leaves the first ``skip`` places alone
    and multiplies each following run of ``block`` places by `hadamard`. Block 0: no ``Q``.

    A weight in this basis is ``W T``, an input ``x T`` (rows), a Hessian ``T^T H T``; ``W x^T`` is the same in both.

    Source:
        LoPRo, eq. 5-6. The paper's P is the inverse of what its text wants and its code does. Its Walsh blocks are
        ordered by sequency, these by Sylvester's rule: that only reorders columns within a block.
    """

    permutation: Int[Tensor, "in"] | None
    block: int
    skip: int

    def rotate(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows in"]:
        """``x T``, in the dtype of ``x``."""
        return self._mix(x if self.permutation is None else x.index_select(-1, self.permutation.long()))

    def unrotate(self, z: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows in"]:
        """``z T^T``, the inverse of `rotate`."""
        mixed = self._mix(z)
        return mixed if self.permutation is None else mixed.index_select(-1, self.permutation.long().argsort())

    def rotate_hessian(self, hessian: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
        """``T^T H T``, exactly symmetric."""
        if self.permutation is None and not self.block:
            return hessian
        turned = self.rotate(self.rotate(hessian).T)
        return (turned + turned.T) / 2

    def _mix(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows in"]:
        if not self.block:
            return x
        matrix = hadamard(self.block, dtype=x.dtype, device=x.device)
        mixed = x[..., self.skip :].unflatten(-1, (-1, self.block)) @ matrix
        return torch.cat([x[..., : self.skip], mixed.flatten(-2)], -1)
