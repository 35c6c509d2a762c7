"""A plan is a value: it goes through JSON and is the same, and what does not fit is refused with the numbers."""

import json
import re
from collections import Counter

import pytest
import torch
from helpers import tiny_folder
from safetensors.torch import load_file, save_file

import lorq
from lorq.models.blocks import StreamedModel
from lorq.pipeline.check_weights import check_kinds, check_weights
from lorq.pipeline.options import Options
from lorq.pipeline.plan import Plan, estimate, make_plan
from lorq.runtime.device import available_bytes


@pytest.fixture(scope="module")
def models(folder_of):
    return {family: StreamedModel.open(folder_of(family)) for family in ("llama", "mixtral", "gpt2")}


@pytest.mark.parametrize("name", lorq.METHODS)
def test_a_plan_goes_through_json_and_is_the_same(name, models):
    method = lorq.METHODS[name](**{"group_size": 32} if name != "lrq-paper" else {})
    options = Options(exclude=("o_proj",), override=("down_proj:bits=8",))
    if method.bits == 2 or name == "lords-paper":
        options = Options(exclude=("o_proj",), smoothing=0.25, activations="token")
    plan = make_plan(models["mixtral"], method, options)
    again = Plan.from_dict(json.loads(json.dumps(plan.as_dict())))
    assert again == plan and list(again.jobs()) == list(plan.jobs())
    assert (again.name, again.stream, list(again.excluded)) == (name, plan.stream, list(plan.excluded))
    assert again != Plan.from_dict(plan.as_dict() | {"options": plan.as_dict()["options"] | {"seed": 7}})


def test_a_plan_names_only_settings_that_a_layer_has_of_its_own(models):
    plan = make_plan(models["llama"], lorq.GPTQ(group_size=32), Options(override=("down_proj:bits=8",)))
    entries = plan.as_dict()["layers"]["model.layers.1"]
    own = {entry["name"].rpartition(".")[2]: entry["settings"] for entry in entries}
    assert own.pop("down_proj") == {"bits": 8} and len(own) == 6 and not any(own.values())


def test_a_plan_of_an_unknown_method_or_setting_is_refused(models):
    stored = make_plan(models["llama"], lorq.GPTQ(group_size=32), Options()).as_dict()
    with pytest.raises(ValueError, match=r"must be one of flrq, .*, got 'gptx'"):
        Plan.from_dict(stored | {"method": "gptx"})
    with pytest.raises(TypeError, match="depth"):
        Plan.from_dict(stored | {"settings": {"depth": 3}})
    with pytest.raises(TypeError, match="unknown options: speed"):
        Plan.from_dict(stored | {"options": {"speed": 3}})


def test_everything_of_a_part_is_quantized_or_kept(models):
    for family, model in models.items():
        plan = make_plan(model, lorq.Nearest(group_size=32), Options(exclude=(r"\.0\..*(up|c_fc)",)))
        for part in model.parts:
            quantized = [target.name + ".weight" for target in plan.of(part)]
            kept = plan.kept(part)
            assert sorted([*quantized, *kept]) == sorted(part.tensors), family
        assert plan.kept(*model.parts) == [name for part in model.parts for name in plan.kept(part)]
        assert sum(len(plan.of(part)) for part in model.parts) == len(list(plan.jobs())) > 0


def test_parts_are_in_the_order_of_data_and_hold_every_tensor_once(models):
    for family, model in models.items():
        first, *blocks, last = model.parts
        assert (first.name, last.name) == ("embeddings", "head") and tuple(blocks) == model.blocks
        assert first.tensors and all("embed" in name or ".wte." in name or ".wpe." in name for name in first.tensors)
        # Tied heads are the embeddings' tensor.
        assert ("lm_head.weight" in last.tensors) == (family == "mixtral") and len(last.tensors) >= 1
        names = Counter(name for part in model.parts for name in part.tensors)
        stored = set(model.model.state_dict(keep_vars=True)) - ({"lm_head.weight"} if family != "mixtral" else set())
        assert set(names) == stored and set(names.values()) == {1}
        assert not first.targets and not last.targets and all(block.targets for block in blocks)


def test_sizes_come_from_headers(models, monkeypatch):
    def read(*_):
        raise AssertionError("no tensor need be read")

    monkeypatch.setattr("lorq.storage.reader.read_tensor", read)
    for model in models.values():
        plan = make_plan(model, lorq.Nearest(bits=4, group_size=32), Options())
        report = estimate(plan, model)
        kept = report.bytes - sum(layer.bytes for layer in report.layers)
        shapes = model.model.state_dict(keep_vars=True)
        assert kept == sum(4 * shapes[name].numel() for name in plan.kept(*model.parts))


# ---- weights ----------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(tmp_path):
    """A plan and model of which some tensors are changed."""

    def make(change):
        folder = tiny_folder(tmp_path / "model", "llama")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        model = StreamedModel.open(folder)
        return make_plan(model, lorq.Nearest(group_size=32), Options()), model

    return make


def test_weights_that_are_not_finite_are_refused_all_at_once_before_the_work(spoiled, tmp_path):
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][3, :2] = torch.nan
        tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = torch.inf
        tensors["model.norm.weight"][0] = torch.nan  # not a weight that is quantized

    plan, model = spoiled(change)
    told = []
    message = (
        r"in model.layers.0.mlp.up_proj \(2 of 8192\), model.layers.1.self_attn.q_proj \(1 of 4096\); repair the model"
    )
    with pytest.raises(ValueError, match=message):
        check_weights(plan, model, lambda *progress: told.append(progress))
    assert told[-1] == ("check weights", 14, 14)
    with pytest.raises(ValueError, match=message):
        lorq.quantize(tmp_path / "model", tmp_path / "out", lorq.Nearest(group_size=32))
    assert not (tmp_path / "out").exists()


def test_weights_of_integers_are_refused_before_any_is_read(spoiled, monkeypatch):
    def change(tensors):
        for name in ("k_proj", "v_proj"):
            key = f"model.layers.0.self_attn.{name}.weight"
            tensors[key] = tensors[key].to(torch.int8)

    plan, model = spoiled(change)
    monkeypatch.setattr("lorq.storage.reader.read_tensor", lambda *_: pytest.fail("read"))
    named = ", ".join(f"model.layers.0.self_attn.{name} is torch.int8" for name in ("k_proj", "v_proj"))
    with pytest.raises(ValueError, match=re.escape(f"weights must be floating point, {named}; give the original")):
        check_kinds(plan, model)


def test_memory_that_files_fill_can_be_had(tmp_path):
    told = tmp_path / "meminfo"
    told.write_text("MemTotal:       24689032 kB\nMemFree:          570000 kB\nMemAvailable:   21900000 kB\n")
    assert available_bytes(told) == 21_900_000 * 1024
    assert available_bytes(tmp_path / "nothing") > 0
