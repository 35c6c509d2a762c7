"""The packed linear layer against a dense one, its dtypes, and the tensors it stores."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from lorq.linear import QuantLinear, pack_weight, stored_layout, unpack_weight
from lorq.weight import LayerFormat

FORMATS = {
    "asymmetric": LayerFormat(3, 16, False),
    "symmetric": LayerFormat(4, 16, True),
    "one group": LayerFormat(2, 48, False),
    "16-bit factors": LayerFormat(3, 16, True, 5, 16),
    "8-bit factors": LayerFormat(3, 16, False, 5, 8),
}
EVERY_FORMAT = [
    LayerFormat(bits, group_size, symmetric, rank, factor_bits)
    for bits, group_size, symmetric, (rank, factor_bits) in itertools.product(
        range(1, 9), (8, 48), (False, True), ((0, 16), (1, 16), (4, 8))
    )
]
formats = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
widths = pytest.mark.parametrize("out", [7, 32])


def same(a, b):
    """Whether two quantized weights hold the same bits."""

    def parts(weight):
        low_rank = weight.low_rank
        factors = [low_rank.left, low_rank.right, low_rank.left_scale, low_rank.right_scale] if low_rank else [None] * 4
        return [weight.codes, weight.scale, weight.zero_point, *factors]

    return a.bits == b.bits and all(
        (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y))
        for x, y in zip(parts(a), parts(b), strict=True)
    )


@formats
@widths
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    "dtype, tolerance",
    # Twice a rounding step: the weight is rounded to the dtype once, and so are the products' sums.
    [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)],
    ids=["float32", "bfloat16", "float16"],
)
def test_output_is_that_of_the_dense_weight(format, out, bias, dtype, tolerance, random_weight, generator):
    weight = random_weight(out, 48, format)
    x = torch.randn(2, 5, 48, generator=generator).to(dtype)
    offset = torch.randn(out, generator=generator).to(dtype) if bias else None
    y = QuantLinear.from_weight(weight, offset)(x)
    expected = x.double() @ weight.dense(torch.float64).T + (0.0 if offset is None else offset.double())
    assert y.dtype == dtype
    assert_close(y.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@widths
def test_stored_tensors_come_back_bit_for_bit(out, random_weight):
    for format in EVERY_FORMAT:
        weight = random_weight(out, 48, format)
        back = unpack_weight(pack_weight(weight), format)
        assert same(back, weight), format
        assert back.format == format
        assert torch.equal(back.dense(), weight.dense())


@widths
def test_the_layout_is_that_of_the_packed_tensors(out, random_weight):
    for format in EVERY_FORMAT:
        tensors = pack_weight(random_weight(out, 48, format))
        stored = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        assert stored == stored_layout(out, 48, format), format


@formats
def test_a_layer_stores_exactly_the_packed_tensors(format, random_weight):
    weight = random_weight(7, 48, format)
    tensors, layer = pack_weight(weight), QuantLinear.from_weight(weight)
    for found in (layer.stored(), layer.state_dict()):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert not list(layer.parameters())
    assert "bias=False" in repr(layer) and f"bits={format.bits}" in repr(layer)


@formats
def test_a_state_dict_fills_an_empty_layer(format, random_weight, generator):
    layer = QuantLinear.from_weight(random_weight(7, 48, format), torch.randn(7, generator=generator))
    empty = QuantLinear(48, 7, format, bias=True)
    x = torch.randn(3, 48, generator=generator)
    assert not torch.equal(empty(x), layer(x))
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))


@formats
@pytest.mark.parametrize(
    "convert, dtype",
    [
        (lambda layer: layer.to(torch.bfloat16), torch.bfloat16),
        (lambda layer: layer.half(), torch.float16),
        (lambda layer: layer.double(), torch.float64),
        (lambda layer: torch.nn.Sequential(layer).to("cpu", torch.bfloat16)[0], torch.bfloat16),
    ],
    ids=["to(bfloat16)", "half()", "double()", "inside a model"],
)
def test_another_dtype_converts_the_bias_alone(format, convert, dtype, random_weight, generator):
    offset = torch.randn(7, generator=generator)
    layer = QuantLinear.from_weight(random_weight(7, 48, format), offset)
    layer.bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in layer.stored().items()}
    converted = convert(layer)
    assert converted is layer
    assert layer.stored().keys() == before.keys()
    for name, tensor in layer.stored().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    assert layer.bias.dtype == dtype and torch.equal(layer.bias, offset.to(dtype))
    assert isinstance(layer.bias, torch.nn.Parameter) and not layer.bias.requires_grad
    assert dict(layer.named_parameters()).keys() == {"bias"}


def test_a_bias_of_another_dtype_does_not_change_the_outputs_dtype(random_weight, generator):
    layer = QuantLinear.from_weight(random_weight(7, 48, FORMATS["symmetric"]), torch.randn(7, generator=generator))
    assert layer(torch.randn(2, 48, generator=generator).to(torch.bfloat16)).dtype == torch.bfloat16


def test_a_meta_layer_has_room_for_every_tensor_and_can_be_filled(random_weight, generator):
    format = FORMATS["8-bit factors"]
    layer = QuantLinear(48, 7, format, bias=True, dtype=torch.float16, device="meta")
    for name, (shape, dtype) in stored_layout(7, 48, format).items():
        tensor = layer.stored()[name]
        assert tensor.is_meta and tensor.shape == shape and tensor.dtype == dtype
    assert layer.bias.is_meta and layer.bias.dtype == torch.float16
    filled = QuantLinear.from_weight(random_weight(7, 48, format), torch.randn(7, generator=generator))
    layer.to_empty(device="cpu").load_state_dict(filled.state_dict())
    assert all(torch.equal(layer.stored()[name], tensor) for name, tensor in filled.stored().items())
    assert torch.equal(layer.bias, filled.bias.half())


def test_a_move_that_fails_leaves_the_layer_with_its_bias():
    layer = QuantLinear(48, 7, FORMATS["symmetric"], bias=True, device="meta")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        layer.to("cpu")
    assert layer.bias is not None and layer.bias.shape == (7,)
    assert "bias" in dict(layer.named_parameters())


@formats
def test_a_dense_layer_has_the_same_weight_and_bias(format, random_weight, generator):
    weight, offset = random_weight(7, 48, format), torch.randn(7, generator=generator)
    dense = QuantLinear.from_weight(weight, offset).dequantize()
    assert type(dense) is torch.nn.Linear and (dense.in_features, dense.out_features) == (48, 7)
    assert torch.equal(dense.weight, weight.dense()) and torch.equal(dense.bias, offset)
    half = QuantLinear.from_weight(weight).dequantize(torch.bfloat16)
    assert torch.equal(half.weight, weight.dense().to(torch.bfloat16)) and half.bias is None
    x = torch.randn(4, 48, generator=generator)
    # float32 sums in another order; the low-rank part is added before the product or after.
    assert_close(dense(x), QuantLinear.from_weight(weight, offset)(x), rtol=1e-4, atol=1e-4)


@formats
def test_the_weight_attribute_is_the_dense_weight_in_the_biass_dtype(format, random_weight, generator):
    weight, offset = random_weight(7, 48, format), torch.randn(7, generator=generator)
    assert torch.equal(QuantLinear.from_weight(weight).weight, weight.dense())
    layer = QuantLinear.from_weight(weight, offset).to(torch.bfloat16)
    assert torch.equal(layer.weight, weight.dense().to(torch.bfloat16))
    assert "weight" not in layer.state_dict()
