"""Codes to machine words and back: the dense bit layout, any width from 1 to 8 bits.

A row of ``n`` codes of ``bits`` bits is one string of ``n * bits`` bits, least significant bit first, cut into int32
words. Code ``i`` occupies the bits ``i * bits`` to ``i * bits + bits - 1`` of its row, which may be in two words. Every
row begins a new word and takes ``ceil(n * bits / 32)`` of them; the spare bits at its end are zero. Thirty-two codes
fill exactly ``bits`` words, and eight codes ``bits`` bytes. docs/format.md draws it and tells whose layout it is.

How it is fast: no loop over codes. As many codes as share whole bytes (eight at 3 bits, two at 4) sit in one integer
with one byte of room for each, and are moved to their bytes by halves: shift, or, mask. Three such steps place eight
codes. The integers are then viewed as bytes, which are the codes.
"""

import math
import sys

import torch
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor

# Of what a folder stores: shape and dtype of every tensor, by local name.
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
# An integer with one byte of room for each of 1, 2, 4 or 8 codes.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Codes that ``unpack`` has in hand at once on a CPU: its scratch tensors then stay in the cache and off the
# page-fault path (a third of the time at 3 bits, 4096 x 4096). Other devices pay per launch, not per byte.
_CODES_AT_ONCE = 1 << 21


def stored_bits(layout: Layout) -> int:
    """Bits of all tensors of a layout."""
    return sum(8 * dtype.itemsize * math.prod(shape) for shape, dtype in layout.values())


