"""The encoder of trellis codes in Triton: one program for each sequence of rows, which goes through a block's columns.

What a program keeps of a column is the least cost of every way into every step (native/trellis.hpp tells of it), in
memory of its own, which the device's cache holds; no way back is stored, it is found again from the costs.
"""

from typing import no_type_check

import torch
from torch import Tensor

from lorq.core.codes.trellis import trellis_values
from lorq.core.rounding.trellis import rows_around
from lorq.kernels.triton_codes import constexpr, jit, tl

# Windows whose costs are in registers at once.
_AT_ONCE = 1024


def encode(columns: Tensor, scale: Tensor, upper: Tensor, bits: int, window: int, length: int) -> tuple[Tensor, Tensor]:
    """`encode_trellis` of the rounding, whatever the device."""
    columns, scale, upper = columns.clone(memory_format=torch.contiguous_format), scale.contiguous(), upper.contiguous()
    count, rows = columns.shape
    codes, errors = torch.empty_like(columns, dtype=torch.uint8), torch.empty_like(columns)
    around, groups = rows_around(bits, window, length), 2 ** (window - bits)
    values = trellis_values(window, columns.device)
    costs = columns.new_empty(rows // length, max(length, 2 * around) + 1, groups)
    encode_sequences[(rows // length,)](
        columns, scale, upper, values, codes, errors, costs, count, rows, length, around,
        costs.shape[1], BITS=bits, GROUPS=groups, AT_ONCE=min(groups, _AT_ONCE), LENGTH=2 ** (length - 1).bit_length(),
        num_warps=8,
    )  # fmt: skip
    return codes, errors


@jit
@no_type_check
def _begin(costs, start, GROUPS: constexpr, AT_ONCE: constexpr):
    """From every window, or from those of given lower bits alone."""
    for first in range(0, GROUPS, AT_ONCE):
        g = first + tl.arange(0, AT_ONCE)
        tl.store(costs + g, tl.where((g == start) | (start < 0), 0.0, 1e30))
    tl.debug_barrier()


@jit
@no_type_check
def _step(before, target, scale, values, BITS: constexpr, GROUPS: constexpr, AT_ONCE: constexpr):
    """The least cost of every way over one row more, behind the costs before it."""
    for first in range(0, GROUPS, AT_ONCE):
        g = first + tl.arange(0, AT_ONCE)
        least = tl.full([AT_ONCE], 2e30, tl.float32)
        for h in tl.static_range(1 << BITS):
            state = h * GROUPS + g
            missed = target - scale * tl.load(values + state)
            least = tl.minimum(least, tl.load(before + (state >> BITS)) + missed * missed)
        tl.store(before + GROUPS + g, least)
    tl.debug_barrier()


@jit
@no_type_check
def _cheapest(costs, GROUPS: constexpr, AT_ONCE: constexpr):
    best = tl.full([], 0, tl.int32)
    least = tl.full([], 4e30, tl.float32)
    for first in range(0, GROUPS, AT_ONCE):
        some = tl.load(costs + first + tl.arange(0, AT_ONCE))
        here = tl.min(some, 0)
        best = tl.where(here < least, first + tl.argmin(some, 0), best).to(tl.int32)
        least = tl.minimum(least, here)
    return best


@jit
@no_type_check
def _before(costs, lower, target, scale, values, BITS: constexpr, GROUPS: constexpr):
    """The window of a row in the cheapest way to its lower bits."""
    state = tl.arange(0, 1 << BITS) * GROUPS + lower
    missed = target - scale * tl.load(values + state)
    return tl.argmin(tl.load(costs + (state >> BITS)) + missed * missed, 0).to(tl.int32) * GROUPS + lower


@jit
@no_type_check
def encode_sequences(columns, scale, upper, values, codes, errors, costs, count, rows, length, around, steps,
                     BITS: constexpr, GROUPS: constexpr, AT_ONCE: constexpr, LENGTH: constexpr):  # fmt: skip
    first = tl.program_id(0) * length
    costs += tl.program_id(0).to(tl.int64) * steps * GROUPS
    scale += first
    inside = tl.arange(0, LENGTH) < length
    of_rows = tl.arange(0, LENGTH)
    for i in range(count):
        at = i * rows + first
        column = columns + at
        # What windows have in common at the seam, from a search of some rows to both sides of it.
        _begin(costs, -1, GROUPS, AT_ONCE)
        for t in range(2 * around):
            row = (t + length - around) % length
            _step(costs + t * GROUPS, tl.load(column + row), tl.load(scale + row), values, BITS, GROUPS, AT_ONCE)
        lower = _cheapest(costs + 2 * around * GROUPS, GROUPS, AT_ONCE)
        for back in range(around):
            t = 2 * around - 1 - back
            row = (t + length - around) % length
            state = _before(
                costs + t * GROUPS, lower, tl.load(column + row), tl.load(scale + row), values, BITS, GROUPS
            )
            lower = state >> BITS
        tl.debug_barrier()
        _begin(costs, lower, GROUPS, AT_ONCE)
        for t in range(length):
            _step(costs + t * GROUPS, tl.load(column + t), tl.load(scale + t), values, BITS, GROUPS, AT_ONCE)
        for back in range(length):
            t = length - 1 - back
            state = _before(costs + t * GROUPS, lower, tl.load(column + t), tl.load(scale + t), values, BITS, GROUPS)
            tl.store(codes + at + t, (state & ((1 << BITS) - 1)).to(tl.uint8))
            tl.store(errors + at + t, tl.load(scale + t) * tl.load(values + state))
            lower = state >> BITS
        tl.debug_barrier()
        target, decoded = tl.load(column + of_rows, inside, 0.0), tl.load(errors + at + of_rows, inside, 0.0)
        missed = (target - decoded) / tl.load(upper + i * count + i)
        tl.debug_barrier()
        tl.store(errors + at + of_rows, missed, inside)
        for j in range(i + 1, count):
            later = columns + j * rows + first + of_rows
            tl.store(later, tl.load(later, inside, 0.0) - tl.load(upper + i * count + j) * missed, inside)
        tl.debug_barrier()
