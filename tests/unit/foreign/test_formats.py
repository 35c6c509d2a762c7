"""Weights that other programs have packed: read as those programs read them, and lorq's own codes where they can be."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorq.core.packing import pack
from lorq.models.bitsandbytes import STATE, read_eight_bits, read_four_bits, read_state
from lorq.models.decoded import read_float8
from lorq.models.grouped import GroupedCodes, read_awq, read_gptq, read_packed, read_plain

# A layer, or some rows of it, as GPTQModel 7.7 (gptq..., awq), llm-compressor 0.14 with compressed-tensors 0.20 (ct...)
# and bitsandbytes 0.50 wrote it, and as the same programs dequantize it: `dense`, in the type they do it in.
WRITTEN = load_file(Path(__file__).with_name("written_by_others.safetensors"))
READERS = {
    "gptq2": lambda tensors: read_gptq(tensors, zero_offset=1),
    "gptq3": lambda tensors: read_gptq(tensors, zero_offset=1),
    "gptq4": lambda tensors: read_gptq(tensors, zero_offset=1),
    "gptq4act": lambda tensors: read_gptq(tensors, zero_offset=1),
    "awq": read_awq,
    "ct4": read_packed,
    "ct3a": read_packed,
    "ct8c": read_packed,
    "nf4": read_four_bits,
    "nf4d": read_four_bits,
    "fp4": read_four_bits,
    "int8": read_eight_bits,
}
INTEGERS = [name for name in READERS if name[:2] in ("gp", "aw", "ct")]


def stored(name):
    own = {key.partition("/")[2]: tensor for key, tensor in WRITTEN.items() if key.startswith(f"{name}/")}
    return {local: tensor for local, tensor in own.items() if local != "dense"}, own["dense"]


@pytest.mark.parametrize("name", READERS)
def test_what_others_have_packed_is_read_as_they_read_it(name):
    tensors, dense = stored(name)
    weight = READERS[name](tensors).decode()
    assert weight.dtype == torch.float32 and weight.shape == dense.shape
    # One rounding to the type in which the program dequantizes, or two where it multiplies in it.
    step = 2 * torch.finfo(dense.dtype).eps if dense.dtype != torch.float32 else 1e-6
    torch.testing.assert_close(weight, dense.float(), rtol=step, atol=step * float(dense.abs().max()) / 8)


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_codes_of_others_are_codes_of_lorq_bit_for_bit(name):
    read = READERS[name](stored(name)[0])
    exact = read.exact()
    assert torch.equal(exact.dense(), read.decode())
    assert exact.format.bits == int(name.strip("gptqawcsr") or 4) and exact.low_rank is None
    assert (exact.basis is not None) == (name == "gptq4act")
    # What is stored of them and read again is the same.
    assert torch.equal(exact.format.read(exact.tensors()).dense(), read.decode())


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_what_are_no_integers_with_groups_is_no_code_of_lorq(name):
    with pytest.raises(ValueError, match="are not integer codes with groups along the columns"):
        READERS[name](stored(name)[0]).exact()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("offset", [0, 1])
def test_gptqs_words_by_a_loop_over_their_bits(bits, offset, generator):
    out, in_, groups = 32, 64, 2
    codes = torch.randint(0, 2**bits, (out, in_), generator=generator)
    zero = torch.randint(offset, 2**bits, (out, groups), generator=generator)
    scale = torch.rand(out, groups, generator=generator).half()

    def words(column):  # of one column of codes, its bits from the lowest up
        string = [int(code) >> bit & 1 for code in column for bit in range(bits)]
        values = [sum(b << i for i, b in enumerate(string[at : at + 32])) for at in range(0, len(string), 32)]
        return torch.tensor([value - (value >> 31 << 32) for value in values], dtype=torch.int32)

    tensors = {
        "qweight": torch.stack([words(row) for row in codes], 1),
        "qzeros": torch.stack([words(column) for column in (zero - offset).T]),
        "scales": scale.T.contiguous(),
        "g_idx": torch.arange(in_) // 32,
    }
    expected = (codes - zero.repeat_interleave(32, 1)) * scale.float().repeat_interleave(32, 1)
    assert torch.equal(read_gptq(tensors, zero_offset=offset).decode(), expected)


def test_integers_with_one_scale_or_one_per_row(generator):
    weight = torch.randint(-128, 128, (8, 32), generator=generator).to(torch.int8)
    one, rows = torch.tensor([0.5]), torch.rand(8, 1, generator=generator).half()
    assert torch.equal(read_plain({"weight": weight, "weight_scale": one}).decode(), weight * 0.5)
    read = read_plain(
        {"weight": weight, "weight_scale": rows, "weight_zero_point": torch.full((8, 1), 3).to(torch.int8)}
    )
    assert torch.equal(read.decode(), (weight.float() - 3) * rows.float())
    assert torch.equal(read.exact().dense(), read.decode())


def grouped(codes, **changes):
    parts = {
        "bits": 4, "scale": torch.ones(2, 2), "zero_point": torch.full((2, 2), 8),
        "group": torch.tensor([0, 0, 1, 1]),
    }  # fmt: skip
    return GroupedCodes(codes=codes, **parts | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": torch.tensor([0, 0, 0, 1])}, "groups must be of one size .* got 2 for 4 columns, of 1 to 3"),
        ({"zero_point": torch.tensor([[8, 16], [8, 8]])}, "zero points must be codes, 0 to 15, .* got 8 to 16"),
        ({"scale": torch.full((2, 2), 1 / 3)}, "scales must fit float16 to be lorq's, got torch.float32 ones"),
    ],
    ids=["a smaller last group", "a zero point beyond the codes", "scales in float32"],
)  # fmt: skip
def test_codes_that_lorq_has_no_place_for_are_refused(changes, message):
    codes = torch.tensor([[0, 15, 3, 4], [1, 2, 7, 9]], dtype=torch.uint8)
    assert grouped(codes).exact().format.codes.symmetric
    read = grouped(codes, **changes)
    read.decode()  # can be read all the same
    with pytest.raises(ValueError, match=message):
        read.exact()


def test_words_of_compressed_tensors_before_version_018_are_refused():
    # 10 codes of 3 bits in a word of their own, not 32 in 3.
    tensors = {
        "weight_packed": torch.zeros(4, 7, dtype=torch.int32),
        "weight_scale": torch.ones(4, 1),
        "weight_shape": torch.tensor([4, 64]),
    }
    with pytest.raises(ValueError, match=r"must fill the 7 words of a row, as compressed-tensors 0\.18"):
        read_packed(tensors)
    tensors["weight_packed"] = pack(torch.full((4, 64), 5, dtype=torch.uint8), 3)
    assert torch.equal(read_packed(tensors).decode(), torch.ones(4, 64))


def test_widths_that_nobody_tells_are_read_where_the_words_tell_them_alone():
    codes = torch.arange(4 * 64).view(4, 64).remainder(8).to(torch.uint8)
    tensors = {"weight_packed": pack(codes, 3), "weight_scale": torch.ones(4, 1), "weight_shape": torch.tensor([4, 64])}
    assert torch.equal(read_packed(tensors).decode(), codes.float() - 4)
    narrow = tensors | {"weight_packed": pack(codes[:, :16], 3), "weight_shape": torch.tensor([4, 16])}
    with pytest.raises(ValueError, match="must say how many bits 16 codes have that take 2 words, where 3 and 4 do"):
        read_packed(narrow)
    assert torch.equal(read_packed(narrow, bits=3).decode(), codes[:, :16].float() - 4)


def test_scales_of_blocks_are_not_taken_for_those_of_rows():
    tensors = {"weight": torch.ones(4, 64).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 4)}
    assert read_float8(tensors, block=(4, 16)).decode().shape == (4, 64)
    with pytest.raises(ValueError, match=r"one for each block \(\(4, 8\)\) of \(4, 64\), got \(1, 4\)"):
        read_float8(tensors, block=(4, 8))
    rows = tensors | {"weight_scale_inv": torch.arange(4.0)}
    assert torch.equal(read_float8(rows, block=None).decode(), torch.arange(4.0)[:, None].expand(4, 64))


def test_integers_with_a_scale_for_each_block(generator):
    weight = torch.randint(-128, 128, (64, 40), generator=generator).to(torch.int8)
    scale = torch.rand(8, 5, generator=generator)
    expected = torch.stack(
        [torch.stack([float(weight[i, j]) * scale[i // 8, j // 8] for j in range(40)]) for i in range(64)]
    )
    tensors = {"weight": weight, "weight_scale": scale}
    assert torch.equal(read_plain(tensors, block=(8, 8)).decode(), expected)
    zero = torch.randint(-5, 5, (8, 5), generator=generator).to(torch.int8)
    shifted = read_plain(tensors | {"weight_zero_point": zero}, block=(8, 8)).decode()
    spread = (zero * scale).repeat_interleave(8, 0).repeat_interleave(8, 1)
    torch.testing.assert_close(shifted, expected - spread, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"must be \(4, 5\), one for each block \(16, 8\), got \(8, 5\)"):
        read_plain(tensors, block=(16, 8))
    # Eight times eight are as many as there are rows, and a row of scales as many as a square has columns.
    for wrong in (torch.ones(8, 8), torch.ones(1, 64)):
        with pytest.raises(ValueError, match=rf"one number, or a row for each of 64, got \({len(wrong)}, "):
            read_plain({"weight": torch.zeros(64, 64, dtype=torch.int8), "weight_scale": wrong})
        packed = {"weight_packed": pack(torch.zeros(64, 64, dtype=torch.uint8), 4), "weight_scale": wrong}
        with pytest.raises(ValueError, match=rf"one number, or a row for each of 64, got \({len(wrong)}, "):
            read_packed(packed | {"weight_shape": torch.tensor([64, 64])})


def test_states_of_bitsandbytes_that_tell_no_shape_are_refused():
    def state(text):
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    assert read_state(state('{"shape": [2, 32], "blocksize": 64}'))["shape"] == (2, 32)
    for text in ('{"shape": [2, 32]}', "[", '{"shape": [2], "blocksize": 64}', '{"shape": [2, 32], "blocksize": 0}'):
        with pytest.raises(ValueError, match="4-bit weight must"):
            read_state(state(text))
    assert STATE.startswith("weight.")
    with pytest.raises(ValueError, match=r"row by row \(weight_format 0\), got 1"):
        read_eight_bits({"weight": torch.zeros(1, 1), "SCB": torch.ones(1), "weight_format": torch.tensor(1)})
