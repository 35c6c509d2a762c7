"""Mixtures of experts: taken apart, read from either kind of file, calibrated per expert, quantized, loaded."""

import copy
import importlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from helpers import BOS, BYTES, MOE, byte_tokenizer, folder_digests, tiny_folder
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import lorq
from lorq.cli import main
from lorq.methods import METHODS
from lorq.models.blocks import StreamedModel
from lorq.models.experts import Experts, find_experts, fuse_experts, split_experts
from lorq.models.skeleton import read_config, skeleton
from lorq.models.windows import Encoder, text_windows
from lorq.pipeline.observe import routed_alike
from lorq.runtime.linear import QuantLinear
from lorq.storage.names import REPORT_NAME
from lorq.storage.reader import WeightFiles
from lorq.storage.report import read_report

SMALL = {"samples": 4, "seq_len": 32}
TOKENS = 4 * 32
families = pytest.mark.parametrize("family", list(MOE))


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.fixture
def windows():
    return torch.randint(BYTES, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def quantize(text_file):
    def run(source, out, method=None, **options):
        method = method or lorq.GPTQ(bits=3, group_size=32)
        return lorq.quantize(source, out, method, **{"calibration": str(text_file)} | SMALL | options)

    return run


@torch.no_grad()
def logits_of(model, windows):
    return model(input_ids=windows, use_cache=False).logits


def close(got, expected, tolerance=1e-5):
    assert_close(got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


# -- taking apart -------------------------------------------------------------------------------------------


@families
def test_experts_taken_apart_compute_what_they_did_and_go_together_again(family, folder_of, windows):
    model = load(folder_of(family))
    parameters, expected = copy.deepcopy(dict(model.named_parameters())), logits_of(model, windows)
    split_experts(model)
    assert find_experts(model) and all(parameter.ndim < 3 for parameter in model.parameters())
    close(logits_of(model, windows), expected)
    fuse_experts(model)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in model.named_parameters())
    assert torch.equal(logits_of(model, windows), expected)


def test_a_token_that_is_masked_out_gets_nothing_from_the_experts(folder_of, generator):
    fused = load(folder_of("mixtral"), experts_implementation="eager").model.layers[0].mlp.experts
    hidden, weights = torch.randn(6, 64, generator=generator), torch.rand(6, 2, generator=generator)
    index = torch.tensor([[0, 1], [1, 4], [4, 4], [3, 0], [4, 2], [2, 3]])  # 4 is past the last
    expected = fused(hidden, index, weights).detach()
    got = Experts.split(fused)(hidden, index, weights)
    assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[2], torch.zeros(64)) and bool(got[1].any())


def test_a_dense_model_stays_as_it_is(folder_of):
    model = skeleton(read_config(folder_of("llama")))
    before = list(model.modules())
    split_experts(model)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


# -- reading ------------------------------------------------------------------------------------------------


def as_fused(folder, out):
    """The same weights under the model's own names: experts in fused tensors."""
    return with_tensors(folder, out, load(folder).state_dict())


def as_split(folder, out):
    """The same weights with the names of the model taken apart."""
    model = load(folder)
    split_experts(model)
    return with_tensors(folder, out, model.state_dict())


def with_tensors(folder, out, tensors):
    shutil.copytree(folder, out)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    return out


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3", "gpt-oss"])
def test_experts_stored_one_by_one_and_fused_give_the_same_bytes(family, folder_of, quantize, tmp_path):
    digests, tensors = [], []
    for store in (shutil.copytree, as_fused, as_split):
        source = Path(store(folder_of(family), tmp_path / store.__name__))
        tensors.append(len(WeightFiles.open(source).names))
        quantize(source, tmp_path / f"out-{store.__name__}")
        found = folder_digests(tmp_path / f"out-{store.__name__}")
        digests.append({name: digest for name, digest in found.items() if name.endswith(".safetensors")})
    assert len(digests[0]) == 3
    assert digests[0] == digests[1] == digests[2]
    assert tensors[1] < tensors[2]
    assert tensors[0] == tensors[1 if family == "gpt-oss" else 2]


