"""The packed linear layer against a dense one, its dtypes, the tensors it stores, and rotations shared by layers."""

import copy
import dataclasses
import itertools
import pickle
import weakref

import pytest
import torch
from helpers import layer_format, same_codes
from torch.testing import assert_close

from lorq.kernels import rotate
from lorq.runtime.linear import QuantLinear
from lorq.runtime.same_input import join

FORMATS = {
    "asymmetric": layer_format(3, 16, False),
    "symmetric": layer_format(4, 16, True),
    "one group": layer_format(2, 48, False),
    "16-bit factors": layer_format(3, 16, True, 5, "float16"),
    "8-bit factors": layer_format(3, 16, False, 5, "int8"),
    "e4m3 factors": layer_format(3, 16, False, 5, "e4m3"),
    "vectors of 4": layer_format(2, 48, True, vector=4, codebook_rows=1, codebook_columns=24),
    "vectors of 2": layer_format(3, 48, True, 4, "int8", vector=2, codebook_rows=1, codebook_columns=48),
    "permuted": layer_format(4, 16, True, permuted=True),
    "rotated": layer_format(3, 16, False, rotation_block=16),
    "rotated over the whole width": layer_format(3, 16, False, 2, "int8", rotation_block=-1),
    "permuted, rotated over the whole width": layer_format(3, 16, False, permuted=True, rotation_block=-1),
    "all": layer_format(2, 48, True, 3, "e4m3", 4, 1, 16, permuted=True, rotation_block=8, rotation_skip=24),
    "normal floats": layer_format(4, 16, True, grid="normal-float"),
    "a scale for each": layer_format(3, 48, True, 2, "int8", scale_rank=3),
    "normal floats, a scale for each": layer_format(2, 48, True, grid="normal-float", scale_rank=2),
}
# Those that round inputs or outputs besides.
ROUNDING = {
    "inputs by token": layer_format(4, 48, False, input_quantization="token"),
    "inputs by tensor": layer_format(8, 48, True, input_quantization="tensor"),
    "outputs": layer_format(4, 16, False, output_quantization="token"),
    "inputs in groups": layer_format(3, 16, False, 2, "int8", input_quantization="token", output_quantization="token"),
    "rotated inputs": layer_format(4, 48, True, rotation_block=16, input_quantization="token"),
    "inputs, normal floats": layer_format(2, 48, True, grid="normal-float", scale_rank=2, input_quantization="tensor"),
}
SCALAR = [
    layer_format(bits, group_size, symmetric, rank, factor_type)
    for bits, group_size, symmetric, (rank, factor_type) in itertools.product(
        range(1, 9), (8, 48), (False, True), ((0, "float16"), (1, "float16"), (4, "int8"), (4, "e4m3"))
    )
]
BASES = [
    {"permuted": permuted, "rotation_block": block, "rotation_skip": skip}
    for permuted, (block, skip) in itertools.product((False, True), ((0, 0), (16, 0), (8, 24)))
]


def every_format(out):
    """All kinds of codes and factors; and codebooks of all kinds of tiles in all bases, for 48 columns."""
    books = [
        layer_format(bits, group_size, True, rank, type, vector, rows, columns)
        for (bits, vector), (group_size, columns), rows, (rank, type) in itertools.product(
            ((2, 4), (3, 2), (4, 2)), ((48, 48), (48, 16), (24, 24)), (1, out), ((0, "float16"), (2, "int8"))
        )
    ]
    levels = [
        layer_format(bits, 16 if rank == 0 else 48, True, grid=grid, scale_rank=rank)
        for bits, grid, rank in itertools.product((2, 3, 4, 8), ("integer", "normal-float"), (0, 1, 5))
    ]
    bases = [dataclasses.replace(f, **basis) for f in (*books, SCALAR[0], SCALAR[-1]) for basis in BASES]
    return [*SCALAR, *levels, *ROUNDING.values(), *bases]


formats = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
all_formats = pytest.mark.parametrize("format", (FORMATS | ROUNDING).values(), ids=FORMATS | ROUNDING)
widths = pytest.mark.parametrize("out", [7, 32])


def same(a, b):
    """Whether two quantized weights hold the same bits."""
    return a.format == b.format and same_codes(a, b)


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


