"""compressed-tensors' own package reads what we write, bit for bit."""

import pytest
import torch

from lorq.core.codes import IntGrid
from lorq.core.weight import LayerFormat
from lorq.exports.compressed_tensors import layer_scheme, layer_tensors

pytest.importorskip("compressed_tensors", minversion="0.18")
OUT, IN = 40, 96


def decompressed(weight):
    """The weight by the package's own reader, and the scheme as it understands it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config = layer_scheme(weight.format, rows=weight.format.codes.group_size == IN)
    scheme = QuantizationScheme(targets=["Linear"], **config)
    tensors = layer_tensors(weight)
    tensors["weight_scale"] = tensors["weight_scale"].float()  # it multiplies in the scale's type
    reader = BaseCompressor.get_value_from_registry(config["format"])
    return reader.decompress(tensors, scheme)["weight"], scheme


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [32, IN], ids=["groups", "channels"])
def test_codes_are_read_bit_for_bit(bits, symmetric, group, random_weight):
    weight = random_weight(OUT, IN, LayerFormat(IntGrid(bits, group, symmetric)))
    read, scheme = decompressed(weight)
    assert torch.equal(read, weight.dense())
    assert (scheme.weights.num_bits, scheme.weights.symmetric) == (bits, symmetric)
    assert scheme.weights.strategy == ("group" if group == 32 else "channel")


@pytest.mark.parametrize("inputs", ["token", "tensor"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_inputs_are_told(bits, inputs, random_weight):
    weight = random_weight(OUT, IN, LayerFormat(IntGrid(bits, IN, symmetric=True), input_quantization=inputs))
    read, scheme = decompressed(weight)
    assert torch.equal(read, weight.dense())
    own = scheme.input_activations
    assert (own.num_bits, own.strategy, bool(own.dynamic)) == (8, inputs, inputs == "token")
    tensors = layer_tensors(weight)
    assert ("weight" in tensors) == (bits == 8)
    if inputs == "tensor":  # of the same grid: codes less 128
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize

        from lorq.kernels import fake_quantize as ours

        x = torch.linspace(-4, 4, IN)[None]
        theirs = fake_quantize(x, tensors["input_scale"], tensors["input_zero_point"], own)
        torch.testing.assert_close(theirs, ours(x, weight.activations.scale, weight.activations.zero_point))


def test_an_order_of_columns_is_undone_where_a_row_is_one_group(random_weight):
    weight = random_weight(OUT, IN, LayerFormat(IntGrid(4, IN), permuted=True))
    assert torch.equal(decompressed(weight)[0], weight.dense())
