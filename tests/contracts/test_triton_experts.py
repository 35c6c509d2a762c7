"""The experts' kernel: as tests/contracts/test_triton.py does for single layers, whose ways are taken from there."""

import itertools
import re

import pytest
import torch
from helpers import layer_format
from test_kernels import dense, operands, sqnr_db
from test_triton import (
    SQNR_DB,
    Recorder,
    build,
    check_usage,
    compiled,
    interpreted,
    whole_interpreter,  # noqa: F401
)

import lorq.runtime.experts_at_once
from lorq.bench.experts import random_experts
from lorq.core.low_rank import FACTOR_TYPES
from lorq.kernels import triton_experts, triton_tile
from lorq.kernels.operands import NAMES, known_sizes
from lorq.kernels.reference_experts import expert_linear

pytest.importorskip("triton")
EXPERTS = 6
GIVEN = ("packed", "scale", "zero_point", "codebook", "codebook_scale")
# (out, in, format): rows and columns that no tile divides, groups of every relation to a tile.
FORMATS = {
    f"{bits}-{'symmetric' if symmetric else 'asymmetric'}-{out}x{in_}": (out, in_, layer_format(bits, group, symmetric))
    for bits, (symmetric, (out, in_, group)) in itertools.product(
        (2, 3, 4, 8), ((True, (65, 192, 64)), (False, (33, 80, 16)), (False, (31, 144, 48)))
    )
} | {
    "1 bit": (33, 96, layer_format(1, 32, False)),
    "6 bits": (33, 192, layer_format(6, 64, False)),
    "vectors of 4": (64, 160, layer_format(2, 160, True, vector=4, codebook_rows=16, codebook_columns=32)),
    "vectors of 2": (33, 120, layer_format(3, 120, True, vector=2, codebook_rows=3, codebook_columns=24)),
    "vectors of 8": (8, 96, layer_format(1, 96, True, vector=8, codebook_rows=8, codebook_columns=96)),
    "normal floats": (70, 320, layer_format(4, 64, True, grid="normal-float")),
}
every_format = pytest.mark.parametrize("out, in_, format", FORMATS.values(), ids=FORMATS)
# (tokens, experts for each, the kind of tile that this takes): one pair, many, pairs with rows of their own.
ROUTES = {"one token": (1, 1), "few": (3, 2), "many": (40, 3)}


def stacked(weights):
    """The operator's tensors of all experts, ``levels`` among them, and the bits."""
    parts = [dict(zip((*NAMES, "bits"), operands(weight), strict=True)) for weight in weights]
    lists = [[p[name] for p in parts if p[name] is not None] for name in GIVEN]
    whole = [torch.stack(tensors) if tensors else None for tensors in lists]
    return *whole[:3], parts[0]["levels"], *whole[3:]


def routing(tokens, places, generator, experts=EXPERTS):
    """An expert for each pair; some have none, some experts nobody."""
    index = torch.stack([torch.randperm(experts - 1, generator=generator)[:places] for _ in range(tokens)])
    if tokens > 1:
        index[torch.rand(index.shape, generator=generator) < 0.2] = experts
    return index.flatten()


