"""What every method in the table keeps to, whatever its settings."""

import dataclasses
import functools
import itertools
import json
import math
import re
import typing
from types import SimpleNamespace

import pytest
import torch
from helpers import solve_one

from lorq.core.problem import Problem
from lorq.core.stats import StatsAccumulator
from lorq.methods import METHODS, Method

OUT, IN = 40, 96


def every(**choices):
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


# Stops that a matrix this small reaches only after some ranks.
EAGER = {"budget": 1.0, "range_measure": "group", "slope_window": 2}
# Each pair of these three settings, once; every pass over the weight is tried with two of them.
FORMS = [
    {"factor_type": "int8", "sketch": "block", "symmetric": False},
    {"factor_type": "int8", "sketch": "rank1", "symmetric": True},
    {"factor_type": "float16", "sketch": "block", "symmetric": True},
    {"factor_type": "float16", "sketch": "rank1", "symmetric": False},
]
PASSES = every(
    rounding=["clip", "nearest", "gptq"],
    metric=["activation", "hessian"],
    order=["low-rank-then-codes", "codes-then-low-rank"],
)
# A little of each of LoPRo's: every order and basis of the columns is tried with one of these.
PARTS = [
    {"metric": "hessian", "factor_type": "int8", "sketch": "block", "symmetric": False},
    {"metric": "hessian", "factor_type": "e4m3", "sketch": "rank1", "symmetric": True},
    {"metric": "activation", "factor_type": "e4m3", "sketch": "block", "symmetric": False},
    {"metric": "activation", "factor_type": "float16", "sketch": "rank1", "symmetric": True},
    {"metric": "hessian", "factor_type": "float16", "sketch": "block", "symmetric": True},
]
ORDERS = [{"order": "low-rank-then-codes"}, {"order": "codes-then-low-rank"}]
TURNS = every(
    rotation=["full", "partial", "none"],
    importance=["log", "ratio", "hessian", "residual", "none"],
)
# Settings beyond bits and group size that a method is tried with, besides its defaults.
SETTINGS = {
    "flrq": [passes | FORMS[(i + half) % 4] | EAGER for i, passes in enumerate(PASSES) for half in (0, 2)]
    + every(iterations=[0, 4], epochs=[0, 2], budget=[0.0, 1.0]),
    "flrq-paper": every(factor_type=["int8"], exponent=[1.0, 2.5], budget=[1.0], min_gain=[0.0]),
    "lopro": [turns | PARTS[(i + i // 5) % 5] | ORDERS[i % 2] for i, turns in enumerate(TURNS)]
    + every(rounding=["gptq", "clip", "nearest"], rank=[0, 40], epochs=[2], range_search=["none"])
    + every(range_search=["saturate"], epochs=[0], shrinkage=[0.0, 1.0])
    + every(
        codebook=["vector"],
        rounding=["gptq", "nearest"],
        rotation=["full", "partial"],
        importance=["log", "none"],
        order=["low-rank-then-codes", "codes-then-low-rank"],
    )
    + every(codebook=["vector"], rank=[0], vector=[2], codebook_columns=[16], codebook_rows=[-1, 8]),
    "lopro-paper": every(codebook=["scalar", "vector"], epochs=[1], rank=[8]),
    "gptq": every(range_search=["none", "saturate", "scale"], symmetric=[False, True], shrinkage=[0.0]),
    "nearest": every(range_search=["saturate", "scale"], symmetric=[False, True]) + every(grid=["normal-float"]),
    "lrq": every(
        scaling=["low-rank", "full"], symmetric=[False, True], range_search=["none", "saturate"], steps=[0, 20]
    ),
    "lrq-paper": every(steps=[50]),
    "lords": every(
        grid=["integer", "normal-float"], weighting=["none", "diagonal"], rounding=["nearest", "gptq"], steps=[3]
    )
    + every(solver=["gradient"], steps=[20], range_search=["none"], rank=[1, 5], refine_steps=[0, 5]),
}
# Few enough gradient steps for a test.
FEW = {"lrq": {"steps": 40}, "lrq-paper": {"steps": 40, "learning_rate": 0.01}, "lords-paper": {"steps": 100}}
CASES = [(name, settings) for name in METHODS for settings in [{}, *SETTINGS.get(name, [])]]
cases = pytest.mark.parametrize(
    "name, settings", CASES, ids=[" ".join([name, *map(str, settings.values())]) for name, settings in CASES]
)
methods = pytest.mark.parametrize("name", METHODS)
# Those whose scales belong to groups of columns; a matrix of scales has none to divide.
grouped = pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("lords")])
SCOPES = ("layer", "input", "experts", "block")
# Those that solve the layers of one input together.
TOGETHER = [(name, settings) for name, settings in CASES if METHODS[name]().scope in ("input", "experts")]
together = pytest.mark.parametrize(
    "name, settings", TOGETHER, ids=[" ".join([name, *map(str, settings.values())]) for name, settings in TOGETHER]
)


@functools.cache
def layer():
    """A weight with two strong directions, and statistics of correlated inputs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = normal(400, IN) @ (torch.eye(IN) + 0.1 * normal(IN, IN)) * torch.linspace(0.3, 2.0, IN)
    sums = StatsAccumulator(IN)
    sums.add(inputs)
    return normal(OUT, 2) @ normal(2, IN) * 0.04 + normal(OUT, IN) * 0.02, sums.finish()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def made(name, **settings):
    """A method with these settings, without those it does not have, and with few steps."""
    known = {field.name for field in dataclasses.fields(METHODS[name])}
    return METHODS[name](**{key: value for key, value in (FEW.get(name, {}) | settings).items() if key in known})


@functools.cache
def solved(name, settings):
    """The result for 3 bits and groups of 32, with what it was made from before and after."""
    method = made(name, bits=3, group_size=32, **dict(settings))
    weight, stats = layer()
    copies = [tensor.clone() for tensor in (weight, stats.hessian, stats.mean_abs)]
    result = solve_one(method, weight, stats)
    unchanged = all(torch.equal(*pair) for pair in zip(copies, (weight, stats.hessian, stats.mean_abs), strict=True))
    return SimpleNamespace(method=method, weight=weight, stats=stats, result=result, unchanged=unchanged)


def case(name, settings):
    return solved(name, tuple(settings.items()))


def parts(result):
    pieces = {"codes": result.codes, "scale": result.scale, "zero_point": result.zero_point, "grid": result.grid}
    for part in (result.low_rank, result.codebook, result.basis, result.scale_factors):
        pieces |= {f"{type(part).__name__} {name}": value for name, value in vars(part).items()} if part else {}
    return pieces


def same(a, b):
    def equal(x, y):
        return torch.equal(x.double(), y.double()) if isinstance(x, torch.Tensor) else x == y

    a, b = parts(a), parts(b)
    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


def relative_error(weight, dense, hessian):
    weight, delta, h = weight.double(), (weight - dense).double(), hessian.double()
    return float(torch.trace(delta @ h @ delta.T) / torch.trace(weight @ h @ weight.T))


def test_the_cases_reach_low_rank_parts_of_every_type_and_none():
    ranks = {(c.method.factor_type, c.result.format.rank > 0) for n, s in CASES if n == "flrq" for c in [case(n, s)]}
    assert ranks >= {("int8", True), ("float16", True), ("int8", False)}
    formats = [case(name, settings).result.format for name, settings in CASES if name == "lopro"]
    assert {f.factor_type for f in formats if f.rank} == {"int8", "e4m3", "float16"}
    assert {(f.permuted, f.rotation_block > 0, f.rotation_skip > 0, f.vector > 1) for f in formats} >= {
        (permuted, block, skip, vector)
        for permuted, (block, skip), vector in itertools.product(
            (False, True), ((True, False), (True, True)), (False, True)
        )
    }


@methods
def test_a_method_keeps_the_protocol_and_is_frozen(name):
    method = METHODS[name]()
    assert isinstance(method, Method) and method.scope in SCOPES
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.bits = 3


@cases
def test_parts_are_in_range_and_inputs_unchanged(name, settings):
    c = case(name, settings)
    assert c.unchanged
    format = c.result.format
    # Vector codebooks have one scale for each row, and no zero point; a matrix of scales has neither groups.
    assert format.group_size == (32 if format.vector == 1 and not format.scale_rank else IN)
    assert c.result.shape == (OUT, IN)
    assert c.result.codes.dtype == torch.uint8 and c.result.codes.shape == (OUT, IN // format.vector)
    assert int(c.result.codes.max()) < 2 ** (3 * format.vector)
    assert (c.result.zero_point is None) == (
        c.method.symmetric or format.vector > 1 or format.grid != "integer" or format.scale_rank > 0
    )
    assert c.result.zero_point is None or int(c.result.zero_point.max()) <= 7
    if format.scale_rank:
        factors = c.result.scale_factors
        assert c.result.scale is None and factors.left.shape == (OUT, format.scale_rank)
        assert factors.right.shape == (format.scale_rank, IN)
        assert factors.left.dtype == factors.right.dtype == torch.float16
    else:
        assert c.result.scale.dtype == torch.float16 and float(c.result.scale.min()) > 0
        assert c.result.scale.shape == (OUT, IN // format.group_size)
    assert torch.isfinite(c.result.dense()).all()


@cases
def test_the_recorded_errors_are_those_of_the_result(name, settings):
    c = case(name, settings)
    assert c.result.record.error_after == pytest.approx(
        relative_error(c.weight, c.result.dense(), c.stats.hessian), rel=1e-4
    )
    if c.result.format.scale_rank or c.result.format.grid != "integer":
        return  # plain rounding then has other groups or levels; the methods' own tests know them
    symmetric = c.method.symmetric and c.result.format.vector == 1
    nearest = METHODS["nearest"](bits=3, group_size=c.result.format.group_size, symmetric=symmetric)
    plain = solve_one(nearest, c.weight, c.stats)
    # float32 sums of differences.
    expected = relative_error(c.weight, plain.dense(), c.stats.hessian)
    assert c.result.record.error_before == pytest.approx(expected, rel=1e-4)


@cases
def test_the_largest_format_bounds_what_is_stored(name, settings):
    c = case(name, settings)
    largest = c.method.largest(OUT, IN)
    assert c.result.stored_bits() <= largest.stored_bits(OUT, IN)
    assert c.result.format.rank <= largest.rank
    assert dataclasses.replace(c.result.format, rank=0, factor_type="float16") == dataclasses.replace(
        largest, rank=0, factor_type="float16"
    )


@cases
def test_the_same_seed_gives_the_same_bits(name, settings):
    c = case(name, settings)
    again = solve_one(c.method, c.weight, c.stats)
    assert same(again, c.result) and again.record == c.result.record


@together
def test_one_weight_solved_together_is_the_weight_solved_alone(name, settings):
    c = case(name, settings)
    alone = c.method.solve(Problem({"layer": c.weight}, {"layer": c.stats}, 0))["layer"]
    assert same(alone, c.result) and alone.record == c.result.record


@together
def test_weights_of_one_input_get_one_basis_and_are_solved_in_it(name, settings):
    c = case(name, settings)
    others = torch.randn(24, IN, generator=seeded(1)) * 0.02 * torch.linspace(2.0, 0.2, IN), c.weight[8:]
    weights = dict(zip(("layer", "second", "third"), (c.weight, *others), strict=True))
    results = c.method.solve(Problem(weights, dict.fromkeys(weights, c.stats), 0))
    first = results["layer"]
    for name, result in results.items():
        weight = weights[name]
        assert result.shape == weight.shape
        assert (result.basis is None) == (first.basis is None)
        assert result.basis is None or (result.basis.block, result.basis.skip) == (first.basis.block, first.basis.skip)
        if first.format.permuted:
            assert torch.equal(result.basis.permutation, first.basis.permutation)
            assert torch.equal(result.basis.permutation.sort().values, torch.arange(IN))
        found = relative_error(weight, result.dense(), c.stats.hessian)
        assert result.record.error_after == pytest.approx(found, rel=1e-4)
        assert found < result.record.error_before * (2 if c.method.rounding == "nearest" else 1)
    if not first.format.permuted:  # then nothing of one weight depends on the others
        assert same(first, c.result)
    if c.method.order == "codes-then-low-rank":  # a weight beside its like is ordered as it is alone
        pair = ("layer", "twin")
        twins = c.method.solve(Problem(dict.fromkeys(pair, c.weight), dict.fromkeys(pair, c.stats), 0))
        assert same(twins["layer"], c.result)


@cases
def test_settings_survive_json(name, settings):
    method = case(name, settings).method
    assert METHODS[name](**json.loads(json.dumps(dataclasses.asdict(method)))) == method


@pytest.mark.parametrize("group_size", [16, -1], ids=["groups", "one group per row"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@methods
def test_eight_bits_are_close_to_exact(name, symmetric, group_size):
    weight, stats = layer()
    # NormalFloat spends its levels where weights are many; its outermost are wide apart at any width.
    method = made(name, bits=8, group_size=group_size, symmetric=symmetric, grid="integer")
    result = solve_one(method, weight, stats)
    # A range of eight standard deviations in 255 steps, each value off by 12^-1/2 of a step, is 40.9 dB; less is wide.
    assert -10 * math.log10(result.record.error_after) > 40.9
    assert relative_error(weight, result.dense(), torch.eye(IN)) < 10**-4.0


@methods
def test_errors_fall_with_every_bit(name):
    weight, stats = layer()
    errors = [
        solve_one(made(name, bits=bits, group_size=32), weight, stats).record.error_after for bits in (2, 3, 4, 6, 8)
    ]
    assert all(after < 0.6 * before for before, after in itertools.pairwise(errors))


@methods
def test_one_group_per_row_is_the_group_of_the_whole_width(name):
    weight, stats = layer()
    whole, minus_one = (solve_one(made(name, bits=3, group_size=size), weight, stats) for size in (IN, -1))
    assert minus_one.format.scale_rank or minus_one.scale.shape == (OUT, 1)
    assert same(whole, minus_one)
    assert METHODS[name](group_size=-1).largest(OUT, IN).group_size == IN


@grouped
def test_a_group_size_that_does_not_divide_is_refused_with_both_numbers(name):
    weight, stats = layer()
    with pytest.raises(ValueError, match="group_size") as caught:
        solve_one(METHODS[name](bits=3, group_size=36), weight, stats)
    assert {"36", str(IN)} <= set(re.findall(r"\d+", str(caught.value)))


@methods
def test_missing_statistics_are_refused_where_they_are_needed(name):
    method = METHODS[name](group_size=32)
    weight, _ = layer()
    if method.needs_stats:
        with pytest.raises(ValueError, match="needs input statistics, got None"):
            solve_one(method, weight, None)
    else:
        result = solve_one(method, weight, None)
        assert result.record.error_after == pytest.approx(
            relative_error(weight, result.dense(), torch.eye(IN)), rel=1e-4
        )


def out_of_range():
    """For every setting that is a number or a name: values that none can mean."""
    for name, method in METHODS.items():
        hints = typing.get_type_hints(method)
        for field in dataclasses.fields(method):
            if hints[field.name] is bool:
                continue
            if typing.get_origin(hints[field.name]) is typing.Literal:
                values = ["nonsense", ""]
            else:
                values = [-99] if hints[field.name] is int else [-99.0, math.inf, math.nan]
            yield from (pytest.param(name, field.name, value, id=f"{name} {field.name} {value}") for value in values)


def checked(name, **changes):
    """Only the settings' own checks: in tests the annotations are checked too, and would come first."""
    method = object.__new__(METHODS[name])
    for setting, value in (dataclasses.asdict(METHODS[name]()) | changes).items():
        object.__setattr__(method, setting, value)
    method.__post_init__()


@pytest.mark.parametrize("name, setting, value", list(out_of_range()))
def test_settings_out_of_range_are_refused_by_name_and_value(name, setting, value):
    with pytest.raises(ValueError, match=rf"^{setting} must be .*, got {re.escape(repr(value))}$"):
        checked(name, **{setting: value})


@methods
@pytest.mark.parametrize("setting, value", [("bits", 1), ("bits", 9), ("group_size", 0), ("group_size", -2)])
def test_widths_and_groups_just_outside_are_refused(name, setting, value):
    with pytest.raises(ValueError, match=f"^{setting} must be .*, got {value}$"):
        checked(name, **{setting: value})


@pytest.mark.parametrize(
    "setting, value",
    [
        ("factor_type", "int4"), ("iterations", 65), ("budget", 8.5), ("slope_window", 0), ("slope_threshold", 1.1),
        ("min_gain", 1.1), ("epochs", -2), ("shrinkage", 1.1), ("damping", 10.5), ("exponent", 8.1),
    ],
)  # fmt: skip
def test_settings_of_flrq_just_outside_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"^{setting} must be .*, got {re.escape(repr(value))}$"):
        checked("flrq", **{setting: value})


@pytest.mark.parametrize(
    "setting, value",
    [
        ("factor_type", "int4"), ("rotation", "half"), ("iterations", 65), ("rank", -1), ("epochs", -1),
        ("block", -2), ("skip", -2), ("vector", 0), ("vector", 1), ("vector", 9), ("codebook_columns", 0),
        ("codebook_rows", 0), ("kmeans_iterations", -1), ("shrinkage", 1.1), ("damping", 10.5), ("exponent", 8.1),
    ],
)  # fmt: skip
def test_settings_of_lopro_just_outside_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"^{setting} must be .*, got {re.escape(repr(value))}$"):
        checked("lopro", **{setting: value})
