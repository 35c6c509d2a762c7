"""Layers that share an input multiply together, and answer as by themselves, whatever changes."""

import copy
import gc
import io
import itertools
import pickle
import sys
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import layer_format
from safetensors.torch import save_model
from torch import nn

import lorq.runtime.compiled
import lorq.runtime.same_input
from lorq.core.codes import TrellisGrid
from lorq.core.weight import LayerFormat
from lorq.models.experts import Expert
from lorq.runtime.linear import QuantLinear
from lorq.runtime.same_input import _Once, fit, join

SIZES = {"q": 32, "k": 16, "v": 16, "o": 48}
FORMATS = {
    "4 bits": layer_format(4, 16, False),
    "3 bits, symmetric": layer_format(3, 16, True),
    "factors": layer_format(4, 16, False, 3, "int8"),
    "factors of float8": layer_format(4, 16, False, 2, "e4m3"),
    "factors of 16 bits": layer_format(2, 16, True, 2, "float16"),
    "codebooks": layer_format(2, 48, True, 0, "float16", 4, 8, 16),
    "levels": layer_format(4, 16, True, grid="normal-float"),
    "rotated": layer_format(4, 16, True, 2, "int8", rotation_block=16),
    "permuted": layer_format(4, 16, True, permuted=True),
    "trellis codes": LayerFormat(TrellisGrid(3, 12, 16), 2, "int8", rotation_block=16),
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
        layers, basis = {}, None
        for name, out in SIZES.items():
            own = (formats or {}).get(name, format)
            given = torch.randn(out, generator=generator) if bias else None
            weight = random_weight(out, 48, own)
            weight = weight if weight.basis is None else replace(weight, basis=basis or weight.basis)
            basis = weight.basis
            layers[name] = QuantLinear.from_weight(weight, given)
        module = Attention(**layers)
        join(module, [["q", "k", "v"]])
        return module

    return make


@pytest.fixture
def products(monkeypatch):
    """Rows of the joined products that are made."""
    rows, multiply = [], lorq.runtime.same_input.multiply

    def counted(x, *rest, **named):
        y = multiply(x, *rest, **named)
        rows.append(y.shape[-1])
        return y

    monkeypatch.setattr(lorq.runtime.same_input, "multiply", counted)
    return rows


def alone(module, x):
    """What layers that know nothing of each other answer."""
    found = []
    for layer, z in ((module.q, x), (module.k, x), (module.v, x), (module.o, x + 1)):
        apart = QuantLinear(layer.in_features, layer.out_features, layer.format, bias=layer.bias is not None)
        apart.load_state_dict(layer.state_dict())
        found.append(apart(z))
    return found


def check(module, x, message=None):
    for found, one in zip(module(x + 0), alone(module, x), strict=True):
        torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-5 * max(1.0, float(one.abs().max())), msg=message)


@torch.no_grad()
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_layers_of_one_input_answer_as_by_themselves(format, bias, attention, products, generator):
    module = attention(format, bias=bias)
    x = torch.randn(2, 48, generator=generator)
    expected = alone(module, x)
    for passes in (1, 2):
        check(module, x)
        assert products == [64] * passes
    assert all(a.equal(b) for a, b in zip(alone(module, x), expected, strict=True))  # their tensors lie elsewhere now


@torch.no_grad()
@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 200])
def test_another_order_of_channels_is_seen(tokens, attention, generator):
    module = attention(FORMATS["permuted"])
    x = torch.randn(tokens, 48, generator=generator)
    check(module, x)
    module.k.permutation = module.k.permutation.flip(0)
    check(module, x)
    module.k.permutation.copy_(module.q.permutation)
    check(module, x)


def test_layers_of_other_ranks_join(attention, products, generator):
    own = {"q": layer_format(4, 16, False, 5, "int8"), "v": layer_format(4, 16, False, 1, "int8")}
    module = attention(layer_format(4, 16, False), own)
    for _ in range(2):
        check(module, torch.randn(1, 48, generator=generator))
    assert products == [64] * 2