def stepped(x, scale=None, zero=None):
    """8 bits of one token in plain Python: its own range with zero in it, or the fixed one."""
    if scale is None:
        low, high = min(*x, 0.0), max(*x, 0.0)
        scale = max((high - low) / 255, 1e-30)
        zero = round(-low / scale)
    return [(min(max(round(value / scale) + zero, 0), 255) - zero) * scale for value in x]


@pytest.mark.parametrize("format", ROUNDING.values(), ids=ROUNDING)
@pytest.mark.parametrize("learns", [False, True], ids=["no gradient", "gradient"])
def test_inputs_and_outputs_are_rounded_as_in_a_plain_loop(format, learns, random_weight, generator):
    weight = random_weight(7, 48, format)
    layer = QuantLinear.from_weight(weight, offset := torch.randn(7, generator=generator))
    x = torch.randn(2, 3, 48, generator=generator)
    y = layer(x.clone().requires_grad_(learns))
    assert y.shape == (2, 3, 7)
    tokens = (x if weight.basis is None else weight.basis.rotate(x)).flatten(0, 1).tolist()
    if format.input_quantization != "none":
        grid = (float(layer.input_scale), int(layer.input_zero_point)) if layer.input_scale is not None else ()
        tokens = [stepped(token, *grid) for token in tokens]
    matrix = weight.dense(torch.float64) if weight.basis is None else weight.basis.rotate(weight.dense(torch.float64))
    expected = torch.tensor(tokens, dtype=torch.float64) @ matrix.T + offset.double()
    found = y.detach().flatten(0, 1).double()
    if format.output_quantization == "none":
        assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    else:
        # The last digit of a sum may take a value over the middle between two codes, by a whole step.
        codes = torch.tensor([stepped(token) for token in expected.tolist()], dtype=torch.float64)
        step = (expected.amax(1, keepdim=True).clamp(min=0) - expected.amin(1, keepdim=True).clamp(max=0)) / 255
        assert ((found - codes).abs() < 1e-3 * step).double().mean() > 0.9
        assert ((found - codes).abs() < 1.001 * step).all()


def test_the_gradient_of_a_rounding_layer_passes_straight_through(random_weight, generator):
    layer = QuantLinear.from_weight(random_weight(7, 48, ROUNDING["inputs by tensor"]))
    x = (2 * torch.randn(5, 48, generator=generator)).requires_grad_()
    grad = torch.randn(5, 7, generator=generator)
    (found,) = torch.autograd.grad(layer(x), x, grad)
    inside = (x > -2.84) & (x < 3.19)  # the fixture's range
    assert 0.5 < inside.double().mean() < 0.95
    assert_close(found, (grad @ layer.weight) * inside, rtol=1e-5, atol=1e-5)


@widths
def test_stored_tensors_come_back_bit_for_bit(out, random_weight):
    for format in every_format(out):
        weight = random_weight(out, 48, format)
        back = format.read(weight.tensors())
        assert same(back, weight), format
        assert back.format == format
        assert torch.equal(back.dense(), weight.dense())


@widths
def test_the_layout_and_the_stored_bits_are_those_of_the_packed_tensors(out, random_weight):
    for format in every_format(out):
        tensors = random_weight(out, 48, format).tensors()
        stored = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        assert stored == format.layout(out, 48), format
        counted = 8 * sum(tensor.nbytes for name, tensor in tensors.items() if name != "weight_shape")
        assert format.stored_bits(out, 48) == counted, format


@all_formats
def test_a_layer_stores_exactly_the_packed_tensors(format, random_weight):
    weight = random_weight(7, 48, format)
    tensors, layer = weight.tensors(), QuantLinear.from_weight(weight)
    for found in (layer.stored(), layer.state_dict()):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert not list(layer.parameters())
    assert "bias=False" in repr(layer) and f"bits={format.bits}" in repr(layer)
    assert f"codes={format.codes}" in repr(layer) and f"rotation={format.rotation_block}" in repr(layer)


