"""Stored factors and the accounting of stored bits."""

import itertools
import re

import pytest
import torch
from torch.testing import assert_close

from lorq.linear import pack_weight
from lorq.weight import LayerFormat, LowRank, QuantizedWeight, store_factors

FORMATS = [
    LayerFormat(bits, group_size, symmetric, rank, factor_bits)
    for bits, group_size, symmetric, (rank, factor_bits) in itertools.product(
        range(1, 9), (16, 48), (False, True), ((0, 16), (3, 16), (3, 8))
    )
]


@pytest.mark.parametrize(
    "format, by_hand",
    [
        # 64 codes of 3 bits are 6 words; 7 zero points of 3 bits are 1 word, once for each of the 2 groups.
        (LayerFormat(3, 32, False), 7 * 6 * 32 + 7 * 2 * 16 + 2 * 1 * 32),
        (LayerFormat(3, 32, True), 7 * 6 * 32 + 7 * 2 * 16),
        (LayerFormat(3, 32, True, 2, 16), 7 * 6 * 32 + 7 * 2 * 16 + 2 * (7 + 64) * 16),
        (LayerFormat(3, 32, True, 2, 8), 7 * 6 * 32 + 7 * 2 * 16 + 2 * (7 + 64) * 8 + 2 * 2 * 16),
        (LayerFormat(8, 64, False, 1, 8), 7 * 64 * 8 + 7 * 16 + 2 * 32 + (7 + 64) * 8 + 2 * 16),
    ],
    ids=["zero points", "symmetric", "16-bit factors", "8-bit factors", "one group"],
)
def test_stored_bits_are_those_counted_by_hand(format, by_hand):
    assert format.stored_bits(7, 64) == by_hand


@pytest.mark.parametrize("out", [7, 32])
def test_stored_bits_are_those_of_the_packed_tensors(out, random_weight):
    for format in FORMATS:
        weight = random_weight(out, 48, format)
        tensors = pack_weight(weight)
        del tensors["weight_shape"]  # the header's business: not a part of the weight
        stored = 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert weight.format == format
        assert weight.stored_bits() == format.stored_bits(out, 48) == stored
        assert weight.bits_per_weight == stored / (out * 48)


# (rows, columns) of the seven linears of a LLaMA block.
LLAMA_7B = 4 * [(4096, 4096)] + 2 * [(11008, 4096)] + [(4096, 11008)]
LLAMA_13B = 4 * [(5120, 5120)] + 2 * [(13824, 5120)] + [(5120, 13824)]


@pytest.mark.parametrize(
    "shapes, bits, rank, expected, paper",
    [
        (LLAMA_7B, 2, 39, 2 + 16 / 128 + 0.241, 2 + 16 / 128 + 0.24),
        (LLAMA_7B, 2, 256, 2 + 16 / 128 + 1.580, 2 + 16 / 128 + 1.60),
        (LLAMA_13B, 4, 64, 4.441, 4.44),
        (LLAMA_13B, 4, 21.9, 4.233, 4.24),
    ],
    ids=["7B FLRQ", "7B LQER", "13B fixed rank", "13B flexible rank"],
)
def test_the_papers_bits_per_weight_come_out(shapes, bits, rank, expected, paper):
    def stored(rank):
        return sum(LayerFormat(bits, 128, True, rank, 16).stored_bits(*shape) for shape in shapes)

    whole, part = int(rank), rank - int(rank)  # a mean over layers need not be whole; the count is linear in it
    average = ((1 - part) * stored(whole) + part * stored(whole + 1)) / sum(m * n for m, n in shapes)
    assert average == pytest.approx(expected, abs=5e-4)
    assert average == pytest.approx(paper, abs=0.021)  # the paper rounds, LQER's figure up to a tenth


def factors(generator, out=20, rank=4, in_=30):
    # Three decades between the vectors, and very unequal sides, as a sketch gives them.
    left = torch.randn(out, rank, generator=generator) * torch.tensor([[300.0, 10.0, 1.0, 0.3]])
    right = torch.randn(rank, in_, generator=generator) * 1e-3
    return left, right


def test_sixteen_bit_factors_are_balanced_and_within_float16s_rounding(generator):
    left, right = factors(generator)
    before = left.clone(), right.clone()
    stored = store_factors(left, right, bits=16)
    assert stored.left.dtype == stored.right.dtype == torch.float16
    assert stored.left_scale is None and stored.right_scale is None and stored.rank == 4
    assert_close(stored.left.abs().amax(0), stored.right.abs().amax(1), rtol=2**-10, atol=0)
    for r in range(4):  # two factors, each off by at most 2^-11 of itself
        pair = stored.left[:, r : r + 1].double() @ stored.right[r : r + 1].double()
        assert_close(pair, torch.outer(left[:, r], right[r]).double(), rtol=2.1 * 2**-11, atol=1e-9)
    assert torch.equal(left, before[0]) and torch.equal(right, before[1])


