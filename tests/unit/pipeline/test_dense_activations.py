"""Smoothing against SmoothQuant's formula and the block's own output, and rounding around dense layers."""

import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lorq.core.activations import Activations, quantize_activations
from lorq.core.basis import Basis
from lorq.core.stats import StatsAccumulator
from lorq.pipeline.dense_activations import layer_activations, quantized_activations, smooth_block, smoothing_scale

WIDTH = 12


class Norm(nn.Module):
    """RMSNorm, which multiplies by ``offset + weight``."""

    def __init__(self, generator, offset=0.0):
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(1.0 - offset + 0.3 * torch.randn(WIDTH, generator=generator), requires_grad=False)

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).rsqrt() * (self.offset + self.weight)


def layer_norm(generator):
    norm = nn.LayerNorm(WIDTH).requires_grad_(False)
    for parameter in norm.parameters():
        parameter += 0.3 * torch.randn(WIDTH, generator=generator)
    return norm


class Block(nn.Module):
    """q, k and v read one norm; o what they make; up another norm, down what up makes."""

    def __init__(self, generator, norm, kind=nn.Linear):
        super().__init__()
        self.first, self.second = norm(generator), norm(generator)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "up", "down", "gate"):
            layer = Conv1D(WIDTH, WIDTH) if kind is Conv1D else nn.Linear(WIDTH, WIDTH, bias=False)
            layer.weight.requires_grad_(False).copy_(torch.randn(WIDTH, WIDTH, generator=generator) / 3)
            self.add_module(name, layer)
        self.gated = False

    def forward(self, x):
        normed = self.first(x)
        x = x + self.o_proj(torch.tanh(self.q_proj(normed)) * self.k_proj(normed) + self.v_proj(normed))
        normed = self.second(x)
        # A router reads the norm too, and is not quantized.
        y = self.down(torch.tanh(self.up(normed)))
        return x + (y * torch.sigmoid(self.gate(normed)) if self.gated else y)


LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "up", "down")
NORMS = {"RMSNorm": Norm, "1 + weight": lambda generator: Norm(generator, 1.0), "LayerNorm": layer_norm}
norms = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


@pytest.fixture
def setting(generator):
    """A block, what runs it, the statistics of its layers, and the inputs that these saw."""

    def make(norm=Norm, kind=nn.Linear, layers=LAYERS):
        block = Block(generator, norm, kind)
        x = torch.randn(20, WIDTH, generator=generator) * torch.linspace(0.1, 4.0, WIDTH)
        seen = {}
        handles = [
            getattr(block, name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
            for name in layers
        ]
        block(x)
        for handle in handles:
            handle.remove()
        stats, shared = {}, {}
        for name, inputs in seen.items():
            if id(inputs) not in shared:
                accumulator = StatsAccumulator(WIDTH)
                accumulator.add(inputs)
                shared[id(inputs)] = accumulator.finish()
            stats[f"b.{name}"] = shared[id(inputs)]
        return block, lambda: block(x), stats, {f"b.{name}": inputs.clone() for name, inputs in seen.items()}

    return make


def smooth(block, run, stats, exponent=0.5, layers=LAYERS):
    named = {f"b.{name}": getattr(block, name) for name in layers}
    return smooth_block(block, named, run, stats, prefix="b", exponent=exponent)


def weights(block):
    return {f"b.{name}": _out_in(getattr(block, name)).clone() for name in (*LAYERS, "gate")}


def moved(old, block, name):
    """What a layer's columns were multiplied by."""
    return weights(block)[name][0] / old[name][0]


def _out_in(layer):
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def inputs_of(block, run, name):
    """What a layer of the block is given now."""
    seen = []
    handle = getattr(block, name.removeprefix("b.")).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run()
    handle.remove()
    return seen[0]


# ---- the scale --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.5, 1.0])
def test_the_scale_is_the_papers_channel_by_channel(exponent, setting):
    _, _, stats, seen = setting()
    given = [torch.tensor([[0.5, -2.0] * 6, [1.0, 0.1] * 6]), torch.tensor([[-3.0, 0.2] * 6])]
    found = smoothing_scale(given, stats["b.q_proj"], exponent)
    for j in range(WIDTH):
        largest = float(seen["b.q_proj"][:, j].abs().max())
        column = (3.0, 2.0)[j % 2]
        assert float(found[j]) == pytest.approx(largest**exponent / column ** (1 - exponent), rel=1e-5)


def test_channels_and_columns_of_zeros_have_a_finite_scale():
    accumulator = StatsAccumulator(4)
    accumulator.add(torch.tensor([[0.0, 0.0, 2.0, -8.0]]))
    scale = smoothing_scale([torch.tensor([[1.0, 0.0, 0.0, 2.0]])], accumulator.finish(), 0.5)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert float(scale[3]) == 2.0


# ---- the block --------------------------------------------------------------------------------------------


@norms
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D], ids=["Linear", "Conv1D"])
def test_smoothing_moves_scale_from_inputs_to_weights_and_keeps_the_output(norm, kind, setting):
    block, run, stats, seen = setting(norm, kind)
    expected, old, old_stats = run(), weights(block), dict(stats)
    found = smooth(block, run, stats)
    assert_close(run(), expected, rtol=1e-4, atol=1e-5)
    for names in (("b.q_proj", "b.k_proj", "b.v_proj"), ("b.up",)):
        scale = moved(old, block, names[0])
        wanted = smoothing_scale([old[name] for name in names], old_stats[names[0]], 0.5)
        assert_close(scale, wanted, rtol=1e-4, atol=0)  # but for the norm's last digit
        for name in names:
            assert_close(weights(block)[name], old[name] * scale, rtol=1e-6, atol=0)
            assert_close(inputs_of(block, run, name), seen[name] / scale, rtol=1e-4, atol=1e-6)
    for name in ("b.o_proj", "b.down", "b.gate"):
        assert torch.equal(weights(block)[name], old[name])
    assert found.notes == {
        name: "not smoothed: its input does not come straight from a norm" for name in ("b.o_proj", "b.down")
    }


