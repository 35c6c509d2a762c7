"""Codes in GGUF's types: exact where they fit, by the gguf package's own reader."""

import math
from typing import get_args

import pytest
import torch
from gguf import GGML_QUANT_SIZES

from lorq.core.codes import IntCodes, IntGrid
from lorq.core.codes.gguf_blocks import TYPES
from lorq.core.low_rank import LowRank
from lorq.core.weight import QuantizedWeight
from lorq.exports.gguf_types import decoded, encode, exact_type, row_bytes, type_number
from lorq.exports.request import GgufType

# bits, group, symmetric -> the type that holds such codes whatever they are
EXACT = {
    (2, 32, True): "q4_0", (3, 64, True): "q4_0", (4, 32, True): "q4_0", (5, 128, True): "q5_0", (8, 32, True): "q8_0",
    (2, 64, False): "q4_0", (3, 32, False): "q4_0", (4, 64, False): "q5_0", (6, 32, False): "q8_0",
    (7, 32, False): "q8_0", (8, 32, False): None, (4, 16, True): None,
}  # fmt: skip


def codes(bits, group, symmetric, seed=0):
    """All codes and zero points occur."""
    generator = torch.Generator().manual_seed(seed)
    grid = IntGrid(bits, group, symmetric)
    numbers = torch.randint(grid.top + 1, (8, 128), generator=generator)
    numbers[:, 0], numbers[:, 1] = 0, grid.top
    scale = torch.rand(8, 128 // group, generator=generator).half()
    zero = torch.randint(grid.top + 1, scale.shape, generator=generator).float()
    zero[0], zero[1] = 0, grid.top
    return IntCodes.of(numbers.float(), scale, zero, grid)


@pytest.mark.parametrize(("bits", "group", "symmetric"), EXACT)
def test_integer_codes_are_a_type_exactly_where_it_has_room_for_them(bits, group, symmetric):
    weight = QuantizedWeight(codes(bits, group, symmetric))
    expected = EXACT[bits, group, symmetric]
    assert exact_type(weight) == expected
    if expected is not None:
        encoded = encode(weight, expected)
        assert encoded.changed == 0
        assert torch.equal(decoded(encoded.rows, expected), weight.dense())


def test_four_bits_with_zero_points_are_q4_1_where_its_minimum_is_exact():
    own = codes(4, 32, False)
    own.scale.copy_(2.0 ** torch.arange(8).unsqueeze(1))  # products with whole numbers up to 15 have 4 bits
    weight = QuantizedWeight(own)
    assert exact_type(weight) == "q4_1"
    assert encode(weight, "q4_1").changed == 0


@pytest.mark.parametrize("type_", ["q4_1", "q5_1"])
def test_asked_for_by_name_codes_stay_and_only_the_minimum_is_rounded(type_):
    weight = QuantizedWeight(codes(4, 64, False))
    encoded = encode(weight, type_)
    assert 0 < encoded.changed / encoded.whole < 2.0**-20  # half a step of float16 is 2^-11 of the minimum at most


def test_what_rounding_changes_is_measured():
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    encoded = encode(values, "q8_0")
    expected = (decoded(encoded.rows, "q8_0") - values).double().square().sum()
    assert math.isclose(encoded.changed, float(expected))
    assert math.isclose(encoded.whole, float(values.double().square().sum()))
    assert 1e-3 < math.sqrt(encoded.changed / encoded.whole) < 1e-2


def test_factors_and_types_are_what_the_gguf_package_says():
    weight = QuantizedWeight(codes(4, 32, True), LowRank(torch.zeros(8, 1).half(), torch.zeros(1, 128).half()))
    assert exact_type(weight) is None
    for name in ("f32", "f16", "bf16", *TYPES):
        block, size = GGML_QUANT_SIZES[type_number(name)]
        assert row_bytes(name, 256) == 256 // block * size
    assert get_args(GgufType) == ("f32", "f16", "bf16", *TYPES)
