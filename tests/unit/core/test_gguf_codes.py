"""GGUF's blocks: decoded as the gguf package does, and chosen so that what ggml decodes is close."""

import re
import sys
import warnings

import gguf as package
import numpy as np
import pytest
import torch

from lorq.core.codes import GgufCodes, GgufGrid
from lorq.core.codes.gguf_blocks import TYPES
from lorq.core.linalg import damp
from lorq.core.problem import Problem
from lorq.core.rounding import gguf, gguf_nearest
from lorq.core.stats import InputStats, PreparedHessian
from lorq.methods import FLRQ, GPTQ, Nearest

types = pytest.mark.parametrize("type", TYPES)
several = pytest.mark.parametrize("type", [name for name, type in TYPES.items() if type.packing])
# That the package quantizes.
KNOWN = [type for type in TYPES if type in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0")]


def dequantized(blocks, type):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random bytes have scales that are no numbers
        return torch.from_numpy(package.quants.dequantize(blocks.numpy(), package.GGMLQuantizationType[type.upper()]))


def energy(error, hessian):
    return float(((error.double() @ hessian.double()) * error).sum())


@pytest.fixture
def layer(generator):
    """A weight (24, 512) and the Hessian of correlated inputs."""
    weight = torch.randn(24, 512, generator=generator) * 0.02
    mix = torch.eye(512) + 0.05 * torch.randn(512, 512, generator=generator)
    inputs = torch.randn(1500, 512, generator=generator) @ mix
    return weight, PreparedHessian(inputs.T @ inputs / 1500, 0.01)


@types
def test_blocks_by_themselves_are_those_of_inputs_that_tell_nothing(type, layer):
    weight, block = layer[0][:8], TYPES[type].block
    white = PreparedHessian(torch.eye(block), damping=0.0)
    passed_on = gguf(weight.reshape(-1, block), white, GgufGrid(type)).decode().view_as(weight)
    alone = gguf_nearest(weight, GgufGrid(type)).decode()
    if TYPES[type].packing:  # there blocks are gone through again
        assert (passed_on - weight).square().sum() <= (alone - weight).square().sum() * (1 + 1e-5)
    else:
        assert torch.equal(passed_on, alone)


@types
def test_any_bytes_decode_as_in_the_gguf_package_and_are_kept(type, generator):
    grid, width = GgufGrid(type), 2 * TYPES[type].block
    shape = grid.layout(5, width)["weight_blocks"][0]
    assert shape == (5, 2 * package.GGML_QUANT_SIZES[package.GGMLQuantizationType[type.upper()]][1])
    blocks = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    codes = grid.read({"weight_blocks": blocks}, 5, width)
    assert np.array_equal(codes.decode().numpy(), dequantized(blocks, type).numpy(), equal_nan=True)
    kept = codes.tensors()["weight_blocks"]
    if TYPES[type].digits:  # some bytes have the same digits as another, which is the one that is written
        assert np.array_equal(dequantized(kept, type).numpy(), dequantized(blocks, type).numpy(), equal_nan=True)
    else:
        assert torch.equal(kept, blocks)


@pytest.mark.parametrize("type", ["tq1_0", "tq2_0"])
def test_three_levels_are_in_the_bytes_that_the_package_writes(type, generator):
    levels = torch.randint(-1, 2, (5, 512), generator=generator)
    theirs = package.quants.quantize((levels / 16).numpy(), package.GGMLQuantizationType[type.upper()])
    codes = GgufCodes((levels + 1).to(torch.uint8), torch.full((5, 2), 1 / 16).half(), None, None, None, GgufGrid(type))
    assert np.array_equal(codes.tensors()["weight_blocks"].numpy(), theirs)


@types
def test_wide_decoding_is_that_of_float32_without_its_rounding(type, layer):
    codes = gguf_nearest(layer[0][:3], GgufGrid(type))
    torch.testing.assert_close(codes.decode(torch.float64).float(), codes.decode(), rtol=1e-6, atol=1e-9)


@types
def test_what_is_found_is_what_is_stored(type, layer):
    weight, hessian = layer
    for codes in (gguf(weight, hessian, GgufGrid(type)), gguf_nearest(weight, GgufGrid(type))):
        blocks = codes.tensors()["weight_blocks"]
        assert torch.equal(codes.decode(), dequantized(blocks, type))


@types
def test_a_weight_that_blocks_hold_comes_back_from_either(type, generator):
    grid = GgufGrid(type)
    kind, width = TYPES[type], 2 * TYPES[type].block
    blocks = torch.randint(0, 256, grid.layout(4, width)["weight_blocks"][0], generator=generator).to(torch.uint8)
    codes = grid.read({"weight_blocks": blocks}, 4, width)
    # Powers of two, and both ends of the range in every group: nothing is in doubt.
    codes.scale.fill_(2.0**-6)
    if codes.scales is not None:
        codes.scales.fill_(kind.scales[1])
    if codes.minimum is not None:
        codes.minimum.fill_(2.0**-6 if kind.packing else -(2.0**-3))
    if codes.minima is not None:
        codes.minima.fill_(kind.minima // 2)
    codes.codes[:] = torch.linspace(0, kind.top, kind.group).round().repeat(width // kind.group)
    weight = codes.decode()
    found = gguf_nearest(weight, grid).decode()
    assert (found - weight).abs().max() <= 2.0**-11 * weight.abs().max()


@types
def test_feedback_lowers_the_output_error_and_white_inputs_leave_nothing_to_feed_back(type, layer):
    weight, hessian = layer
    grid = GgufGrid(type)
    nearest = gguf_nearest(weight, grid).decode()
    fed = gguf(weight, hessian, grid).decode()
    # Three levels clip much of what is passed on: 0.62.
    share = 0.65 if TYPES[type].top == 2 else 0.6
    assert energy(fed - weight, hessian.matrix) < share * energy(nearest - weight, hessian.matrix)
    # Sums in another order may choose another of two steps that are equally good; blocks of several groups are gone
    # through again.
    white = gguf(weight, PreparedHessian(torch.eye(512), 0.0), grid).decode()
    reached, plain = (float((found - weight).square().sum()) for found in (white, nearest))
    assert reached <= plain * (1 + 1e-4) and (grid.layout_of.packing or reached >= plain * (1 - 1e-4))


@several
def test_going_through_blocks_again_lowers_every_rows_error(type, layer, monkeypatch):
    weight, hessian = layer
    damped = damp(hessian.matrix, hessian.damping).double()
    errors = []
    for passes in (0, 1, 2):
        monkeypatch.setattr(sys.modules["lorq.core.rounding.gguf"], "_PASSES", passes)
        error = gguf(weight, hessian, GgufGrid(type)).decode().double() - weight.double()
        errors.append(((error @ damped) * error).sum(1))
    assert bool((errors[1] < errors[0] * (1 + 1e-5)).all()) and bool((errors[2] < errors[1] * (1 + 1e-5)).all())
    assert float(errors[1].sum()) < 0.97 * float(errors[0].sum())


@several
def test_no_unit_suits_a_blocks_codes_better(type, layer):
    weight, hessian = layer[0][:, :256], PreparedHessian(layer[1].matrix[:256, :256], 0.01)
    codes = gguf(weight, hessian, GgufGrid(type))
    damped = damp(hessian.matrix, hessian.damping).double()
    units, ones = codes.continuous(), {name: torch.ones_like(unit) for name, unit in codes.continuous().items()}
    axes = [{other: one * (other == name) for other, one in ones.items()} for name in units]
    basis = torch.stack([codes.refitted(axis).decode(torch.float64) for axis in axes], 2)  # (out, in, units)
    factor = torch.linalg.cholesky(damped).mT
    best = torch.linalg.lstsq(factor @ basis, (factor @ weight.double().T).T.unsqueeze(2)).solution  # (out, units, 1)
    least = codes.refitted({name: best[:, i].half() for i, name in enumerate(units)}).decode().double() - weight
    error = codes.decode().double() - weight
    assert bool((((error @ damped) * error).sum(1) <= 1.0001 * ((least @ damped) * least).sum(1)).all())


@types
def test_rows_are_rounded_by_themselves(type, layer):
    weight, hessian = layer
    grid = GgufGrid(type)
    whole = gguf(weight, hessian, grid).decode()
    torch.testing.assert_close(gguf(weight[5:7], hessian, grid).decode(), whole[5:7])


@types
def test_columns_are_rounded_in_the_order_of_what_they_cost_wherever_blocks_and_groups_stand(type, layer):
    weight, hessian = layer
    kind = TYPES[type]
    place = torch.arange(512).view(-1, kind.block // kind.group, kind.group).flip(0, 1, 2).flatten()
    turned = PreparedHessian(hessian.matrix[place][:, place], hessian.damping)
    there = gguf(weight[:4, place], turned, GgufGrid(type)).decode()
    assert torch.equal(there, gguf(weight[:4], hessian, GgufGrid(type)).decode()[:, place])


@pytest.mark.parametrize("type", KNOWN)
def test_nearest_is_closer_than_the_packages_own(type, layer):
    weight = layer[0]
    theirs = package.quants.quantize(weight.numpy(), package.GGMLQuantizationType[type.upper()])
    error = dequantized(torch.from_numpy(theirs), type) - weight
    ours = gguf_nearest(weight, GgufGrid(type)).decode() - weight
    assert float(ours.square().sum()) < 0.93 * float(error.square().sum())


@types
def test_zeros_stay_zeros(type):
    assert not gguf_nearest(torch.zeros(2, 256), GgufGrid(type)).decode().abs().max() > 1e-6


def test_a_width_that_blocks_do_not_tile_is_refused_with_the_types_that_fit():
    with pytest.raises(
        ValueError, match=r"blocks of q4_k have 256 columns, which must divide the width 576; take q4_0, .*, iq4_nl for"
    ):
        GPTQ(grid="q4_k").largest(64, 576)
    with pytest.raises(ValueError, match=r"blocks of q8_0 have 32 columns.* the width 40; leave such a layer as it is"):
        Nearest(grid="q8_0").largest(64, 40)


def test_an_unknown_type_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=re.escape("a GGUF type must be one of q4_0, q4_1")):
        GgufGrid("q4_x").check(1, 256)
    with pytest.raises(ValueError, match=r"grid 'q4_0' with codebook 'scalar' and rounding 'clip'; leave these away"):
        FLRQ(grid="q4_0", rounding="clip")


@pytest.mark.parametrize("method", [GPTQ(grid="q2_k"), FLRQ(grid="q3_k", budget=0.2), Nearest(grid="q6_k")], ids=str)
def test_methods_put_blocks_of_256_columns_into_their_results(method, layer):
    weight, hessian = layer
    stats = InputStats(hessian.matrix, torch.ones(512), 1500)
    result = method.solve(Problem({"layer": weight}, {"layer": stats}, 0))["layer"]
    largest = method.largest(24, 512)
    assert result.format.codes == largest.codes == GgufGrid(method.grid)
    assert result.record.error_after < result.record.error_before
    assert method.choices["grid"] == tuple(TYPES)
    assert set(GPTQ(grid="q4_0").choices["grid"]) == {name for name, type in TYPES.items() if type.block == 32}
