"""Layers that share an input multiply together, are found by what they are called with, and answer as by themselves."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import layer_format
from torch import nn

import lorq.runtime.compiled
import lorq.runtime.same_input
from lorq.runtime.linear import QuantLinear
from lorq.runtime.same_input import Joined, fit, join_layers, share_rotations

SIZES = {"q": 32, "k": 16, "v": 16, "o": 48}
FORMATS = {
    "4 bits": layer_format(4, 16, False),
    "3 bits, symmetric": layer_format(3, 16, True),
    "factors": layer_format(4, 16, False, 3, "int8"),
    "factors of 16 bits": layer_format(2, 16, True, 2, "float16"),
    "codebooks": layer_format(2, 48, True, 0, "float16", 4, 8, 16),
    "levels": layer_format(4, 16, True, grid="normal-float"),
    "rotated": layer_format(4, 16, True, 2, "int8", rotation_block=16),
}


class Attention(nn.Module):
    """q, k and v of one input, o of another, all of one width."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return q, k, v, self.o(x + 1)


@pytest.fixture
def attention(random_weight, generator):
    def make(format, formats=None, bias=False):
        layers = {}
        for name, out in SIZES.items():
            own = (formats or {}).get(name, format)
            given = torch.randn(out, generator=generator) if bias else None
            layers[name] = QuantLinear.from_weight(random_weight(out, 48, own), given)
        module = Attention(**layers)
        share_rotations(module)
        join_layers(module)
        return module

    return make


@pytest.fixture
def products(monkeypatch):
    """Rows of the joined products that are made."""
    rows, multiply = [], lorq.runtime.same_input.multiply

    def counted(x, packed, *rest):
        rows.append(len(packed))
        return multiply(x, packed, *rest)

    monkeypatch.setattr(lorq.runtime.same_input, "multiply", counted)
    return rows


def alone(module, x):
    return [type(layer).multiply(layer, layer.into_basis(z)) for layer, z in calls(module, x)]


def calls(module, x):
    return [(module.q, x), (module.k, x), (module.v, x), (module.o, x + 1)]


@torch.no_grad()
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_layers_of_one_input_are_found_and_answer_as_by_themselves(format, bias, attention, products, generator):
    module = attention(format, bias=bias)
    x = torch.randn(2, 48, generator=generator)
    expected = alone(module, x)
    for passes in range(3):
        found = module(x.clone())
        for y, own in zip(found, expected, strict=True):
            torch.testing.assert_close(y, own, rtol=1e-5, atol=1e-5 * float(own.abs().max()))
        assert products == [64] * passes  # the first pass tells who shares
    assert module.q.joined[0] is module.k.joined[0] is module.v.joined[0] and module.o.joined is None
    assert alone(module, x)[1].equal(expected[1])  # whose tensors lie elsewhere now


@torch.no_grad()
def test_layers_of_other_ranks_join(attention, products, generator):
    own = {"q": layer_format(4, 16, False, 5, "int8"), "v": layer_format(4, 16, False, 1, "int8")}
    module = attention(layer_format(4, 16, False), own)
    x = torch.randn(1, 48, generator=generator)
    expected = alone(module, x)
    for y in (module(x + 0), module(x + 0)):
        for found, one in zip(y, expected, strict=True):
            torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-4)
    assert products == [64]


