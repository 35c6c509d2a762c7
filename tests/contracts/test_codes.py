"""What every kind of codes keeps to: its tensors are what its layout says, and read back they are the same codes."""

import dataclasses
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import lorq
from lorq.adapt.adapters import attach
from lorq.core.codes import CODES, Codes, CodesFormat, GgufGrid, IntGrid, LevelFormat, TrellisGrid, VectorGrid
from lorq.core.codes.gguf_blocks import TYPES
from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.kernels import cpu, int8, triton_linear
from lorq.kernels.reference_experts import declines_experts
from lorq.runtime.inspect import implementation_lines, layer_implementations
from lorq.runtime.linear import QuantLinear
from lorq.storage.config import read_format, write_format
from lorq.storage.folder import LorqFolder

OUT, IN = 12, 48


@dataclass(frozen=True)
class ByteFormat:
    """A kind that lorq does not have: bytes, a scale for each row."""

    width: int
    kind: ClassVar[str] = "bytes"
    operator: ClassVar[str | None] = None
    bits: ClassVar[int] = 8

    def check(self, out, in_):
        if in_ != self.width:
            raise ValueError(f"rows must have {self.width} columns, got {in_}")

    def layout(self, out, in_):
        return {"bytes": ((out * in_,), torch.int8), "steps": ((out,), torch.float16)}

    def read(self, tensors, out, in_):
        return ByteCodes(tensors["bytes"].view(out, in_), tensors["steps"])

    def decode_rows(self, tensors, index, in_):
        return ByteCodes(tensors["bytes"].view(-1, in_)[index], tensors["steps"][index]).decode()

    def plain(self, width):
        return IntGrid(8, self.width, symmetric=True)


@dataclass(frozen=True)
class ByteCodes:
    codes: torch.Tensor
    steps: torch.Tensor

    @property
    def format(self):
        return ByteFormat(self.shape[1])

    @property
    def shape(self):
        return tuple(self.codes.shape)

    def decode(self, dtype=torch.float32):
        return self.codes.to(dtype) * self.steps.to(dtype)[:, None]

    def tensors(self):
        return {"bytes": self.codes.flatten(), "steps": self.steps}

    def continuous(self):
        return {"steps": self.steps}

    def refitted(self, numbers):
        return dataclasses.replace(self, steps=numbers["steps"])


@dataclass(frozen=True)
class Bytes:
    """The method that makes such codes."""

    scope: ClassVar[str] = "layer"
    needs_stats: ClassVar[bool] = False
    bits: ClassVar[int] = 8
    group_size: ClassVar[int] = -1

    def solve(self, problem):
        def solved(weight):
            steps = (weight.abs().amax(1) / 127).half()
            return QuantizedWeight(ByteCodes((weight / steps.float()[:, None]).round().to(torch.int8), steps))

        return {name: solved(weight) for name, weight in problem.weights.items()}

    def largest(self, out, in_):
        return LayerFormat(ByteFormat(in_))


@pytest.fixture(autouse=True)
def one_kind_more(monkeypatch):
    monkeypatch.setitem(CODES, "bytes", ByteFormat)


# Sizes of each kind that fit a weight of this shape; a kind that is not here is tried with its defaults.
TRIED = {
    "integer": [IntGrid(3, 16), IntGrid(8, 48, symmetric=True), IntGrid(1, 8)],
    "levels": [
        LevelFormat(4, "normal-float", 16),
        LevelFormat(3, "integer", 48, 2),
        LevelFormat(2, "normal-float", 48, 5),
    ],
    "vectors": [VectorGrid(2, 4, 6, 16, 48), VectorGrid(3, 2, 12, 8, 16)],
    "trellis": [TrellisGrid(3, 12, 16), TrellisGrid(1, 16, 16), TrellisGrid(6, 10, 16)],
    "gguf": [GgufGrid(type) for type in TYPES],
}
ALL = [format for name, kind in CODES.items() for format in TRIED.get(name) or [kind()]] + [ByteFormat(IN)]
formats = pytest.mark.parametrize("format", ALL, ids=str)


def width(format):
    """Of the weights that a format is tried with."""
    return format.layout_of.block if format.kind == "gguf" else IN


@formats
def test_a_format_keeps_the_protocol_and_is_a_frozen_value_of_json(format):
    assert isinstance(format, CodesFormat) and CODES[format.kind] is type(format)
    assert type(format)(**json.loads(json.dumps(dataclasses.asdict(format)))) == format
    with pytest.raises(dataclasses.FrozenInstanceError):
        format.bits = 1


@formats
def test_rows_that_are_decoded_alone_are_those_of_the_whole(format, random_weight):
    codes = random_weight(OUT, width(format), LayerFormat(format)).codes
    index = torch.tensor([11, 0, 7, 7])
    assert torch.equal(format.decode_rows(codes.tensors(), index, width(format)), codes.decode()[index])
    assert format.decode_rows(codes.tensors(), index[:0], width(format)).shape == (0, width(format))


@formats
def test_tensors_are_those_of_the_layout_and_read_back_they_are_the_same_codes(format, random_weight):
    weight = random_weight(OUT, width(format), LayerFormat(format))
    codes = weight.codes
    assert isinstance(codes, Codes) and codes.format == format and codes.shape == (OUT, width(format))
    tensors = codes.tensors()
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == format.layout(OUT, width(format))
    back = format.read(tensors, OUT, width(format))
    assert torch.equal(back.decode(), codes.decode()) and back.decode().shape == (OUT, width(format))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in back.tensors().items())
    assert weight.stored_bits() == sum(8 * t.numel() * t.element_size() for t in tensors.values())


