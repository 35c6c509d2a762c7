"""Tensors that vLLM hands out become a layer's weight, or are refused by name."""

import pytest
import torch
from torch import nn

from lorq.core.codes import IntGrid
from lorq.core.rounding import nearest
from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.runtime.vllm.loading import Collected

FORMAT = LayerFormat(IntGrid(4, 16))


def handed_out(generator, **changed):
    """A layer of one part whose tensors have come through the loaders that its parameters have."""
    weight = QuantizedWeight(nearest(torch.randn(8, 32, generator=generator), None, IntGrid(4, 16)), None, None)
    collected, layer = Collected({"model.up_proj": FORMAT}), nn.Module()
    collected.make_room(layer, 8, 32, torch.float32)
    for local, tensor in (weight.tensors() | changed).items():
        if tensor is not None:
            parameter = getattr(layer, local)
            parameter.weight_loader(parameter, tensor)
    return weight, collected


def test_a_part_is_read_whole(generator):
    weight, collected = handed_out(generator)
    assert torch.equal(collected.weight(0).dense(), weight.dense())


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"weight_scale": torch.full((8, 2), torch.nan).half()}, "weight_scale must be finite, 16 of 16 .* damaged"),
        ({"weight_scale": torch.full((8, 2), torch.inf).half()}, "weight_scale must be finite"),
        ({"weight_scale": torch.ones(8, 3).half()}, r"must have weight_scale of shape \(8, 2\); download"),
        ({"weight_packed": None}, "must have weight_packed of shape"),
        ({"weight_shape": None}, "lacks weight_shape: the folder is not whole"),
    ],
)
def test_what_cannot_be_a_weight_is_refused(changed, message, generator):
    with pytest.raises(ValueError, match=f"model.up_proj.*{message}"):
        handed_out(generator, **changed)[1].weight(0)