@norms
def test_the_norms_parameters_are_returned_as_they_are_to_be_stored(norm, setting):
    block, run, stats, _ = setting(norm)
    found = smooth(block, run, stats)
    names = {f"b.{path}.{key}" for path in ("first", "second") for key, _ in block.first.named_parameters()}
    assert found.tensors.keys() == names
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, block.get_parameter(name.removeprefix("b."))) and tensor.dtype == torch.float32


def test_statistics_are_those_of_the_smoothed_inputs_and_shared_as_before(setting):
    block, run, stats, _ = setting()
    before, old = dict(stats), weights(block)
    smooth(block, run, stats)
    assert stats["b.q_proj"] is stats["b.k_proj"] is stats["b.v_proj"]
    assert stats["b.o_proj"] is before["b.o_proj"] and stats["b.down"] is before["b.down"]
    for name in ("b.q_proj", "b.up"):
        now = inputs_of(block, run, name)
        assert_close(stats[name].low, now.amin(0), rtol=1e-4, atol=1e-6)
        assert_close(stats[name].high, now.amax(0), rtol=1e-4, atol=1e-6)
        scale = moved(old, block, name)
        assert_close(stats[name].hessian, before[name].hessian / scale[:, None] / scale)
        assert_close(stats[name].mean_abs, before[name].mean_abs / scale)
        assert stats[name].tokens == 20


def test_with_all_of_the_range_moved_every_channel_reaches_as_far(setting):
    block, run, stats, _ = setting()
    smooth(block, run, stats, exponent=1.0)
    assert_close(inputs_of(block, run, "q_proj").abs().amax(0), torch.ones(WIDTH), rtol=1e-4, atol=0)


@norms
def test_a_norm_that_serves_others_too_is_left_alone(norm, setting):
    block, run, stats, _ = setting(norm)
    block.gated = True
    expected, old, before = run(), weights(block), dict(stats)
    old_norm = block.second.weight.clone()
    found = smooth(block, run, stats)
    assert found.notes["b.up"] == "not smoothed: second also serves what is not quantized"
    assert found.tensors.keys() >= {"b.first.weight"} and "b.second.weight" not in found.tensors
    assert stats["b.up"] is before["b.up"] and torch.equal(block.second.weight, old_norm)
    assert torch.equal(weights(block)["b.up"], old["b.up"])
    assert not torch.equal(weights(block)["b.q_proj"], old["b.q_proj"])
    assert_close(run(), expected, rtol=1e-4, atol=1e-5)


def test_an_excluded_layer_that_reads_the_norm_keeps_the_others_as_they_are(setting):
    layers = tuple(name for name in LAYERS if name != "k_proj")
    block, run, stats, _ = setting(layers=layers)
    old = weights(block)
    found = smooth(block, run, stats, layers=layers)
    for name in ("b.q_proj", "b.v_proj"):
        assert found.notes[name] == "not smoothed: first also serves what is not quantized"
    assert [name for name in old if not torch.equal(weights(block)[name], old[name])] == ["b.up"]


