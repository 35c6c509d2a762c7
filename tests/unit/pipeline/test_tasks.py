"""Which layers of a block are solved in one call, with which statistics and randomness, and what errors say."""

import itertools
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import pytest
import torch
from helpers import same_codes, solve_one

import lorq
from lorq.core.problem import layer_generator
from lorq.core.rounding import nearest
from lorq.core.stats import InputStats
from lorq.models.blocks import Target
from lorq.models.experts import ExpertName, expert_name
from lorq.pipeline.tasks import block_tasks, check_finite, expert_formats, expert_groups, solve_task

BLOCK = "model.layers.0"
EXPERTS = f"{BLOCK}.mlp.experts"
MODULES = {EXPERTS: range(4)}
OUT, IN = 8, 16
CPU = torch.device("cpu")
TILEQ = lorq.TileQ(bits=4, group_size=16, rank=2, range_search="none")
LOPRO = lorq.LoPRo(bits=4, group_size=16, rank=2, range_search="none", importance="log")


def target(name):
    return Target(name, OUT, IN, transposed=False)


def expert_targets(experts=range(4), projections=("gate_proj", "up_proj", "down_proj")):
    return [target(f"{EXPERTS}.{e}.{p}") for e, p in itertools.product(experts, projections)]


def stats(seed=0):
    x = torch.randn(40, IN, generator=torch.Generator().manual_seed(seed))
    return InputStats(x.T @ x / 40, x.abs().mean(0), 40)


def weight_of(layer):
    return torch.randn(OUT, IN, generator=layer_generator(7, layer.name)) / 8


def solve(plan, known, *, modules=MODULES, seed=0, weight=weight_of):
    tasks = block_tasks(plan, dict(known), modules, weight=weight, seed=seed)
    solved = {name: result for task in tasks for name, result in solve_task(task).items()}
    return {layer: solved[layer.name] for layer in plan}


def same(a, b):
    return same_codes(a.codes, b.codes) and torch.equal(a.dense(), b.dense())


@pytest.fixture
def recorder():
    """A method that writes down each problem that it is given."""

    @dataclass(frozen=True)
    class Recorder(lorq.TileQ):
        calls: ClassVar = []

        def solve(self, problem):
            self.calls.append(problem)
            return super().solve(problem)

    return Recorder(bits=4, group_size=16, rank=2, range_search="none", epochs=0)


# ---- names ------------------------------------------------------------------------------------------------


def test_names_of_experts_projections_are_taken_apart_and_others_are_not():
    place = expert_name(f"{EXPERTS}.12.up_proj", MODULES)
    assert place == ExpertName(EXPERTS, 12, "up_proj") and place.tiles == f"{EXPERTS}.tiles.up_proj"
    for other in (f"{BLOCK}.mlp.shared_expert.up_proj", f"{BLOCK}.self_attn.q_proj", "lm_head"):
        assert expert_name(other, MODULES) is None
    assert expert_name(f"{EXPERTS}.12.up_proj", {}) is None


def test_a_layers_randomness_depends_on_its_name_and_the_seed_alone():
    def draw(*given):
        return torch.randn(4, generator=layer_generator(*given)).tolist()

    assert draw(0, "a") == draw(0, "a")
    assert len({tuple(draw(seed, name)) for seed, name in itertools.product((0, 1, 10), ("a", "b", "0:a"))}) == 9


# ---- layers of one input ----------------------------------------------------------------------------------


def test_layers_of_one_input_and_method_are_solved_in_one_call(recorder):
    names = [f"{BLOCK}.{name}" for name in ("q", "k", "v", "o")]
    q, k, v, o = map(target, names)
    common, own = stats(), stats(1)
    solved = solve(dict.fromkeys((q, k, v, o), recorder), dict(zip(names, (common, common, common, own), strict=True)))
    first, second = recorder.calls
    assert list(first.weights) == names[:3] and all(s is common for s in first.stats.values())
    assert list(second.weights) == names[3:] and all(s is own for s in second.stats.values())
    assert list(solved) == [q, k, v, o]