def test_eight_bit_factors_are_within_half_a_step_of_each_vector(generator):
    left, right = factors(generator)
    stored = store_factors(left, right, bits=8)
    assert stored.left.dtype == stored.right.dtype == torch.int8
    assert stored.left_scale.dtype == stored.right_scale.dtype == torch.float16
    assert torch.equal(stored.left.abs().amax(0), torch.full((4,), 127, dtype=torch.int8))
    assert torch.equal(stored.right.abs().amax(1), torch.full((4,), 127, dtype=torch.int8))
    balance = (right.double().abs().amax(1) / left.double().abs().amax(0)).sqrt()
    found_left, found_right = stored.factors(torch.float64)
    # Half a step, and what float32 loses while balancing.
    assert ((found_left - left * balance).abs() <= 0.501 * stored.left_scale.double()).all()
    off = (found_right - right / balance[:, None]).abs()
    assert (off <= 0.501 * stored.right_scale.double()[:, None]).all()


@pytest.mark.parametrize("bits, tolerance", [(16, 2**-10), (8, 0.02)], ids=["16", "8"])
def test_the_product_survives_storage(bits, tolerance, generator):
    left, right = factors(generator)
    stored = store_factors(left, right, bits=bits)
    exact = left.double() @ right.double()
    error = torch.linalg.matrix_norm(stored.dense(torch.float64) - exact) / torch.linalg.matrix_norm(exact)
    assert float(error) < tolerance


def test_powers_of_two_are_stored_exactly_in_sixteen_bits():
    left, right = torch.tensor([[4.0], [-2.0]]), torch.tensor([[0.25, 0.125, 0.0]])
    stored = store_factors(left, right, bits=16)
    assert torch.equal(stored.dense(), left @ right)
    assert float(stored.left.abs().max()) == float(stored.right.abs().max()) == 1


@pytest.mark.parametrize("bits", [8, 16])
def test_vectors_of_zeros_stay_zero(bits, generator):
    left, right = factors(generator)
    left[:, 1], right[2], left[:, 3], right[3] = 0, 0, 0, 0
    dense = store_factors(left, right, bits=bits).dense(torch.float64)
    assert torch.isfinite(dense).all()
    assert_close(dense, torch.outer(left[:, 0], right[0]).double(), rtol=0, atol=0.01 * float(dense.abs().max()))
    nothing = store_factors(torch.zeros(3, 2), torch.zeros(2, 5), bits=bits)
    assert torch.equal(nothing.dense(), torch.zeros(3, 5))


@pytest.mark.parametrize("bits", [8, 16])
def test_rank_zero_stores_nothing(bits):
    assert store_factors(torch.zeros(5, 0), torch.zeros(0, 6), bits=bits) is None


@pytest.mark.parametrize("bits", [8, 16])
def test_balance_keeps_a_large_and_a_small_side_inside_float16(bits):
    stored = store_factors(torch.tensor([[1e9], [5e8]]), torch.tensor([[1e-9, -1e-9]]), bits=bits)
    assert_close(stored.dense(), torch.tensor([[1.0, -1.0], [0.5, -0.5]]), rtol=0.01, atol=0)


@pytest.mark.parametrize("value, shown", [(1e6, "1e+06"), (float("nan"), "nan"), (float("inf"), "nan")], ids=str)
def test_factors_that_do_not_fit_float16_are_refused_with_the_value(value, shown):
    with pytest.raises(ValueError, match=re.escape(f"at most 65504), got {shown}")):
        store_factors(torch.full((2, 1), value), torch.full((1, 3), value), bits=16)


def test_other_widths_of_factors_are_refused():
    with pytest.raises(ValueError, match="factor_bits must be 8 or 16, got 4"):
        store_factors(torch.ones(2, 1), torch.ones(1, 2), bits=4)


def test_low_rank_multiplies_its_scales_in():
    part = LowRank(
        left=torch.tensor([[1, -2], [3, 4]], dtype=torch.int8),
        right=torch.tensor([[5, 0, 1], [0, 7, -1]], dtype=torch.int8),
        left_scale=torch.tensor([0.5, 2.0], dtype=torch.float16),
        right_scale=torch.tensor([4.0, 0.25], dtype=torch.float16),
    )
    left, right = part.factors()
    assert torch.equal(left, torch.tensor([[0.5, -4.0], [1.5, 8.0]]))
    assert torch.equal(right, torch.tensor([[20.0, 0.0, 4.0], [0.0, 1.75, -0.25]]))
    assert torch.equal(part.dense(), torch.tensor([[10.0, -7.0, 3.0], [30.0, 14.0, 4.0]]))


def test_dense_is_codes_on_their_grid_plus_the_low_rank():
    codes = torch.tensor([[0, 3, 1, 2]], dtype=torch.uint8)
    scale = torch.tensor([[0.5, 2.0]], dtype=torch.float16)
    low_rank = LowRank(torch.tensor([[2.0]]).half(), torch.tensor([[1.0, 0.0, -1.0, 3.0]]).half())
    middle = QuantizedWeight(codes, scale, None, bits=2, low_rank=low_rank)
    assert torch.equal(middle.dense(), torch.tensor([[1.0, 0.5, -4.0, 6.0]]))
    zero_point = torch.tensor([[0, 3]], dtype=torch.uint8)
    assert torch.equal(QuantizedWeight(codes, scale, zero_point, 2).dense(), torch.tensor([[0.0, 1.5, -4.0, -2.0]]))
