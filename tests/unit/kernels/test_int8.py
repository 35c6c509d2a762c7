"""The product of bytes against sums in Python's own integers, the machine's traps, and when a layer takes it."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from helpers import layer_format, with_codes
from torch.testing import assert_close

from lorq.core.activations import quantize_activations
from lorq.core.packing import pack, pack_columns
from lorq.kernels import fake_quantize, int8, int8_linear, quant_linear
from lorq.runtime.linear import QuantLinear

# Decibels that are kept at least: sums below 2^24 are exact, scales and the output round once each.
SQNR_DB = {torch.float32: 125, torch.float16: 60, torch.bfloat16: 42}
TOKEN = layer_format(4, 48, False, input_quantization="token")
CPU = torch.device("cpu")


def operands(out, in_, bits, symmetric, generator):
    """What the operator takes between ``x`` and the grid of the input; and codes less their zero points, the scale."""
    codes = torch.randint(0, 2**bits, (out, in_), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (out, 1), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(out, 1, generator=generator) * 0.02 + 0.005).to(torch.float16)
    whole = codes.long() - (2 ** (bits - 1) if symmetric else zero.long())
    return (pack(codes, bits), scale, None if symmetric else pack_columns(zero, bits)), whole, scale


def fixed_grid():
    return torch.tensor([0.03]), torch.tensor([100], dtype=torch.int32)


def sqnr_db(expected, y):
    noise = float(torch.linalg.vector_norm(expected - y.double()))
    return 20 * math.log10(float(torch.linalg.vector_norm(expected)) / noise) if noise else math.inf


@pytest.mark.parametrize("dtype, floor", SQNR_DB.items(), ids=[str(dtype) for dtype in SQNR_DB])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_shape_and_grid_matches_integer_sums(bits, dtype, floor, generator):
    for (out, in_, tokens), symmetric, fixed in itertools.product(
        ((5, 8, 1), (7, 48, 3), (33, 80, 9), (64, 1000, 17)), (False, True), (False, True)
    ):
        parts, whole, scale = operands(out, in_, bits, symmetric, generator)
        x = torch.randn(tokens, in_, generator=generator).to(dtype)
        grid = fixed_grid() if fixed else (None, None)
        codes, step, zero = quantize_activations(x, *grid)
        sums = (codes - zero).long() @ whole.T
        y = int8_linear(x, *parts, *grid, bits)
        assert y.dtype == dtype
        assert sqnr_db(sums.double() * step.double() * scale.double().T, y) > floor, (out, in_, symmetric, fixed)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("token", [0, 1, 254, 255])
def test_the_largest_codes_do_not_saturate(bits, token):
    # Neighbouring pairs of the largest products are what processors without VNNI cannot add.
    width, top = 96, 2**bits - 1
    for codes in (0, 1, top // 2, top):
        packed = pack(torch.full((16, width), codes, dtype=torch.uint8), bits)
        zero = pack_columns(torch.zeros(16, 1, dtype=torch.uint8), bits)
        grid = torch.tensor([1.0]), torch.tensor([0], dtype=torch.int32)
        x = torch.full((33, width), float(token))
        y = int8_linear(x, packed, torch.ones(16, 1, dtype=torch.float16), zero, *grid, bits)
        assert torch.equal(y, torch.full((33, 16), float(width * codes * token)))


@pytest.mark.parametrize("bits", [4, 8])
def test_leading_dimensions_are_tokens_and_inputs_need_not_be_contiguous(bits, generator):
    parts, *_ = operands(31, 48, bits, False, generator)
    x = torch.randn(48, 6, 4, generator=generator).permute(2, 1, 0)[::2]
    before = x.clone()
    y = int8_linear(x, *parts, None, None, bits)
    assert y.shape == (2, 6, 31) and torch.equal(x, before)
    assert torch.equal(y.flatten(0, 1), int8_linear(x.flatten(0, 1), *parts, None, None, bits))
    assert_close(y[1, 2], int8_linear(x[1, 2], *parts, None, None, bits))
    assert int8_linear(x[:0], *parts, None, None, bits).shape == (0, 6, 31)


@pytest.mark.parametrize("fixed", [False, True], ids=["token", "tensor"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_token_and_is_seen(bad, symmetric, fixed, generator):
    parts, *_ = operands(7, 48, 8, symmetric, generator)
    x, grid = torch.randn(3, 48, generator=generator), fixed_grid() if fixed else (None, None)
    expected = int8_linear(x, *parts, *grid, 8)
    x[1, 5] = bad
    y = int8_linear(x, *parts, *grid, 8)
    assert torch.equal(y[[0, 2]], expected[[0, 2]])
    reference = quant_linear(fake_quantize(x, *grid), *parts, *[None] * 9, 8)
    assert torch.equal(torch.isfinite(y), torch.isfinite(reference))


# ---- the machine ------------------------------------------------------------------------------------------


def whole_product(codes, weight, out):
    return (codes.double() @ weight.double().T).float()


def saturating_product(codes, weight, out):
    """Neighbouring pairs of products are added in 16 bits."""
    products = codes.int()[:, None] * weight.int()
    return products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1).sum(-1).float()


def worse_product(codes, weight, out):
    return whole_product(codes, weight, out).clamp(-1e4, 1e4)


def no_product(codes, weight, out):
    raise RuntimeError("no such operator")


@pytest.mark.parametrize(
    "product, found",
    [(whole_product, "whole"), (saturating_product, "halves"), (worse_product, "none"), (no_product, "none")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_machine_is_found_out_and_served(product, found, monkeypatch, generator):
    monkeypatch.setattr(int8, "_product", product)
    monkeypatch.setattr(int8, "_in_order", lambda weight: weight)
    assert int8._products.__wrapped__() == found
    monkeypatch.setattr(int8, "_products", lambda: found)
    for bits in (4, 7, 8):
        parts, whole, scale = operands(33, 64, bits, False, generator)
        x = torch.randn(9, 64, generator=generator) - 3  # most codes are large
        codes, step, zero = quantize_activations(x)
        y = int8_linear(x, *parts, None, None, bits)
        expected = ((codes - zero).long() @ whole.T).double() * step.double() * scale.double().T
        assert sqnr_db(expected, y) > 115
    why = int8.declines(TOKEN, 48, CPU, torch.float32)
    assert (why is None) == (found != "none")
    if found == "none":
        assert why == "this build of torch has no exact product of bytes on this processor"
        assert torch.equal(y, quant_linear(fake_quantize(x, None, None), *parts, *[None] * 9, bits))


def test_this_machine_has_a_product_that_can_be_relied_upon():
    assert int8._products() in ("whole", "halves") or "onednn" not in torch.__config__.show().lower()


# ---- what is covered --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, why",
    [
        ({}, None),
        ({"symmetric": True}, None),
        ({"input_quantization": "tensor"}, None),
        ({"output_quantization": "token"}, None),
        ({"input_quantization": "none"}, "inputs are not quantized"),
        ({"group_size": 16}, "a row has more than one scale"),
        ({"symmetric": True, "scale_rank": 1}, "a row has more than one scale"),
        ({"symmetric": True, "grid": "normal-float"}, "codes do not stand for whole numbers"),
        ({"symmetric": True, "vector": 2}, "codes do not stand for whole numbers"),
        ({"rank": 1}, "it has a low-rank part"),
        ({"permuted": True}, "its inputs are rotated"),
        ({"rotation_block": 16}, "its inputs are rotated"),
    ],
    ids=str,
)
def test_a_format_is_covered_or_it_is_said_why_not(change, why):
    flat = {"bits": 4, "group_size": 48, "symmetric": False, "input_quantization": "token"} | change
    assert int8.declines(layer_format(**flat), 48, CPU, torch.bfloat16) == why


def test_other_devices_types_and_sums_that_do_not_fit_are_not_covered():
    assert int8.declines(TOKEN, 48, torch.device("cuda"), torch.float32) == "the device is cuda"
    assert int8.declines(TOKEN, 48, CPU, torch.float64) == "inputs are torch.float64"
    wide = with_codes(TOKEN, bits=8, group_size=65794)
    assert int8.declines(wide, 65794, CPU, torch.float32) == "sums of 65794 products of 8 by 8 bits do not fit 32"
    assert int8.declines(with_codes(wide, group_size=65793), 65793, CPU, torch.float32) is None


@pytest.fixture
def calls(monkeypatch):
    """How often layers take the product of bytes."""
    taken = []

    def counted(*args):
        taken.append(args)
        return int8_linear(*args)

    monkeypatch.setattr("lorq.runtime.packed.int8_linear", counted)
    return taken


@pytest.mark.parametrize("kind", ["token", "tensor"])
@pytest.mark.parametrize("bits, symmetric", [(4, False), (8, True)])
def test_a_covered_layer_takes_the_product_of_bytes_and_agrees_with_the_reference(
    kind, bits, symmetric, calls, random_weight, generator, monkeypatch
):
    format = layer_format(bits, 48, symmetric, input_quantization=kind)
    layer = QuantLinear.from_weight(random_weight(33, 48, format), torch.randn(33, generator=generator))
    x = torch.randn(2, 5, 48, generator=generator)
    y = layer(x)
    assert len(calls) == 1
    with torch.inference_mode():
        assert torch.equal(layer(x), y) and len(calls) == 2
    monkeypatch.setattr("lorq.runtime.packed.declines_format", lambda *_: "not today")
    assert_close(layer(x), y, rtol=1e-5, atol=1e-5 * float(y.detach().abs().max()))
    assert len(calls) == 2


def test_a_layer_that_is_not_covered_or_whose_input_learns_takes_the_reference(calls, random_weight, generator):
    x = torch.randn(5, 48, generator=generator)
    QuantLinear.from_weight(random_weight(7, 48, with_codes(TOKEN, group_size=16)))(x)
    layer = QuantLinear.from_weight(random_weight(7, 48, TOKEN))
    layer(x.double())
    start = x.clone().requires_grad_()
    grad = torch.randn(5, 7, generator=generator)
    (found,) = torch.autograd.grad(layer(start), start, grad)
    assert not calls
    assert_close(found, grad @ layer.weight, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        layer(start)
    assert len(calls) == 1


def test_packed_tensors_of_inference_mode_take_the_reference(random_weight, generator):
    with torch.inference_mode():
        layer = QuantLinear.from_weight(random_weight(7, 48, TOKEN))
        x = torch.randn(5, 48, generator=generator)
        y = layer(x)
        weight = layer.weight
    assert_close(y, fake_quantize(x, None, None) @ weight.T, rtol=1e-5, atol=1e-5)


# ---- the prepared weight ----------------------------------------------------------------------------------


@pytest.fixture
def prepared(monkeypatch):
    """How often a weight is put in order."""
    made, in_order = [], int8._in_order

    def counted(weight):
        made.append(weight.shape)
        return in_order(weight)

    monkeypatch.setattr(int8, "_in_order", counted)
    return made


def test_a_weight_is_prepared_once_and_again_when_its_tensors_change(prepared, random_weight, generator):
    layer = QuantLinear.from_weight(random_weight(32, 48, TOKEN))
    x = torch.randn(5, 48, generator=generator)
    layer(x), layer(x), layer(x[:1])
    assert len(prepared) == 1
    other = QuantLinear.from_weight(random_weight(32, 48, TOKEN))
    changes = {
        "codes written to": lambda: layer.weight_packed.copy_(other.weight_packed),
        "zero points written to": lambda: layer.weight_zero_point.copy_(other.weight_zero_point),
        "codes replaced": lambda: setattr(layer, "weight_packed", layer.weight_packed.roll(1, 0)),
        "zero points replaced": lambda: setattr(layer, "weight_zero_point", layer.weight_zero_point.roll(1, 0)),
        "loaded": lambda: layer.load_state_dict(other.state_dict()),
        "loaded by assignment": lambda: layer.load_state_dict(layer.state_dict(), assign=True),
    }
    for name, change in changes.items():
        del prepared[:]
        change()
        y = layer(x)
        assert len(prepared) == 1, name
        expected = fake_quantize(x, None, None) @ layer.weight.T
        assert_close(y, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_scales_are_read_at_every_call(prepared, random_weight, generator):
    layer = QuantLinear.from_weight(random_weight(7, 48, TOKEN))
    x = torch.randn(5, 48, generator=generator)
    y = layer(x)
    layer.weight_scale.mul_(2)
    assert torch.equal(layer(x), 2 * y) and len(prepared) == 1


def test_copies_pickles_and_state_dicts_know_nothing_of_what_was_prepared(prepared, random_weight, generator):
    layer = QuantLinear.from_weight(random_weight(7, 48, TOKEN))
    x = torch.randn(5, 48, generator=generator)
    before = layer.state_dict().keys(), len(pickle.dumps(layer))
    y = layer(x)
    assert (layer.state_dict().keys(), len(pickle.dumps(layer))) == before
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        del prepared[:]
        assert torch.equal(other(x), y) and len(prepared) == 1


# ---- as torch wants it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [False, True], ids=["token", "tensor"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_the_operator_is_registered_as_torch_wants_it(symmetric, fixed, generator):
    parts, *_ = operands(7, 48, 4, symmetric, generator)
    args = (torch.randn(2, 3, 48, generator=generator), *parts, *(fixed_grid() if fixed else (None, None)), 4)
    torch.library.opcheck(int8_linear, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))
    real = int8_linear(*args)
    fake = int8_linear(*(arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args))
    assert (fake.shape, fake.dtype, fake.stride(), fake.is_meta) == (real.shape, real.dtype, real.stride(), True)


def test_a_layer_can_be_compiled_whole(random_weight, generator):
    layer = QuantLinear.from_weight(random_weight(7, 48, TOKEN))
    x = torch.randn(5, 48, generator=generator)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
