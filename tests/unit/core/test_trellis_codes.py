"""Trellis codes against brute force over all streams, windows read bit by bit, and the rate-distortion bound."""

import itertools

import pytest
import torch
from helpers import prepared
from torch.testing import assert_close

from lorq.core.codes import TrellisGrid
from lorq.core.codes.trellis import (
    VALUES_DEVIATION,
    TrellisCodes,
    pack_streams,
    stream_windows,
    trellis_values,
)
from lorq.core.rounding.trellis import encode_trellis, encode_trellis_reference, trellis
from lorq.core.stats import PreparedHessian, output_energy
from lorq.kernels.cpu_trellis import encode

ALL_BITS = pytest.mark.parametrize("bits", range(1, 7))


def codes_of(generator, rows, columns, bits):
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


def windows_of(codes, bits, window, length):
    """By strings of digits, as docs/format.md has it."""
    found = torch.empty(codes.shape, dtype=torch.int32)
    for first, column in itertools.product(range(0, len(codes), length), range(codes.shape[1])):
        ring = "".join(f"{int(code):0{bits}b}" for code in codes[first : first + length, column])
        for row in range(length):
            end = (row + 1) * bits + len(ring)
            found[first + row, column] = int((ring + ring)[end - window : end], 2)
    return found


@ALL_BITS
@pytest.mark.parametrize("window", [10, 12, 16])
def test_windows_are_the_last_bits_of_a_ring_of_codes(bits, window, generator):
    codes = codes_of(generator, 96, 3, bits)
    packed = pack_streams(codes, bits)
    assert packed.shape == (6, bits, 3)
    windows = torch.stack(stream_windows(packed, bits, window, 48), 1).flatten(0, 1)
    assert torch.equal(windows, windows_of(codes, bits, window, 48))


@ALL_BITS
def test_words_have_the_highest_bit_of_the_first_code_first(bits, generator):
    codes = codes_of(generator, 16, 2, bits)
    for column in range(2):
        string = "".join(f"{int(code):0{bits}b}" for code in codes[:, column])
        words = [int(string[i : i + 16], 2) for i in range(0, len(string), 16)]
        assert (pack_streams(codes, bits)[0, :, column].int() & 0xFFFF).tolist() == words


def test_values_are_byte_sums_of_a_product_and_have_the_stated_deviation():
    values = trellis_values(16)
    for n in (0, 1, 77, 40000, 65535):
        product = (n * 0xC49087BF) % 2**32
        assert values[n] == (sum(product.to_bytes(4, "little")) - 510) / 128
    assert abs(float(values.std()) / VALUES_DEVIATION - 1) < 0.01 and abs(float(values.mean())) < 0.02