def test_one_expert_of_a_fused_tensor_is_read_alone(folder_of, tmp_path):
    folder = as_fused(folder_of("mixtral"), tmp_path / "fused")
    checkpoint, name = WeightFiles.open(folder), "model.layers.1.mlp.experts.gate_up_proj"
    whole = checkpoint.tensor(name)
    assert whole.shape == (4, 192, 64)
    for expert in range(4):
        one = checkpoint.tensor(name, expert)
        assert torch.equal(one, whole[expert]) and one.untyped_storage().nbytes() == 192 * 64 * 4


# -- the whole way ------------------------------------------------------------------------------------------


# Experts that share factors compute in a way of their own; a paper's settings are another method's, with other numbers.
@pytest.mark.parametrize(
    "name", [name for name, kind in METHODS.items() if kind.scope != "experts" and not name.endswith("-paper")]
)
def test_every_method_quantizes_experts_and_the_loaded_model_computes_what_its_weights_say(
    name, folder_of, quantize, windows, tmp_path
):
    few = {"steps": 3} if hasattr(METHODS[name], "steps") else {}
    report = quantize(folder_of("mixtral"), tmp_path / "out", METHODS[name](bits=4, group_size=32, **few))
    packed, twin = load(tmp_path / "out"), load(folder_of("mixtral"))
    split_experts(twin)
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, QuantLinear)}
    assert set(layers) == {layer.name for layer in report.layers} and len(layers) == 32
    assert "model.layers.1.mlp.experts.3.down_proj" in layers
    for path, layer in layers.items():
        twin.get_submodule(path).weight.data = layer.weight
    expected = logits_of(twin, windows)
    close(logits_of(packed, windows), expected, 5e-5)
    assert bool(report.notes) == METHODS[name]().needs_stats


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_a_dequantized_model_is_transformers_own_again(family, folder_of, quantize, windows, tmp_path):
    quantize(folder_of(family), tmp_path / "out")
    model = load(tmp_path / "out")
    expected = logits_of(model, windows)
    model = model.dequantize()
    assert not find_experts(model) and {type(m) for m in model.modules()} == {
        type(m) for m in load(folder_of(family)).modules()
    }
    close(logits_of(model, windows), expected, 5e-5)
    model.save_pretrained(tmp_path / "dense")
    close(logits_of(load(tmp_path / "dense"), windows), logits_of(model, windows))


def test_experts_that_are_excluded_stay_as_they_are_and_load(folder_of, quantize, windows, tmp_path):
    report = quantize(folder_of("mixtral"), tmp_path / "out", lorq.Nearest(bits=8, group_size=32), exclude=r"\.[13]\.")
    experts = load(folder_of("mixtral")).model.layers[0].mlp.experts
    loaded = load(tmp_path / "out").model.layers[0].mlp.experts
    name = "model.layers.0.mlp.experts.3.up_proj"
    assert report.kept[name] == r"excluded by \.[13]\." and name not in {layer.name for layer in report.layers}
    assert torch.equal(loaded[3].up_proj.weight, experts.gate_up_proj[3, 96:])
    assert torch.equal(loaded[1].down_proj.weight, experts.down_proj[1])
    assert isinstance(loaded[0].up_proj, QuantLinear) and isinstance(loaded[2].down_proj, QuantLinear)


def test_routers_and_the_gate_of_a_shared_expert_are_kept_with_a_reason(folder_of, quantize, tmp_path, monkeypatch):
    routed = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    monkeypatch.setitem(MOE, "phimoe", ("Phimoe", routed))  # its router is a linear layer
    phimoe = tiny_folder(tmp_path / "phimoe", "phimoe")
    nearest = lorq.Nearest(bits=8, group_size=32)
    kept = quantize(phimoe, tmp_path / "out", nearest).kept
    assert kept == {f"model.layers.{i}.mlp.router": "routes tokens to experts, kept as it is" for i in range(2)}
    router = load(tmp_path / "out").model.layers[1].mlp.router
    assert torch.equal(router.weight, load(phimoe).model.layers[1].mlp.router.weight)
    assert quantize(folder_of("qwen2-moe"), tmp_path / "qwen", nearest).kept == {
        "model.layers.1.mlp.shared_expert_gate": "weighs an expert with one number per token, kept as it is"
    }


