"""What every method in the table keeps to, whatever its settings; a new one is tried with all its choices."""

import dataclasses
import functools
import itertools
import json
import math
import re
import typing
from dataclasses import dataclass, field

import pytest
import torch
from helpers import same_codes

from lorq.core.checks import Range
from lorq.core.codes import CODES
from lorq.core.low_rank import FACTOR_TYPES
from lorq.core.problem import BlockOutput, Problem
from lorq.core.rounding import nearest
from lorq.core.stats import StatsAccumulator
from lorq.methods import METHODS, Method

OUT, IN = 40, 96
SCOPES = ("layer", "input", "experts", "block")


@dataclass(frozen=True)
class Row:
    """What a method is tried with besides its choices, and what makes it fit a test.

    Attributes:
        tried: values of settings that are numbers; each meets each choice.
        always: settings of every case.
    """

    tried: dict[str, list] = field(default_factory=dict)
    always: dict[str, typing.Any] = field(default_factory=dict)


# A method that is not here is tried with its choices alone.
ROWS = {
    # Stops that a matrix this small reaches only after some ranks.
    "flrq": Row(
        {"iterations": [0, 2], "epochs": [0, 2], "budget": [1.0, 0.0, 2.0]}, {"slope_window": 2, "budget": 1.0}
    ),
    "flrq-paper": Row({"exponent": [1.0, 2.5]}, {"budget": 1.0, "min_gain": 0.0}),
    "lopro": Row({"rank": [4, 0, 40], "epochs": [0, 2], "shrinkage": [0.2, 0.0, 1.0], "codebook_rows": [-1, 8]}),
    "lopro-paper": Row({"epochs": [0, 1]}),
    "gptq": Row({"shrinkage": [0.2, 0.0]}),
    "lrq": Row({"steps": [20, 0]}, {"steps": 40}),
    "lrq-paper": Row({}, {"steps": 40, "learning_rate": 0.01}),
    "lords": Row({"steps": [3, 20], "rank": [-1, 2, 5], "refine_steps": [0, 5]}),
    "lords-paper": Row({}, {"steps": 100}),
}
methods = pytest.mark.parametrize("name", METHODS)


def having(setting):
    """The methods with a setting of this name; others have one width, or no groups."""
    known = [name for name, kind in METHODS.items() if setting in {f.name for f in dataclasses.fields(kind)}]
    return pytest.mark.parametrize("name", known)


def made(name, **settings):
    """A method with these settings, without those it does not have, and with its row's."""
    known = {f.name for f in dataclasses.fields(METHODS[name])}
    given = ROWS.get(name, Row()).always | settings
    return METHODS[name](**{key: value for key, value in given.items() if key in known})


def choices(name):
    """The values of each setting that has a few, but for those that the method has from another one in the table."""
    kind = METHODS[name]
    inherited = {f.name for other in METHODS.values() if other in kind.__mro__[1:] for f in dataclasses.fields(other)}
    found = {}
    for setting, hint in typing.get_type_hints(kind).items():
        values = [False, True] if hint is bool else typing.get_args(hint) if is_choice(hint) else ()
        if values and setting not in inherited:
            found[setting] = [value for value in values if setting != "grid" or fits(name, value)]
    return found | ROWS.get(name, Row()).tried


def fits(name, grid):
    """GGUF's blocks of 256 columns are tried with weights of their own (tests/unit/core/test_gguf.py)."""
    try:
        return bool(made(name, grid=grid, group_size=32).largest(OUT, IN))
    except ValueError:
        return False


def is_choice(hint):
    return typing.get_origin(hint) is typing.Literal


def allowed(name, settings):
    """Some settings exclude each other."""
    try:
        made(name, **settings)
    except ValueError:
        return False
    return True


def pairwise(name):
    """Settings in which every two values of two settings, where the method allows them, stand together."""
    values = choices(name)
    missing = {
        frozenset(pair): dict(pair)
        for a, b in itertools.combinations(values, 2)
        for pair in itertools.product(((a, x) for x in values[a]), ((b, y) for y in values[b]))
        if allowed(name, dict(pair))
    }
    if len(values) == 1:
        missing = {frozenset({(a, x)}): {a: x} for a in values for x in values[a] if allowed(name, {a: x})}
    while missing:
        row = dict(next(iter(missing.values())))
        for setting in values:
            fits = [v for v in values[setting] if allowed(name, row | {setting: v})]
            if setting not in row and fits:
                row[setting] = max(
                    fits, key=lambda v: sum(frozenset({(setting, v), i}) in missing for i in row.items())
                )
        missing = {pair: settings for pair, settings in missing.items() if not pair <= set(row.items())}
        yield row


CASES = [(name, settings) for name in METHODS for settings in ({}, *pairwise(name))]
IDS = [" ".join([name, *map(str, settings.values())]) for name, settings in CASES]


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


def solve(method, weights, stats, **others):
    """Layers of one input, in one call."""
    return method.solve(Problem(weights, {} if stats is None else dict.fromkeys(weights, stats), 0, **others))


