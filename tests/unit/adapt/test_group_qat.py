"""Training through the rounding of codes in groups, the baseline of LoRDS' own: gradients, a model, refusals."""

import copy

import pytest
import torch
from helpers import Straight, logits, packed_model

from lorq.adapt import train
from lorq.adapt.folder import check_formats
from lorq.adapt.qat import TrainableLinear, cancel_qat, finish_qat, prepare_qat
from lorq.adapt.rounded import FakeQuantized, Rounding
from lorq.core.codes import IntGrid, LevelFormat, LevelGrid, TrellisGrid, VectorGrid
from lorq.core.rounding.nearest import nearest, nearest_levels
from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.runtime.linear import QuantLinear
from lorq.storage.config import write_format

GRIDS = [IntGrid(3, 4), IntGrid(4, 8, symmetric=True), IntGrid(1, 8, symmetric=True), LevelFormat(3, "normal-float", 4)]
grids = pytest.mark.parametrize("grid", GRIDS, ids=str)


def rounded(weight, grid):
    if isinstance(grid, LevelFormat):
        return nearest_levels(weight, LevelGrid(grid.bits, grid.levels), grid.group_size)
    return nearest(weight, None, grid)


def pack(weight, grid, bias=None):
    return QuantLinear.from_weight(QuantizedWeight(rounded(weight, grid)), bias).requires_grad_(False)


@pytest.fixture(scope="module")
def quantized():
    """A tiny language model with integers of 3 bits in groups, not to be changed."""
    return packed_model(lambda weight: pack(weight, IntGrid(3, 8)))


@pytest.fixture
def groups(quantized):
    return copy.deepcopy(quantized)


@pytest.fixture
def windows(generator):
    return torch.randint(0, 256, (6, 12), generator=generator)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if isinstance(grid, IntGrid)], ids=str)
