"""The dial: what a plan's layers can be given, which budgets can be met, and what is chosen for them."""

import json
import math
import re

import pytest
import torch
from helpers import tiny_folder

import lorq
from lorq.core.stats import InputStats
from lorq.models.blocks import StreamedModel
from lorq.pipeline.dial import Dial
from lorq.pipeline.executors import SameProcess
from lorq.pipeline.options import Options, read_options, read_size
from lorq.pipeline.plan import Plan, estimate, make_plan
from lorq.pipeline.predict import _harm, predict
from lorq.progress import no_progress

GPTQ, NEAREST = lorq.GPTQ(group_size=16), lorq.Nearest(group_size=16)
FEW = (2, 4, 8)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("dial")
    families = ("llama", "mixtral")
    return {f: StreamedModel.open(tiny_folder(place / f, f, num_hidden_layers=1)) for f in families}


@pytest.fixture(scope="module")
def windows():
    return torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(0))


def dial_of(model, method=GPTQ, **options):
    return Dial.open(make_plan(model, method, Options(**{"token_weights": "gradient"} | options)), model)


def chosen(model, windows, folder, method=GPTQ, **options):
    """The choice, and the plan that it makes."""
    dial = dial_of(model, method, **options)
    choice, _ = predict(dial, model, windows, folder, SameProcess(), no_progress)
    return choice, dial.met(choice)


def widths(plan):
    return {target.name: method.bits for target, method in plan.jobs()}


@pytest.mark.parametrize(
    ("family", "method", "budget"),
    [("llama", GPTQ, 3.4), ("llama", GPTQ, 6.2), ("mixtral", NEAREST, 4.5)],
)
def test_a_choice_keeps_its_budget_and_uses_it(family, method, budget, models, windows, tmp_path):
    model = models[family]
    choice, plan = chosen(model, windows, tmp_path, method, bits_per_weight=budget)
    got = estimate(plan, model).bits_per_weight
    largest = max(t.out_features * t.in_features for t, _ in plan.jobs())
    step = 5 * largest / sum(t.out_features * t.in_features for t, _ in plan.jobs())  # from 3 bits to 8 in one layer
    assert budget - step < got <= budget
    assert len(set(widths(plan).values())) > 1
    harms = [harm for _, harm in choice.curve]
    assert harms == sorted(harms, reverse=True) and harms[-1] <= choice.harm <= harms[0]
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


def test_the_harm_of_a_layer_is_that_of_its_error_in_the_model():
    """Half the mean square of ``g_t (D x_t)``, for gradients that are independent of the inputs."""
    generator = torch.Generator().manual_seed(0)
    error, inputs, deviations = (torch.randn(*shape, generator=generator) for shape in ((6, 8), (64, 8), (6,)))
    squares = deviations.double().square()
    expected = 0.5 * float(((inputs.double() @ error.double().T) ** 2 * squares).sum() / 64)
    stats = InputStats(
        inputs.T @ inputs / 64, inputs.abs().mean(0), 64, sensitivity=float(squares.sum()),
        output_weights=(squares / squares.mean()).float(),
    )  # fmt: skip
    assert _harm(error, stats, 64) == pytest.approx(expected, rel=1e-4)


def test_tokens_that_pass_an_expert_by_are_not_harmed():
    error, stats = torch.eye(2), InputStats(torch.eye(2), torch.ones(2), 10)
    assert _harm(error, stats, 10) == pytest.approx(0.5)
    assert _harm(error, stats, 40) == pytest.approx(0.125)
    few = InputStats(torch.eye(2), torch.ones(2), 40, routed=4)  # the statistics of all tokens
    assert _harm(error, few, 40) == pytest.approx(0.05)


def test_some_rows_tell_of_all(models, windows, tmp_path, monkeypatch):
    dial = dial_of(models["llama"], NEAREST, bits_per_weight=4.0, widths=FEW)
    whole, _ = predict(dial, models["llama"], windows, tmp_path, SameProcess(), no_progress)
    monkeypatch.setattr("lorq.pipeline.predict._ROWS", 16)
    part, _ = predict(dial, models["llama"], windows, tmp_path, SameProcess(), no_progress)
    assert part.curve != whole.curve
    for (bits, harm), (other, near) in zip(
        whole.curve[:1] + whole.curve[-1:], part.curve[:1] + part.curve[-1:], strict=True
    ):
        assert bits == other and near == pytest.approx(harm, rel=0.3)