def test_a_mixture_of_experts_is_evaluated_like_any_model(folder_of, quantize, text_file, tmp_path):
    quantize(folder_of("olmoe"), tmp_path / "out", lorq.Nearest(bits=8, group_size=32))
    options = {"text": str(text_file), "window": 32, "windows": 4}
    original = lorq.evaluate(folder_of("olmoe"), **options)
    quantized = lorq.evaluate(tmp_path / "out", reference=folder_of("olmoe"), **options)
    assert abs(quantized.perplexity / original.perplexity - 1) < 0.05
    assert quantized.kl_mean < 0.05


def test_an_interrupted_run_with_experts_ends_in_the_same_bytes(folder_of, quantize, tmp_path):
    def stop(stage, done, total):
        if (stage, done) == ("quantize", 1):
            raise KeyboardInterrupt

    source, options = folder_of("qwen3-moe"), {"router_weights": True, "expert_tokens": 70}
    quantize(source, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", progress=stop, **options)
    with pytest.raises(ValueError, match=r"begun differently: expert_tokens \(folder: 70, now: 71\)"):
        quantize(source, tmp_path / "out", resume=True, router_weights=True, expert_tokens=71)
    quantize(source, tmp_path / "out", resume=True, **options)
    assert folder_digests(tmp_path / "out") == folder_digests(tmp_path / "whole")
    assert any("tokens routed here" in layer.note for layer in read_report(tmp_path / "out").layers)


# -- statistics ---------------------------------------------------------------------------------------------


@pytest.fixture
def recorder():
    """A method that rounds to nearest and keeps the statistics that it is given."""

    @dataclass(frozen=True)
    class Recorder(lorq.Nearest):
        needs_stats = True
        seen: ClassVar = []

        def solve(self, problem):
            self.seen.extend((weight.clone(), problem.stats[name]) for name, weight in problem.weights.items())
            return super().solve(problem)

        def of(self, weight):
            return next(stats for seen, stats in self.seen if seen.shape == weight.shape and torch.equal(seen, weight))

    return Recorder(bits=8, group_size=32)


@pytest.fixture
def lonely(tmp_path):
    """A Mixtral folder whose fourth expert is never chosen: of the others' scores two are ``a`` and ``-a``."""
    folder = tiny_folder(tmp_path / "lonely", "mixtral", num_experts_per_tok=1)
    tensors = load_file(folder / "model.safetensors")
    for i in range(2):
        router = tensors[f"model.layers.{i}.block_sparse_moe.gate.weight"]
        router[1], router[2], router[3] = -router[0], 0.5 * router[2], 0.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def first_layer(folder, text_file):
    """All that goes into the experts of the first block, from transformers' own model."""
    model, seen = load(folder), []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    tokens = text_windows(str(text_file), Encoder(byte_tokenizer(128), (BOS,), 257), **SMALL).tokens
    for window in tokens:
        logits_of(model, window[None])
    hidden, index, weights = (torch.cat(parts).detach() for parts in zip(*seen, strict=True))
    return SimpleNamespace(experts=experts, hidden=hidden, index=index, weights=weights)


def by_definition(x, v):
    """``sum v d x x^T / sum v`` and ``sum v sqrt(d) |x| / sum v`` with ``d = 1 / mean(x^2)``, in float64."""
    x, v = x.double(), v.double()
    x = x / x.square().mean(1, keepdim=True).sqrt()
    return (x * v[:, None]).T @ x / v.sum(), (v[:, None] * x.abs()).sum(0) / v.sum()


@torch.no_grad()
def check_expert(layer, expert, rows, v, recorder):
    """Compare what the three layers of an expert were given with the definition over some of the tokens."""
    gate, up = layer.experts.gate_up_proj[expert].chunk(2)
    inputs = layer.hidden[rows]
    middle = torch.nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)
    for weight, x in ((gate, inputs), (up, inputs), (layer.experts.down_proj[expert], middle)):
        stats = recorder.of(weight)
        hessian, mean_abs = by_definition(x, v)
        assert stats.tokens == len(inputs)
        # float32 sums over at most 128 tokens, after a block in float32.
        assert_close(stats.hessian.double(), hessian, rtol=1e-4, atol=1e-4)
        assert_close(stats.mean_abs.double(), mean_abs, rtol=1e-4, atol=1e-5)
    assert recorder.of(gate) is recorder.of(up)


