"""Weights and inputs that are out of the ordinary: every method has a stated answer, which the layer's note tells."""

import dataclasses
import math
import re
from collections import Counter

import pytest
import torch
from helpers import byte_tokenizer, tiny_folder
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import lorq
from lorq.core.problem import Problem
from lorq.core.stats import StatsAccumulator
from lorq.methods import METHODS
from lorq.pipeline.tasks import Task, solve_task
from lorq.pipeline.verify import probe_tokens

OUT, IN = 16, 64
QUICK = {"rank": 2, "steps": 3, "epochs": 1, "refine_steps": 1, "iterations": 1}


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def weights():
    return normal(OUT, IN) / 50


def inputs():
    return normal(200, IN) @ (torch.eye(IN) + normal(IN, IN) / 10)


def made(name, shape):
    """A method that is quick."""
    known = {field.name for field in dataclasses.fields(METHODS[name])}
    given = QUICK | {"bits": 3, "group_size": 32 if shape[1] % 32 == 0 else -1}
    if min(shape) < QUICK["rank"]:
        given.pop("rank")
    return METHODS[name](**{key: value for key, value in given.items() if key in known})


def solved(name, weight, x, weigh="equal"):
    """One layer by a method, as a run solves it."""
    sums = StatsAccumulator(x.shape[1], weigh)
    sums.add(x)
    problem = Problem({"layer": weight}, {"layer": sums.finish()}, 0)
    return solve_task(Task(made(name, weight.shape), problem))["layer"]


def zeroed(tensor, dim, part):
    tensor = tensor.clone()
    tensor.narrow(dim, 0, part).zero_()
    return tensor


# What goes on as if nothing were: weight, inputs.
ORDINARY = {
    "dead channels": lambda: (weights(), zeroed(inputs(), 1, 21)),
    "constant inputs": lambda: (weights(), inputs()[:1].repeat(200, 1)),
    "one token": lambda: (weights(), inputs()[:1]),
    "a singular Hessian": lambda: (weights(), inputs()[:, :3] @ normal(3, IN)),
    "dead outputs": lambda: (zeroed(weights(), 0, 8), inputs()),
    "a group of zeros": lambda: (zeroed(weights(), 1, 32), inputs()),
    "weights all alike": lambda: (torch.full((OUT, IN), 0.02), inputs()),
    "one row": lambda: (weights()[:1], inputs()),
    "one column": lambda: (weights()[:, :1].clone(), inputs()[:, :1].clone()),
    "one weight": lambda: (weights()[:1, :1].clone(), inputs()[:, :1].clone()),
    "inputs of 1e18": lambda: (weights(), inputs() * 1e18),
    "inputs of 1e-18": lambda: (weights(), inputs() * 1e-18),
}
ways = pytest.mark.parametrize("name", METHODS)


@ways
@pytest.mark.parametrize("trouble", ORDINARY)
def test_what_is_quantized_as_any_other_is_no_worse_than_rounded_to_nearest(name, trouble):
    weight, x = ORDINARY[trouble]()
    if weight.shape[1] == 1 and name.startswith(("lopro", "tileq")):  # they rotate columns
        with pytest.raises(ValueError, match=r"a rotation block must be a power of two from 4 .* for width 1"):
            solved(name, weight, x)
        return
    result = solved(name, weight, x)
    assert torch.isfinite(result.dense()).all() and result.shape == weight.shape
    record = result.record
    assert 0 <= record.error_before < 0.1 and math.isfinite(record.error_after)
    assert record.error_after <= 1.001 * record.error_before or "worse than rounded to nearest" in record.note
    assert "too small" not in record.note


@ways
def test_weights_of_zeros_stay_zeros(name):
    result = solved(name, torch.zeros(OUT, IN), inputs())
    assert not result.dense().any() and result.record.error_before == result.record.error_after == 0


@ways
def test_inputs_of_zeros_have_the_layer_rounded_to_nearest_and_a_note(name):
    result = solved(name, weights(), torch.zeros(200, IN))
    told = "its inputs are zero on every calibration token: rounded to nearest"
    assert result.record.note == (told if made(name, (OUT, IN)).needs_stats else "")


@ways
@pytest.mark.parametrize("size", [1e-9, 1e-30])
def test_weights_too_small_to_be_stored_are_lost_and_a_note_says_so(name, size):
    result = solved(name, 50 * size * weights(), inputs())
    lost = re.fullmatch(
        r"(.*; )?its weights are too small for scales in float16, the largest is (\S+): (\d+)% of their .* lost",
        result.record.note,
    )
    error = result.record.error_after
    if lost is None:  # factors of two parts hold more
        assert error < 0.3 and name.startswith("lords"), (error, result.record.note)
        return
    assert float(lost[2]) == pytest.approx(50 * size * float(weights().abs().max()), rel=0.05)
    assert error == pytest.approx(int(lost[3]) / 100, abs=0.2)  # and the error tells the same, not 0 of 0


