"""Layers behind quantized ones make up for what these have done to their inputs."""

import pytest
import torch
from helpers import BOS, Recorder, byte_tokenizer, folder_digests, inputs_of
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import lorq
from lorq.core.stats import _CORRECTION as SHARE
from lorq.core.stats import _CORRECTION_DAMPING as DAMPING
from lorq.models.windows import Encoder, text_windows

SMALL = {"samples": 4, "seq_len": 32}


@pytest.fixture
def recorder():
    Recorder.seen.clear()
    return Recorder(bits=3, group_size=32)


@pytest.fixture
def quantize(text_file):
    def run(source, out, method, **options):
        return lorq.quantize(
            source, out, method, **{"calibration": str(text_file), "stream": "corrected"} | SMALL | options
        )

    return run


@pytest.fixture
def windows(text_file):
    return text_windows(str(text_file), Encoder(byte_tokenizer(128), (BOS,), 257), **SMALL).tokens


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family, token_weights", [("llama", "equal"), ("llama", "gradient"), ("gpt2", "plain")])
def test_the_target_makes_up_for_what_the_first_block_has_changed(
    family, token_weights, folder_of, recorder, quantize, windows, tmp_path
):
    folder = folder_of(family)
    quantize(folder, tmp_path / "out", recorder, token_weights=token_weights)
    original, half = load(folder), load(folder)
    quantized = lorq.load(tmp_path / "out").dequantize()
    second = [name for name in recorder.seen if ".1." in name]
    for name in set(recorder.seen) - set(second):
        solved = quantized.get_submodule(name).weight
        half.get_submodule(name).weight.data.copy_(solved.T if family == "gpt2" else solved)
        weight = original.get_submodule(name).weight.detach()
        # Nothing is before the first block.
        assert torch.equal(recorder.seen[name][0], weight.T if family == "gpt2" else weight)
    before, now = (inputs_of(model, second, windows) for model in (original, half))
    for name in second:
        x0, x = before[name][0].double(), now[name][0].double()
        # Tokens count alike there, whatever weighs them elsewhere.
        d = 1 / x.square().mean(1, keepdim=True)
        h, c = (x * d).T @ x / len(x), ((x0 - x) * d).T @ x / len(x)
        weight = original.get_submodule(name).weight.detach().double()
        weight = weight.T if family == "gpt2" else weight
        damped = h + DAMPING * h.diagonal().mean() * torch.eye(len(h))
        expected = weight + SHARE * weight @ c @ torch.linalg.inv(damped)
        assert_close(recorder.seen[name][0].double(), expected, rtol=1e-2, atol=1e-3 * float(weight.abs().max()))
        assert float((expected - weight).abs().max()) > 1e-2 * float(weight.abs().max())


def test_experts_are_not_corrected(folder_of, recorder, quantize, tmp_path):
    quantize(folder_of("mixtral"), tmp_path / "out", recorder)
    corrected = {name for name, (_, stats) in recorder.seen.items() if stats.correction is not None}
    assert corrected == {name for name in recorder.seen if ".experts." not in name} and corrected


@pytest.mark.parametrize("token_weights", ["equal", "gradient"])
def test_an_interrupted_run_ends_in_the_same_bytes(token_weights, folder_of, quantize, tmp_path):
    def stop(stage, done, total):
        if (stage, done) == ("quantize", 1):
            raise KeyboardInterrupt

    method, source = lorq.GPTQ(bits=3, group_size=32), folder_of("mixtral")
    quantize(source, tmp_path / "whole", method, token_weights=token_weights)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", method, token_weights=token_weights, progress=stop)
    quantize(source, tmp_path / "out", method, token_weights=token_weights, resume=True)
    assert folder_digests(tmp_path / "out") == folder_digests(tmp_path / "whole")


def test_only_what_comes_behind_quantized_blocks_differs(folder_of, quantize, tmp_path):
    source, method = folder_of("llama"), lorq.GPTQ(bits=3, group_size=32)
    shards = []
    for stream in ("quantized", "corrected"):
        quantize(source, tmp_path / stream, method, stream=stream)
        shards.append([load_file(file) for file in sorted((tmp_path / stream).glob("*.safetensors"))])
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(*shards, strict=True)]
    assert same == [True, True, False]


def test_methods_that_fit_a_block_to_the_originals_output_need_no_correction(folder_of, quantize, tmp_path):
    with pytest.raises(ValueError, match="stream 'corrected' is for methods that solve layer by layer"):
        quantize(folder_of("llama"), tmp_path / "out", lorq.LRQ(bits=3, group_size=32, steps=1))