def test_overridden_layers_stay_as_they_are_and_count(models, windows, tmp_path):
    model, over = models["llama"], ("down_proj:bits=8", "layers.0.*q_proj:symmetric=true")
    _, plan = chosen(model, windows, tmp_path, bits_per_weight=5.0, override=over, widths=FEW)
    own = widths(plan)
    assert {bits for name, bits in own.items() if "down_proj" in name} == {8}
    assert own["model.layers.0.self_attn.q_proj"] == 4
    assert estimate(plan, model).bits_per_weight <= 5.0
    with pytest.raises(ValueError, match="got 0: all are overridden"):
        dial_of(model, bits_per_weight=5.0, override=(".:bits=8",))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_layers_that_servers_fuse_are_alike_where_asked(family, models, windows, tmp_path):
    _, plan = chosen(models[family], windows, tmp_path, NEAREST, bits_per_weight=4.0, fused_alike=True, widths=FEW)
    groups = {}
    for name, bits in widths(plan).items():
        key = re.sub(r"\b[qkv]_proj", "qkv", name)
        key = re.sub(
            r"experts\.\d+\.(gate|up)_proj", "experts.entry", re.sub(r"experts\.\d+\.down", "experts.down", key)
        )
        groups.setdefault(re.sub(r"\b(gate|up)_proj", "entry", key), set()).add(bits)
    assert all(len(bits) == 1 for bits in groups.values()) and len(set(map(tuple, groups.values()))) > 1


def test_experts_that_share_factors_get_one_setting(models, windows, tmp_path):
    method = lorq.TileQ(group_size=16, rank=1, rounding="nearest", epochs=0)
    _, plan = chosen(models["mixtral"], windows, tmp_path, method, bits_per_weight=4.5, widths=(2, 4))
    for part in ("gate|up", "down"):
        own = {bits for name, bits in widths(plan).items() if re.search(rf"layers\.0\..*experts\.\d+\.({part})", name)}
        assert len(own) == 1


def test_a_size_counts_the_files(models, windows, tmp_path):
    model = models["llama"]
    with pytest.raises(ValueError, match=r"size must be at most [0-9.]+ MB .* got 1GB; ask for that") as refused:
        dial_of(model, NEAREST, size="1GB")
    most = float(re.search(r"at most ([0-9.]+) MB", str(refused.value))[1])
    _, plan = chosen(model, windows, tmp_path, NEAREST, size=f"{most}MB")
    headers = 110 * sum(1 for part in model.parts for _ in part.tensors) + 110 * 3 * len(widths(plan))
    assert 1e6 * most - 2 * headers < estimate(plan, model).bytes < 1e6 * most


@pytest.mark.parametrize("method", [GPTQ, lorq.FLRQ(group_size=16), lorq.LoPRo(group_size=16, rank=2), NEAREST])
def test_a_budget_that_nothing_meets_is_refused_with_the_nearest(method, models):
    for asked, rule, end in ((1.5, "at least", "low"), (15.0, "at most", "high")):
        with pytest.raises(ValueError, match=f"bits_per_weight must be {rule} .*, got {asked}") as refused:
            dial_of(models["llama"], method, bits_per_weight=asked)
        near = float(re.search(rf"{rule} ([0-9.]+)", str(refused.value))[1])
        dial_of(models["llama"], method, bits_per_weight=near)  # the nearest is one
        beyond = near - 0.002 if end == "low" else near + 0.002
        with pytest.raises(ValueError, match=rule):
            dial_of(models["llama"], method, bits_per_weight=beyond)


def test_settings_that_fit_no_layer_are_refused(models):
    with pytest.raises(ValueError, match=r"group_size"):
        dial_of(models["llama"], lorq.GPTQ(group_size=7), bits_per_weight=3.0)
    with pytest.raises(ValueError, match=r"none of bits 7, budget 0.0 0.03 fits .*; take other widths"):
        dial_of(models["llama"], lorq.FLRQ(codebook="trellis"), bits_per_weight=3.0, widths=(7,))


def test_bits_beside_a_budget_are_refused_but_as_a_width(models):
    with pytest.raises(ValueError, match=r"each layer's bits, got bits 3 too; leave bits at 4, .* such as widths 3"):
        dial_of(models["llama"], lorq.GPTQ(bits=3, group_size=16), bits_per_weight=4.0)
    dial = dial_of(models["llama"], bits_per_weight=4.5, widths=(3, 4))
    assert {change["bits"] for change in dial.changes} == {3, 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"bits_per_weight": 3.0, "size": "1GB"},
            "bits_per_weight 3.0 and size 1GB; keep",
        ),
        ({"size": "4.2"}, "number of KB, MB or GB .* got '4.2'"),
        ({"widths": (2, 9), "bits_per_weight": 3.0}, r"whole numbers from 1 to 8, got \(2, 9\)"),
        ({"widths": (2, 3)}, "widths goes with a budget, got none"),
        ({"fused_alike": True}, "fused_alike goes with a budget, got none"),
        ({"table_group_size": 32}, "table_group_size serves embeddings and head, got 32 and neither"),
        ({"bits_per_weight": 3.0, "token_weights": "equal"}, "needs token_weights gradient.*, got 'equal'"),
        ({"bits_per_weight": -1.0}, "between 0 and 16, got -1.0"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_what_contradicts_itself_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        read_options(options)


@pytest.mark.parametrize(
    ("text", "size"), [("4.2GB", 4_200_000_000), ("107mb", 107_000_000), ("1.5 KiB", 1536), ("900B", 900)]
)
def test_sizes_are_read(text, size):
    assert read_size(text) == size and math.isfinite(size)