@torch.no_grad()
def test_what_changes_is_seen(attention, products, generator):
    module = attention(layer_format(4, 16, False, 2, "int8"))
    x = torch.randn(1, 48, generator=generator)
    check(module, x)
    # An input that is written to between two calls.
    z = x.clone()
    module.q(z)
    z.mul_(2)
    torch.testing.assert_close(module.k(z), alone(module, 2 * x)[1])
    # Tensors that take the place of others, one by one; also between two calls with one input.
    for name in ("weight_packed", "weight_scale", "weight_zero_point", "left", "right_scale"):
        module.q(x)
        setattr(module.k, name, getattr(module.k, name).flip(0).contiguous())
        torch.testing.assert_close(module.k(x), alone(module, x)[1], rtol=1e-5, atol=1e-4)
        check(module, x, name)
    # What is written to: codes and factors, all at once and one by one.
    other = attention(layer_format(4, 16, False, 2, "int8"))
    module.load_state_dict(other.state_dict())
    check(module, x)
    assert all(a.equal(b) for a, b in zip(alone(module, x), alone(other, x), strict=True))
    module.q.left.zero_()
    check(module, x)
    # All in place of all others, and the first call not the first layer's.
    module.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=True)
    torch.testing.assert_close(module.k(x), alone(other, x)[1], rtol=1e-5, atol=1e-4)
    # Another device or dtype.
    module.to(torch.bfloat16)
    module._apply(lambda tensor: tensor.clone())
    products.clear()
    check(module, x)
    assert products == [64]


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_join_among_themselves_once_all_were_called(make, attention, products, generator):
    module = attention(layer_format(4, 16, False))
    x = torch.randn(1, 48, generator=generator)
    expected = module(x + 0)
    other = make(module)
    assert other.q.together[0] is other.k.together[0] is not module.q.together[0]
    other.q.weight_scale.zero_()
    del products[:]
    for _ in range(2):
        assert not other(x + 0)[0].any() and module(x + 0)[0].equal(expected[0])
    assert products == [64] * 3
    alone_ = make(module.q)
    for _ in range(2):
        torch.testing.assert_close(alone_(x), expected[0])


def test_gradients_inference_and_many_tokens_go_by_layers(attention, products, generator):
    module = attention(layer_format(4, 16, False))
    x = torch.randn(1, 48, generator=generator)
    learning = x.clone().requires_grad_()
    module(learning)[0].sum().backward()
    assert learning.grad is not None
    with torch.inference_mode():
        module(x + 0)
    with torch.no_grad():
        module(torch.randn(500, 48, generator=generator))
    assert products == []
    # What was made while measuring serves training too.
    with torch.inference_mode():
        module(x)
    assert products == [64]
    module(x + 0)
    module(learning)[0].sum().backward()


@torch.no_grad()
def test_replicas_of_data_parallel_have_their_own_tensors(attention, products, generator):
    module = attention(layer_format(4, 16, False))
    x = torch.randn(1, 48, generator=generator)
    check(module, x)
    replica = module.q._replicate_for_data_parallel()
    replica._parameters["bias"] = None  # as torch.nn.parallel.replicate goes on
    replica._buffers = {name: t if t is None else t.clone() for name, t in module.q._buffers.items()}
    replica.weight_scale = 2 * module.q.weight_scale
    del products[:]
    torch.testing.assert_close(replica(x), 2 * alone(module, x)[0])
    assert not products