@pytest.mark.parametrize("encoder", [encode_trellis_reference, encode], ids=["reference", "C++"])
@pytest.mark.parametrize(("bits", "window"), [(1, 8), (2, 8), (3, 8)])
def test_no_change_of_two_neighbouring_codes_lowers_the_cost(encoder, bits, window, generator):
    length = 32
    target, scale = torch.randn(1, length, generator=generator), torch.rand(length, generator=generator) + 0.5
    codes, errors = encoder(target, scale, torch.ones(1, 1), bits, window, length)
    values = trellis_values(window)

    def cost(column):
        got = values[windows_of(column[:, None], bits, window, length)[:, 0]]
        return float((target[0] - scale * got).square().sum())

    best = cost(codes[0])
    assert best == pytest.approx(float(errors.square().sum()), rel=1e-4)
    # The bits at the seam, the last of all, were chosen before the rest.
    for row in range(0, length - window // bits - 2, 3):
        for pair in itertools.product(range(2**bits), repeat=2):
            other = codes[0].clone()
            other[row : row + 2] = torch.tensor(pair, dtype=torch.uint8)
            assert cost(other) >= best - 1e-4


def test_a_tiny_sequence_is_about_as_good_as_the_best_of_all(generator):
    bits, window, length = 1, 8, 16
    values, scale = trellis_values(window), torch.ones(16)
    every = torch.arange(2**16)
    streams = torch.stack([every >> (15 - row) & 1 for row in range(16)], 1).to(torch.uint8)
    found = windows_of_many(streams, window)
    targets = torch.randn(6, 16, generator=generator)
    _, errors = encode_trellis(targets, scale, torch.eye(6), bits, window, length)
    least = torch.stack([(values[found] - target).square().sum(1).amin() for target in targets])
    got = errors.square().sum(1)
    assert bool((got >= least - 1e-4).all()) and float(got.sum()) <= 1.25 * float(least.sum())


def windows_of_many(streams, window):
    total = torch.zeros(streams.shape, dtype=torch.long)
    for back in range(window):
        total += streams.long().roll(back, 1) << back
    return total


@pytest.mark.parametrize(("bits", "limit"), [(1, 0.30), (2, 0.084), (3, 0.0205), (4, 0.0058)])
def test_white_weights_cost_little_more_than_any_code_must(bits, limit, generator):
    """The bound is 4^-bits; values that do not know of each other reach 0.36, 0.1175, 0.0345, 0.0095 (Lloyd-Max)."""
    target = torch.randn(256, 48, generator=generator)
    grid = TrellisGrid.of(256, bits, 12)
    codes = trellis(target, prepared(torch.eye(48)), grid)
    assert float((target - codes.decode()).square().mean()) < limit


@ALL_BITS
def test_c_and_reference_choose_the_same_codes_and_pass_on_the_same_errors(bits, generator):
    columns = torch.randn(5, 64, generator=generator) * 0.02
    scale = torch.rand(64, generator=generator) * 0.01 + 0.01
    upper = torch.eye(5) + torch.rand(5, 5, generator=generator).triu(1)
    given = columns.clone()
    codes, errors = encode(columns, scale, upper, bits, 10, 32)
    expected, expected_errors = encode_trellis_reference(columns, scale, upper, bits, 10, 32)
    assert torch.equal(columns, given)
    assert torch.equal(codes, expected)
    assert_close(errors, expected_errors, rtol=1e-4, atol=1e-6)


def test_feedback_lowers_the_output_error_and_white_inputs_leave_nothing_to_feed_back(correlated, generator):
    weight = torch.randn(64, 48, generator=generator) * 0.03
    x = correlated(400, 48)
    hessian = x.T @ x / 400
    grid = TrellisGrid.of(64, 2, 12)
    passed, alone = trellis(weight, prepared(hessian), grid), trellis(weight, prepared(torch.eye(48)), grid)
    one_by_one, _ = encode_trellis(weight.T.contiguous(), alone.scale[:, 0].float(), torch.eye(48), 2, 12, grid.length)
    assert torch.equal(TrellisCodes.of(one_by_one.T.contiguous(), alone.scale, grid).packed, alone.packed)
    energies = [float(output_energy(weight - codes.decode(), hessian)) for codes in (passed, alone)]
    assert energies[0] < 0.8 * energies[1]


def test_rows_that_cost_more_get_the_better_codes_of_what_there_is(generator):
    weight, rows = torch.randn(64, 40, generator=generator), torch.ones(64)
    rows[::2] = 25.0
    grid = TrellisGrid.of(64, 2, 12)
    plain, weighed = (trellis(weight, prepared(torch.eye(40)), grid, given) for given in (None, rows))
    before, after = ((weight - codes.decode()).square().mean(1) for codes in (plain, weighed))
    assert float((rows * after).sum()) < 0.9 * float((rows * before).sum())
    assert float(after[1::2].sum()) > float(before[1::2].sum())
    alike = trellis(weight, prepared(torch.eye(40)), grid, torch.full((64,), 4.0))
    assert torch.equal(alike.packed, plain.packed) and torch.equal(alike.scale, plain.scale)


def test_a_height_that_fills_no_tile_has_rows_that_are_not_there(generator):
    weight = torch.randn(21, 8, generator=generator)
    codes = trellis(weight, prepared(torch.eye(8)), TrellisGrid.of(21, 4, 12))
    assert codes.shape == (21, 8) and codes.packed.shape == (2, 4, 8)
    assert float((weight - codes.decode()).square().mean()) < 0.012


def test_decoding_in_strips_is_decoding_at_once(generator, monkeypatch):
    codes = torch.randint(8, (112, 40), generator=generator, dtype=torch.uint8)
    whole = TrellisCodes.of(codes, torch.rand(100, 1, generator=generator) + 0.1, TrellisGrid(3, 10, 16))
    expected = whole.decode()
    monkeypatch.setattr("lorq.core.codes.trellis._STRIP", 2 * 16 * 40)
    assert torch.equal(whole.decode(), expected)


def test_rows_that_are_nothing_stay_nothing(generator):
    weight = torch.randn(48, 32, generator=generator) * 0.02
    weight[5], weight[20], weight[33:] = 0.0, weight[20] * 1e-4, 0.0
    codes = trellis(weight, PreparedHessian(torch.eye(32), 0.0), TrellisGrid(3, 10, 48))
    assert not codes.decode()[[5, 20, *range(33, 48)]].any()
    rest = codes.decode()[:5] - weight[:5]
    assert rest.norm() < 0.25 * weight[:5].norm()


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_rows_whose_peaks_no_code_reaches_get_longer_scales_and_the_others_do_not(bits, generator):
    weight = torch.randn(48, 192, generator=generator)
    same = trellis(weight, PreparedHessian(torch.eye(192), 0.0), TrellisGrid(bits, 12, 48))
    # A constant, rotated in blocks of 64 columns: 8 deviations at the first of each, where codes reach 3.5.
    weight[5], weight[5, ::64] = 0.0, 8.0
    codes = trellis(weight, PreparedHessian(torch.eye(192), 0.0), TrellisGrid(bits, 12, 48))
    missed = (codes.decode() - weight).square().sum(1) / weight.square().sum(1)
    assert missed[5] < 0.1 and missed.median() < 2 * 4.0**-bits  # 0.34 of a constant before
    others = torch.arange(48) != 5
    assert torch.equal(codes.scale[others], same.scale[others])


def test_rows_that_grow_have_scales_that_grow(generator):
    weight = torch.randn(32, 24, generator=generator)
    grid = TrellisGrid.of(32, 3, 12)
    codes, larger = (trellis(weight * factor, prepared(torch.eye(24)), grid) for factor in (1.0, 4.0))
    assert torch.equal(larger.packed, codes.packed) and torch.equal(larger.scale, 4 * codes.scale)


@pytest.mark.parametrize(
    ("grid", "rule"),
    [
        (TrellisGrid(7, 16, 16), "1 to 6 bits.*got 7 bits"),
        (TrellisGrid(3, 17, 16), "16 at most, got 3 bits and a window of 17"),
        (TrellisGrid(4, 7, 16), "window of 4 more at least.*got 4 bits and a window of 7"),
        (TrellisGrid(3, 12, 24), "multiple of 16 rows.*height 100, rounded up to 112.*got 24"),
        (TrellisGrid(3, 12, 64), "divides the height 100, rounded up to 112.*got 64"),
    ],
)
def test_sizes_that_no_stream_has_are_refused(grid, rule):
    with pytest.raises(ValueError, match=rule):
        grid.check(100, 8)