@pytest.mark.parametrize("stream", ["original", "quantized"])
def test_an_expert_that_is_never_chosen_gets_the_statistics_of_all_tokens(
    stream, lonely, recorder, quantize, text_file, tmp_path, capsys
):
    layer = first_layer(lonely, text_file)
    report = quantize(lonely, tmp_path / "out", recorder, stream=stream, expert_tokens=1, router_weights=True)
    assert set(layer.index.flatten().tolist()) == {0, 1, 2}
    check_expert(layer, 3, torch.arange(TOKENS), torch.ones(TOKENS), recorder)
    for expert in range(3):
        token, _ = torch.where(layer.index == expert)
        check_expert(layer, expert, token, torch.ones(len(token)), recorder)
    note = f"0 of {TOKENS} tokens routed here, statistics from all of them"
    path = "model.layers.0.mlp.experts.3"
    assert report.notes[path] == note
    assert {l.name for l in report.layers if l.note == note} >= {f"{path}.{p}_proj" for p in ("gate", "up", "down")}
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert f"note: {path}: {note}" in capsys.readouterr().out


def test_few_tokens_are_fewer_than_asked_for(folder_of, recorder, quantize, text_file, tmp_path):
    layer = first_layer(folder_of("mixtral"), text_file)
    counts = torch.bincount(layer.index.flatten(), minlength=4).tolist()
    ask = sorted(counts)[2]  # two of the four have fewer, unless two have the same
    report = quantize(folder_of("mixtral"), tmp_path / "out", recorder, expert_tokens=ask)
    few = {expert for expert in range(4) if counts[expert] < ask}
    assert 0 < len(few) < 4
    for expert in range(4):
        token, _ = torch.where(layer.index == expert)
        rows = torch.arange(TOKENS) if expert in few else token
        check_expert(layer, expert, rows, torch.ones(len(rows)), recorder)
        assert (f"model.layers.0.mlp.experts.{expert}" in report.notes) == (expert in few)


def test_router_weights_weigh_a_token_by_their_square(folder_of, recorder, quantize, text_file, tmp_path):
    layer = first_layer(folder_of("mixtral"), text_file)
    report = quantize(folder_of("mixtral"), tmp_path / "out", recorder, expert_tokens=1, router_weights=True)
    assert not report.notes
    for expert in range(4):
        token, place = torch.where(layer.index == expert)
        check_expert(layer, expert, token, layer.weights[token, place] ** 2, recorder)


def test_a_report_without_notes_is_read_as_before(folder_of, quantize, tmp_path):
    report = quantize(folder_of("llama"), tmp_path / "out", lorq.Nearest(group_size=32))
    path = tmp_path / "out" / REPORT_NAME
    content = json.loads(path.read_text())
    for layer in content["layers"]:
        assert layer.pop("note") == ""
    path.write_text(json.dumps(content))
    assert read_report(tmp_path / "out").layers == report.layers


def test_tokens_at_a_routers_border_are_led_where_they_went_before(folder_of, generator):
    experts = Experts.split(load(folder_of("mixtral")).model.layers[0].mlp.experts)
    hidden, weights = torch.randn(64, 64, generator=generator), torch.rand(64, 2, generator=generator)
    index, routes = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(64)]), {}
    with routed_alike({"experts": experts}, routes):
        first = experts(hidden, index, weights)
        strayed, changed = index.clone(), weights.clone()
        strayed[[7, 9]], changed[[7, 9]] = (index[[7, 9]] + 1) % 4, 0.5
        assert torch.equal(experts(hidden, strayed, changed), first)
        # The same experts in another order are no other way, and router weights are not made equal.
        assert torch.equal(experts(hidden, index.flip(1), weights.flip(1)), first)
        assert not torch.equal(experts(hidden, index, 2 * weights), first)
        with pytest.raises(ArithmeticError, match=r"experts: at most 2 of 64 tokens .* got 3"):
            experts(hidden, torch.where(torch.arange(64)[:, None] < 3, (index + 1) % 4, index), weights)
    assert not torch.equal(experts(hidden, strayed, changed), first)


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda fused: setattr(fused, "has_post_expert_norm", True), "has a norm after each expert"),
        (
            lambda fused: fused.register_parameter("scale", torch.nn.Parameter(torch.ones(4))),
            "holds down_proj, gate_up_proj, scale",
        ),
    ],
    ids=["norm", "parameter"],
)
def test_experts_of_another_build_are_refused(change, reason, folder_of):
    model = load(folder_of("mixtral"))
    change(model.model.layers[1].mlp.experts)
    where = r"MixtralForCausalLM is not supported: model\.layers\.1\.mlp\.experts \(MixtralExperts\) "
    with pytest.raises(ValueError, match=where + reason):
        split_experts(model)
    assert not find_experts(model)  # nothing is half done