def expected_of(x, expert, matrices, tiles):
    """Pair by pair in float64, with the shared factors where there are some."""
    places, rows = len(expert) // len(x), []
    for pair, number in enumerate(expert.tolist()):
        if number < len(matrices):
            matrix = matrices[number] + (0 if tiles is None else tiles.dense(number, torch.float64))
            rows.append(x[pair // places].double() @ matrix.T)
        else:
            rows.append(torch.zeros(len(matrices[0]), dtype=torch.float64))
    return torch.stack(rows)


def shared_of(x, tiles):
    if tiles is None:
        return None, None, None, None
    projected = (x @ tiles.rights(x.dtype).flatten(0, 1).T).unflatten(1, (tiles.grid[0], tiles.rank))
    return tiles.left, tiles.left_scale, tiles.cells, projected


@pytest.fixture
def check(random_weight, random_tiles, generator):
    def run(function, out, in_, format, draws, *, rank=3, type="int8", device="cpu"):
        weights = [random_weight(out, in_, format) for _ in range(EXPERTS)]
        matrices, stored = [dense(weight) for weight in weights], stacked(weights)
        for (tokens, places), (dtype, floor), shared in draws:
            tiles = random_tiles(out, in_, (2, 3), type, EXPERTS, rank=rank) if shared else None
            x = torch.randn(tokens, in_, generator=generator).to(dtype)
            expert = routing(tokens, places, generator)
            arguments = x, expert, *stored, *shared_of(x, tiles), format.bits
            y = function(*(v.to(device) if isinstance(v, torch.Tensor) else v for v in arguments)).cpu()
            assert y.dtype == dtype and y.shape == (tokens * places, out)
            expected = expected_of(x, expert, matrices, tiles)
            # Factors of 16 bits round what lies between them.
            assert sqnr_db(expected, y) > floor, (tokens, dtype, shared, format)
            assert not y[expert == EXPERTS].any()

    return run


def some_draws(generator):
    """Every route, with a dtype and shared factors or none drawn for each."""
    kinds = list(SQNR_DB.items())
    for route, draw in zip(
        ROUTES.values(), torch.randint(6, (len(ROUTES),), generator=generator).tolist(), strict=True
    ):
        yield route, kinds[draw // 2], bool(draw % 2)


def test_the_reference_is_the_dense_product_of_each_pair(check):
    for out, in_, format in (FORMATS["3-asymmetric-33x80"], FORMATS["vectors of 4"], FORMATS["normal floats"]):
        draws = itertools.product(ROUTES.values(), SQNR_DB.items(), (False, True))
        check(expert_linear, out, in_, format, list(draws))


@pytest.fixture
def arguments(random_weight, random_tiles, generator):
    """Of a call with shared factors."""
    format, x = layer_format(3, 16, False), torch.randn(4, 48, generator=generator)
    stored = stacked([random_weight(7, 48, format) for _ in range(EXPERTS)])
    factors = shared_of(x, random_tiles(7, 48, (2, 3), "int8", EXPERTS))
    return x, routing(4, 2, generator), *stored, *factors, format.bits


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared factors"])
def test_the_operator_is_registered_as_torch_wants_it(shared, arguments):
    given = arguments if shared else (*arguments[:8], None, None, None, None, arguments[-1])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(expert_linear, given, test_utils=checks)
    real = expert_linear(*given)
    fake = expert_linear(*(v.to("meta") if isinstance(v, torch.Tensor) else v for v in given))
    assert fake.is_meta and (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_what_is_not_covered_or_does_not_belong_together_goes_to_the_reference(arguments, monkeypatch):
    assert torch.equal(triton_experts.linear_or_reference(*arguments), expert_linear(*arguments))
    assert triton_experts.declines(layer_format(3, 16, False), 48, torch.device("cpu"), torch.float32, 1.0) == (
        "the device is cpu"
    )
    monkeypatch.setattr(triton_experts, "declines", lambda *_: None)
    monkeypatch.setattr(triton_experts, "expert_linear_reference", lambda *_: torch.tensor(7))
    left, left_scale, cells, projected = range(8, 12)
    for place, cut in ((left, 1), (left_scale, 1), (cells, 1), (projected, 1), (3, 1)):
        wrong = list(arguments)
        wrong[place] = wrong[place][cut:]
        assert triton_experts.linear_or_reference(*wrong) == 7, place


def test_the_kernel_is_registered_for_cuda_devices():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("lorq::expert_linear", "CUDA")


# ---- interpreted ------------------------------------------------------------------------------------------


@interpreted
@every_format
def test_every_format_is_the_dense_product_of_each_pair(out, in_, format, check, generator, whole_interpreter):  # noqa: F811
    check(triton_experts.linear, out, in_, format, list(some_draws(generator)))


@interpreted
@pytest.mark.parametrize("type", FACTOR_TYPES)
@pytest.mark.parametrize("rank", [1, 40])
def test_every_kind_of_shared_factors_is_added(type, rank, check, whole_interpreter):  # noqa: F811
    draws = [(route, kind, True) for route, kind in zip(ROUTES.values(), SQNR_DB.items(), strict=True)]
    check(triton_experts.linear, 33, 96, layer_format(3, 32, False), draws, rank=rank, type=type)


@interpreted
def test_tiles_of_hundreds_of_pairs_are_the_dense_product(check):
    check(triton_experts.linear, 40, 96, layer_format(4, 32, True), [((400, 2), (torch.float32, 120), True)])


@interpreted
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_whole_layer_of_experts_runs_on_the_kernel(tokens, generator, monkeypatch, whole_interpreter):  # noqa: F811
    layer, runs = random_experts(EXPERTS, 64, 96, 5, (2, 3), generator), []

    def kernel(*given):
        runs.append(given)
        return triton_experts.linear(*given)

    monkeypatch.setattr(lorq.runtime.experts_at_once, "declines_experts", lambda *_: None)
    monkeypatch.setattr(lorq.runtime.experts_at_once, "_run_experts", lambda _: None)
    monkeypatch.setattr(lorq.runtime.experts_at_once, "expert_linear", kernel)
    x, index = torch.randn(tokens, 64, generator=generator), routing(tokens, 3, generator).unflatten(0, (tokens, 3))
    given = x, index, torch.rand(tokens, 3, generator=generator)
    with torch.no_grad():
        y = layer(*given)
        assert len(runs) == 3 and sqnr_db(layer.one_by_one(*given).double(), y) > 100


@pytest.mark.gpu
@every_format
def test_every_format_is_the_dense_product_on_a_device(out, in_, format, check, generator):
    check(expert_linear, out, in_, format, list(some_draws(generator)), device="cuda")


# ---- the plan ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize("tokens, places", [(1, 1), (1, 5), (7, 3), (50, 2)])
def test_every_pair_is_in_one_tile_of_its_expert(tokens, places, size, generator):
    for expert in (routing(tokens, places, generator), torch.zeros(tokens * places, dtype=torch.int64)):
        order, plan = triton_experts.plan_tiles(expert, EXPERTS, size)
        seen = []
        for owner, first, last in plan.T.tolist():
            if owner < EXPERTS:
                pairs = order[first : min(first + size, last)]
                assert len(pairs) and (expert[pairs] == owner).all()
                seen += pairs.tolist()
        assert sorted(seen) == torch.where(expert < EXPERTS)[0].tolist()


# ---- compiled ---------------------------------------------------------------------------------------------

# As in Qwen1.5-MoE: 60 experts of 1408 x 2048, four for each token, factors of rank 32 on a grid of 8 x 8.
OUT, IN, COUNT, PLACES, GRID, RANK = 1408, 2048, 60, 4, 8, 32
LARGE = {
    "2 bits in vectors of 4": (layer_format(2, IN, True, vector=4, codebook_rows=64, codebook_columns=512), "int8"),
    "3 bits": (layer_format(3, 128, False), "e4m3"),
    "4 bits": (layer_format(4, 128, True), "int8"),
    "2 bits": (layer_format(2, 64, True), "float16"),
    "3 bits in vectors of 2": (layer_format(3, IN, True, vector=2, codebook_rows=64, codebook_columns=512), "int8"),
    "normal floats": (layer_format(4, 64, True, grid="normal-float"), "int8"),
}


@pytest.fixture
def launch(monkeypatch):
    """Launches of the operator on experts without memory, in place of the kernel's work."""
    found = []
    monkeypatch.setattr(triton_tile, "experts", Recorder(triton_tile.experts, found))

    def run(name, tokens, dtype, *, shared=True):
        format, type = LARGE[name]
        layout = format.layout(OUT, IN)

        def meta(shape, kind):
            return torch.empty(shape, dtype=kind, device="meta")

        keys = ("weight_packed", "weight_scale", "weight_zero_point", "codebook", "codebook_scale")
        shapes = [((COUNT, *layout[key][0]), layout[key][1]) if key in layout else None for key in keys]
        stored = [None if shape is None else meta(*shape) for shape in shapes]
        levels = meta((2**format.bits,), torch.float32) if known_sizes(format).levels != "integer" else None
        factors = None, None, None, None
        if shared:
            scales = None if type == "float16" else meta((GRID, RANK), torch.float16)
            factors = meta((GRID, OUT, RANK), FACTOR_TYPES[type][0]), scales
            factors += meta((COUNT, 2), torch.int16), meta((tokens, GRID, RANK), dtype)
        expert = meta((tokens * PLACES,), torch.int64)
        triton_experts.linear(
            meta((tokens, IN), dtype), expert, *stored[:3], levels, *stored[3:], *factors, format.bits
        )
        return found

    return run


def check_fit(launch, name, tokens, dtype, folder):
    launches = launch(name, tokens, dtype)
    assert [kernel.__name__ for kernel, _, _ in launches] == ["experts"]
    check_usage((name, str(dtype)[6:], tokens), launches, folder)


@compiled
@pytest.mark.parametrize("name, tokens", [("2 bits in vectors of 4", 1), ("3 bits", 2048)])
def test_default_tiles_fit_the_devices(name, tokens, launch, tmp_path):
    check_fit(launch, name, tokens, torch.bfloat16, tmp_path)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, tokens",
    [
        *((torch.bfloat16, tokens) for tokens in (1, 64, 256, 1024, 4096)),  # one for each tile of 16 bits
        *((torch.float32, tokens) for tokens in (1, 64, 1024)),
        *((torch.float16, tokens) for tokens in (1, 4096)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", LARGE)
def test_every_default_tile_fits_the_devices(name, tokens, dtype, launch, tmp_path):
    check_fit(launch, name, tokens, dtype, tmp_path)


@compiled
def test_tensor_cores_and_copies_in_the_background_are_used(launch):
    launches = launch("4 bits", 4096, torch.bfloat16)
    for capability, instruction in ((80, "mma.sync"), (90, "wgmma.mma_async"), (100, "tcgen05.mma")):
        text = build(*launches[0], capability).asm["ptx"]
        copied = [int(size, 16) for size in re.findall(r"cp\.async\.c\S+ .*, (0x\d+), ", text)]
        # Words too are fetched 16 bytes at a time.
        assert instruction in text and copied.count(16) > 3 * (len(copied) - copied.count(16)), capability
