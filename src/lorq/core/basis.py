"""Basis: permute the input channels, then mix the less important ones by Walsh-Hadamard transforms, or all of them."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorq.core.hadamard import hadamard, mix_whole, whole_sizes

# Blocks that are worth a transform; a smaller one hardly spreads an outlier.
SMALLEST_BLOCK = 4
# Largest block that is chosen unasked; the paper's size.
_USUAL_BLOCK = 256
# In place of a block: signs, then one Hadamard matrix over the whole width, a power of two or not.
WHOLE = -1


def largest_block(width: int) -> int:
    """The largest power of two, up to the paper's 256, that divides the width.

    Example:
        >>> largest_block(576), largest_block(1536), largest_block(4096)
        (64, 256, 256)
    """
    return math.gcd(width, _USUAL_BLOCK)


def check_block(width: int, block: int, skip: int) -> None:
    """Refuse blocks that do not tile the columns after the first ``skip``, and a width that `WHOLE` has no matrix for.

    Raises:
        ValueError: naming the width and the blocks that fit it.
    """
    if block == WHOLE and skip == 0:
        whole_sizes(width)
        return
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
    and multiplies each following run of ``block`` places by `hadamard`. Block 0: no ``Q``. Block `WHOLE`: ``Q = D H``,
    signs and one Hadamard matrix over the whole width (`lorq.core.hadamard.mix_whole`); no kernel does that.

    A weight in this basis is ``W T``, an input ``x T`` (rows), a Hessian ``T^T H T``; ``W x^T`` is the same in both.

    Source:
        LoPRo, eq. 5-6. The paper's P is the inverse of what its text wants and its code does. Its Walsh blocks are
        ordered by sequency, these by Sylvester's rule: that only reorders columns within a block. `WHOLE` is the "full"
        of its table 5, QuaRot's random Hadamard matrix, but with one draw of signs for all layers of a width.
    """

    permutation: Int[Tensor, "in"] | None
    block: int
    skip: int

    def rotate(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows in"]:
        """``x T``, in the dtype of ``x``."""
        return self._mix(x if self.permutation is None else x.index_select(-1, self.permutation.long()))

    def unrotate(self, z: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows in"]:
        """``z T^T``, the inverse of `rotate`."""
        mixed = self._mix(z, inverse=True)
        return mixed if self.permutation is None else mixed.index_select(-1, self.permutation.long().argsort())

    def rotate_hessian(self, hessian: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
        """``T^T H T``, exactly symmetric."""
        if self.permutation is None and not self.block:
            return hessian
        turned = self.rotate(self.rotate(hessian).T)
        return (turned + turned.T) / 2

    def _mix(self, x: Float[Tensor, "*rows in"], *, inverse: bool = False) -> Float[Tensor, "*rows in"]:
        if not self.block:
            return x
        if self.block == WHOLE:
            return mix_whole(x, inverse=inverse)
        matrix = hadamard(self.block, dtype=x.dtype, device=x.device)
        mixed = x[..., self.skip :].unflatten(-1, (-1, self.block)) @ matrix
        return torch.cat([x[..., : self.skip], mixed.flatten(-2)], -1)
