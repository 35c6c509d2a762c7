"""Rounding to GGUF's blocks: scales as ggml stores them, later columns making up for the error."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lorq.core.codes.gguf import GgufCodes, GgufGrid
from lorq.core.codes.gguf_blocks import BlockType
from lorq.core.linalg import damp
from lorq.core.rounding.gguf_again import again
from lorq.core.rounding.gguf_fit import Fit, begin_block, covering, halves, in_units, near, search
from lorq.core.rounding.gptq import column_blocks, feed_back
from lorq.core.stats import PreparedHessian

# Weights in hand at once: temporaries of 2.6 MB, and 67 MB for 25 trials where there is no library of kernels.
_AT_ONCE = 1 << 19
# How often blocks of several groups are gone through again.
_PASSES = 2


def gguf(target: Float[Tensor, "out in"], hessian: PreparedHessian, grid: GgufGrid) -> GgufCodes:
    """Codes in GGUF's blocks that keep ``tr[(T - Q) H (T - Q)^T]`` small by passing errors on.

    As `lorq.core.rounding.gptq`, against the values that ggml will decode. Where a group begins, its step ``s`` (and
    ``l``, which is subtracted) is fitted to what earlier errors have made of its columns, by the error that is left
    when feedback has done inside the group what it can:

        sum_i ((t_i - q_i) / U_ii)^2 = |(t - q) U_g^-1|^2,    q = s level(c) - l

    ``t_i`` on the left has the errors of the group's columns before ``i`` passed on, ``U_g`` is the group's block of
    ``U``. Some steps are tried, of both signs where levels may be negative; the best is refitted to its codes by least
    squares. In blocks of several groups these have whole numbers under a common scale. It is chosen where the block
    begins, so that all groups get near their best; a group chooses its whole numbers where it begins. Such blocks are
    then gone through again: each group, and the common scale, against what all the other columns leave.

    Columns with the largest diagonal of ``H`` come first, as far as blocks and groups stay together: the others make up
    for them.

    Args:
        target: what is to be rounded; unchanged.
        hessian: of the inputs.

    Raises:
        ValueError: if the damped Hessian is not positive definite, the type's blocks do not divide the width, or a
            scale does not fit float16.

    Source:
        GPTQ, arXiv:2210.17323, for the feedback; the blocks are ggml's, how their numbers are found is ours.
    """
    grid.check(*target.shape)
    type = grid.layout_of
    order, ordered = hessian.falling(type.block, type.group)
    parts, damped = [], damp(ordered.matrix, ordered.damping)
    for strip in target.split(max(1, _AT_ONCE // type.block)):
        columns = strip[:, order].T.contiguous()
        found = _first(columns, ordered.inverse_factor, type)
        for _ in range(_PASSES if type.packing else 0):
            again(columns, *found, damped, type)
        parts.append(_put_back(_as_codes(*found, grid), order).tensors())
    return grid.read({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, *target.shape)


def gguf_nearest(target: Float[Tensor, "out in"], grid: GgufGrid) -> GgufCodes:
    """The same without inputs: every block by itself, for the least squared error of its weights."""
    grid.check(*target.shape)
    type = grid.layout_of
    parts = [
        _as_codes(*_alone(strip.T.contiguous(), type), grid).tensors()
        for strip in target.reshape(-1, type.block).split(max(1, _AT_ONCE // type.block))
    ]
    whole = {name: torch.cat([part[name] for part in parts]).view(len(target), -1) for name in parts[0]}
    return grid.read(whole, *target.shape)


def _alone(target: Float[Tensor, "block rows"], type: BlockType) -> tuple[Tensor, list[Fit], list[Fit]]:
    """One block of each row, no errors passed on: codes, fits of groups, and the unit where a block has several."""
    groups = target.unflatten(0, (-1, type.group))
    if not type.packing:
        fit, codes = search(groups, None, halves(covering(groups, type)), halves, type)
        return codes.flatten(0, 1), [fit.at(0)], []
    unit, wanted = begin_block(target, None, type)
    stored = partial(in_units, unit=unit, type=type)
    found = [
        search(group[None], None, near(wanted.at(number), unit, type), stored, type)
        for number, group in enumerate(groups)
    ]
    return torch.cat([codes[0] for _, codes in found]), [fit.at(0) for fit, _ in found], [unit]


def _first(
    target: Float[Tensor, "in rows"], upper: Float[Tensor, "in in"], type: BlockType
) -> tuple[Tensor, list[Fit], list[Fit]]:
    """Column by column, errors passed on: codes, fits of groups, and units of blocks where a block has several."""
    columns = target.clone()
    codes = torch.empty_like(columns)
    fits: list[Fit] = []
    units: list[Fit] = []
    wanted: list[Fit] = []

    def begin(i: int) -> None:
        own = slice(i, i + type.group)
        weight, inner = columns[own].unsqueeze(0), upper[own, own].unsqueeze(0)
        stored: Callable[[Fit], Fit]
        if type.packing:
            stored = partial(in_units, unit=units[-1], type=type)
            trials = near(wanted[i // type.group], units[-1], type)
        else:
            stored, trials = halves, halves(covering(weight, type))
        fits.append(search(weight, inner, trials, stored, type)[0].at(0))

    def encode(i: int, column: Tensor) -> tuple[Tensor, Tensor]:
        if type.packing and i % type.block == 0:
            own = slice(i, i + type.block)
            unit, fit = begin_block(columns[own], upper[own, own], type)
            units.append(unit)
            wanted.extend(fit.at(group) for group in range(len(fit.step)))
        if i % type.group == 0:
            begin(i)
        code = fits[-1].encode(column, type)
        return code, fits[-1].decode(code, type)

    feed_back(columns, codes, upper, column_blocks(len(target), type.block), encode)
    return codes, fits, units


def _as_codes(codes: Float[Tensor, "in rows"], fits: list[Fit], units: list[Fit], grid: GgufGrid) -> GgufCodes:
    """What was found, row by row."""

    def of(parts: list[Fit]) -> Fit:
        lows = [part.low for part in parts if part.low is not None]
        return Fit(torch.stack([part.step for part in parts], 1), torch.stack(lows, 1) if lows else None)

    bytes_, all_ = codes.T.to(torch.uint8).contiguous(), of(fits)
    if not units:
        low = None if all_.low is None else -all_.low
        return GgufCodes(bytes_, all_.step.half(), None if low is None else low.half(), None, None, grid)
    unit = of(units)
    repeated = unit.map(lambda part: part.repeat_interleave(all_.step.shape[1] // part.shape[1], 1))
    scales = (all_.step / repeated.step).round_().short()
    minima = None if all_.low is None or repeated.low is None else (all_.low / repeated.low).round_().short()
    return GgufCodes(bytes_, unit.step.half(), None if unit.low is None else unit.low.half(), scales, minima, grid)


def _put_back(codes: GgufCodes, order: Int64[Tensor, "in"]) -> GgufCodes:
    """The same with columns, groups and blocks where they were before they were put in this order."""
    type = codes.format.layout_of
    blocks, groups = ((order[::size] // size).argsort() for size in (type.block, type.group))
    minimum, scales, minima = (
        None if part is None else part[:, own]
        for part, own in ((codes.minimum, blocks), (codes.scales, groups), (codes.minima, groups))
    )
    return GgufCodes(codes.codes[:, order.argsort()], codes.scale[:, blocks], minimum, scales, minima, codes.format)