@torch.no_grad()
def test_what_changes_is_seen(attention, generator):
    module = attention(layer_format(4, 16, False, 2, "int8"))
    x = torch.randn(1, 48, generator=generator)
    module(x + 0), module(x + 0)
    # An input that is written to between two calls.
    z = x.clone()
    module.q(z)
    z.mul_(2)
    torch.testing.assert_close(module.k(z), module.k.multiply(2 * x))
    # Tensors that take the place of others, one by one.
    for name in ("weight_packed", "weight_scale", "weight_zero_point", "left", "right_scale"):
        setattr(module.k, name, getattr(module.k, name).flip(0).contiguous())
        expected = alone(module, x)
        for found, one in zip(module(x + 0), expected, strict=True):
            torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-4, msg=name)
    # What is written to: codes and factors, all at once and one by one.
    other = attention(layer_format(4, 16, False, 2, "int8"))
    module.load_state_dict(other.state_dict())
    for found, one in zip(module(x + 0), alone(other, x), strict=True):
        torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-4)
    module.q.left.zero_()
    expected = alone(module, x)
    torch.testing.assert_close(module(x + 0)[0], expected[0], rtol=1e-5, atol=1e-4)
    # All in place of all others, and the first call not the first layer's.
    module.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=True)
    torch.testing.assert_close(module.k(x), other.k.multiply(x), rtol=1e-5, atol=1e-4)
    assert module.q.joined is not None
    # Another device or dtype: all of it is learned again.
    module.to(torch.bfloat16)
    assert module.q.joined is None
    module(x + 0), module(x + 0)
    assert module.q.joined is not None


@torch.no_grad()
def test_copies_learn_for_themselves(attention, products, generator):
    module = attention(layer_format(4, 16, False))
    x = torch.randn(1, 48, generator=generator)
    expected = module(x + 0)
    module(x + 0)
    other = copy.deepcopy(module)
    assert other.q.joined is None and other.q.siblings is other.k.siblings is not module.q.siblings
    other.q.weight_scale.zero_()
    for _ in range(2):
        assert not other(x + 0)[0].any() and module(x + 0)[0].equal(expected[0])
    assert products == [64] * 4


def test_gradients_inference_and_many_tokens_go_by_layers(attention, products, generator):
    module = attention(layer_format(4, 16, False))
    x = torch.randn(1, 48, generator=generator)
    with torch.no_grad():
        module(x + 0), module(x + 0)
    products.clear()
    learning = x.clone().requires_grad_()
    module(learning)[0].sum().backward()
    assert learning.grad is not None
    with torch.inference_mode():
        module(x + 0)
    with torch.no_grad():
        module(torch.randn(500, 48, generator=generator))
    assert products == []


@torch.no_grad()
@torch.no_grad()
def test_layers_between_whose_calls_the_input_changes_are_not_joined(attention, generator):
    module = attention(layer_format(4, 16, False))
    x = torch.randn(1, 48, generator=generator)
    for _ in range(2):
        z = x.clone()
        module.q(z), module.k(z)
        z.mul_(2)
        module.v(z)
    assert module.q.joined[0] is module.k.joined[0] and module.v.joined is None


def test_replicas_of_data_parallel_have_their_own_tensors(attention):
    module = attention(layer_format(4, 16, False))
    with torch.no_grad():
        module(torch.ones(1, 48)), module(torch.ones(1, 48))
    replica = module.q._replicate_for_data_parallel()
    assert replica.joined is None and replica.learned and module.q.joined is not None


def test_a_layer_that_is_called_alone_multiplies_and_keeps_nothing(attention, products, generator):
    module = attention(layer_format(4, 16, False))
    module(torch.ones(1, 48)), module(torch.ones(1, 48))
    x = torch.randn(1, 48, generator=generator)
    for _ in range(2):  # twice the same layer, and others that never come
        torch.testing.assert_close(module.k(x), module.k.multiply(x))
    assert module.k.joined[0]._kept is not None
    del x
    gc.collect()
    assert module.k.joined[0]._kept is None


def test_what_does_not_fit_is_left_alone(random_weight):
    def layers(*formats, sizes=(32, 16)):
        return [QuantLinear.from_weight(random_weight(n, 48, f)) for n, f in zip(sizes, formats, strict=True)]

    one = layer_format(4, 16, False)
    assert fit(layers(one, one))
    assert not fit(layers(one, layer_format(3, 16, False)))
    assert not fit(layers(one, layer_format(4, 16, True)))
    assert not fit(layers(one, one, sizes=(31, 16)))  # 124 bits of zero points: two layers would meet in a word
    assert fit(layers(one, one, sizes=(32, 15)))
    scaled = layer_format(4, 48, True, scale_rank=2)
    assert not fit(layers(scaled, scaled))
    assert not fit(layers(layer_format(4, 16, True, rotation_block=16), layer_format(4, 16, True, rotation_block=16)))
    ranks = layer_format(4, 16, False, 2, "int8"), layer_format(4, 16, False, 2, "float16")
    assert not fit(layers(*ranks))


