"""A weight rounded while it trains: to the nearest code, under a scale that learns with it."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from lorq.core.codes import IntGrid, LevelFormat, level_values, levels

# Scales this small stand for zero: nothing is divided by less.
_SMALLEST = 1e-8


@dataclass(frozen=True)
class Rounding:
    """What a stored layer makes of a weight: codes of its grid, and the scale that they are under.

    Attributes:
        format: of the codes.
        zero_point: the code of 0.0 for each group; None where the format fixes it. It does not learn.
    """

    format: IntGrid | LevelFormat
    zero_point: UInt8[Tensor, "out groups"] | None = None

    def scale(self, *numbers: Tensor) -> Float[Tensor, "out in"]:
        """One for each weight, of the stored numbers: the product of two factors, or each group's."""
        if len(numbers) == 2:
            return numbers[0] @ numbers[1]
        return self._repeated(numbers[0])

    def _repeated(self, of_groups: Float[Tensor, "out groups"]) -> Float[Tensor, "out in"]:
        return of_groups.unsqueeze(-1).expand(-1, -1, self.format.group_size).flatten(1)

    def _zero(self, like: Tensor) -> Tensor | float:
        """The code of 0.0, where codes are whole numbers: of each weight, or of all."""
        if self.zero_point is not None:
            return self._repeated(self.zero_point.to(like.dtype))
        assert isinstance(self.format, IntGrid)
        return float(self.format.middle)

    def encode(self, weight: Float[Tensor, "out in"], scale: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Nearest codes, as floats."""
        scale = away_from_zero(scale)
        if isinstance(self.format, LevelFormat):
            return self.format.grid.encode(weight, scale)
        return (weight / scale).add_(self._zero(weight)).round_().clamp_(0, self.format.top)

    def values(self, codes: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """What codes stand for under a scale of 1."""
        if isinstance(self.format, LevelFormat):
            return level_values(codes, self.format.levels, self.format.bits, dtype=codes.dtype)
        return codes - self._zero(codes)

    def inside(self, quotient: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """Where the rounded quotient is a level before it is clamped. Halves are rounded to even codes: -0.5 is 0."""
        if isinstance(self.format, LevelFormat):
            table = levels(self.format.levels, self.format.bits, quotient.device)
            return (quotient >= 1.5 * table[0] - table[1] / 2) & (quotient < 1.5 * table[-1] - table[-2] / 2)
        code = quotient + self._zero(quotient)
        return (code >= -0.5) & (code < self.format.top + 0.5)


def away_from_zero(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < _SMALLEST, torch.full_like(scale, _SMALLEST), scale)


class FakeQuantized(torch.autograd.Function):
    """``W^ = v[q] o S``, ``v[q]`` the nearest value to ``W / S``; the rounding is straight through.

        dL/dW = G o M,    dL/dS = G o (v[q] - (W / S) o M),    and from there what autograd makes of S:
        dL/dB = dL/dS A^T, dL/dA = B^T dL/dS where it is B A, and sums over groups where these have one

    with ``M`` for quotients that are rounded to a level of the grid before they are clamped to it: those inside the
    levels, and past the outermost by less than half of its distance to the next. Codes and scales are made again in the
    backward pass, so that it keeps W and the stored numbers alone. All in the numbers' own type, autocast or not.

    Source:
        LoRDS, arXiv:2601.22716, training. The mask is that of its authors' code, ``clamp(round(W / |B A| + 8), 0, 15)``
        through autograd. A mask that ends at the outermost levels belongs to ``round(clamp(...))`` and is another rule:
        1.3 % of the weights lie between, and the gradients of B and A differ by 1.4 times their norm. Ours: the
        same for NormalFloat levels, which the code does not train, and for groups, the paper's baseline, whose zero
        points stay; and S keeps its sign, as in the stored form, where the code has ``|B A|``: dL/dS has no sign of
        B A, and a weight whose S is negative takes the mirrored level.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounding: Rounding, *numbers: Tensor) -> Tensor:
        ctx.rounding = rounding
        ctx.save_for_backward(weight, *numbers)
        with torch.autocast(weight.device.type, enabled=False):
            scale = rounding.scale(*numbers)
            return rounding.values(rounding.encode(weight, scale)).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, *numbers = ctx.saved_tensors
        rounding: Rounding = ctx.rounding
        with torch.autocast(weight.device.type, enabled=False):
            with torch.enable_grad():
                leaves = [number.detach().requires_grad_() for number in numbers]
                learning = rounding.scale(*leaves)
            scale = away_from_zero(learning.detach())
            quotient = weight / scale
            inside = rounding.inside(quotient)
            value = rounding.values(rounding.encode(weight, scale))
            of_scale = value.sub_(quotient.mul_(inside)).mul_(gradients[0])
            return gradients[0] * inside, None, *torch.autograd.grad(learning, leaves, of_scale)