@formats
def test_what_is_continuous_is_stored_as_it_is_and_with_it_the_same_codes_decode_to_the_same(format, random_weight):
    codes = random_weight(OUT, width(format), LayerFormat(format)).codes
    numbers, tensors = codes.continuous(), codes.tensors()
    assert numbers and all(torch.equal(number, tensors[name]) for name, number in numbers.items() if name in tensors)
    assert numbers.keys() <= tensors.keys() or format.kind == "gguf"  # inside of its one tensor
    again = codes.refitted({name: number.float() for name, number in numbers.items()})
    assert torch.equal(again.decode(), codes.decode())
    back = again.refitted(numbers).tensors()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in back.items())


@formats
def test_decoding_is_differentiable_in_what_is_continuous(format, random_weight, generator):
    codes = random_weight(OUT, width(format), LayerFormat(format)).codes
    numbers = {name: number.double().requires_grad_() for name, number in codes.continuous().items()}
    seed = torch.randn(OUT, width(format), generator=generator, dtype=torch.float64)

    def value(given):
        return (codes.refitted(given).decode(torch.float64) * seed).sum()

    gradients = torch.autograd.grad(value(numbers), list(numbers.values()))
    for (name, number), gradient in zip(numbers.items(), gradients, strict=True):
        step = 1e-3 * torch.randn(number.shape, generator=generator, dtype=torch.float64) * number.detach().abs().mean()
        with torch.no_grad():  # linear in each of them alone, so that differences are exact
            ahead, behind = (value(numbers | {name: number + sign * step}) for sign in (1, -1))
        assert float((gradient * step).sum()) != 0
        torch.testing.assert_close((gradient * step).sum(), (ahead - behind) / 2, rtol=1e-6, atol=1e-12)


@formats
def test_a_layer_multiplies_by_what_its_codes_decode_to(format, random_weight, generator):
    weight = random_weight(OUT, width(format), LayerFormat(format, rank=2, rotation_block=16))
    layer, x = QuantLinear.from_weight(weight), torch.randn(3, width(format), generator=generator)
    expected = x.double() @ weight.dense(torch.float64).T
    layer.weight_shape.zero_()  # compiled programs cannot look at what tensors hold
    assert torch.linalg.vector_norm(layer(x) - expected) <= 1e-4 * torch.linalg.vector_norm(expected)


# Streams run down columns: any number of these will do.
@pytest.mark.parametrize("format", [format for format in ALL if format.kind != "trellis"], ids=str)
def test_a_shape_that_codes_do_not_tile_is_refused_with_the_width(format):
    with pytest.raises(ValueError, match=str(width(format) + 1)):
        format.check(OUT, width(format) + 1)
    format.check(OUT, width(format))


@formats
def test_whole_numbers_are_no_inputs(format, random_weight):
    layer = QuantLinear.from_weight(random_weight(OUT, width(format), LayerFormat(format)))
    with pytest.raises(TypeError, match=r"must be floating point, got torch.int64; convert them"):
        layer(torch.ones(2, width(format), dtype=torch.int64))


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
    with pytest.raises(ValueError, match=r"codes must have a kind of integer, levels, .*, got \{'kind': 'hexagons'\}"):
        read_format("up_proj", rest | {"codes": {"kind": "hexagons"}})


def test_no_kernel_takes_a_kind_that_it_does_not_know():
    format, cpu_ = LayerFormat(ByteFormat(IN), input_quantization="token"), torch.device("cpu")
    whys = [cpu.declines_format(format, IN), triton_linear.declines_format(format)]
    whys.append(int8.declines_format(format, IN, cpu_, torch.float32))
    assert set(whys) == {"codes of the kind bytes have no kernel"}
    assert declines_experts(format) == "codes of the kind bytes are multiplied one expert after the other"


@pytest.mark.parametrize("family, inputs", [("llama", "none"), ("mixtral", "none"), ("llama", "token")])
def test_a_kind_that_the_rest_of_lorq_does_not_know_is_stored_run_and_shown(family, inputs, folder_of, tmp_path):
    out = tmp_path / "out"
    options = dict(activations=inputs, calibration="self", samples=1, seq_len=8)

    def stop(stage, done, total):
        if (stage, done) == ("quantize", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lorq.quantize(folder_of(family), out, Bytes(), progress=stop, **options)
    lorq.quantize(folder_of(family), out, Bytes(), resume=True, **options)
    folder, model = LorqFolder.open(out), lorq.load(out)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert layers.keys() == folder.formats.keys()
    assert all(layer.together is None for layer in layers.values())
    assert all(torch.equal(layers[name].weight, weight.dense()) for name, weight in folder.layers())
    (line,) = implementation_lines(layer_implementations(folder))
    assert line.startswith("runs on reference (torch)")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        logits = model(tokens).logits
    with pytest.raises(ValueError, match=f"this one has {len(layers)} packed layers, none of them with scale factors"):
        attach(model)
    if inputs == "none":
        model.dequantize()
        with torch.no_grad():
            torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