def test_a_block_without_layers_to_quantize_is_left_alone(setting):
    block, run, stats, _ = setting()
    found = smooth(block, run, stats, layers=())
    assert (found.tensors, found.notes) == ({}, {})


# ---- inputs that another layer makes ----------------------------------------------------------------------


class Gated(nn.Module):
    """Values are mixed over the tokens and read by o; what down reads is up's output times a gate."""

    def __init__(self, generator, bias=False):
        super().__init__()
        self.norm = Norm(generator)
        for name in ("gate", "v", "o", "up", "down"):
            layer = nn.Linear(WIDTH, WIDTH, bias=bias).requires_grad_(False)
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
            self.add_module(name, layer)
        self.mix = torch.rand(20, 20, generator=generator).tril()

    def forward(self, x):
        normed = self.norm(x)
        x = x + self.o(self.mix @ self.v(normed))
        return x + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


GATED = ("gate", "v", "o", "up", "down")


def gated(generator, bias=False, sink=1.0):
    """The block, what runs it, and the statistics of its layers; one token is ``sink`` times as large."""
    block, x = Gated(generator, bias), torch.randn(20, WIDTH, generator=generator)
    x[0] *= sink
    stats = {}
    for name in GATED:
        accumulator = StatsAccumulator(WIDTH)
        accumulator.add(inputs_of(block, lambda: block(x), name))
        stats[f"b.{name}"] = accumulator.finish()
    return block, lambda: block(x), stats


def smooth_gated(block, run, stats, exponent=0.5, layers=GATED, made=GATED):
    named = {f"b.{name}": getattr(block, name) for name in layers}
    made = [f"b.{name}" for name in made]
    return smooth_block(block, named, run, stats, prefix="b", exponent=exponent, made=made)


@pytest.mark.parametrize("bias", [False, True])
def test_what_a_layer_makes_channel_by_channel_is_divided_in_its_rows(bias, generator):
    block, run, stats = gated(generator, bias)
    expected, before = run(), dict(stats)
    old = {name: getattr(block, name).weight.clone() for name in GATED}
    old_bias = {name: getattr(block, name).bias.clone() for name in GATED} if bias else {}
    seen = {name: inputs_of(block, run, name).clone() for name in ("o", "down")}
    found = smooth_gated(block, run, stats)
    assert_close(run(), expected, rtol=1e-4, atol=1e-5)
    assert not found.notes
    for maker, reader in (("v", "o"), ("up", "down")):
        wanted = smoothing_scale([old[reader]], before[f"b.{reader}"], 0.5)
        assert_close(getattr(block, reader).weight, old[reader] * wanted, rtol=1e-6, atol=0)
        assert_close(inputs_of(block, run, reader), seen[reader] / wanted, rtol=1e-4, atol=1e-6)
        assert_close(stats[f"b.{reader}"].high, inputs_of(block, run, reader).amax(0), rtol=1e-4, atol=1e-6)
        rows = getattr(block, maker).weight * wanted[:, None] / old[maker]
        assert_close(rows, rows[:1].expand_as(rows), rtol=1e-4, atol=0)  # the norm's scale alone
        if bias:
            assert_close(getattr(block, maker).bias, old_bias[maker] / wanted, rtol=1e-6, atol=0)
            assert torch.equal(found.tensors[f"b.{maker}.bias"], getattr(block, maker).bias)
    assert found.tensors.keys() == {"b.norm.weight", *(["b.v.bias", "b.up.bias"] if bias else [])}


def test_a_token_far_above_the_others_hides_no_wrong_pair(generator):
    block, run, stats = gated(generator, sink=1e4)
    expected, old_gate = run(), block.gate.weight.clone()
    assert not smooth_gated(block, run, stats).notes
    turned = block.gate.weight / old_gate
    assert_close(turned, turned[:1].expand_as(turned), rtol=1e-4, atol=0)  # no row has a scale of its own
    assert bool(((run() - expected).norm(dim=-1) < 1e-4 * expected.norm(dim=-1)).all())


@pytest.mark.parametrize("left", ["layers", "made"])
def test_rows_of_a_layer_that_stays_are_not_scaled(left, generator):
    block, run, stats = gated(generator)
    expected, old = run(), block.down.weight.clone()
    others = tuple(name for name in GATED if name != "up")
    found = smooth_gated(block, run, stats, made=others) if left == "made" else None
    if left == "layers":
        found = smooth_gated(block, run, stats, layers=others, made=others)
    assert found.notes["b.down"] == ("not smoothed: its input comes from no norm, and channel by channel from no layer")
    assert torch.equal(block.down.weight, old)
    assert_close(run(), expected, rtol=1e-4, atol=1e-5)