def alone(method, stats="measured"):
    """The layer by itself."""
    weight, measured = layer()
    return solve(method, {"layer": weight}, measured if stats == "measured" else stats)["layer"]


@functools.cache
def cached(method):
    return alone(method)


def result_of(name, **settings):
    """For 3 bits and groups of 32."""
    return cached(made(name, bits=3, group_size=32, **settings))


def same(a, b):
    def equal(x, y):
        return torch.equal(x.double(), y.double()) if isinstance(x, torch.Tensor) else x == y

    def parts(result):
        own = (result.low_rank, result.basis)
        return {f"{type(part).__name__} {name}": value for part in own if part for name, value in vars(part).items()}

    left, right = parts(a), parts(b)
    alike = left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    alike = alike and a.format == b.format and a.record.error_after == b.record.error_after
    return alike and same_codes(a.codes, b.codes)


def relative_error(weight, dense, hessian):
    weight, delta, h = weight.double(), (weight - dense).double(), hessian.double()
    return float(torch.trace(delta @ h @ delta.T) / torch.trace(weight @ h @ weight.T))


# ---- every case -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, settings", CASES, ids=IDS)
def test_a_result_is_what_its_method_promises(name, settings):
    method = made(name, bits=3, group_size=32, **settings)
    assert METHODS[name](**json.loads(json.dumps(dataclasses.asdict(method)))) == method
    weight, stats = layer()
    copies = [tensor.clone() for tensor in (weight, stats.hessian, stats.mean_abs)]
    result = cached(method)
    assert all(torch.equal(*pair) for pair in zip(copies, (weight, stats.hessian, stats.mean_abs), strict=True))
    parts_are_what_the_format_lays_out(result)
    recorded_errors_are_its_own(result, weight)
    largest_format_bounds_it(result, method)
    neither_call_nor_company_changes_it(result, method)


def parts_are_what_the_format_lays_out(result):
    codes = result.codes
    assert result.shape == (OUT, IN)
    assert {name: (tuple(t.shape), t.dtype) for name, t in codes.tensors().items()} == codes.format.layout(OUT, IN)
    assert torch.isfinite(result.dense()).all()


def recorded_errors_are_its_own(result, weight):
    hessian = layer()[1].hessian
    found = relative_error(weight, result.dense(), hessian)
    assert result.record.error_after == pytest.approx(found, rel=1e-4)
    # Rounding to nearest without a search, in another basis or of vectors, may lose a little.
    assert found < 2 * result.record.error_before
    plain = nearest(weight, None, result.codes.format.plain(weight.shape[1])).decode()
    # float32 sums of differences.
    assert result.record.error_before == pytest.approx(relative_error(weight, plain, hessian), rel=1e-4)


def largest_format_bounds_it(result, method):
    largest = method.largest(OUT, IN)
    assert result.stored_bits() <= largest.stored_bits(OUT, IN)
    assert result.format.rank <= largest.rank
    found, bound = (dataclasses.replace(f, rank=0, factor_type="float16") for f in (result.format, largest))
    assert found == bound


def neither_call_nor_company_changes_it(result, method):
    weight, stats = layer()
    other = torch.randn(24, IN, generator=torch.Generator().manual_seed(1)) * 0.02 * torch.linspace(2.0, 0.2, IN)
    both = solve(method, {"other": other, "layer": weight}, stats)
    assert both.keys() == {"other", "layer"} and both["other"].shape == other.shape
    if not result.format.permuted:  # else the columns' order is that of both
        assert same(both["layer"], result)
        return
    assert same(alone(method), result)
    bases = [solved.basis for solved in both.values()]
    assert len({(basis.block, basis.skip) for basis in bases}) == 1
    assert torch.equal(bases[0].permutation, bases[1].permutation)
    assert torch.equal(bases[0].permutation.sort().values, torch.arange(IN))
    for own, solved in ((weight, both["layer"]), (other, both["other"])):
        recorded_errors_are_its_own(solved, own)


def test_the_cases_reach_every_kind_of_what_is_stored():
    formats = [result_of(name, **settings).format for name, settings in CASES]
    assert {f.factor_type for f in formats if f.rank} == set(FACTOR_TYPES) and any(not f.rank for f in formats)
    kinds = [(f.permuted, f.rotation_block != 0, f.rotation_skip > 0, f.codes.kind == "vectors") for f in formats]
    for one, two in itertools.combinations(range(4), 2):
        # Columns are left alone only where blocks are rotated.
        assert len({(kind[one], kind[two]) for kind in kinds}) == (3 if (one, two) == (1, 2) else 4)
    assert {f.codes.kind for f in formats} == set(CODES)


@methods
def test_every_choice_makes_a_difference(name):
    for setting, values in choices(name).items():
        if setting in getattr(METHODS[name], "block_settings", ()) or METHODS[name]().scope == "experts":
            continue  # shows in blocks, or among experts
        rows = [settings for other, settings in CASES if other == name and setting in settings]
        for one, two in itertools.pairwise([*values, values[0]]):
            pairs = ((row, row | {setting: two}) for row in (*rows, {setting: one}) if row[setting] == one)
            assert any(
                not same(result_of(name, **row), result_of(name, **changed))
                for row, changed in pairs
                if allowed(name, row) and allowed(name, changed)
            ), f"{setting} {one} and {two}"