@all_formats
def test_a_state_dict_fills_an_empty_layer(format, random_weight, generator):
    layer = QuantLinear.from_weight(random_weight(7, 48, format), torch.randn(7, generator=generator))
    empty = QuantLinear(48, 7, format, bias=True)
    x = torch.randn(3, 48, generator=generator)
    assert not torch.equal(empty(x), layer(x))
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))


@all_formats
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


@all_formats
def test_a_meta_layer_has_room_for_every_tensor_and_can_be_filled(format, random_weight, generator):
    layer = QuantLinear(48, 7, format, bias=True, dtype=torch.float16, device="meta")
    for name, (shape, dtype) in format.layout(7, 48).items():
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


@all_formats
def test_the_weight_attribute_is_the_dense_weight_in_the_biass_dtype(format, random_weight, generator):
    weight, offset = random_weight(7, 48, format), torch.randn(7, generator=generator)
    assert torch.equal(QuantLinear.from_weight(weight).weight, weight.dense())
    layer = QuantLinear.from_weight(weight, offset).to(torch.bfloat16)
    assert torch.equal(layer.weight, weight.dense().to(torch.bfloat16))
    assert "weight" not in layer.state_dict()


# ---- rotations shared by layers ---------------------------------------------------------------------------

TURNED = layer_format(4, 16, True, 2, "int8", permuted=True, rotation_block=16, rotation_skip=16)


class Attention(torch.nn.Module):
    """Three layers of one input and one of another."""

    def __init__(self, q, k, v, o=None):
        super().__init__()
        self.q, self.k, self.v, self.o = q, k, v, o

    def forward(self, x):
        y = torch.cat([self.q(x), self.k(x), self.v(x)], -1)
        return y if self.o is None else self.o(y[..., : self.o.in_features])


@pytest.fixture
def attention(random_weight):
    """Layers in one basis; ``shared`` or each for itself."""

    def make(*, shared=True, format=TURNED, with_o=False, outs=(7, 32, 16)):
        weights = [random_weight(out, 48, format) for out in outs]
        if with_o:
            weights.append(random_weight(5, 48, format))
        weights = [dataclasses.replace(weight, basis=weights[0].basis) for weight in weights]
        model = Attention(*map(QuantLinear.from_weight, weights))
        if shared:
            join(model, [[name for name, layer in model.named_children()]])
            model.q.together[0].joins = False  # rotations are looked at alone
        return model

    return make


@pytest.fixture
def images(monkeypatch):
    """Weak references to the images that are made, in order."""
    made = []

    def counted(*args):
        image = rotate(*args)
        made.append(weakref.ref(image))
        return image

    monkeypatch.setattr("lorq.runtime.packed.turn", counted)
    return made


def alone(model, x):
    """What the layers make of an input without sharing anything."""
    return torch.cat([copy.deepcopy(layer)(x.clone()) for layer in (model.q, model.k, model.v)], -1)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("format", [TURNED, FORMATS["permuted"], FORMATS["rotated"], FORMATS["all"]], ids=str)
def test_layers_of_one_input_rotate_it_once(format, grad, attention, images, generator):
    model = attention(format=format)
    with torch.set_grad_enabled(grad):
        for count in (1, 2):
            x = torch.randn(2, 5, 48, generator=generator)
            y = model(x)
            assert len(images) == count
            expected = alone(model, x)
            del images[count:]
            assert torch.equal(y, expected)


def test_without_sharing_each_layer_rotates(attention, images, generator):
    attention(shared=False)(torch.randn(3, 48, generator=generator))
    assert len(images) == 3


def test_another_input_a_change_in_place_and_another_grad_mode_are_rotated_anew(attention, images, generator):
    model = attention()
    x = torch.randn(3, 48, generator=generator)
    q, k, v = model.q, model.k, model.v
    changes = {
        "a copy": lambda: v(x.clone()),
        "an equal view": lambda: v(x.view(3, 48)),
        "a change in place": lambda: v(x.mul_(2.0)),
        "no gradients": lambda: torch.no_grad()(v)(x),
        "gradients wanted": lambda: v(x.requires_grad_()),
        "inference": lambda: torch.inference_mode()(v)(x),
    }
    for name, change in changes.items():
        x = torch.randn(3, 48, generator=generator)
        q(x), k(x)
        count = len(images)
        y = change()
        # A tensor made outside inference mode is tracked inside it too, by its gradient mode.
        assert len(images) == count + 1, name
        assert_close(y, copy.deepcopy(v)(x), rtol=0, atol=0)
        assert y.requires_grad == (name == "gradients wanted")