def packed_width(cols: int, bits: int) -> int:
    """Words of one packed row: ``ceil(cols * bits / 32)``.

    Raises:
        ValueError: if ``bits`` or ``cols`` is out of range.

    Example:
        >>> packed_width(576, 3), packed_width(33, 3)
        (54, 4)
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be between 1 and 8, got {bits}")
    if cols < 0:
        raise ValueError(f"the number of codes in a row must be at least 0, got {cols}")
    return (cols * bits + 31) // 32


def pack(codes: UInt8[Tensor, "rows cols"], bits: int) -> Int32[Tensor, "rows words"]:
    """Every row of ``codes``, 0 .. 2^bits - 1, as ``packed_width(cols, bits)`` words.

    Raises:
        TypeError: if ``codes`` is not uint8.
        ValueError: if ``bits`` is outside 1 to 8, or a code does not fit in ``bits`` bits.

    Example:
        >>> codes = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
        >>> bin(pack(codes, 3).item())  # 4, 3, 2, 1 from the left: the first code in the lowest bits
        '0b100011010001'
    """
    rows, cols = codes.shape
    words = packed_width(cols, bits)
    _require_dtype(codes, torch.uint8, "codes")
    if codes.numel() and (largest := int(codes.max())) >> bits:
        raise ValueError(f"codes must be between 0 and {2**bits - 1} to fit in {bits} bits, got {largest}")
    blocks = (cols + 31) // 32
    padded = codes.new_zeros(rows, blocks * 32)
    padded[:, :cols] = codes
    integers = _close_up(padded.flatten().view(_INTEGERS[_codes_per_integer(bits)]), bits)
    if 8 % bits == 0:  # one byte each
        packed = integers.to(torch.uint8).view(torch.int32)
    else:
        packed = _integers_to_words(integers.view(rows * blocks, 4), bits)
    return packed.view(rows, blocks * bits)[:, :words].contiguous()


def unpack(packed: Int32[Tensor, "rows words"], bits: int, cols: int) -> UInt8[Tensor, "rows {cols}"]:
    """The codes of ``pack``, in memory of their own. Spare bits at the end of a row are ignored.

    Raises:
        TypeError: if ``packed`` is not int32.
        ValueError: if ``bits`` is outside 1 to 8, or the width of ``packed`` does not match ``cols``.

    Example:
        >>> unpack(torch.tensor([[0b100_011_010_001]], dtype=torch.int32), bits=3, cols=4)
        tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    """
    rows, words = packed.shape
    _require_dtype(packed, torch.int32, "packed")
    if words != packed_width(cols, bits):
        raise ValueError(
            f"{cols} codes of {bits} bits take {packed_width(cols, bits)} words per row, "
            f"got packed words of shape {(rows, words)}; check bits and the stored weight shape"
        )
    blocks = (cols + 31) // 32
    flat = torch.nn.functional.pad(packed, (0, blocks * bits - words)).flatten()
    codes = torch.empty(rows * blocks * 32, dtype=torch.uint8, device=packed.device)
    at_once = _CODES_AT_ONCE if packed.device.type == "cpu" else max(codes.numel(), 32)
    for start in range(0, codes.numel(), at_once):
        integers = codes[start : start + at_once].view(_INTEGERS[_codes_per_integer(bits)])
        words_at = flat[start // 32 * bits : (start + at_once) // 32 * bits]
        if 8 % bits == 0:  # one byte each
            integers.copy_(words_at.view(torch.uint8))
        else:
            _words_to_integers(words_at.view(-1, bits), out=integers.view(-1, 4))
        _spread(integers, bits)
    return codes.view(rows, blocks * 32)[:, :cols].contiguous()


def pack_columns(codes: UInt8[Tensor, "rows cols"], bits: int) -> Int32[Tensor, "words cols"]:
    """Pack down the columns: ``pack(codes.T).T``, as compressed-tensors stores zero points; errors are those of it.

    Example:
        >>> zero_point = torch.tensor([[1, 7], [2, 7], [3, 7]], dtype=torch.uint8)
        >>> pack_columns(zero_point, 4)
        tensor([[ 801, 1911]], dtype=torch.int32)
    """
    return pack(codes.T, bits).T.contiguous()


def unpack_columns(packed: Int32[Tensor, "words cols"], bits: int, rows: int) -> UInt8[Tensor, "{rows} cols"]:
    """The codes of ``pack_columns``, of which every column held ``rows``. Errors are those of ``unpack``."""
    return unpack(packed.T, bits, rows).T.contiguous()


def unpack_columns_at(
    packed: Int32[Tensor, "words cols"], bits: int, rows: Int64[Tensor, "count"]
) -> UInt8[Tensor, "count cols"]:
    """The codes of ``pack_columns`` in some rows alone, in any order; bits 1 to 8.

    Example:
        >>> packed = pack_columns(torch.tensor([[1, 7], [2, 7], [3, 0]], dtype=torch.uint8), 3)
        >>> unpack_columns_at(packed, 3, torch.tensor([2, 0]))
        tensor([[3, 0],
                [1, 7]], dtype=torch.uint8)
    """
    first = rows * bits
    word, shift = first // 32, (first % 32).unsqueeze(1)
    low = packed.index_select(0, word).to(torch.int64).bitwise_and_(0xFFFFFFFF) >> shift
    # Of a code that ends in its word the next one's bits lie above the mask.
    high = packed.index_select(0, (word + 1).clamp(max=len(packed) - 1)).to(torch.int64) << (32 - shift)
    return (low | high).bitwise_and_(2**bits - 1).to(torch.uint8)


def _require_dtype(tensor: Tensor, dtype: torch.dtype, name: str) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}; convert it with .to({dtype})")
    if sys.byteorder != "little":
        raise ValueError(f"packing views words as bytes on a little-endian machine, this one is {sys.byteorder}")


def _codes_per_integer(bits: int) -> int:
    """The fewest codes that fill whole bytes: 8 / bits of one byte, else eight codes of ``bits`` bytes."""
    return 8 // bits if 8 % bits == 0 else 8


def _steps(bits: int) -> list[tuple[int, int, int]]:
    """(shift, low, high) of each halving step, the widest move first.

    A step moves the upper half of the codes in every field to the middle of its room: ``low`` masks the codes that
    stay, ``high`` the places of those that moved up by ``shift`` bits. Eight codes, code 0 on the right, go
    ``76543210`` -> ``7654 3210`` -> ``76 54 32 10`` -> ``7 6 5 4 3 2 1 0``.
    """
    lanes = _codes_per_integer(bits)
    steps = []
    half = lanes // 2
    while half:
        low = sum(((1 << half * bits) - 1) << start for start in range(0, 8 * lanes, 16 * half))
        steps.append(((8 - bits) * half, low, low << 8 * half))
        half //= 2
    return steps


def _spread(integers: Tensor, bits: int) -> None:
    """Move the codes of each integer from adjoining low bits to one byte each, in place."""
    moved = torch.empty_like(integers)  # one scratch tensor for all steps: this runs at every forward
    for shift, low, high in _steps(bits):
        torch.bitwise_left_shift(integers, shift, out=moved)
        integers.bitwise_and_(low).bitwise_or_(moved.bitwise_and_(high))


def _close_up(integers: Tensor, bits: int) -> Tensor:
    """The inverse of ``_spread``: codes of one byte each to adjoining bits at the low end, in place."""
    for shift, low, high in reversed(_steps(bits)):
        moved = (integers & high) >> shift
        integers.bitwise_and_(low).bitwise_or_(moved)
    return integers


def _words_to_integers(words: Int32[Tensor, "blocks bits"], *, out: Int64[Tensor, "blocks 4"]) -> None:
    """Cut blocks of ``bits`` words into four integers of eight codes each; bits that do not divide 8."""
    bits = words.shape[1]
    unsigned = words.to(torch.int64).bitwise_and_(0xFFFFFFFF)  # a sign would smear over 64 bits
    span = 8 * bits  # bits of one integer: 24 to 56, so the sign bit stays clear
    for i in range(4):
        first, last = i * span // 32, (i * span + span - 1) // 32
        value = unsigned[:, first] >> (i * span - 32 * first)
        for word in range(first + 1, last + 1):
            value |= unsigned[:, word] << (32 * word - i * span)
        torch.bitwise_and(value, (1 << span) - 1, out=out[:, i])


def _integers_to_words(integers: Int64[Tensor, "blocks 4"], bits: int) -> Int32[Tensor, "blocks words"]:
    """The inverse of ``_words_to_integers``: four integers to one block of ``bits`` words."""
    words = integers.new_empty(len(integers), bits)
    span = 8 * bits
    for word in range(bits):
        first, last = 32 * word // span, (32 * word + 31) // span
        value = integers[:, first] >> (32 * word - first * span)
        for i in range(first + 1, last + 1):
            value |= integers[:, i] << (i * span - 32 * word)
        words[:, word] = value
    return words.flatten().view(torch.int32)[::2].view(-1, bits)  # the low half of each int64
