"""Packed experts with shared factors against experts with dense weights: fused, one by one, and taken out again."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from helpers import layer_format, with_codes
from torch import nn
from torch.testing import assert_close
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import lorq.runtime.experts
import lorq.runtime.experts_at_once
from lorq.core.basis import Basis
from lorq.core.low_rank import FACTOR_TYPES
from lorq.core.tile_factors import TileFactors
from lorq.kernels import cpu_experts
from lorq.kernels.reference_experts import declines_experts
from lorq.models.experts import Experts
from lorq.runtime.experts import QuantExperts, Tiles
from lorq.runtime.experts_at_once import declines_at_once, layers_of, run_grouped
from lorq.runtime.linear import QuantLinear
from lorq.runtime.same_input import join

HIDDEN, WIDTH, EXPERTS = 32, 48, 6
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FORMAT = layer_format(3, 16, False, permuted=True, rotation_block=16)
types = pytest.mark.parametrize("type", FACTOR_TYPES)
families = pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
# Every grid once, every type of factors twice.
GRIDS = dict(zip([(1, 6), (6, 1), (2, 3), (3, 2), (3, 3), (7, 4)], 2 * list(FACTOR_TYPES), strict=True))


def fused_experts(family, generator, experts=EXPERTS):
    """transformers' own module with random values; gpt-oss has biases, and gate and up by turns."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_local_experts": experts}
    config, kind = {"mixtral": (MixtralConfig, MixtralExperts), "gpt-oss": (GptOssConfig, GptOssExperts)}[family]
    config = config(**sizes)
    config._experts_implementation = "eager"
    module = kind(config)
    for parameter in module.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.requires_grad_(False).eval()


@pytest.fixture
def packed(random_weight, random_tiles, generator):
    """Packed experts with random codes, and tile factors for some projections."""

    def make(grid=(2, 3), type="int8", tiles=PROJECTIONS, *, family="mixtral", format=FORMAT, input_scale=False):
        experts = Experts.split(fused_experts(family, generator))
        bases = {}
        for expert, name in itertools.product(range(EXPERTS), PROJECTIONS):
            old = getattr(experts[expert], name)
            size = old.in_features if format.codes.group_size == -1 else format.codes.group_size
            own = with_codes(format, group_size=size)
            weight = random_weight(old.out_features, old.in_features, own)
            # What has tiles and reads the layer's input has one basis; the others have any.
            if name in tiles and name != "down_proj":
                weight = dataclasses.replace(weight, basis=bases.setdefault("input", weight.basis))
            bias = None if old.bias is None else old.bias.data
            setattr(experts[expert], name, QuantLinear.from_weight(weight, bias))
        modules = {}
        for name in tiles:
            out, in_ = (HIDDEN, WIDTH) if name == "down_proj" else (WIDTH, HIDDEN)
            factors = random_tiles(out, in_, grid, type, EXPERTS, input_scale=input_scale)
            modules[name] = Tiles(out, in_, factors.format)
            modules[name].load_state_dict(factors.tensors())
        whole = QuantExperts(experts, modules)
        join(whole, [])
        return whole.requires_grad_(False).eval()

    return make


def dense_twin(experts, family="mixtral", dtype=torch.float64):
    """The model's own fused module with the weights that the packed layers say they have."""
    fused = fused_experts(family, torch.Generator())
    plain = Experts.split(fused).to(dtype)
    for expert, name in itertools.product(range(EXPERTS), PROJECTIONS):
        old, new = getattr(plain[expert], name), getattr(experts.plain[expert], name)
        old.weight.data = new.value().dense(dtype) if isinstance(new, QuantLinear) else new.weight.data.to(dtype)
        if old.bias is not None:
            old.bias.data = new.bias.data.to(dtype)
    return plain.fuse()


