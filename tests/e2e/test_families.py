"""Ten dense architectures and six mixtures of experts from the folder to the running low-bit model."""

import copy
import json
import statistics
from functools import partial

import pytest
import torch
from helpers import BYTES, FAMILIES, MOE, TIED
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import lorq
from lorq.models.blocks import StreamedModel
from lorq.models.experts import split_experts
from lorq.pipeline.walk import advance
from lorq.runtime.linear import QuantLinear

LINEARS = {  # of both blocks; three for each expert
    "llama": 14, "mistral": 14, "qwen2": 14, "qwen3": 14, "gemma2": 14, "gemma3": 14, "opt": 12, "phi": 12,
    "gpt-neox": 8, "gpt2": 8,
    "mixtral": 32, "qwen2-moe": 29, "qwen3-moe": 32, "olmoe": 32, "deepseek-v3": 40, "gpt-oss": 32,
}  # fmt: skip
METHODS = {
    "nearest": lorq.Nearest(bits=8, group_size=32),
    "lopro": lorq.LoPRo(bits=3, group_size=32, rank=3, rotation="none", epochs=0),
}
families = pytest.mark.parametrize("family", list(FAMILIES | MOE))
methods = pytest.mark.parametrize("method", list(METHODS))


@pytest.fixture(scope="module")
def quantized(folder_of, text_file, tmp_path_factory):
    """The folder of a family quantized by a method, and its report; made once."""
    made = {}

    def of(family, method):
        if (family, method) not in made:
            out = tmp_path_factory.mktemp("quantized") / f"{family}-{method}"
            options = dict(calibration=str(text_file), samples=4, seq_len=32)
            made[family, method] = out, lorq.quantize(folder_of(family), out, METHODS[method], **options)
        return made[family, method]

    return of


@pytest.fixture
def windows():
    # Longer than the sliding windows of 8.
    return torch.randint(BYTES, (2, 24), generator=torch.Generator().manual_seed(5))


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture(scope="module")
def packed(quantized):
    """The loaded float32 model of a family and a method; loaded once, not to be changed."""
    made = {}

    def of(family, method):
        if (family, method) not in made:
            made[family, method] = load(quantized(family, method)[0])
        return made[family, method]

    return of


@pytest.fixture(scope="module")
def original(folder_of):
    """The original float32 model of a family; loaded once, not to be changed."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = load(folder_of(family))
        return made[family]

    return of


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def apart(original):
    """A copy of the original with each expert's projections on their own."""
    model = copy.deepcopy(original)
    split_experts(model)
    return model


def dense_twin(original, packed):
    """A copy of the original with every quantized weight replaced by what its stored tensors stand for."""
    model, modules = apart(original), dict(packed.named_modules())
    for name, module in linears(model).items():
        packed = modules[name]
        if isinstance(packed, QuantLinear):
            weight = packed.format.read(packed.stored()).dense()
            module.weight.data = weight.T.contiguous() if isinstance(module, Conv1D) else weight
    return model


@torch.no_grad()
def logits_of(model, windows):
    return model(input_ids=windows, use_cache=False).logits


def sqnr_db(expected, got):
    return 20 * torch.log10(expected.norm() / (expected - got).norm()).item()


@families
def test_walking_block_by_block_gives_the_logits_of_the_whole_model(family, folder_of, original, windows):
    streamed = StreamedModel.open(folder_of(family))
    stream = streamed.embed(windows)
    for block in streamed.blocks:
        with streamed.resident(block):
            advance(stream, partial(streamed.run, block))
    got = torch.stack([streamed.logits(*both) for both in zip(windows, stream.hidden, strict=True)])
    expected = logits_of(original(family), windows)
    # float32 sums over 64 and 128 products, in the same order but for the batch.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    assert streamed.unused_tensors == []


@families
def test_a_sliding_window_a_soft_cap_and_a_norm_matter_to_these_tiny_models(family, folder_of, windows):
    # Otherwise the comparison above could not tell whether they are kept.
    model = load(folder_of(family))
    expected = logits_of(model, windows)
    names = [name for name, p in model.named_parameters() if p.ndim == 1 or name.endswith("_bias")]
    assert names
    for name in names:
        parameter = model.get_parameter(name)
        before = parameter.data.clone()
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        # A bias of the keys shifts all scores of a query alike, which the softmax does not see.
        if "k_proj.bias" not in name:
            assert sqnr_db(expected, logits_of(model, windows)) < 60, name
        parameter.data = before
    if "sliding_window" in (FAMILIES | MOE)[family][1]:
        free = AutoModelForCausalLM.from_pretrained(folder_of(family), sliding_window=1000)
        assert sqnr_db(expected, logits_of(free, windows)) < 40