@ways
@pytest.mark.parametrize("size", ["all", "one"])
def test_weights_too_large_to_be_stored_are_refused_with_the_layer(name, size):
    weight = weights()
    if size == "all":
        weight *= 1e30
    else:
        weight[3, 5] = 1e30
    with pytest.raises(
        ValueError, match=r"must fit float16 \(at most 65504\), got \S+; the weights are too large"
    ) as told:
        solved(name, weight, inputs())
    assert told.value.__notes__ == ["while solving layer"]


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if kind().needs_stats])
def test_squares_that_float32_cannot_hold_are_refused_with_the_remedy(name):
    with pytest.raises(FloatingPointError, match=r"below 1e\+30 .*, got \S+; weigh .* --token-weights equal"):
        solved(name, weights(), inputs() * 1e18, "plain")


def test_errors_of_small_inputs_are_the_same_as_those_of_others():
    usual, small = (solved("nearest", weights(), inputs() * size, "plain").record for size in (1.0, 1e-18))
    assert small.error_after == pytest.approx(usual.error_after, rel=1e-3)


# ---- in a model -------------------------------------------------------------------------------------------

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def troubled(tmp_path, text_file):
    """Quantize a model after a change to its tensors; the report's layers by name."""

    def run(change, method=None, family="llama", **options):
        folder = tiny_folder(tmp_path / "model", family)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        method = method or lorq.GPTQ(bits=3, group_size=32)
        given = dict(calibration=str(text_file), samples=4, seq_len=32) | options
        report = lorq.quantize(folder, tmp_path / "out", method, **given)
        assert lorq.read_report(tmp_path / "out").layers == report.layers
        return {layer.name: layer for layer in report.layers}, report

    return run


def set_to(name, value, dtype=None):
    def change(tensors):
        tensor = tensors[name]
        tensors[name] = torch.full_like(tensor, value) if dtype is None else tensor.to(dtype)

    return change


def test_a_layer_of_zeros_is_seen_in_the_report(troubled):
    layers, _ = troubled(set_to(f"{DOWN}.weight", 0.0))
    assert layers[DOWN].error_after == 0 and layers[DOWN].note == ""


def test_a_layer_too_small_to_be_stored_is_seen_in_the_report_and_at_its_end(troubled):
    layers, report = troubled(set_to(f"{DOWN}.weight", 1e-30))
    assert "too small for scales in float16, the largest is 1.0e-30: 100% of" in layers[DOWN].note
    assert layers[DOWN].error_after == pytest.approx(1) and DOWN in report.notes


def test_a_layer_too_large_to_be_stored_is_named(troubled):
    with pytest.raises(ValueError, match=r"must fit float16") as told:
        troubled(set_to(f"{DOWN}.weight", 1e30))
    assert any(DOWN in note for note in told.value.__notes__)


def test_layers_behind_a_dead_norm_are_rounded_to_nearest_and_say_so(troubled):
    layers, _ = troubled(set_to("model.layers.1.post_attention_layernorm.weight", 0.0))
    told = {name: layer.note for name, layer in layers.items() if layer.note}
    note = "its inputs are zero on every calibration token: rounded to nearest"
    assert told == {f"model.layers.1.mlp.{part}_proj": note for part in ("gate", "up", "down")}


def test_a_window_that_overflows_is_refused_with_the_layer_and_the_numbers(troubled, text_file):
    text = Counter(byte_tokenizer(10**6)(text_file.read_text()).input_ids[1:]).most_common()
    probed = probe_tokens(LlamaConfig(vocab_size=257, max_position_embeddings=128), 0)
    letter = next(token for token, _ in text if token not in probed)  # the text has it, the run's own checks do not

    def loud(tensors):
        tensors["model.embed_tokens.weight"][letter] = 6e37

    with pytest.raises(
        FloatingPointError, match=r"inputs must be finite, got \d+ NaN or infinite values of \d+"
    ) as told:
        troubled(loud, family="gemma2")  # which multiplies embeddings, and bounds its logits
    assert any("while calibrating model.layers.0" in note for note in told.value.__notes__)


@pytest.mark.parametrize("name", ["gptq", "flrq"])
def test_float16_weights_that_would_overflow_in_float16_do_not_here(name, troubled):
    def large(tensors):
        for key, tensor in tensors.items():
            tensors[key] = tensor.half()
        tensors[f"{DOWN}.weight"] *= 30_000  # what it gives is beyond 65504

    layers, _ = troubled(large, METHODS[name](bits=4, group_size=32))
    assert all(math.isfinite(layer.error_after) and layer.error_after < 0.1 for layer in layers.values())


def test_experts_that_no_token_reaches_have_the_statistics_of_all_and_say_so(troubled):
    def unloved(tensors):
        tensors["model.layers.0.block_sparse_moe.gate.weight"].zero_()  # then the same two are always taken

    layers, _ = troubled(unloved, family="mixtral")
    told = [layer.note for name, layer in layers.items() if ".layers.0.mlp.experts" in name and layer.note]
    assert told == 2 * 3 * ["0 of 128 tokens routed here, statistics from all of them"]