def test_any_order_of_calls_gives_what_each_layer_gives_alone(attention, images, generator):
    model, apart = attention(), None
    apart = Attention(*(copy.deepcopy(layer) for layer in (model.q, model.k, model.v)))
    inputs = [torch.randn(2, 48, generator=generator) for _ in range(3)]
    for _ in range(60):
        which, layer, change = (int(torch.randint(3, (), generator=generator)) for _ in range(3))
        if change == 0:
            inputs[which].add_(1.0)
        name = "qkv"[layer]
        assert torch.equal(getattr(model, name)(inputs[which]), getattr(apart, name)(inputs[which].clone()))
    assert len(images) < 120  # at times an image served twice


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_shares_among_its_own_layers(make, attention, images, generator):
    model = attention()
    x = torch.randn(3, 48, generator=generator)
    y = model(x)
    model.q(x)  # leaves an image behind, which a copy must not take along
    other = make(model)
    assert other.q.together[0] is other.k.together[0] is other.v.together[0] is not model.q.together[0]
    del images[:]
    assert torch.equal(other(x), y) and len(images) == 1


def test_only_layers_of_one_input_one_basis_and_one_width_share(random_weight):
    def layer(format=TURNED, in_=48):
        return QuantLinear.from_weight(random_weight(8, in_, format))

    first = random_weight(8, 48, TURNED)
    rotated = dataclasses.replace(TURNED, permuted=False)
    others = [
        layer(), layer(), layer(rotated), layer(dataclasses.replace(rotated, rotation_skip=0)),
        layer(dataclasses.replace(rotated, rotation_block=8)), layer(rotated, in_=96), layer(FORMATS["symmetric"]),
    ]  # fmt: skip
    named = [QuantLinear.from_weight(first), QuantLinear.from_weight(first), *others]
    model = torch.nn.ModuleList([*named, QuantLinear.from_weight(first)])
    join(model, [[str(i) for i in range(len(named))]])
    assert named[0].together[0] is named[1].together[0] and [layer.together[1] for layer in named[:2]] == [0, 1]
    assert all(layer.together is None for layer in model[2:])


def test_nothing_is_kept_when_all_layers_have_run(attention, images, generator):
    model = attention()
    x = torch.randn(3, 48, generator=generator)
    with torch.no_grad():
        model.q(x), model.k(x)
        assert images[0]() is not None
        model.v(x)
    assert len(images) == 1 and images[0]() is None
    y = model(x)  # with a graph
    del y
    assert len(images) == 2 and images[1]() is None


def test_an_image_ends_with_its_input_though_not_all_sharers_have_run(attention, images, generator):
    model = attention(with_o=True)
    x = torch.randn(3, 48, generator=generator)
    with torch.no_grad():
        model(x)
    # Three took the image of x, one that of a tensor that is gone.
    assert len(images) == 2 and images[1]() is None
    del x
    assert images[0]() is None


@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "inner"])
def test_the_gradient_through_a_shared_rotation_is_that_of_the_dense_layers(leaf, attention, images, generator):
    model = attention(with_o=True)
    start = torch.randn(2, 3, 48, generator=generator, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    x = start if leaf else start * 1.0
    (found,) = torch.autograd.grad(model(x), start, grad)
    w = {name: layer.dequantize(torch.float64).weight for name, layer in model.named_children()}
    dense = torch.cat([start @ w[name].T for name in "qkv"], -1)[..., :48] @ w["o"].T
    (expected,) = torch.autograd.grad(dense, start, grad)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)  # stored weights are decoded in float32
    assert len(images) == 2  # of x and of what o reads


def test_under_compilation_and_for_inference_tensors_each_layer_rotates(attention, images, generator, monkeypatch):
    model = attention()
    x = torch.randn(3, 48, generator=generator)
    expected = alone(model, x)
    del images[:]
    with torch.inference_mode():
        assert torch.equal(model(x.clone()), expected)
    assert len(images) == 3
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(model(x), expected) and len(images) == 6
