"""The dense bit layout: against a big integer, against bytes written by hand, and its errors."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorq.core import packing
from lorq.core.packing import pack, pack_columns, packed_width, unpack, unpack_columns

WIDTHS = range(1, 9)
AWKWARD_COLS = (0, 1, 5, 31, 32, 33, 63, 64, 95, 97, 576)


def random_codes(rows: int, cols: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, cols), generator=generator, dtype=torch.uint8)


def reference_words(row: list[int], bits: int) -> list[int]:
    """One row as a single big integer, cut into words."""
    number = 0
    for i, code in enumerate(row):
        number |= code << i * bits
    words = []
    for k in range(-(-len(row) * bits // 32)):
        word = number >> 32 * k & 0xFFFFFFFF
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


def as_bytes(packed: Tensor) -> bytes:
    return bytes(packed.view(torch.uint8).flatten().tolist())


@given(bits=st.integers(1, 8), rows=st.integers(0, 4), cols=st.integers(0, 140), seed=st.integers(0, 2**16))
def test_any_width_and_shape_comes_back(bits: int, rows: int, cols: int, seed: int) -> None:
    codes = random_codes(rows, cols, bits, seed)
    before = codes.clone()
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_width(cols, bits))
    assert torch.equal(unpack(packed, bits, cols), codes)
    assert torch.equal(codes, before)


@pytest.mark.parametrize("cols", AWKWARD_COLS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_words_are_those_of_one_big_integer(bits: int, cols: int) -> None:
    codes = random_codes(3, cols, bits)
    expected = [reference_words(row, bits) for row in codes.tolist()]
    assert pack(codes, bits).tolist() == expected


GOLDEN = {
    # codes, least significant bit of the first byte first
    2: ([1, 2, 3, 0, 1], "39 01 00 00"),  # 00111001 = 0 3 2 1 from the left
    3: ([1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3], "d1 58 1f d1 00 00 00 00"),  # code 10 begins in word 0
    4: ([1, 2, 15, 0, 7], "21 0f 07 00"),
    8: ([0, 255, 128, 1, 2], "00 ff 80 01 02 00 00 00"),
}


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_bytes(bits: int) -> None:
    codes, expected = GOLDEN[bits]
    row = torch.tensor([codes], dtype=torch.uint8)
    assert as_bytes(pack(row, bits)) == bytes.fromhex(expected)
    words = torch.tensor(list(bytes.fromhex(expected)), dtype=torch.uint8).view(torch.int32)
    assert torch.equal(unpack(words[None], bits, len(codes)), row)


def test_a_three_bit_code_lies_in_two_words() -> None:
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 10] = 0b101  # bits 30, 31 and 32 of the row
    assert pack(codes, 3).tolist() == [[1 << 30, 1, 0]]
    codes[0, 10], codes[0, 21] = 0, 0b110  # bits 63, 64 and 65
    assert pack(codes, 3).tolist() == [[0, 0, 0b11]]


@pytest.mark.parametrize("bits", WIDTHS)
def test_columns_are_packed_rows_of_the_transpose(bits: int) -> None:
    codes = random_codes(77, 5, bits)
    packed = pack_columns(codes, bits)
    assert packed.shape == (packed_width(77, bits), 5) and packed.is_contiguous()
    assert packed.T.tolist() == [reference_words(column, bits) for column in codes.T.tolist()]
    assert torch.equal(unpack_columns(packed, bits, 77), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_slices_and_transposes_pack_like_their_copies(bits: int) -> None:
    wide = random_codes(40, 90, bits)
    view = wide.T[3:61:2, 1:34]
    assert torch.equal(pack(view, bits), pack(view.contiguous(), bits))
    packed = pack(wide, bits)
    assert torch.equal(unpack(packed[5:17:3], bits, 90), wide[5:17:3])
    assert torch.equal(unpack(packed.T.contiguous().T, bits, 90), wide)


@pytest.mark.parametrize("bits", WIDTHS)
def test_working_in_slices_changes_nothing(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(7, 100, bits)
    monkeypatch.setattr(packing, "_CODES_AT_ONCE", 96)
    assert torch.equal(unpack(pack(codes, bits), bits, 100), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_spare_bits_are_written_zero_and_read_as_nothing(bits: int) -> None:
    codes = random_codes(2, 33, bits)
    packed = pack(codes, bits)
    spare = 32 * packed.shape[1] - 33 * bits
    assert packed[0, -1].item() & 0xFFFFFFFF < 1 << 32 - spare
    packed[:, -1] |= -1 << 32 - spare
    assert torch.equal(unpack(packed, bits, 33), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_may_be_changed_without_changing_the_words(bits: int) -> None:
    packed = pack(random_codes(2, 64, bits), bits)
    before = packed.clone()
    unpack(packed, bits, 64).fill_(0)
    assert torch.equal(packed, before)


@pytest.mark.parametrize("bits", (-1, 0, 9, 32))
def test_widths_outside_one_to_eight_are_refused(bits: int) -> None:
    codes = torch.zeros(1, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"bits must be between 1 and 8, got {bits}"):
        pack(codes, bits)
    with pytest.raises(ValueError, match=f"bits must be between 1 and 8, got {bits}"):
        unpack(torch.zeros(1, 1, dtype=torch.int32), bits, 4)


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match="codes in a row must be at least 0, got -3"):
        packed_width(-3, 4)


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_that_does_not_fit_is_named(bits: int) -> None:
    codes = torch.zeros(2, 40, dtype=torch.uint8)
    codes[1, 39] = 2**bits
    limit = f"codes must be between 0 and {2**bits - 1} to fit in {bits} bits, got {2**bits}"
    with pytest.raises(ValueError, match=limit):
        pack(codes, bits)


@pytest.mark.parametrize("words", (2, 4))
def test_a_packed_width_that_does_not_match_is_refused(words: int) -> None:
    packed = torch.zeros(5, words, dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"32 codes of 3 bits take 3 words per row, .*\(5, {words}\)"):
        unpack(packed, 3, 32)


# The test run checks dtypes in the signatures; users run without that, so the functions' own checks are
# tested below the signature check.
def test_a_wrong_dtype_is_named() -> None:
    with pytest.raises(TypeError, match=r"codes must be torch.uint8, got torch.int64"):
        inspect.unwrap(pack)(torch.zeros(1, 4, dtype=torch.int64), 4)
    with pytest.raises(TypeError, match=r"packed must be torch.int32, got torch.uint8"):
        inspect.unwrap(unpack)(torch.zeros(1, 1, dtype=torch.uint8), 4, 4)


def test_a_big_endian_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing.sys, "byteorder", "big")
    with pytest.raises(ValueError, match="little-endian machine, this one is big"):
        pack(torch.zeros(1, 4, dtype=torch.uint8), 4)
