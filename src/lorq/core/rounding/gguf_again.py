"""GGUF's blocks of several groups once more: groups and units against what all the other columns leave."""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lorq.core.codes.gguf_blocks import BlockType
from lorq.core.linalg import inverse_factor
from lorq.core.rounding.gguf_fit import Fit, halves, in_units, near, search


def again(
    target: Float[Tensor, "in rows"],
    codes: Float[Tensor, "in rows"],
    fits: list[Fit],
    units: list[Fit],
    matrix: Float[Tensor, "in in"],
    type: BlockType,
) -> None:
    """Choose every group and every unit of some rows once more, in place, where that lowers ``e H e^T``.

    Args:
        fits: of the groups.
        units: of the blocks.
        matrix: ``H``, damped.
    """
    size, each = type.group, type.block // type.group
    values = _decoded(fits, codes, type)
    for number, unit in enumerate(units):
        own, groups = slice(number * type.block, (number + 1) * type.block), slice(number * each, (number + 1) * each)
        block = _Block(codes[own], values[own], matrix[own] @ (target - values), matrix[own, own])
        found = [
            _group(block, slice(group * size, (group + 1) * size), fit, unit, type)
            for group, fit in enumerate(fits[groups])
        ]
        units[number], fits[groups] = _unit(block, found, unit, type)


def _decoded(fits: list[Fit], codes: Float[Tensor, "columns rows"], type: BlockType) -> Float[Tensor, "columns rows"]:
    return torch.cat([fit.decode(own, type) for fit, own in zip(fits, codes.split(type.group), strict=True)])


@dataclass(frozen=True)
class _Block:
    """Columns of a block, changed in place.

    A change ``c`` of its values lowers a row's error by ``2 c P - c H c``.

    Attributes:
        pull: ``P = H (t - q)`` at these columns, of the errors of all columns.
        matrix: ``H`` between these columns.
    """

    codes: Float[Tensor, "block rows"]
    values: Float[Tensor, "block rows"]
    pull: Float[Tensor, "block rows"]
    matrix: Float[Tensor, "block block"]

    def take(self, columns: slice, values: Float[Tensor, "columns rows"]) -> Bool[Tensor, "rows"]:
        """Other values of some columns, for those rows whose error they lower, which are returned."""
        change = values - self.values[columns]
        better = (change * (2 * self.pull[columns] - self.matrix[columns, columns] @ change)).sum(0) > 0
        self.pull.sub_(self.matrix[:, columns] @ torch.where(better, change, 0.0))
        self.values[columns] = torch.where(better, values, self.values[columns])
        return better


def _group(block: _Block, columns: slice, fit: Fit, unit: Fit, type: BlockType) -> Fit:
    """A group's codes and whole numbers, which aims at what would be best without rounding, ``q + H_gg^-1 P_g``."""
    upper = inverse_factor(block.matrix[columns, columns])
    aim = block.values[columns] + upper.mT @ (upper @ block.pull[columns])
    stored = partial(in_units, unit=unit, type=type)
    found, codes = search(aim[None], upper[None], near(fit, unit, type), stored, type)
    better = block.take(columns, found.at(0).decode(codes[0], type))
    block.codes[columns] = torch.where(better, codes[0], block.codes[columns])
    return found.at(0).where(better, fit)


def _unit(block: _Block, fits: list[Fit], unit: Fit, type: BlockType) -> tuple[Fit, list[Fit]]:
    """The unit that suits the block's codes and whole numbers best, and its groups' steps in it."""
    counts = [_counted(fit, unit) for fit in fits]
    ones = Fit(torch.ones_like(unit.step), None if unit.low is None else torch.zeros_like(unit.low))
    zeros = Fit(torch.zeros_like(unit.step), None if unit.low is None else torch.ones_like(unit.low))
    axes = [ones] if unit.low is None else [ones, zeros]
    # What a unit of 1 would be worth, (parts, block, rows).
    basis = torch.stack([_decoded([_times(count, axis) for count in counts], block.codes, type) for axis in axes])
    products = torch.einsum("pbr,qbr->rpq", basis, block.matrix @ basis)
    products.diagonal(dim1=1, dim2=2).mul_(1 + 1e-6).add_(1e-30)  # parts may be alike, or nothing
    change = torch.linalg.solve(products, torch.einsum("pbr,br->rp", basis, block.pull))
    other = halves(Fit(unit.step + change[:, 0], None if unit.low is None else unit.low + change[:, 1]))
    other = Fit(_signed(other.step, unit.step), None if unit.low is None else _signed(other.low, unit.low))
    moved = [_times(count, other) for count in counts]
    better = block.take(slice(None), _decoded(moved, block.codes, type))
    return other.where(better, unit), [new.where(better, fit) for new, fit in zip(moved, fits, strict=True)]


def _counted(fit: Fit, unit: Fit) -> Fit:
    """Whole numbers of a unit."""
    low = None if fit.low is None or unit.low is None else (fit.low / unit.low).round()
    return Fit((fit.step / unit.step).round(), low)


def _times(count: Fit, unit: Fit) -> Fit:
    low = None if count.low is None or unit.low is None else count.low * unit.low
    return Fit(count.step * unit.step, low)


def _signed(new: Tensor | None, old: Tensor) -> Tensor:
    """What keeps its sign; a unit is never 0."""
    assert new is not None
    return torch.where(new * old > 0, new, old)
