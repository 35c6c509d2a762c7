"""Grids against hand-made matrices, half-step error bounds, plain loops and exact recovery."""

import re

import pytest
import torch
from torch.testing import assert_close

from lorq.core.codes import (
    LEVEL_KINDS,
    Codebook,
    IntCodes,
    IntGrid,
    LevelGrid,
    VectorCodes,
    VectorGrid,
    level_values,
    levels,
)
from lorq.core.half import SMALLEST_SCALE

every_grid = pytest.mark.parametrize(
    "grid",
    [IntGrid(bits, 8, symmetric) for bits in range(1, 9) for symmetric in (False, True)],
    ids=lambda grid: f"{grid.bits}-{'symmetric' if grid.symmetric else 'asymmetric'}",
)


def rounded(weight, grid):
    """``(codes, dense)`` on the grid that covers each group."""
    scale, zero_point = (part.unsqueeze(-1) for part in grid.fit(weight))
    codes = grid.encode(grid.grouped(weight), scale, zero_point)
    return codes.flatten(1), grid.decode(codes, scale, zero_point).flatten(1)


def test_scale_and_zero_point_of_a_hand_made_matrix():
    weight = torch.tensor([[-1.0, 2.0, 0.5, 0.5], [-3.0, 0.0, 0.0, 1.5]])
    scale, zero_point = IntGrid(bits=2, group_size=2).fit(weight)
    # 0.5 / 3 is not a float16 number: the nearest one is stored.
    assert torch.equal(scale, torch.tensor([[1.0, 0.5 / 3], [1.0, 0.5]]).to(torch.float16).float())
    assert torch.equal(zero_point, torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    scale, zero_point = IntGrid(bits=3, group_size=2, symmetric=True).fit(weight * 3)
    assert torch.equal(scale, torch.tensor([[2.0, 0.5], [3.0, 1.5]]))
    assert torch.equal(zero_point, torch.full((2, 2), 4.0))


def test_one_bit_symmetric_has_zero_and_one_step_below():
    grid = IntGrid(bits=1, group_size=2, symmetric=True)
    codes, dense = rounded(torch.tensor([[-2.0, 1.0]]), grid)
    assert (grid.top, grid.middle) == (1, 1)
    assert torch.equal(codes, torch.tensor([[0.0, 1.0]]))
    assert torch.equal(dense, torch.tensor([[-2.0, 0.0]]))


@every_grid
def test_values_on_the_grid_come_back_bit_for_bit(grid, generator):
    low = 1 if grid.symmetric and grid.bits > 1 else 0
    codes = torch.randint(low, grid.top + 1, (6, 24), generator=generator).float()
    # Each group spans its range, and its zero lies inside, where the grid's zero always is.
    codes[:, ::8], codes[:, 7::8] = low, grid.top
    zero_point = torch.full((6, 3), grid.middle) if grid.symmetric else torch.arange(18).view(6, 3) % (grid.top + 1)
    scale = 2.0 ** torch.arange(-9, 9).view(6, 3)
    weight = grid.decode(grid.grouped(codes), scale.unsqueeze(-1), zero_point.float().unsqueeze(-1)).flatten(1)
    found_codes, dense = rounded(weight, grid)
    fitted, found_zero = grid.fit(weight)
    assert torch.equal(dense, weight)
    assert torch.equal(fitted, scale)
    assert torch.equal(found_codes, codes)
    assert torch.equal(found_zero, zero_point.float())


@every_grid
@pytest.mark.parametrize("shift", [0.0, 2.0, -2.0], ids=["around zero", "all positive", "all negative"])
def test_error_is_at_most_half_a_step_and_zero_is_exact(grid, shift, generator):
    if grid.bits == 1 and grid.symmetric:
        pytest.skip("the only positive value of a symmetric 1-bit grid is zero")
    weight = torch.randn(16, 64, generator=generator).clamp(-1.9, 1.9) + shift
    scale, zero_point = grid.fit(weight)
    codes, dense = rounded(weight, grid)
    assert torch.equal(scale.to(torch.float16).float(), scale)
    assert torch.equal(codes, codes.round()) and 0 <= codes.min() and codes.max() <= grid.top
    assert 0 <= zero_point.min() and zero_point.max() <= grid.top
    # A float16 scale is off by at most one part in 2^11, which a range of `top` steps adds up.
    allowed = (0.5 + grid.top * 2.0**-11 + 1e-5) * scale.repeat_interleave(grid.group_size, 1)
    assert ((weight - dense).abs() <= allowed).all()
    nothing = grid.encode(torch.zeros(16, 8, 1), scale.unsqueeze(-1), zero_point.unsqueeze(-1))
    assert not grid.decode(nothing, scale.unsqueeze(-1), zero_point.unsqueeze(-1)).any()


@every_grid
def test_encoding_takes_the_nearest_of_all_codes(grid, generator):
    # The range is half of the weights' reach, so that values outside it are encoded too.
    weight = torch.randn(8, 1, generator=generator, dtype=torch.float64)
    scale, zero_point = grid.span(weight.clamp(max=0) / 2 - 0.1, weight.clamp(min=0) / 2 + 0.1)
    codes = grid.encode(weight, scale, zero_point)
    every = grid.decode(torch.arange(grid.top + 1, dtype=torch.float64).expand(8, -1), scale, zero_point)  # (8, codes)
    assert torch.equal(codes, (every - weight).abs().argmin(1, keepdim=True).double())


def test_a_group_of_zeros_is_exact_with_the_smallest_scale():
    for symmetric in (False, True):
        grid = IntGrid(bits=3, group_size=4, symmetric=symmetric)
        scale, _ = grid.fit(torch.zeros(2, 8))
        assert torch.equal(scale, torch.full((2, 2), SMALLEST_SCALE))
        assert not rounded(torch.zeros(2, 8), grid)[1].any()


@every_grid
def test_a_power_of_two_on_a_row_moves_to_its_scale(grid, generator):
    weight = torch.randn(4, 16, generator=generator)
    factor = torch.tensor([[1.0], [8.0], [0.25], [2.0]])
    (scale, zero_point), (scaled, same) = grid.fit(weight), grid.fit(weight * factor)
    assert torch.equal(scaled, scale * factor) and torch.equal(same, zero_point)
    assert torch.equal(rounded(weight * factor, grid)[0], rounded(weight, grid)[0])


def test_groups_are_consecutive_columns_and_a_view():
    weight = torch.arange(12.0).view(2, 6)
    groups = IntGrid(bits=4, group_size=3).grouped(weight)
    assert torch.equal(groups[1], torch.tensor([[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]))
    assert groups.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("symmetric", [False, True], ids=["a zero point per group", "one zero point"])
def test_integer_codes_decode_by_the_formula_element_by_element(symmetric, generator):
    codes = torch.randint(0, 16, (5, 12), generator=generator, dtype=torch.uint8)
    scale = torch.rand(5, 3, generator=generator).to(torch.float16)
    zero = None if symmetric else torch.randint(0, 16, (5, 3), generator=generator, dtype=torch.uint8)
    expected = torch.empty(5, 12, dtype=torch.float64)
    for i in range(5):
        for j in range(12):
            middle = 8 if zero is None else int(zero[i, j // 4])
            expected[i, j] = (int(codes[i, j]) - middle) * float(scale[i, j // 4])
    # Five bits times a float16 fit float32: no rounding at all.
    stored = IntCodes(codes, scale, zero, IntGrid(4, 4, symmetric))
    assert torch.equal(stored.decode().double(), expected)
    assert torch.equal(stored.decode(torch.float64), expected)
    assert_close(stored.decode(torch.bfloat16).double(), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_stored_of_a_grid_decodes_to_what_the_grid_says(symmetric, generator):
    grid = IntGrid(3, 4, symmetric)
    weight = torch.randn(3, 8, generator=generator)
    codes, dense = rounded(weight, grid)
    scale, zero_point = grid.fit(weight)
    assert torch.equal(IntCodes.of(codes, scale, zero_point, grid).decode(), dense)


def test_a_group_size_that_does_not_divide_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="group_size 48 and width 100"):
        IntGrid(bits=4, group_size=48).fit(torch.ones(2, 100))


def test_a_scale_beyond_float16_is_refused_with_its_value():
    grid = IntGrid(bits=2, group_size=2)
    assert float(grid.fit(torch.tensor([[0.0, 3 * 65504.0]]))[0]) == 65504
    with pytest.raises(ValueError, match=re.escape("at most 65504), got 6.667e+04")):
        grid.fit(torch.tensor([[-1e5, 1e5]]))


@pytest.mark.parametrize("bits, vector, entries", [(2, 4, 256), (3, 2, 64), (4, 2, 256), (1, 8, 256), (2, 3, 64)])
def test_a_codebook_has_an_entry_for_every_code(bits, vector, entries):
    grid = VectorGrid(bits, vector, 8, 24, 48)
    assert grid.entries == entries
    grid.check(16, 96)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((3, 4, 8, 24, 96), "at most 8, got 3 * 4"),
        ((0, 4, 8, 24, 96), "got 0 * 4"),
        ((2, 1, 8, 24, 96), "at least 2 weights and take bits * vector bits, at most 8, got 2 * 1"),
        ((2, 4, 5, 24, 96), "5 rows and 24 columns must divide a weight of shape (16, 96) into vectors of 4"),
        ((2, 4, 0, 24, 96), "0 rows and 24 columns"),
        ((2, 4, 8, 36, 96), "8 rows and 36 columns must divide a weight of shape (16, 96)"),
        ((2, 4, 8, 0, 96), "8 rows and 0 columns"),
        ((2, 4, 8, -24, 96), "8 rows and -24 columns"),
        ((2, 4, 8, 6, 96), "8 rows and 6 columns must divide a weight of shape (16, 96) into vectors of 4"),
        ((2, 4, 8, 24, 36), "a multiple of a codebook's 24 columns that divides the width 96, got 36; choose 96"),
        ((2, 4, 8, 24, 72), "divides the width 96, got 72"),
        ((2, 4, 8, 24, 0), "divides the width 96, got 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_codebooks_that_do_not_tile_a_weight_are_refused_with_the_sizes(sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        VectorGrid(*sizes).check(16, 96)


@pytest.mark.parametrize("tiles, groups", [((1, 1), 1), ((2, 3), 1), ((3, 2), 2), ((6, 6), 6)], ids=str)
def test_vector_codes_decode_by_the_table_element_by_element(tiles, groups, generator):
    out, in_, vector, entries = 6, 24, 2, 16
    book = Codebook(
        torch.randint(-127, 128, (*tiles, entries, vector), generator=generator).to(torch.int8),
        (torch.rand(*tiles, generator=generator) + 0.1).to(torch.float16),
    )
    codes = torch.randint(0, entries, (out, in_ // vector), generator=generator).to(torch.uint8)
    scale = (torch.rand(out, groups, generator=generator) + 0.1).to(torch.float16)
    expected = torch.empty(out, in_, dtype=torch.float64)
    for i in range(out):
        for j in range(in_):
            tile = i // (out // tiles[0]), j // (in_ // tiles[1])
            entry = book.entries[(*tile, int(codes[i, j // vector]), j % vector)]
            expected[i, j] = float(entry) * float(book.scale[tile]) * float(scale[i, j // (in_ // groups)])
    stored = VectorCodes(codes, scale, book, VectorGrid(2, 2, out // tiles[0], in_ // tiles[1], in_ // groups))
    assert torch.equal(stored.decode(torch.float64), expected)
    # 8 bits times 11 fit float32, times 11 more are rounded once.
    assert torch.equal(stored.decode(), expected.float())
    assert stored.decode(torch.bfloat16).dtype == torch.bfloat16


# ---- fixed levels -----------------------------------------------------------------------------------------

level_grids = pytest.mark.parametrize(
    "grid", [LevelGrid(bits, kind) for bits in (2, 3, 4, 8) for kind in LEVEL_KINDS], ids=str
)
NF4 = (
    -1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0910, 0,
    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1,
)  # fmt: skip


@pytest.mark.parametrize("bits, expected", [(2, (-1, 0, 0.3379, 1)), (4, NF4)])
def test_normal_floats_are_those_of_qlora_and_loftq(bits, expected):
    assert_close(levels("normal-float", bits), torch.tensor(expected).float(), rtol=0, atol=6e-5)


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_rise_have_a_zero_and_one_more_on_one_side(bits):
    half = 2 ** (bits - 1)
    assert torch.equal(levels("integer", bits), torch.arange(-half, half).float())
    table = levels("normal-float", bits)
    assert table.shape == (2**bits,) and (table.diff() > 0).all()
    assert (table[0], table[half - 1], table[-1]) == (-1, 0, 1)


@level_grids
def test_codes_have_the_least_squared_error_of_all_whatever_the_scales_sign(grid, generator):
    weight = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    scale = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    scale[0], weight[1] = 1e-4, 0  # far outside the range; nothing
    codes = grid.encode(weight, scale)
    table = levels(grid.kind, grid.bits).double()
    errors = (weight.unsqueeze(-1) - table * scale.unsqueeze(-1)).square()
    assert torch.equal(codes, errors.argmin(-1).double())
    assert torch.equal(grid.decode(codes, scale), table[codes.long()] * scale)


@level_grids
def test_a_scale_of_zero_gives_a_code_and_nothing(grid):
    codes = grid.encode(torch.tensor([0.0]), torch.tensor([0.0]))
    assert float(grid.decode(codes, torch.tensor([1.0]))) == 0
    far = grid.encode(torch.tensor([1.0, -1.0]), torch.tensor([0.0, 0.0]))
    assert ((far >= 0) & (far < 2**grid.bits)).all()


@level_grids
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32], ids=str)
def test_levels_come_back_from_their_own_codes_of_any_type(grid, dtype):
    codes = torch.arange(2**grid.bits).to(dtype)
    values = level_values(codes, grid.kind, grid.bits)
    assert torch.equal(values, levels(grid.kind, grid.bits))
    assert torch.equal(grid.encode(values * -0.5, torch.tensor(-0.5)), codes.float())


@pytest.mark.parametrize(
    "kind, bits, message",
    [
        ("float", 4, "grid must be one of integer, normal-float, got 'float'"),
        ("integer", 1, "bits of a grid of levels must be 2 to 8, got 1"),
        ("normal-float", 9, "bits of a grid of levels must be 2 to 8, got 9"),
    ],
)
def test_unknown_levels_are_refused_with_what_is_known(kind, bits, message):
    with pytest.raises(ValueError, match=message):
        levels(kind, bits)


def test_levels_that_were_made_while_measuring_serve_training():
    levels.cache_clear()
    with torch.inference_mode():
        table = levels("normal-float", 3)
    assert not table.is_inference()