def test_layers_of_one_input_have_the_basis_of_all_their_magnitudes():
    q, k, o = (target(f"{BLOCK}.{name}") for name in "qko")
    common, own = stats(), stats(1)
    known = {q.name: common, k.name: common, o.name: own}
    solved = solve(dict.fromkeys((q, k, o), LOPRO), known)
    magnitude = weight_of(q).abs().sum(0) + weight_of(k).abs().sum(0)
    h = common.hessian.diagonal()
    score = (magnitude / ((h / h.min()).log2() + 1))[solved[q].basis.permutation.long()]
    assert (score.diff() >= -1e-5 * score.max()).all()
    assert torch.equal(solved[q].basis.permutation, solved[k].basis.permutation)
    alone = solve_one(LOPRO, weight_of(o), own, name=o.name)
    assert same(solved[o], alone)


def test_equal_statistics_of_two_inputs_are_not_one_input(recorder):
    a, b = target("a"), target("b")
    solve(dict.fromkeys((a, b), recorder), {"a": stats(), "b": stats()})
    assert [list(problem.weights) for problem in recorder.calls] == [["a"], ["b"]]


def test_layers_of_one_input_with_other_settings_are_solved_apart(recorder):
    q, k, v = map(target, "qkv")
    common = stats()
    other = replace(LOPRO, bits=3)
    solved = solve({q: LOPRO, k: other, v: LOPRO}, dict.fromkeys("qkv", common))
    assert [solved[t].format.bits for t in (q, k, v)] == [4, 3, 4]
    assert torch.equal(solved[q].basis.permutation, solved[v].basis.permutation)
    assert not torch.equal(solved[q].basis.permutation, solved[k].basis.permutation)
    assert same(solved[k], solve_one(other, weight_of(k), common, name="k"))


def test_methods_of_one_layer_are_given_one_layer():
    a, b = target("a"), target("b")
    common, method = stats(), lorq.GPTQ(bits=4, group_size=16)
    solved = solve(dict.fromkeys((a, b), method), dict.fromkeys("ab", common))
    for t in (a, b):
        assert same(solved[t], solve_one(method, weight_of(t), common, name=t.name))
    nearest = lorq.Nearest(bits=4, group_size=16)
    solved = solve(dict.fromkeys((a, b), nearest), {})
    assert same(solved[b], solve_one(nearest, weight_of(b), None, name="b"))


def test_statistics_are_let_go_as_layers_are_solved():
    layers = [target("a"), *expert_targets()]
    known = {t.name: stats() for t in layers}
    left = []
    for task in block_tasks(dict.fromkeys(layers, TILEQ), known, MODULES, weight=weight_of, seed=0):
        assert not set(task.problem.weights) & set(known)
        left.append(len(known))
    assert left == [5, 1, 0]


# ---- experts ----------------------------------------------------------------------------------------------


def shared_stats(layers):
    """Gate and up projection of an expert read one input."""
    made = {}
    return {t.name: made.setdefault(t.name.replace("up_proj", "gate_proj"), stats(len(made))) for t in layers}


def test_experts_are_solved_together_gate_and_up_in_one_basis(recorder):
    layers = [target(f"{BLOCK}.o"), *expert_targets()]
    known = shared_stats(layers)
    solved = solve(dict.fromkeys(layers, recorder), known)
    names = {p: [f"{EXPERTS}.{e}.{p}_proj" for e in range(4)] for p in ("gate", "up", "down")}
    inputs_of_experts, outputs_of_experts, rest = recorder.calls
    assert inputs_of_experts.projections == (tuple(names["gate"]), tuple(names["up"]))
    assert outputs_of_experts.projections == (tuple(names["down"]),)
    assert inputs_of_experts.common_input and not outputs_of_experts.common_input
    for problem in recorder.calls:
        assert all(problem.stats[name] is known[name] for name in problem.weights)
    assert list(rest.weights) == [f"{BLOCK}.o"] and not rest.projections and list(solved) == layers
    for projection in names.values():
        tiles = [solved[target(name)].tile for name in projection]
        assert [tile.expert for tile in tiles] == [0, 1, 2, 3]
        assert len({id(tile.factors) for tile in tiles}) == 1
    assert len({id(solved[t].tile.factors) for t in layers[1:]}) == 3 and solved[layers[0]].tile is None


def test_neither_order_nor_other_layers_change_a_bit():
    layers = expert_targets()
    first = solve(dict.fromkeys(layers, TILEQ), shared_stats(layers))
    plan = dict.fromkeys([target(f"{BLOCK}.o"), *layers], TILEQ)
    other = solve(plan, {f"{BLOCK}.o": stats(9)} | shared_stats(layers))
    assert all(same(first[t], other[t]) for t in layers)