@families
def test_rounding_to_8_bits_stays_close_to_the_original(family, original, packed, windows):
    # 8 bits of a group's range of about 4.2 standard deviations: 20 log10(255 sqrt(12) / 4.2) = 46 dB a layer.
    expected, got = logits_of(original(family), windows), logits_of(packed(family, "nearest"), windows)
    if family in MOE:
        # A token at a router's border may be sent to another expert by the slightest change, and tokens after it
        # attend to it; most stay where they are.
        near = [sqnr_db(a, b) > 30 for a, b in zip(expected.flatten(0, 1), got.flatten(0, 1), strict=True)]
        assert sum(near) > len(near) / 2
    else:
        assert sqnr_db(expected, got) > 30


@methods
@families
def test_the_loaded_model_computes_what_its_dense_weights_would(family, method, original, packed, windows):
    model = packed(family, method)
    expected = logits_of(dense_twin(original(family), model), windows)
    # The packed layer multiplies in another order than the dense one.
    torch.testing.assert_close(logits_of(model, windows), expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())


@methods
@families
def test_every_linear_layer_of_every_block_is_quantized_and_nothing_else(family, method, original, packed, quantized):
    dense, model, report = apart(original(family)), packed(family, method), quantized(family, method)[1]
    names = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert len(names) == LINEARS[family] == len(report.layers)
    assert {layer.name for layer in report.layers} == set(names)
    assert set(linears(model)) == set(linears(dense)) - set(names)
    assert all(".0." in name or ".1." in name for name in names)
    kept = {name: p for name, p in dense.named_parameters() if name.removesuffix(".weight") not in names}
    loaded = dict(model.named_parameters())
    assert set(kept) == set(loaded)
    assert all(torch.equal(kept[name], loaded[name]) for name in kept)
    if method == "lopro":
        assert all(layer.rank == 3 for layer in report.layers)


@families
def test_the_report_counts_the_bytes_that_are_in_the_files(family, quantized):
    out, report = quantized(family, "lopro")
    stored = 0
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            stored += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())
    assert report.bytes == stored
    assert json.loads((out / "lorq.safetensors.index.json").read_bytes())["metadata"]["total_size"] == stored


@families
def test_tied_embeddings_stay_tied_and_are_stored_once(family, packed, quantized):
    out, _ = quantized(family, "lopro")
    model = packed(family, "lopro")
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding.data_ptr() == head.data_ptr()) == (family in TIED)
    weight_map = json.loads((out / "lorq.safetensors.index.json").read_bytes())["weight_map"]
    shape, found = [BYTES + 1, 64], 0
    for file in set(weight_map.values()):
        with safe_open(out / file, "pt") as tensors:
            found += sum(tensors.get_slice(name).get_shape() == shape for name in tensors.keys())
    assert found == (1 if family in TIED else 2)


@families
def test_generating_with_a_cache_gives_the_text_that_recomputing_gives(family, packed, windows):
    model = packed(family, "lopro")
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    prompt = {"input_ids": windows[:1, :12], "attention_mask": torch.ones(1, 12, dtype=torch.int64)}
    cached = model.generate(**prompt, use_cache=True, **options)
    assert cached.shape == (1, 18)
    assert torch.equal(cached, model.generate(**prompt, use_cache=False, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@families
def test_half_precision_runs_and_keeps_the_stored_tensors_as_they_are(family, dtype, packed, quantized, windows):
    half, full = load(quantized(family, "lopro")[0], dtype), packed(family, "lopro")
    logits = logits_of(half, windows)
    assert logits.dtype == dtype
    # A rounding of 2^-9 (bfloat16) or 2^-12 at some thirty places; a token that it routes to another expert is off.
    tokens = zip(logits_of(full, windows).flatten(0, 1), logits.float().flatten(0, 1), strict=True)
    assert statistics.median(sqnr_db(*pair) for pair in tokens) > (20 if dtype == torch.bfloat16 else 40)
    for (name, a), (_, b) in zip(half.named_buffers(), full.named_buffers(), strict=True):
        if name.rpartition(".")[2].startswith(("weight_", "left", "right")):
            assert a.dtype == b.dtype and torch.equal(a, b), name
    generated = half.generate(
        input_ids=windows[:1, :12], attention_mask=torch.ones(1, 12, dtype=torch.int64), max_new_tokens=3,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    assert generated.shape == (1, 15)
