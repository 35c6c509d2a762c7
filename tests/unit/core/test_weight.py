"""The accounting of stored bits, and the matrix that the parts stand for."""

import itertools

import pytest
import torch
from helpers import layer_format, same_codes, solve_one

from lorq.core.codes import IntCodes, IntGrid
from lorq.core.low_rank import LowRank
from lorq.core.weight import QuantizedWeight, join_rows
from lorq.methods import Nearest

FORMATS = [
    layer_format(bits, group_size, symmetric, rank, factor_type)
    for bits, group_size, symmetric, (rank, factor_type) in itertools.product(
        range(1, 9), (16, 48), (False, True), ((0, "float16"), (3, "float16"), (3, "int8"))
    )
]


@pytest.mark.parametrize(
    "format, by_hand",
    [
        # 64 codes of 3 bits are 6 words; 7 zero points of 3 bits are 1 word, once for each of the 2 groups.
        (layer_format(3, 32, False), 7 * 6 * 32 + 7 * 2 * 16 + 2 * 1 * 32),
        (layer_format(3, 32, True), 7 * 6 * 32 + 7 * 2 * 16),
        (layer_format(3, 32, True, 2, "float16"), 7 * 6 * 32 + 7 * 2 * 16 + 2 * (7 + 64) * 16),
        (layer_format(3, 32, True, 2, "int8"), 7 * 6 * 32 + 7 * 2 * 16 + 2 * (7 + 64) * 8 + 2 * 2 * 16),
        (layer_format(8, 64, False, 1, "int8"), 7 * 64 * 8 + 7 * 16 + 2 * 32 + (7 + 64) * 8 + 2 * 16),
    ],
    ids=["zero points", "symmetric", "16-bit factors", "8-bit factors", "one group"],
)
def test_stored_bits_are_those_counted_by_hand(format, by_hand):
    assert format.stored_bits(7, 64) == by_hand


@pytest.mark.parametrize("out", [7, 32])
def test_stored_bits_are_those_of_the_packed_tensors(out, random_weight):
    for format in FORMATS:
        weight = random_weight(out, 48, format)
        tensors = weight.tensors()
        del tensors["weight_shape"]  # the header's business: not a part of the weight
        stored = 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert weight.format == format
        assert weight.stored_bits() == format.stored_bits(out, 48) == stored


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
        return sum(layer_format(bits, 128, True, rank, "float16").stored_bits(*shape) for shape in shapes)

    whole, part = int(rank), rank - int(rank)  # a mean over layers need not be whole; the count is linear in it
    average = ((1 - part) * stored(whole) + part * stored(whole + 1)) / sum(m * n for m, n in shapes)
    assert average == pytest.approx(expected, abs=5e-4)
    assert average == pytest.approx(paper, abs=0.021)  # the paper rounds, LQER's figure up to a tenth


def test_dense_is_codes_on_their_grid_plus_the_low_rank():
    codes = torch.tensor([[0, 3, 1, 2]], dtype=torch.uint8)
    scale = torch.tensor([[0.5, 2.0]], dtype=torch.float16)
    low_rank = LowRank(torch.tensor([[2.0]]).half(), torch.tensor([[1.0, 0.0, -1.0, 3.0]]).half())
    middle = QuantizedWeight(IntCodes(codes, scale, None, IntGrid(2, 2, symmetric=True)), low_rank)
    assert torch.equal(middle.dense(), torch.tensor([[1.0, 0.5, -4.0, 6.0]]))
    zero_point = torch.tensor([[0, 3]], dtype=torch.uint8)
    weight = QuantizedWeight(IntCodes(codes, scale, zero_point, IntGrid(2, 2)))
    assert torch.equal(weight.dense(), torch.tensor([[0.0, 1.5, -4.0, -2.0]]))


@pytest.mark.parametrize("grid", ["integer", "normal-float"])
def test_strips_of_rows_join_to_the_weight_as_it_is_solved_whole(grid, generator):
    weight, method = torch.randn(75, 48, generator=generator), Nearest(bits=3, group_size=16, grid=grid)
    whole = solve_one(method, weight)
    strips = weight.split(32)
    joined = join_rows([solve_one(method, strip) for strip in strips], [float(s.square().sum()) for s in strips])
    assert same_codes(joined, whole) and joined.format == whole.format
    assert joined.record.error_after == pytest.approx(whole.record.error_after, rel=1e-5)
    assert joined.record.error_before == pytest.approx(whole.record.error_before, rel=1e-5)


def test_strips_that_end_within_a_word_of_zero_points_are_refused(generator):
    parts = [solve_one(Nearest(bits=3, group_size=16), torch.randn(25, 48, generator=generator)) for _ in range(3)]
    with pytest.raises(ValueError, match=r"a multiple of 32 rows .* weight_zero_point .* \[\(25, 48\), \(25, 48\), "):
        join_rows(parts, [1.0, 1.0, 1.0])