def test_experts_of_methods_that_share_nothing_are_ordinary_layers():
    layers = expert_targets()
    assert expert_groups(dict.fromkeys(layers, LOPRO), MODULES) == []
    known = shared_stats(layers)
    solved = solve(dict.fromkeys(layers, LOPRO), known)
    gate, up, down = (solved[t] for t in layers[:3])
    assert torch.equal(gate.basis.permutation, up.basis.permutation)
    assert same(down, solve_one(LOPRO, weight_of(layers[2]), known[layers[2].name], name=layers[2].name))


def test_experts_of_two_modules_share_nothing():
    second = EXPERTS.replace("experts", "others")
    layers = expert_targets() + [target(t.name.replace("experts", "others")) for t in expert_targets()]
    groups = expert_groups(dict.fromkeys(layers, TILEQ), MODULES | {second: range(4)})
    found = [
        (sorted(group), {t.name.rpartition(".")[0][:-2] for own in group.values() for t in own}) for group in groups
    ]
    both, down = ["gate_proj", "up_proj"], ["down_proj"]
    assert found == [(both, {EXPERTS}), (down, {EXPERTS}), (both, {second}), (down, {second})]


@pytest.mark.parametrize("left_out", ["gate_proj", "up_proj", "down_proj"])
def test_a_projection_may_be_left_out_for_all_experts(left_out):
    layers = [t for t in expert_targets() if not t.name.endswith(left_out)]
    solved = solve(dict.fromkeys(layers, TILEQ), shared_stats(layers))
    assert len(solved) == 8 and all(weight.tile is not None for weight in solved.values())


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_a_projection_may_have_settings_of_its_own(projection):
    other = replace(TILEQ, bits=2, rank=1, grid_rows=4)
    plan = {t: other if t.name.endswith(projection) else TILEQ for t in expert_targets()}
    solved = solve(plan, shared_stats(plan))
    for t, weight in solved.items():
        bits, tile = (2, (1, (4, 1))) if t.name.endswith(projection) else (4, (2, (2, 2)))
        assert weight.format.bits == bits and (weight.rank, weight.tile.factors.grid) == tile, t.name
    formats = {targets[0].name.rpartition(".")[2]: (len(targets), f) for targets, f in expert_formats(plan, MODULES)}
    assert set(formats) == {"gate_proj", "up_proj", "down_proj"}
    for t, weight in solved.items():
        assert formats[t.name.rpartition(".")[2]] == (4, weight.tile.factors.format)


@pytest.mark.parametrize("projection", ["gate_proj", "down_proj"])
def test_experts_left_out_are_refused_with_the_numbers(projection):
    plan = dict.fromkeys(expert_targets(), TILEQ)
    del plan[target(f"{EXPERTS}.2.{projection}")]
    message = rf"got 3 of 4 experts with 1 settings for {projection} of {EXPERTS}; --exclude or --override all"
    for refused in (lambda: expert_groups(plan, MODULES), lambda: solve(plan, shared_stats(expert_targets()))):
        with pytest.raises(ValueError, match=message):
            refused()


def test_experts_with_other_settings_are_refused_with_the_numbers():
    plan = dict.fromkeys(expert_targets(), TILEQ)
    plan[target(f"{EXPERTS}.2.up_proj")] = replace(TILEQ, bits=3)
    plan[target(f"{EXPERTS}.3.up_proj")] = replace(TILEQ, bits=2)
    with pytest.raises(ValueError, match=rf"got 4 of 4 experts with 3 settings for up_proj of {EXPERTS}"):
        expert_groups(plan, MODULES)


# ---- errors -----------------------------------------------------------------------------------------------


def notes_of(call):
    with pytest.raises((ValueError, ArithmeticError, RuntimeError)) as caught:
        call()
    return caught.value.__notes__


def broken(name):
    """Weights of which one is not a number, so that what is derived from it is not."""

    def weight(layer):
        return torch.full((OUT, IN), torch.nan) if layer.name == name else weight_of(layer)

    return weight