def tokens_for(experts, top_k, generator, tokens=11, *, missed=(), masked=False, dtype=torch.float32):
    """Inputs, the experts that tokens are routed to, and the router's weights."""
    allowed = [e for e in range(experts) if e not in missed]
    index = torch.stack([torch.randperm(len(allowed), generator=generator)[:top_k] for _ in range(tokens)])
    index = torch.tensor(allowed)[index]
    if masked:
        index[torch.rand(index.shape, generator=generator) < 0.3] = experts
    weights = torch.rand(tokens, top_k, generator=generator)
    return torch.randn(tokens, HIDDEN, generator=generator).to(dtype), index, weights.to(dtype)


def run(experts, given, *, fused):
    return (experts if fused else experts.one_by_one)(*given)


def close(got, expected, tolerance=1e-5):
    assert_close(got.double(), expected.double(), rtol=0, atol=tolerance * float(expected.abs().max()))


def check(experts, given, family="mixtral", tolerance=1e-5):
    """Fused, one by one, and dense; at expert numbers past the last the dense module may stumble."""
    x, index, weights = given
    none = index >= EXPERTS
    expected = dense_twin(experts, family)(
        x.double(), torch.where(none, 0, index), torch.where(none, 0.0, weights.double())
    )
    assert float(expected.abs().max()) > 0.01
    for fused in (True, False):
        got = run(experts, given, fused=fused)
        assert got.dtype == x.dtype
        close(got, expected, tolerance)


# ---- forward ----------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("grid, type", GRIDS.items(), ids=lambda value: str(value).replace(", ", "x"))
def test_fused_and_one_by_one_they_compute_what_dense_experts_do(grid, type, family, packed, generator):
    check(packed(grid, type, family=family), tokens_for(EXPERTS, 2, generator), family)


@pytest.mark.parametrize("top_k", range(1, EXPERTS + 1))
def test_any_number_of_experts_may_be_chosen(top_k, packed, generator):
    check(packed(), tokens_for(EXPERTS, top_k, generator))


