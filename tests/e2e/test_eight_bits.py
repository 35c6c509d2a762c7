"""Activations in 8 bits, blocks fitted as a whole, and mixed widths, through whole runs."""

import shutil
from dataclasses import replace

import pytest
import torch
from helpers import folder_digests

import lorq
from lorq.pipeline import quantize as stages

FEW_STEPS = lorq.LRQ(bits=4, group_size=16, steps=3)
EIGHT = lorq.GPTQ(bits=8, group_size=-1)


@pytest.fixture
def quantize(text_file):
    def run(source, out, method, **options):
        return lorq.quantize(source, out, method, calibration=str(text_file), samples=4, seq_len=32, **options)

    return run


def logits(folder):
    return logits_of(lorq.load(folder))


def logits_of(model):
    tokens = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(tokens).logits


def sqnr_db(expected, found):
    return float(10 * torch.log10(expected.square().sum() / (expected - found).square().sum()))


@pytest.mark.parametrize(
    "method, options",
    [
        (FEW_STEPS, {"activations": "token", "kv_cache": "token"}),
        (EIGHT, {"activations": "tensor", "smoothing": 0.5}),
    ],
    ids=["lrq token", "gptq tensor"],
)
def test_rounded_activations_are_in_the_folder_and_cost_a_little(method, options, folder_of, quantize, tmp_path):
    source = folder_of("llama")
    quantize(source, tmp_path / "plain", method)
    report = quantize(source, tmp_path / "out", method, **options)
    model = lorq.load(tmp_path / "out")
    for name, layer in model.named_modules():
        if hasattr(layer, "weight_packed"):
            assert layer.format.input_quantization == options["activations"]
            cached = name.endswith(("k_proj", "v_proj")) and "kv_cache" in options
            assert layer.format.output_quantization == ("token" if cached else "none")
            assert (layer.input_scale is None) == (options["activations"] == "token")
    if "smoothing" in options:
        # Its values serve two heads each; down_proj's input has its range moved into up_proj's rows.
        told = {name.rpartition(".")[2] for name, note in report.notes.items() if "not smoothed" in note}
        assert told == {"o_proj"}
    original = logits(source)
    plain, rounded = (sqnr_db(original, logits(tmp_path / name)) for name in ("plain", "out"))
    assert rounded > 10 and rounded < plain + 3  # coarser, but the same model


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_smoothing_alone_changes_nothing_but_the_rounding(family, folder_of, quantize, tmp_path):
    source = folder_of(family)
    for smoothing in (0.0, 0.5):
        quantize(source, tmp_path / str(smoothing), EIGHT, activations="token", smoothing=smoothing)
    assert sqnr_db(logits(tmp_path / "0.0"), logits(tmp_path / "0.5")) > 25


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_rows_and_columns_scaled_against_each_other_leave_the_model_as_it_was(family, folder_of, quantize, tmp_path):
    source = folder_of(family)
    report = quantize(source, tmp_path / "out", EIGHT, activations="tensor", smoothing=0.5)
    assert not any("not smoothed" in note for name, note in report.notes.items() if name.endswith(("down_proj", "fc2")))
    model = lorq.load(tmp_path / "out")
    for layer in model.modules():
        if hasattr(layer, "weight_packed"):
            layer.format = replace(layer.format, input_quantization="none")
    assert sqnr_db(logits(source), logits_of(model)) > 25  # 8-bit weights cost as much


def test_a_fixed_range_serves_a_model_with_a_huge_channel_before_down_proj_once_it_is_smoothed(
    folder_of, quantize, tmp_path
):
    source = shutil.copytree(folder_of("llama"), tmp_path / "source")
    model = lorq.load(source)
    for name, layer in model.named_modules():
        if name.endswith("up_proj"):
            layer.weight.data[3] *= 1000.0
        if name.endswith("down_proj"):
            layer.weight.data[:, 3] /= 1000.0
    model.save_pretrained(source)
    found = {}
    for smoothing in (0.0, 0.8):
        quantize(source, tmp_path / str(smoothing), EIGHT, activations="tensor", smoothing=smoothing)
        found[smoothing] = sqnr_db(logits(source), logits(tmp_path / str(smoothing)))
    assert found[0.8] > found[0.0] + 10


def test_layers_that_stay_as_they_are_keep_their_norm_from_being_smoothed(folder_of, quantize, tmp_path):
    report = quantize(
        folder_of("llama"), tmp_path / "out", EIGHT, activations="token", smoothing=0.5, exclude=("q_proj",)
    )
    notes = {layer.name: layer.note for layer in report.layers if layer.name.endswith("k_proj")}
    assert notes and all("also serves what is not quantized" in note for note in notes.values())


@pytest.mark.parametrize(
    "method, options",
    [
        (FEW_STEPS, {"stream": "original"}),
        (lorq.LoRDS(bits=3, group_size=16, steps=2, refine_steps=3), {}),
        (FEW_STEPS, {"activations": "tensor", "smoothing": 0.5}),
        (lorq.GPTQ(bits=4, group_size=16), {"activations": "token", "smoothing": 0.5, "stream": "quantized"}),
    ],
    ids=["lrq original", "lords", "lrq smoothed", "gptq smoothed"],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(method, options, folder_of, quantize, tmp_path, monkeypatch):
    source, solve, solved = folder_of("llama"), stages.begin_block, []

    def stop_at_the_second(model, plan, visit, probe, executor):
        solved.append(visit.part.name)
        if solved == ["model.layers.0", "model.layers.1"]:
            raise KeyboardInterrupt
        return solve(model, plan, visit, probe, executor)

    quantize(source, tmp_path / "whole", method, **options)
    monkeypatch.setattr(stages, "begin_block", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "parts", method, **options)
    quantize(source, tmp_path / "parts", method, **options, resume=True)
    assert folder_digests(tmp_path / "whole") == folder_digests(tmp_path / "parts")


REFUSED = {
    "smoothing without activations": (EIGHT, {"smoothing": 0.5}, "smoothing 0.5 and activations 'none'"),
    "too much smoothing": (EIGHT, {"smoothing": 1.5, "activations": "token"}, "between 0 and 1, got 1.5"),
    "a range in another basis": (
        lorq.LoPRo(bits=4, group_size=16),
        {"activations": "tensor"},
        "'tensor' need inputs in the",
    ),
    "keys left out": (EIGHT, {"kv_cache": "token", "exclude": ("k_proj",)}, "k_proj and v_proj in every block"),
    "steps of one layer": (
        FEW_STEPS,
        {"override": ("q_proj:steps=5",)},
        "steps serves a whole block.*got 5 for .*q_proj",
    ),
    "scope of one layer": (
        lorq.LoRDS(group_size=16),
        {"override": ("q_proj:refine_steps=5",)},
        "scope serves a whole block",
    ),
    "too high a rank": (lorq.LoRDS(rank=999), {}, "at most min.*got 999"),
}


@pytest.mark.parametrize("method, options, message", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_before_the_work(method, options, message, folder_of, quantize, tmp_path):
    with pytest.raises(ValueError, match=message):
        quantize(folder_of("llama"), tmp_path / "out", method, **options)
    assert not (tmp_path / "out").exists()
