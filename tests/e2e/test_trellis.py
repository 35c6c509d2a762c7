"""Trellis codes from a model to a folder and back: with factors and without, for few tokens and many."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorq
from lorq.core.codes import TrellisGrid
from lorq.runtime.linear import QuantLinear

RUN = {"samples": 2, "seq_len": 32, "token_weights": "gradient"}
METHODS = {
    "flrq, 3 bits": lorq.FLRQ(bits=3, codebook="trellis", budget=1.0, epochs=0),
    "flrq, 1 bit": lorq.FLRQ(bits=1, codebook="trellis", budget=0.0),
    "lopro, 6 bits": lorq.LoPRo(bits=6, codebook="trellis", window=16, rank=2, rotation="partial", importance="log"),
    "lopro, whole width": lorq.LoPRo(bits=3, codebook="trellis", window=10, rank=2, rotation="whole"),
}


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("name", METHODS)
def test_a_folder_of_trellis_codes_runs_as_the_weights_that_it_stands_for(name, family, folder_of, text_file, tmp_path):
    report = lorq.quantize(folder_of(family), tmp_path / "out", METHODS[name], calibration=text_file, **RUN)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == len(report.layers)
    assert all(isinstance(layer.format.codes, TrellisGrid) for layer in layers)
    assert (max(layer.format.rank for layer in layers) > 0) == ("1 bit" not in name)
    tokens = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        many, few = model(tokens).logits, model(tokens[:, :1]).logits
        for path, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                model.set_submodule(path, module.dequantize())
        dense_many, dense_few = model(tokens).logits, model(tokens[:, :1]).logits
    for got, expected in ((many, dense_many), (few, dense_few)):
        # Inputs are rounded to 15 bits of a block's largest, or to 23.
        assert torch.linalg.vector_norm(got - expected) < 2e-3 * torch.linalg.vector_norm(expected)


def test_a_bit_more_leaves_less_than_half_of_the_error(folder_of, text_file, tmp_path):
    errors = []
    for bits in (1, 2, 3, 4, 5, 6):
        method = lorq.FLRQ(bits=bits, codebook="trellis", window=10, budget=0.0)
        report = lorq.quantize(folder_of("llama"), tmp_path / str(bits), method, calibration=text_file, **RUN)
        assert all(layer.bits == bits for layer in report.layers)
        errors.append(sum(layer.error_after for layer in report.layers))
    assert all(after < 0.45 * before for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"bits": 7}, "bits must be 1, 2, 3, 4, 5, 6 with trellis codes, got 7"),
        ({"bits": 6, "window": 9}, "window must be at least 4 more than bits, got window 9, bits 6"),
        ({"window": 17}, "window must be between 8 and 16, got 17"),
        ({"rounding": "clip"}, "pass errors on and have no zero points, got rounding 'clip'"),
        ({"metric": "activation"}, "got metric 'activation' and range_measure 'amax'"),
    ],
)
def test_settings_that_trellis_codes_cannot_keep_to_are_refused(settings, rule):
    with pytest.raises(ValueError, match=rule):
        lorq.FLRQ(codebook="trellis", **settings)


def test_single_values_have_two_bits_at_least():
    with pytest.raises(ValueError, match="bits must be 2, 3, 4, 5, 6, 7, 8 with scalar codes, got 1"):
        lorq.FLRQ(bits=1)