def test_an_error_names_the_layers_that_were_solved():
    singular = InputStats(-torch.eye(IN), torch.ones(IN), 5)
    a, b, c = map(target, "abc")
    plan = dict.fromkeys((a, b, c), LOPRO)
    assert notes_of(lambda: solve(plan, {"a": stats(), "b": singular, "c": singular})) == ["while solving b, c"]
    layers = expert_targets()
    known = shared_stats(layers) | {f"{EXPERTS}.1.down_proj": singular}
    notes = notes_of(lambda: solve(dict.fromkeys(layers, TILEQ), known))
    assert notes == [f"while solving {EXPERTS}.0.down_proj and the other experts"]
    # What a layer's weight is read with is not solving.
    assert notes_of(lambda: solve({a: lorq.Nearest(group_size=16)}, {}, weight=broken("a")))[0] == "while solving a"


@pytest.mark.parametrize("part", ["left", "right", "scale"])
def test_what_is_not_finite_is_never_handed_on(part):
    layers = expert_targets()
    weight = solve(dict.fromkeys(layers, TILEQ), shared_stats(layers))[layers[0]]
    check_finite(weight)
    if part == "scale":
        bad = replace(weight, codes=replace(weight.codes, scale=weight.codes.scale.clone().fill_(torch.inf)))
    else:
        factors = weight.tile.factors
        scale = getattr(factors, f"{part}_scale").clone()
        scale[1, 0] = torch.nan
        bad = replace(weight, low_rank=replace(weight.low_rank, factors=replace(factors, **{f"{part}_scale": scale})))
    with pytest.raises(ArithmeticError, match="must be finite"):
        check_finite(bad)


# ---- layers whose inputs tell nothing, and results that are worse than rounding to nearest --------------------


def silent():
    return InputStats(torch.zeros(IN, IN), torch.zeros(IN), 40)


SMALL = {"rank": 2} | dict.fromkeys(("steps", "epochs"), 1)


@pytest.mark.parametrize("name", [name for name, method in lorq.METHODS.items() if method().needs_stats])
def test_a_layer_whose_inputs_are_zero_is_rounded_to_nearest_and_says_so(name):
    known = {f.name: SMALL[f.name] for f in fields(lorq.METHODS[name]) if f.name in SMALL}
    method = lorq.METHODS[name](bits=3, group_size=IN, **known)
    dead, live = target(f"{BLOCK}.dead"), target(f"{BLOCK}.live")
    solved = solve({dead: method, live: method}, {dead.name: silent(), live.name: stats()}, modules={})
    plain = nearest(weight_of(dead), None, method.largest(OUT, IN).codes.plain(IN))
    assert torch.equal(solved[dead].dense(), plain.decode())
    assert solved[dead].format.rank == 0 and solved[dead].basis is None
    assert solved[dead].record.note == "its inputs are zero on every calibration token: rounded to nearest"
    assert "zero" not in solved[live].record.note
    assert same(solved[live], solve({live: method}, {live.name: stats()}, modules={})[live])


@pytest.mark.parametrize("dead", [range(1), range(4)], ids=["one", "all"])
def test_experts_that_share_factors_do_so_where_the_inputs_of_some_are_zero(dead):
    layers = expert_targets(projections=("down_proj",))
    known = {t.name: silent() if e in dead else stats(e) for e, t in enumerate(layers)}
    solved = solve(dict.fromkeys(layers, TILEQ), known)
    assert all(weight.tile is not None for weight in solved.values())
    assert all(weight.record.error_after < weight.record.error_before for weight in list(solved.values())[len(dead) :])


def test_a_layer_that_comes_out_worse_than_rounded_to_nearest_says_so():
    @dataclass(frozen=True)
    class Coarse(lorq.GPTQ):
        def solve(self, problem):
            scaled = replace(problem, weights={name: 1.5 * weight for name, weight in problem.weights.items()})
            off = {name: weight.dense() - problem.weights[name] for name, weight in super().solve(scaled).items()}
            worse = {name: float((error @ problem.stats[name].hessian * error).sum()) for name, error in off.items()}
            return {
                name: replace(weight, record=replace(weight.record, error_after=worse[name], note="coarse"))
                for name, weight in super().solve(problem).items()
            }

    layer = target(f"{BLOCK}.q_proj")
    good, bad = (solve({layer: m(3, IN)}, {layer.name: stats()})[layer].record for m in (lorq.GPTQ, Coarse))
    assert good.error_after < good.error_before and not good.note
    assert bad.note.startswith(f"coarse; worse than rounded to nearest: output error {bad.error_after:.3g}, not ")