def test_gradients_are_autograd_s_of_codes_that_are_rounded_and_clamped_then(grid, generator):
    """W^ = (clamp(round(W / s + z), 0, 2^b - 1) - z) s, each group with its s and z."""
    groups = 16 // grid.group_size
    scale = torch.rand(12, groups, generator=generator, dtype=torch.float64) + 0.1
    scale[0] *= -1  # training may take it there
    zero = torch.randint(0, grid.top + 1, (12, groups), generator=generator)
    zero = torch.full_like(zero, grid.middle) if grid.symmetric else zero
    spread = [part.repeat_interleave(grid.group_size, 1) for part in (scale, zero)]
    code = torch.empty(12, 16, dtype=torch.float64).uniform_(-1.5, grid.top + 1.5, generator=generator)
    w = (code - spread[1]) * spread[0]
    seed = torch.randn(12, 16, generator=generator, dtype=torch.float64)

    def formula(w, scale):
        s = scale.repeat_interleave(grid.group_size, 1)
        level = w / s + spread[1]
        return (Straight.apply(level, level.round()).clamp(0, grid.top) - spread[1]) * s

    def mine(w, scale):
        return FakeQuantized.apply(w, Rounding(grid, None if grid.symmetric else zero.to(torch.uint8)), scale)

    results = []
    for function in (formula, mine):
        parts = [part.clone().requires_grad_() for part in (w, scale)]
        value = function(*parts)
        value.backward(seed)
        results.append([value.detach(), *(part.grad for part in parts)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    between = (code > grid.top) & (code < grid.top + 0.5)
    assert between.any() and torch.equal(results[1][1][between], seed[between])


@grids
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_the_same_before_in_and_after_training(grid, bias, generator):
    weight = torch.randn(24, 16, generator=generator)
    layer = pack(weight, grid, torch.randn(24, generator=generator) if bias else None)
    x = torch.randn(2, 5, 16, generator=generator)
    training = TrainableLinear(layer, layer.value().dense())
    torch.testing.assert_close(training(x), layer(x))
    assert torch.equal(training.finished().weight_packed, layer.weight_packed)
    with torch.no_grad():
        for part in (training.weight, training.weight_scale):
            part += 0.05 * torch.randn(part.shape, generator=generator)
    after = training.finished()
    torch.testing.assert_close(after(x), training(x))
    assert torch.equal(after.value().dense(), training.quantized()) and not torch.equal(after(x), layer(x))
    assert after.format == layer.format
    zero = layer.weight_zero_point
    assert zero is None or torch.equal(after.weight_zero_point, zero)


@grids
def test_scales_are_made_in_float32_under_autocast(grid, generator):
    layer = pack(torch.randn(24, 16, generator=generator), grid)
    training, results = TrainableLinear(layer, torch.randn(24, 16, generator=generator)), []
    for on in (False, True):
        training.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            value = training.quantized()
            (value * torch.arange(16.0)).sum().backward()
        results.append([value.detach(), training.weight.grad.clone(), training.weight_scale.grad.clone()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_losses_fall_and_scales_and_codes_alone_change(groups, windows):
    before, kept = logits(groups), {name: p.clone() for name, p in groups.named_parameters()}
    zeros = {name: layer.weight_zero_point.clone() for name, layer in packed(groups).items()}
    done = train(groups, windows, "qat", steps=25, batch=3, learning_rate=1e-2, scale_rate=1.0)
    assert done.losses[-1] < 0.7 * done.losses[0] and not torch.equal(logits(groups), before)
    assert all(torch.equal(groups.get_parameter(name), parameter) for name, parameter in kept.items())
    assert all(torch.equal(packed(groups)[name].weight_zero_point, zero) for name, zero in zeros.items())
    weights = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24)
    assert done.parameters == weights + weights // 8
    assert not groups.training and not any(p.requires_grad for p in groups.parameters())


def packed(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}


def test_what_is_cancelled_or_not_finite_is_put_back(groups):
    layers, expected = packed(groups), logits(groups)
    prepare_qat(groups)
    with pytest.raises(ValueError, match="a model in training is not saved"):
        groups.save_pretrained("x")
    cancel_qat(groups)
    assert packed(groups) == layers and torch.equal(logits(groups), expected)
    prepare_qat(groups)
    groups.model.layers[1].mlp.up_proj.weight_scale.data[0, 0] = 1e5
    with pytest.raises(ArithmeticError, match="scales must be finite in float16, they are not; train with a lower"):
        finish_qat(groups)
    cancel_qat(groups)
    assert torch.equal(logits(groups), expected)


def test_adapters_are_lords_alone(groups, windows):
    with pytest.raises(
        ValueError, match=r"lords take adapters, this one has 14 packed .* in groups train with mode qat"
    ):
        train(groups, windows, "peft", steps=1)


REFUSED = {
    "factors": (LayerFormat(IntGrid(3, 64), rank=8), "low-rank factors of rank 8"),
    "permuted": (LayerFormat(IntGrid(3, 64), permuted=True), "weights in another basis"),
    "rotated": (LayerFormat(IntGrid(3, 64), rotation_block=32), "weights in another basis"),
    "vectors": (LayerFormat(VectorGrid(4, 2, 1, 1, 64)), "codes of vectors"),
    "trellis": (LayerFormat(TrellisGrid(3, 16, 16)), "codes of kind trellis"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_has_more_than_codes_and_scales_is_refused_with_its_name(case):
    format, what = REFUSED[case]
    message = f"nothing beside them, OUT has {what} \\(b\\); quantize it with gptq, nearest, lrq or lords"
    plain = write_format(LayerFormat(IntGrid(3, 64)))
    check_formats("OUT", "qat", {"a": plain}, False)
    with pytest.raises(ValueError, match=message):
        check_formats("OUT", "qat", {"a": plain, "b": write_format(format)}, False)
    with pytest.raises(ValueError, match=r"has factors that they share \(its experts\)"):
        check_formats("OUT", "qat", {"a": plain}, True)