# ---- every method -----------------------------------------------------------------------------------------


def test_no_row_is_of_a_method_that_is_gone():
    assert set(ROWS) <= set(METHODS)


@methods
def test_a_method_keeps_the_protocol_and_is_frozen(name):
    method = METHODS[name]()
    assert isinstance(method, Method) and method.scope in SCOPES
    assert set(getattr(method, "block_settings", ())) <= {f.name for f in dataclasses.fields(method)}
    assert hasattr(method, "largest_experts") == (method.scope == "experts")
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.bits = 3


@methods
def test_a_block_of_one_layer_is_solved_by_its_name(name):
    weight, stats = layer()
    inputs = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(2))

    def forward(weights, windows):
        return inputs[windows] @ (torch.eye(IN) + weights["layer"].T @ weight)

    block = BlockOutput(forward, forward({"layer": weight}, slice(None)))
    method = made(name, bits=3, group_size=32)
    solved = solve(method, {"layer": weight}, stats, methods={"layer": method}, block=block)
    assert list(solved) == ["layer"]
    recorded_errors_are_its_own(solved["layer"], weight)
    largest_format_bounds_it(solved["layer"], method)


@methods
def test_eight_bits_are_close_to_exact(name):
    weight, _ = layer()
    for group_size, symmetric in itertools.product((16, -1), (False, True)):
        # NormalFloat spends its levels where weights are many; its outermost are wide apart at any width.
        method = made(name, bits=8, group_size=group_size, symmetric=symmetric, grid="integer")
        result = alone(method)
        # A range of eight standard deviations in 255 steps, each value off by 12^-1/2 of a step, is 40.9 dB; less is
        # wide.
        assert -10 * math.log10(result.record.error_after) > 40.9, (group_size, symmetric)
        assert relative_error(weight, result.dense(), torch.eye(IN)) < 10**-4.0, (group_size, symmetric)


@having("bits")
def test_errors_fall_with_every_bit(name):
    errors = [cached(made(name, bits=bits, group_size=32)).record.error_after for bits in (2, 3, 4, 8)]
    assert all(after < 0.6 * before for before, after in itertools.pairwise(errors))


@having("group_size")
def test_one_group_per_row_is_the_group_of_the_whole_width(name):
    whole, minus_one = (alone(made(name, bits=3, group_size=size)) for size in (IN, -1))
    assert minus_one.codes.format.group_size == IN
    assert same(whole, minus_one)
    assert METHODS[name](group_size=-1).largest(OUT, IN).codes.group_size == IN


@having("group_size")
def test_a_group_size_that_does_not_divide_is_refused_with_both_numbers(name):
    if made(name, group_size=32).largest(OUT, IN).codes.group_size == IN:
        return  # no groups of columns: a matrix of scales has none to divide
    with pytest.raises(ValueError, match="group_size") as caught:
        alone(METHODS[name](bits=3, group_size=36))
    assert {"36", str(IN)} <= set(re.findall(r"\d+", str(caught.value)))


@methods
def test_missing_statistics_are_refused_where_they_are_needed(name):
    method = made(name, group_size=32)
    if method.needs_stats:
        with pytest.raises(ValueError, match="needs input statistics, got None"):
            alone(method, None)
    else:
        result = alone(method, None)
        found = relative_error(layer()[0], result.dense(), torch.eye(IN))
        assert result.record.error_after == pytest.approx(found, rel=1e-4)


# ---- settings ---------------------------------------------------------------------------------------------


def checked(name, **changes):
    """Only the settings' own checks: in tests the annotations' types are checked too, and would come first."""
    method = object.__new__(METHODS[name])
    for setting, value in (dataclasses.asdict(METHODS[name]()) | changes).items():
        object.__setattr__(method, setting, value)
    method.__post_init__()


def excluded(hint):
    """Values just outside of what an annotation allows; every number has a range, every word is one of a few."""
    if is_choice(hint):
        return ["nonsense", ""]
    kind, limits = typing.get_args(hint)
    assert isinstance(limits, Range)
    values = [limits.low - 1, limits.high + 1] if kind is int else [limits.low - 0.1, limits.high + 0.1, math.nan]
    values += [0, -2] if limits.minus_one else []
    return [value for value in values if value not in limits and value != math.inf]


@methods
def test_settings_just_outside_their_ranges_are_refused_by_name_and_value(name):
    for setting, hint in typing.get_type_hints(METHODS[name], include_extras=True).items():
        if hint is bool or typing.get_origin(hint) is typing.ClassVar:
            continue
        values = excluded(hint)
        assert values, setting
        for value in values:
            with pytest.raises(ValueError, match=rf"^{setting} must be .*, got {re.escape(repr(value))}$"):
                checked(name, **{setting: value})