@torch.no_grad()
def test_a_layer_that_is_called_alone_multiplies_and_keeps_nothing(attention, products, generator):
    module = attention(layer_format(4, 16, False))
    x = torch.randn(1, 48, generator=generator)
    for _ in range(2):  # twice the same layer, and others that never come
        torch.testing.assert_close(module.k(x), alone(module, x)[1])
    assert products == [64] * 2


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
    trellis, longer = (LayerFormat(TrellisGrid(3, 12, length)) for length in (16, 32))
    assert fit(layers(trellis, trellis)) and fit(layers(trellis, trellis, sizes=(32, 15)))
    assert not fit(layers(trellis, trellis, sizes=(31, 16)))  # two layers would meet in a tile
    assert not fit(layers(trellis, longer, sizes=(32, 32)))
    ranks = layer_format(4, 16, False, 2, "int8"), layer_format(4, 16, False, 2, "float16")
    assert not fit(layers(*ranks))


def test_factors_of_large_layers_join_only_where_zeros_cost_little():
    def layers(rank, out=4096):
        format = layer_format(4, 128, False, rank, "int8")
        return [QuantLinear(4096, out, format, device="meta") for _ in range(2)]

    assert fit(layers(0)) and fit(layers(8)) and not fit(layers(64))
    assert fit([QuantLinear(512, 512, layer_format(4, 128, False, 64, "int8"), device="meta") for _ in range(2)])


@torch.no_grad()
@pytest.mark.parametrize("learns", [False, True], ids=["elsewhere", "learns"])
def test_what_lies_elsewhere_or_learns_is_left_alone_and_joins_again(learns, attention, products, generator):
    module = attention(layer_format(4, 16, False))
    x = torch.randn(1, 48, generator=generator)
    before = module.k.weight_scale
    if learns:
        del module.k.weight_scale
        module.k.weight_scale = nn.Parameter(before, requires_grad=False)
    else:
        module.k.weight_scale = before.to("meta")
    torch.testing.assert_close(module.q(x), alone_of(module.q)(x))
    assert products == []
    if not learns:
        module.k.weight_scale = before
        check(module, x)
        assert products == [64]


def alone_of(layer):
    apart = QuantLinear(layer.in_features, layer.out_features, layer.format)
    apart.load_state_dict(layer.state_dict())
    return apart


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2])
def test_what_a_layer_returns_may_be_written_to(tokens, attention, generator):
    module = attention(layer_format(4, 16, False))
    x = torch.randn(tokens, 48, generator=generator)
    expected = alone(module, x)
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


def test_a_model_is_gone_when_nobody_has_it_and_a_product_when_its_input_is(attention, monkeypatch):
    module, made = attention(layer_format(4, 16, False, 2, "int8")), []
    split = torch.unsafe_split_with_sizes

    def noted(*given):
        parts = split(*given)
        made.append(weakref.ref(parts[1]))
        return parts

    monkeypatch.setattr(torch, "unsafe_split_with_sizes", noted)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            x = torch.ones(1, 48)
            module.q(x)
            assert made[0]() is not None
            del x
            assert made[0]() is None
        seen = weakref.ref(module.q), weakref.ref(module.q.weight_packed), weakref.ref(module.q.together[0])
        del module
        assert [ref() for ref in seen] == [None] * 3
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


@torch.no_grad()
@pytest.mark.parametrize("factor_type", ["int8", "float16"])
def test_joined_layers_have_one_memory_and_storages_of_their_own(factor_type, attention, products, tmp_path):
    """What is saved of a model is the same whether or not it has run."""
    module = attention(layer_format(4, 16, False, 2, factor_type), bias=True)
    fresh = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    save_model(module, tmp_path / "fresh")
    torch.save(module.q.state_dict(), one := io.BytesIO())
    module(torch.ones(1, 48))
    module(torch.ones(1, 48))
    assert products == [64] * 2
    for name in ("weight_packed", "weight_scale", "weight_zero_point", "right"):
        own = [getattr(layer, name) for layer in (module.q, module.k, module.v)]
        storages = [tensor.untyped_storage() for tensor in own]
        assert [storage.nbytes() for storage in storages] == [tensor.nbytes for tensor in own]
        starts = [storage.data_ptr() for storage in storages]
        assert starts[1:] == [a + tensor.nbytes for a, tensor in zip(starts[:-1], own[:-1], strict=True)], name
    save_model(module, tmp_path / "run")
    assert (tmp_path / "fresh").read_bytes() == (tmp_path / "run").read_bytes()
    torch.save(module.q.state_dict(), other := io.BytesIO())
    assert one.tell() == other.tell()
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        found = again.state_dict()
        assert found.keys() == fresh.keys() and all(found[name].equal(tensor) for name, tensor in fresh.items())
        assert again.q.weight_packed.untyped_storage().nbytes() == module.q.weight_packed.nbytes