@pytest.mark.parametrize("missed", [(0,), (5,), (0, 2, 3), (0, 1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_experts_that_nobody_chooses_and_masked_tokens_add_nothing(missed, masked, packed, generator):
    given = tokens_for(EXPERTS, min(2, EXPERTS - len(missed)), generator, missed=missed, masked=masked)
    experts = packed()
    check(experts, given)
    if masked:
        alone = (given[1] == EXPERTS).all(1)
        assert alone.any() and not run(experts, given, fused=True)[alone].any()


def test_one_expert_chosen_twice_by_a_token_counts_twice(packed, generator):
    x, _, weights = tokens_for(EXPERTS, 2, generator)
    check(packed(), (x, torch.full((11, 2), 4), weights))


@pytest.mark.parametrize("fused", [True, False])
def test_no_tokens_and_no_experts_give_nothing(fused, packed, generator):
    experts = packed()
    x, index, weights = tokens_for(EXPERTS, 2, generator)
    none = run(experts, (x[:0], index[:0], weights[:0]), fused=fused)
    assert none.shape == (0, HIDDEN) and none.dtype == x.dtype
    assert torch.equal(run(experts, (x, torch.full_like(index, EXPERTS), weights), fused=fused), torch.zeros_like(x))


@pytest.mark.parametrize(
    "tiles",
    [names for count in range(4) for names in itertools.combinations(PROJECTIONS, count)],
    ids=lambda names: " ".join(names) or "none",
)
def test_each_projection_may_be_with_or_without_tiles(tiles, packed, generator):
    experts = packed(tiles=tiles, family="gpt-oss")
    check(experts, tokens_for(EXPERTS, 3, generator), "gpt-oss")
    # Those without need not even be packed.
    for expert, name in itertools.product(range(EXPERTS), PROJECTIONS):
        if name not in tiles:
            setattr(experts.plain[expert], name, getattr(experts.plain[expert], name).dequantize())
    check(experts, tokens_for(EXPERTS, 3, generator), "gpt-oss")


def test_gate_and_up_may_have_bases_of_their_own(packed, generator):
    experts = packed()
    other = Basis(torch.randperm(HIDDEN, generator=generator), 8, 8)
    for expert in experts.plain:
        weight = dataclasses.replace(expert.up_proj.value(), basis=other, low_rank=None)
        layer = QuantLinear.from_weight(weight)
        layer.shared, expert.up_proj = expert.up_proj.shared, layer
    check(experts, tokens_for(EXPERTS, 2, generator))


@types
@pytest.mark.parametrize("format", [FORMAT, layer_format(3, 16, True)], ids=["basis", "no basis"])
def test_input_scales_stand_outside_the_basis(type, format, packed, generator):
    check(packed(type=type, input_scale=True, format=format), tokens_for(EXPERTS, 2, generator, masked=True))


@pytest.mark.parametrize(
    "format",
    [
        layer_format(4, 16, True),
        layer_format(2, 16, False, rotation_block=8, rotation_skip=8),
        layer_format(2, -1, True, vector=4, codebook_rows=8, codebook_columns=16, permuted=True, rotation_block=4),
    ],
    ids=["plain", "partly rotated", "vectors"],
)
def test_every_kind_of_codes_carries_tiles(format, packed, generator):
    check(packed(format=format), tokens_for(EXPERTS, 2, generator))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=str)
def test_sixteen_bit_activations_lose_no_more_than_their_rounding(dtype, tolerance, packed, generator):
    experts = packed(type="e4m3").to(dtype)
    check(experts, tokens_for(EXPERTS, 3, generator, dtype=dtype), tolerance=tolerance)
    # A router may weigh in float32.
    x, index, weights = tokens_for(EXPERTS, 3, generator, dtype=dtype)
    check(experts, (x, index, weights.float()), tolerance=tolerance)


@families
@pytest.mark.parametrize("fused", [True, False])
def test_the_gradient_is_that_of_dense_experts(family, fused, packed, generator):
    experts = packed(family=family)
    x, index, weights = tokens_for(EXPERTS, 2, generator)
    wanted = torch.randn(x.shape, generator=generator)
    seen, double = (t.clone().requires_grad_() for t in (x, x.double()))
    router, router_double = (t.clone().requires_grad_() for t in (weights, weights.double()))
    (run(experts, (seen, index, router), fused=fused) * wanted).sum().backward()
    (dense_twin(experts, family)(double, index, router_double) * wanted.double()).sum().backward()
    close(seen.grad, double.grad)
    close(router.grad, router_double.grad)


def test_the_middle_of_one_expert_has_its_part_of_the_shared_factors(packed, generator):
    experts, x = packed(), torch.randn(5, HIDDEN, generator=generator)
    for expert in range(EXPERTS):
        gate, up = (getattr(experts.plain[expert], name).value().dense(torch.float64) for name in PROJECTIONS[:2])
        expected = nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)
        close(experts.middle(expert, x), expected)


# ---- all experts in one product ---------------------------------------------------------------------------


@pytest.fixture(params=["C++", "as on a GPU"])
def grouped(request, monkeypatch):
    """Experts run in one call, and how often they did: in C++, or as on a device whose kernels do not decline them."""
    runs, taken = [], []

    def run(*given):
        runs.append(given)
        taken.clear()
        result = run_grouped(*given)
        assert all(y is not None for y in taken) if request.param == "C++" else not taken
        return result

    def multiply(*given):
        taken.append(cpu_experts_run(*given))
        return taken[-1]

    cpu_experts_run = cpu_experts.run
    in_cpp = multiply if request.param == "C++" else None
    monkeypatch.setattr(lorq.runtime.experts_at_once, "_run_experts", lambda x: in_cpp)
    monkeypatch.setattr(lorq.runtime.experts_at_once, "declines_experts", lambda *_: None)
    monkeypatch.setattr(lorq.runtime.experts, "run_grouped", run)
    return runs


@pytest.mark.parametrize("grid, type", GRIDS.items(), ids=lambda value: str(value).replace(", ", "x"))
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_in_one_product_they_compute_what_dense_experts_do(grid, type, masked, packed, generator, grouped):
    check(packed(grid, type), tokens_for(EXPERTS, 3, generator, masked=masked))
    assert len(grouped) == 1  # fused, and not where each expert runs for itself


@pytest.mark.parametrize(
    "format",
    [
        layer_format(4, 16, True),
        layer_format(2, 16, False, rotation_block=8, rotation_skip=8),
        layer_format(3, 16, False, permuted=True),
        layer_format(4, 16, True, grid="normal-float"),
        layer_format(2, -1, True, vector=4, codebook_rows=8, codebook_columns=16, permuted=True, rotation_block=4),
    ],
    ids=["plain", "partly rotated", "permuted", "normal floats", "vectors"],
)
def test_in_one_product_every_kind_of_codes_carries_tiles(format, packed, generator, grouped):
    experts = packed(format=format)
    check(experts, tokens_for(EXPERTS, 2, generator))
    check(experts.to(torch.bfloat16), tokens_for(EXPERTS, 2, generator, dtype=torch.bfloat16), tolerance=0.05)
    x, index, weights = tokens_for(EXPERTS, 2, generator)
    assert torch.equal(run(experts, (x, index, weights), fused=True), run(experts, (x, index, weights), fused=True))
    assert run(experts, (x[:0], index[:0], weights[:0]), fused=True).shape == (0, HIDDEN)
    assert not run(experts, (x, torch.full_like(index, EXPERTS), weights), fused=True).any()
    assert len(grouped) == 6


@pytest.mark.parametrize("tiles", [(), ("gate_proj",), ("up_proj", "down_proj")], ids=str)
def test_in_one_product_projections_may_be_without_shared_factors(tiles, packed, generator, grouped):
    check(packed(tiles=tiles, format=layer_format(3, 16, False, rotation_block=16)), tokens_for(EXPERTS, 3, generator))
    assert len(grouped) == 1


def test_experts_that_were_moved_replaced_or_copied_are_those_that_run(packed, generator, grouped):
    experts, given = packed(), tokens_for(EXPERTS, 3, generator)
    check(experts, given)
    packed_ = [expert.down_proj.weight_packed for expert in experts.plain]
    check(experts, given)
    assert [expert.down_proj.weight_packed is own for expert, own in zip(experts.plain, packed_, strict=True)] == [
        True
    ] * EXPERTS
    # One memory, and storages of their own.
    starts = [own.untyped_storage().data_ptr() for own in packed_]
    assert [start - starts[0] for start in starts] == [i * packed_[0].nbytes for i in range(EXPERTS)]
    assert {own.untyped_storage().nbytes() for own in packed_} == {packed_[0].nbytes}
    twin = copy.deepcopy(experts)
    experts.plain[2].up_proj = new = packed().plain[2].up_proj
    new.shared, new.permutation = twin.plain[2].up_proj.shared, twin.plain[2].up_proj.permutation
    check(experts, given)
    experts._apply(lambda tensor: tensor.clone())
    check(experts, given)
    check(twin, given)
    experts.plain[3].down_proj.weight_scale = experts.plain[3].down_proj.weight_scale * 2
    check(experts, given)
    assert len(grouped) == 6


def test_why_experts_do_not_run_in_one_product_is_said(packed, generator, monkeypatch):
    x, _, weights = tokens_for(EXPERTS, 2, generator)

    def why(experts, x=x):
        return declines_at_once(layers_of(experts.plain), tuple(experts.tiles), x, weights)

    assert why(packed()) is None
    assert why(packed(), x.double()) == "inputs are torch.float64"
    many = declines_at_once(layers_of(packed().plain), PROJECTIONS, x, torch.ones(75, 2))
    assert many is not None and many.startswith("an expert has 25.0 tokens, and more than ")
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        assert why(packed()) == "a program is being compiled, which one call of C++ is no part of"
    books = packed(format=layer_format(2, -1, True, vector=4, codebook_rows=8, codebook_columns=16))
    assert why(books) == "an expert has 3.7 tokens, and more than 1 are faster one expert after the other"
    monkeypatch.setattr(lorq.runtime.experts_at_once, "declines_experts", lambda format, *_: declines_experts(format))
    assert why(packed()) is None
    assert why(packed(), x.clone().requires_grad_()) == "inputs need gradients"
    # Without shared factors experts may have an order of channels each, or not be packed.
    assert why(packed(tiles=("gate_proj", "down_proj"))) == "up_proj has no shared factors"
    dense = packed(tiles=("gate_proj", "up_proj"))
    assert why(dense) is None
    dense.plain[1].down_proj = dense.plain[1].down_proj.dequantize()
    assert why(dense) == "down_proj has no shared factors"
    assert why(packed(tiles=(), format=layer_format(3, 16, False, rotation_block=16))) is None
    assert why(packed(format=layer_format(3, 16, False, 2))) == "experts have low-rank factors of their own, of rank 2"
    assert why(packed(format=layer_format(3, -1, True, scale_rank=2))) == "experts have scales of rank 2"
    quantized = packed(format=layer_format(3, 16, True, input_quantization="token"))
    assert why(quantized) == "experts quantize their inputs or outputs"
    mixed = packed()
    mixed.plain[2].up_proj = packed(format=layer_format(4, 16, True)).plain[2].up_proj
    assert why(mixed) == "up_proj has experts of several formats"
    biased = packed()
    biased.plain[0].gate_proj.bias = nn.Parameter(torch.zeros(WIDTH))
    assert why(biased) == "gate_proj has biases"


# ---- the module -------------------------------------------------------------------------------------------


def test_its_children_are_the_experts_once_and_the_tiles(packed):
    experts = packed()
    assert [name for name, _ in experts.named_children()] == [*map(str, range(EXPERTS)), "tiles"]
    assert all(a is getattr(experts, str(i)) for i, a in enumerate(experts.plain)) and len(experts.plain) == EXPERTS


@types
def test_a_weight_has_its_part_of_the_shared_factors(type, packed):
    experts = packed((3, 3), type)
    for name, (number, expert) in itertools.product(PROJECTIONS, enumerate(experts.plain)):
        layer, f = getattr(expert, name), experts.tiles[name].factors()
        i, j = f.cells[number].tolist()
        left, right = f.left[j].double(), f.right[i].double()
        if type != "float16":
            left, right = left * f.left_scale[j].double(), right * f.right_scale[i].double()[:, None]
        value = layer.value()
        expected = value.basis.unrotate(value.codes.decode(torch.float64) + left @ right)
        assert_close(layer.weight.double(), expected, rtol=1e-5, atol=1e-6)
        assert_close(layer.dequantize().weight.double(), expected, rtol=1e-5, atol=1e-6)
        alone = dataclasses.replace(value, low_rank=None).dense(torch.float64)
        assert float((alone - expected).norm()) > 0.5 * float(expected.norm())


@types
def test_another_dtype_leaves_what_is_stored_alone(type, packed, generator):
    experts = packed(type=type, input_scale=True, family="gpt-oss")
    given, before = tokens_for(EXPERTS, 2, generator), copy.deepcopy(experts.state_dict())
    expected = run(experts, given, fused=True)
    experts.to(torch.bfloat16)
    for name, tensor in experts.state_dict().items():
        if name.endswith("bias"):
            assert tensor.dtype == torch.bfloat16
        else:
            assert tensor.dtype == before[name].dtype and torch.equal(tensor.double(), before[name].double()), name
    assert all(layer.shared[0] is experts.tiles["gate_proj"] for layer in (e.gate_proj for e in experts.plain))
    x, index, weights = given
    close(experts(x.bfloat16(), index, weights.bfloat16()), expected, 0.05)


def test_a_copy_shares_its_own_factors_and_not_the_originals(packed, generator):
    experts, given = packed(), tokens_for(EXPERTS, 2, generator)
    expected = run(experts, given, fused=True)
    twin = copy.deepcopy(experts)
    for name in PROJECTIONS:
        assert {id(getattr(expert, name).shared[0]) for expert in twin.plain} == {id(twin.tiles[name])}
        assert twin.tiles[name] is not experts.tiles[name]
    assert torch.equal(run(twin, given, fused=True), expected)
    twin.tiles["down_proj"].left.zero_()
    assert not torch.equal(run(twin, given, fused=True), expected)
    assert not torch.equal(twin.plain[0].down_proj.weight, experts.plain[0].down_proj.weight)
    assert torch.equal(run(experts, given, fused=True), expected)


@families
@pytest.mark.parametrize("input_scale", [False, True], ids=["", "input scale"])
def test_dequantized_they_are_the_models_own_module_again(family, input_scale, packed, generator):
    experts, given = packed(family=family, input_scale=input_scale), tokens_for(EXPERTS, 2, generator)
    expected = run(experts, given, fused=True)
    plain = experts.dequantize()
    assert type(plain) is Experts and len(plain) == EXPERTS and not plain.training
    close(plain(*given), expected)
    fused = plain.fuse()
    assert type(fused).__name__ == {"mixtral": "MixtralExperts", "gpt-oss": "GptOssExperts"}[family]
    assert not any(module.training for module in (plain, fused))
    close(fused(*given), expected)
    assert torch.equal(run(experts, given, fused=True), expected)  # nothing was taken from the packed ones
    assert experts.dequantize(torch.bfloat16)[0].up_proj.weight.dtype == torch.bfloat16


def test_tiles_for_layers_that_are_not_packed_are_refused(packed, generator):
    tiles = dict(packed(tiles=("up_proj",)).tiles)
    experts = Experts.split(fused_experts("mixtral", generator))
    with pytest.raises(ValueError, match=r"must be packed, 0\.up_proj is a Linear; the config belongs to another"):
        QuantExperts(experts, tiles)


# ---- storage ----------------------------------------------------------------------------------------------


@types
@pytest.mark.parametrize("input_scale", [False, True], ids=["", "input scale"])
def test_stored_tiles_come_back_bit_for_bit(type, input_scale, random_tiles):
    for grid, experts in (((2, 3), 6), ((3, 3), 7), ((1, 5), 5)):
        tiles = random_tiles(HIDDEN, WIDTH, grid, type, experts, input_scale=input_scale)
        tensors = tiles.tensors()
        back = TileFactors.read(tensors)
        for field in dataclasses.fields(tiles):
            one, other = getattr(tiles, field.name), getattr(back, field.name)
            assert (one is None) == (other is None)
            assert one is None or (one.dtype == other.dtype and torch.equal(one.double(), other.double()))
        module = Tiles(HIDDEN, WIDTH, tiles.format)
        layout = tiles.format.layout(HIDDEN, WIDTH)
        assert {name: (tuple(t.shape), t.dtype) for name, t in module.state_dict().items()} == layout
        assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == layout
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        module.load_state_dict(tensors)
        again = module.factors().tensors()
        assert all(torch.equal(again[name].double(), tensor.double()) for name, tensor in tensors.items())
        assert module.factors().format == tiles.format


def test_room_on_meta_takes_no_memory_and_has_the_layout(packed):
    format = packed((3, 3), "e4m3", ("down_proj",)).tiles["down_proj"].format
    module = Tiles(HIDDEN, WIDTH, format, device="meta")
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    assert str(module) == "Tiles(grid=3x3, experts=6, rank=3, factor_type=e4m3)"
    assert math.prod(module.left.shape) == 3 * HIDDEN * 3


def test_the_state_is_the_layers_and_the_tiles(packed):
    experts = packed((3, 3))
    names = set(experts.state_dict())
    weight = experts.plain[0].gate_proj.value().tensors()
    layers = itertools.product(range(EXPERTS), PROJECTIONS)
    expected = {f"{expert}.{name}.{local}" for expert, name in layers for local in weight}
    tiles = ("left", "right", "left_scale", "right_scale", "cells")
    assert names == expected | {f"tiles.{name}.{local}" for name in PROJECTIONS for local in tiles}