def test_a_channel_of_one_huge_token_no_longer_decides_the_range(generator):
    block, run, stats = gated(generator)
    block.up.weight[3] *= 1000.0
    block.down.weight[:, 3] /= 1000.0
    accumulator = StatsAccumulator(WIDTH)
    accumulator.add(inputs_of(block, run, "down"))
    stats["b.down"] = accumulator.finish()

    def lost():
        """Of down's output, when its input is rounded on one range."""
        x, w = inputs_of(block, run, "down"), block.down.weight
        found = layer_activations("b.down", stats["b.down"], inputs="tensor", cache="none")
        return float(((rounded(x, found.scale, found.zero_point) - x) @ w.T).norm() / (x @ w.T).norm())

    before = lost()
    smooth_gated(block, run, stats, exponent=0.8)
    assert lost() < before / 20


# ---- activations of a block -------------------------------------------------------------------------------


def test_which_activations_a_layer_has():
    kinds = {
        name: layer_activations(f"model.layers.0.self_attn.{name}", None, inputs="token", cache="token")
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    assert {name: (a.input, a.output) for name, a in kinds.items()} == {
        "q_proj": ("token", "none"), "k_proj": ("token", "token"), "v_proj": ("token", "token"),
        "o_proj": ("token", "none"),
    }  # fmt: skip
    assert layer_activations("k_proj", None, inputs="none", cache="none") == Activations()
    assert layer_activations("k_proj", None, inputs="none", cache="token") == Activations("none", "token")


def test_the_fixed_grid_reaches_from_the_smallest_to_the_largest_input(setting):
    _, _, stats, seen = setting()
    found = layer_activations("b.up", stats["b.up"], inputs="tensor", cache="none")
    low, high = float(seen["b.up"].min()), float(seen["b.up"].max())
    assert found.scale.shape == found.zero_point.shape == (1,)
    assert (found.scale.dtype, found.zero_point.dtype) == (torch.float32, torch.int32)
    assert float(found.scale) == pytest.approx((high - low) / 255)
    assert int(found.zero_point) == round(-low / float(found.scale))


def test_a_fixed_grid_without_statistics_is_refused_with_the_layers_name():
    with pytest.raises(ValueError, match=re.escape("got no statistics for b.up")):
        layer_activations("b.up", None, inputs="tensor", cache="none")


def rounded(x, *grid):
    codes, scale, zero = quantize_activations(x, *grid)
    return (codes - zero) * scale


def test_inputs_and_outputs_of_dense_layers_are_rounded_while_asked(generator):
    model = nn.ModuleDict({name: nn.Linear(WIDTH, 8, bias=False) for name in "abcd"})
    x = torch.randn(5, WIDTH, generator=generator)
    fixed = torch.tensor([0.05]), torch.tensor([90], dtype=torch.int32)
    turn = Basis(torch.randperm(WIDTH, generator=generator), 4, 4)
    layers = {
        "a": (Activations("token"), None),
        "b": (Activations("tensor", "token", *fixed), None),
        "c": (Activations("token"), turn),
        "d": (Activations("none", "token"), None),
    }
    plain = {name: layer(x) for name, layer in model.items()}
    with quantized_activations(model, layers):
        found = {name: layer(x) for name, layer in model.items()}
    w = {name: layer.weight for name, layer in model.items()}
    assert_close(found["a"], rounded(x) @ w["a"].T)
    assert_close(found["b"], rounded(rounded(x, *fixed) @ w["b"].T))
    assert_close(found["c"], turn.unrotate(rounded(turn.rotate(x))) @ w["c"].T)
    assert_close(found["d"], rounded(plain["d"]))
    assert not torch.equal(rounded(x), turn.unrotate(rounded(turn.rotate(x))))
    assert all(torch.equal(layer(x), plain[name]) for name, layer in model.items())


def test_hooks_are_gone_after_an_error_too(generator):
    model = nn.ModuleDict({"a": nn.Linear(WIDTH, 8)})
    with pytest.raises(RuntimeError, match="stop"), quantized_activations(model, {"a": (Activations("token"), None)}):
        raise RuntimeError("stop")
    assert not model["a"]._forward_pre_hooks and not model["a"]._forward_hooks