def test_what_another_thread_does_at_any_moment_changes_nothing():
    """Another thread takes its own between any two steps of one that takes its second."""
    mine, others, moments = torch.zeros(1), torch.zeros(1), itertools.count()
    for moment in moments:
        once, steps = _Once(2), itertools.count()
        once.take(0, mine, lambda: "mine")
        other = threading.Thread(target=once.take, args=(0, others, lambda: "other's"))

        def trace(frame, event, _, other=other, steps=steps, moment=moment):
            if frame.f_code.co_name == "take" and frame.f_code.co_filename == lorq.runtime.same_input.__file__:
                frame.f_trace_opcodes = True
                if event == "opcode" and next(steps) == moment:
                    other.start()
                    other.join()
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            assert once.take(1, mine, lambda: "mine") == "mine"
        finally:
            sys.settrace(before)
        if not other.ident:
            break
    assert moment > 20


@torch.no_grad()
@pytest.mark.parametrize("kind", ["factors", "rotated", "permuted"])
def test_what_a_thread_gets_depends_on_its_own_input(kind, attention, generator):
    inputs = [torch.randn(1 + 2 * i, 48, generator=generator) for i in range(4)]
    module = attention(FORMATS[kind])
    expected = [alone(module, x) for x in inputs]
    wrong, start, end = [], threading.Barrier(4), time.monotonic() + 0.3

    @torch.no_grad()
    def serve(number):
        start.wait()  # the first calls of all join the layers
        while time.monotonic() < end and not wrong:
            for found, one in zip(module(inputs[number] + 0), expected[number], strict=True):
                if not torch.allclose(found, one, rtol=1e-4, atol=1e-4 * float(one.abs().max())):
                    wrong.append(number)

    # Threads change places after every few instructions.
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


@torch.no_grad()
def test_layers_join_while_another_thread_multiplies_with_them(attention):
    """Tensors are replaced, not moved: who has them keeps their memory."""
    module = attention(layer_format(4, 16, False, 2, "int8"))
    held = {name: (tensor, tensor.data_ptr()) for name, tensor in module.q._buffers.items() if tensor is not None}
    module(torch.ones(1, 48))
    assert module.q.weight_packed is not held["weight_packed"][0]
    assert all(tensor.data_ptr() == place for tensor, place in held.values())
    assert all(module.q._buffers[name].equal(tensor) for name, (tensor, _) in held.items())


def test_only_packed_layers_that_are_in_memory_join(random_weight):
    format = layer_format(4, 16, False)
    packed = [QuantLinear.from_weight(random_weight(32, 48, format)) for _ in range(2)]
    away = [QuantLinear(48, 32, format, device="meta"), nn.Linear(48, 32)]
    for other in away:
        model = nn.ModuleList([*packed, other])
        join(model, [["0", "2"]])
        assert packed[0].together is None
    join(model, [["0", "1"]])
    assert packed[0].together[0] is packed[1].together[0]


def test_gate_and_up_of_an_expert_join_without_being_named(random_weight):
    expert = Expert()
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(expert, name, QuantLinear.from_weight(random_weight(32, 48, layer_format(4, 16, False))))
    join(nn.ModuleList([expert]), [])
    assert expert.gate_proj.together[0] is expert.up_proj.together[0] and expert.down_proj.together is None
