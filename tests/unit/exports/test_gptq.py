"""GPTQ's layout, unpacked bit by bit as its documentation says."""

import pytest
import torch

from lorq.core.codes import IntGrid
from lorq.core.weight import LayerFormat
from lorq.exports.gptq import layer_tensors

OUT, IN = 64, 96


def bits_of(words, column, bits, index):
    """Code ``index`` of a column of words: a string of bits, the lowest first."""
    string = "".join(format(int(word) & 0xFFFFFFFF, "032b")[::-1] for word in words[:, column])
    return int(string[index * bits : (index + 1) * bits][::-1], 2)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_codes_and_zero_points_are_where_readers_look(bits, version, random_weight, generator):
    weight = random_weight(OUT, IN, LayerFormat(IntGrid(bits, 32, symmetric=version == 1)))
    tensors = layer_tensors(weight, 2 - version)
    assert tensors["qweight"].shape == (IN * bits // 32, OUT) and tensors["qzeros"].shape == (3, OUT * bits // 32)
    assert tensors["g_idx"].tolist() == [i // 32 for i in range(IN)]
    dense = weight.dense()
    for _ in range(40):
        out, in_ = (int(torch.randint(n, (1,), generator=generator)) for n in (OUT, IN))
        group = int(tensors["g_idx"][in_])
        zero = bits_of(tensors["qzeros"].T, group, bits, out) + (2 - version)
        scale = float(tensors["scales"][group, out])
        assert (bits_of(tensors["qweight"], out, bits, in_) - zero) * scale == float(dense[out, in_])


def test_lorqs_own_reader_of_gptq_reads_it(random_weight):
    from lorq.models.grouped import read_gptq

    weight = random_weight(OUT, IN, LayerFormat(IntGrid(3, 32)))
    assert torch.equal(read_gptq(layer_tensors(weight, 0), zero_offset=0).decode(), weight.dense())
