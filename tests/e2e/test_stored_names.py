"""Tensors under other names than the model's, and two for one parameter: read as transformers does, or refused."""

import pytest
import torch
from helpers import tiny_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorq.models.blocks import StreamedModel


def edited(folder, change):
    """The folder after a change of its tensors, in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "family, own, other",
    [
        ("llama", "model.norm.weight", "norm.weight"),
        ("llama", "model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("llama", "lm_head.weight", "model.lm_head.weight"),
        ("gpt2", "transformer.ln_f.weight", "ln_f.weight"),
    ],
)
def test_of_two_names_for_a_parameter_the_one_that_transformers_takes_counts(family, own, other, tmp_path):
    untied = {"tie_word_embeddings": False} if family == "llama" else {}
    folder = edited(tiny_folder(tmp_path / family, family, **untied), lambda t: t.update({other: t[own] + 1}))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_parameter(own)
    assert torch.equal(StreamedModel.open(folder).stored_tensor(own), expected)


def test_a_tied_model_may_be_stored_by_its_head_alone(tmp_path):
    folder = edited(
        tiny_folder(tmp_path / "llama", "llama"),
        lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}),
    )
    model, window = StreamedModel.open(folder), torch.arange(20)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(window[None]).logits[0]
    torch.testing.assert_close(model.own_logits(window, lambda block: None, model.blocks), expected)


EXPERT = "model.layers.0.mlp.experts.{}.gate_proj.weight"


@pytest.mark.parametrize(
    "added, message",
    [
        (
            EXPERT.format(4),
            r"there must be 4 experts as the config says, model.layers.0.mlp.experts.4.gate_proj.weight",
        ),
        (
            EXPERT.format(1).removeprefix("model."),
            r"as layers.0.\S+ and as model.layers.0.mlp.experts.1.gate_proj.weight",
        ),
        ("model.layers.0.mlp.experts.gate_up_proj", r"experts.0.gate_proj.weight and as \S+.experts.gate_up_proj"),
    ],
    ids=["too many", "twice", "fused besides"],
)
def test_experts_that_transformers_would_not_take_are_refused_by_name(added, message, tmp_path):
    def add(tensors):
        one = tensors[EXPERT.format(1)]
        tensors[added] = one if added.endswith("weight") else torch.zeros(4, 2 * one.shape[0], one.shape[1])

    folder = edited(tiny_folder(tmp_path / "moe", "qwen3-moe"), add)
    with pytest.raises(ValueError, match=message):
        StreamedModel.open(folder)