def test_factors_of_large_layers_join_only_where_zeros_cost_little():
    def layers(rank, out=4096):
        format = layer_format(4, 128, False, rank, "int8")
        return [QuantLinear(4096, out, format, device="meta") for _ in range(2)]

    assert fit(layers(0)) and fit(layers(8)) and not fit(layers(64))
    assert fit([QuantLinear(512, 512, layer_format(4, 128, False, 64, "int8"), device="meta") for _ in range(2)])


@torch.no_grad()
def test_tensors_that_are_others_in_every_pass_are_left_alone(attention, generator):
    module = attention(layer_format(4, 16, False))
    x = torch.randn(1, 48, generator=generator)
    module(x + 0)
    for _ in range(8):
        module.v._buffers["weight_scale"] = module.v.weight_scale.clone()  # as accelerate's hooks do
        module(x + 0)
    assert module.q.joined is module.k.joined is module.v.joined is None
    # Nor what lies elsewhere, or learns.
    for wrong in (module.k.weight_scale.to("meta"), nn.Parameter(module.k.weight_scale, requires_grad=False)):
        module = attention(layer_format(4, 16, False))
        module(x + 0), module(x + 0)
        if isinstance(wrong, nn.Parameter):
            del module.k.weight_scale
        module.k.weight_scale = wrong
        assert module.q.joined is module.v.joined is None
        torch.testing.assert_close(module.q(x), module.q.multiply(x))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2])
def test_what_a_layer_returns_may_be_written_to(tokens, attention, generator):
    module = attention(layer_format(4, 16, False))
    x = torch.randn(tokens, 48, generator=generator)
    expected = alone(module, x)
    module(x + 0), module(x + 0)
    with torch.enable_grad():
        z = x + 0
        q, k = module.q(z), module.k(z)
        assert q.is_contiguous() and k.is_contiguous()
        q += torch.ones(32, requires_grad=True)
        k.mul_(2)
        v = module.v(z)
        (q.sum() + v.sum()).backward()
    torch.testing.assert_close(q, expected[0] + 1)
    torch.testing.assert_close(v, expected[2])


def test_a_model_is_gone_when_nobody_has_it(attention):
    module = attention(layer_format(4, 16, False, 2, "int8"))
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            module(torch.ones(1, 48)), module(torch.ones(1, 48))
        seen = weakref.ref(module.q), weakref.ref(module.q.weight_packed)
        assert module.q.joined is not None
        del module
        assert seen[0]() is None and seen[1]() is None
    finally:
        gc.enable()


def test_several_equal_calls_become_one_in_a_graph():
    graph = torch.fx.Graph()
    x, packed = graph.placeholder("x"), graph.placeholder("packed")
    ours = torch.ops.lorq.quant_linear.default
    calls = [graph.call_function(ours, (x, packed, None, 4)), graph.call_function(ours, (x, packed, None, 4))]
    calls += [graph.call_function(ours, (x, packed, None, 3)), graph.call_function(ours, (packed, packed, None, 4))]
    graph.output(tuple(calls))
    lorq.runtime.compiled.merge_calls(graph)
    assert sum(node.target == ours for node in graph.nodes) == 3
    first, again, *others = next(node for node in graph.nodes if node.op == "output").args[0]
    assert first is again and first not in others


def test_joining_takes_no_second_memory(attention):
    module = attention(layer_format(4, 16, False, 2, "int8"))
    joined = Joined([module.q, module.k])
    for name, place in (("weight_packed", 0), ("weight_scale", 1), ("right", 9)):
        whole = joined._operands[place]
        for layer in (module.q, module.k):
            assert getattr(layer, name).untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