def broken(folder, out, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    return with_tensors(folder, out, tensors)


def test_files_that_lack_a_part_of_an_expert_or_hold_more_are_refused(folder_of, quantize, tmp_path):
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    source = broken(folder_of("mixtral"), tmp_path / "one", lambda tensors: tensors.pop(name))
    with pytest.raises(
        ValueError, match=r"lacks 1 tensors .* such as model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight"
    ):
        quantize(source, tmp_path / "out")
    source = broken(folder_of("mixtral"), tmp_path / "two", lambda tensors: tensors.update({name: torch.ones(95, 64)}))
    with pytest.raises(ValueError, match=r"mlp\.experts\.2\.up_proj\.weight is \(95, 64\), not \(96, 64\)"):
        quantize(source, tmp_path / "out")
    fused = as_fused(folder_of("mixtral"), tmp_path / "fused")
    name = "model.layers.0.mlp.experts.down_proj"
    source = broken(fused, tmp_path / "three", lambda tensors: tensors.update({name: torch.ones(5, 64, 96)}))
    with pytest.raises(ValueError, match=r"down_proj must hold 4 experts .* its shape is \(5, 64, 96\)"):
        quantize(source, tmp_path / "out")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    source = broken(fused, tmp_path / "four", lambda tensors: tensors.update({name: torch.ones(4, 193, 64)}))
    with pytest.raises(ValueError, match=r"experts\.0\.up_proj\.weight is \(97, 64\), not \(96, 64\)"):
        quantize(source, tmp_path / "out")


def test_experts_that_transformers_turns_when_it_loads_are_read_so(folder_of, tmp_path, monkeypatch):
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

    sources, steps = "mlp.experts.*.down_proj.weight", [MergeModulelist(dim=0), Transpose(1, 2)]
    converters = [WeightConverter(sources, "mlp.experts.down_proj", steps)]
    halves, steps = (
        ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
        [MergeModulelist(), Concatenate(1)],
    )
    converters += [WeightConverter(halves, "mlp.experts.gate_up_proj", steps)]
    mapping = importlib.import_module("transformers.conversion_mapping")  # not to be had as an attribute
    folder = folder_of("qwen3-moe")
    expected = StreamedModel.open(folder)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    monkeypatch.setattr(mapping, "get_model_conversion_mapping", lambda model: converters)
    with pytest.raises(ValueError, match=r"down_proj.weight is \(32, 64\), not \(64, 32\)"):
        StreamedModel.open(folder)
    turned = broken(folder, tmp_path / "turned", turn)
    model = StreamedModel.open(turned)
    assert torch.equal(model.stored_tensor(name), expected.stored_tensor(name))
    assert model.unused_tensors == []


def turn(tensors):
    tensors |= {
        name: tensor.T.contiguous() for name, tensor in tensors.items() if ".experts." in name and "down" in name
    }


def test_a_conversion_that_fails_is_told_in_words(folder_of, monkeypatch):
    from transformers.core_model_loading import MergeModulelist, Split, WeightConverter

    steps = [MergeModulelist(dim=0), Split(dim=1)]
    converters = [
        WeightConverter("mlp.experts.*.down_proj.weight", ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"], steps)
    ]
    mapping = importlib.import_module("transformers.conversion_mapping")
    monkeypatch.setattr(mapping, "get_model_conversion_mapping", lambda model: converters)
    with pytest.raises(ValueError, match=r"could not be made of .*down_proj\.weight.* as transformers makes it"):
        StreamedModel.open(folder_of("qwen3-moe"))


def test_no_tokens_at_all_cannot_be_enough(folder_of, quantize, tmp_path):
    with pytest.raises(ValueError, match="expert_tokens must be at least 1, got 0"):
        quantize(folder_of("mixtral"), tmp_path / "out", expert_tokens=0)
