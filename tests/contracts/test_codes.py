"""What every kind of codes keeps to: its tensors are what its layout says, and read back they are the same codes."""

import dataclasses
import json

import pytest
import torch

from lorq.core.codes import CODES, Codes, CodesFormat, IntGrid, LevelFormat, VectorGrid
from lorq.core.weight import LayerFormat
from lorq.runtime.linear import QuantLinear
from lorq.storage.config import read_format, write_format

OUT, IN = 12, 48
# Sizes of each kind that fit a weight of this shape; a kind that is not here is tried with its defaults.
TRIED = {
    "integer": [IntGrid(3, 16), IntGrid(8, 48, symmetric=True), IntGrid(1, 8)],
    "levels": [
        LevelFormat(4, "normal-float", 16),
        LevelFormat(3, "integer", 48, 2),
        LevelFormat(2, "normal-float", 48, 5),
    ],
    "vectors": [VectorGrid(2, 4, 6, 16, 48), VectorGrid(3, 2, 12, 8, 16)],
}
ALL = [format for name, kind in CODES.items() for format in TRIED.get(name) or [kind()]]
formats = pytest.mark.parametrize("format", ALL, ids=str)


@formats
def test_a_format_keeps_the_protocol_and_is_a_frozen_value_of_json(format):
    assert isinstance(format, CodesFormat) and CODES[format.kind] is type(format)
    assert type(format)(**json.loads(json.dumps(dataclasses.asdict(format)))) == format
    with pytest.raises(dataclasses.FrozenInstanceError):
        format.bits = 1


@formats
def test_tensors_are_those_of_the_layout_and_read_back_they_are_the_same_codes(format, random_weight):
    weight = random_weight(OUT, IN, LayerFormat(format))
    codes = weight.codes
    assert isinstance(codes, Codes) and codes.format == format and codes.shape == (OUT, IN)
    tensors = codes.tensors()
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == format.layout(OUT, IN)
    back = format.read(tensors, OUT, IN)
    assert torch.equal(back.decode(), codes.decode()) and back.decode().shape == (OUT, IN)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in back.tensors().items())
    assert weight.stored_bits() == sum(8 * t.numel() * t.element_size() for t in tensors.values())


@formats
def test_a_layer_multiplies_by_what_its_codes_decode_to(format, random_weight, generator):
    weight = random_weight(OUT, IN, LayerFormat(format, rank=2, rotation_block=16))
    layer, x = QuantLinear.from_weight(weight), torch.randn(3, IN, generator=generator)
    expected = x.double() @ weight.dense(torch.float64).T
    assert torch.linalg.vector_norm(layer(x) - expected) <= 1e-4 * torch.linalg.vector_norm(expected)


@formats
def test_a_shape_that_codes_do_not_tile_is_refused_with_the_width(format):
    with pytest.raises(ValueError, match=str(IN + 1)):
        format.check(OUT, IN + 1)
    format.check(OUT, IN)


@formats
def test_a_layers_entry_in_a_config_reads_back(format):
    whole = LayerFormat(format, 3, "e4m3", True, 16, 16, "token", "token")
    entry = json.loads(json.dumps(write_format(whole)))
    assert read_format("up_proj", entry) == whole
    with pytest.raises(ValueError, match=r"layers\['up_proj'\].* must have the keys"):
        read_format("up_proj", entry | {"more": 1})


def test_codes_of_a_kind_that_nobody_knows_are_refused_with_those_that_are():
    entry = write_format(LayerFormat(IntGrid(4, 16)))
    rest = {key: entry[key] for key in vars(LayerFormat(IntGrid(4, 16))) if key != "codes"}
    with pytest.raises(ValueError, match=r"codes must have a kind of integer, levels, .*, got \{'kind': 'trellis'\}"):
        read_format("up_proj", rest | {"codes": {"kind": "trellis"}})
