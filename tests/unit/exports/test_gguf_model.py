"""Which models llama.cpp runs, and the order of its rows."""

import pytest
import torch
from gguf_models import CASES, gguf_config
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from lorq.exports.gguf_model import ARCHITECTURES, architecture_of, find_sources, permuted, write_metadata


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("qwen2", {"hidden_act": "gelu"}, "runs qwen2 with hidden_act 'silu' alone, the folder's config has 'gelu'"),
        ("qwen3-moe", {"norm_topk_prob": False}, "with norm_topk_prob True alone"),
        ("gemma3", {"query_pre_attn_scalar": 8}, r"attention by 32\^-0.5, query_pre_attn_scalar is 8"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "every sixth layer of Gemma 3 attend to all"),
        ("olmoe", {"num_key_value_heads": 2}, "as many heads of keys as of queries alone, .* 2 and 4"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(name, changes, what):
    with pytest.raises(ValueError, match=what):
        architecture_of(gguf_config(name, **changes))


class Deaf:
    """Stands for a GGUF writer."""

    def __getattr__(self, name):
        return lambda value: None


def test_scalings_of_positions_that_llama_cpp_lacks_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = gguf_config("llama", rope_parameters=rope)
    with pytest.raises(
        ValueError, match=r"by default, llama3, linear, yarn, longrope, the folder's config has .*dynamic"
    ):
        write_metadata(Deaf(), config, architecture_of(config))


def test_windows_that_llama_cpp_ignores_are_told():
    config = gguf_config("mistral", sliding_window=32)
    told = write_metadata(Deaf(), config, architecture_of(config))
    assert told == ["attention reaches back over all tokens, the model's over 32: past these it is another model"]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_rows_are_permuted_so_that_readers_permute_them_back(heads):
    weight = torch.randn(32, 3, generator=torch.Generator().manual_seed(heads)).numpy()
    turned = permuted(torch.from_numpy(weight), heads).numpy()
    back = LlamaTensorProcessor()._reverse_permute_weights(turned, heads)
    assert (turned != weight).any() and (back == weight).all()


def test_a_tensor_without_a_place_is_refused():
    config = gguf_config("llama")
    with pytest.raises(
        ValueError, match=r"no place for model.layers.0.self_attn.sinks in llama.cpp's llama; try dense"
    ):
        find_sources({"model.layers.0.self_attn.sinks": "any"}, config, architecture_of(config))


def test_all_architectures_are_compared_with_transformers_in_llama_cpp():
    assert {gguf_config(name).get_text_config().model_type for name in CASES} == set(
        ARCHITECTURES
    )  # tests/engines/test_llama_cpp.py
