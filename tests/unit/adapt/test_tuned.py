"""Layers in tuning: they compute what packed ones do, and their gradients are those of the dense formula."""

import copy

import pytest
import torch
from helpers import layer_format, tiny_model
from torch import nn

from lorq.adapt.fit import Divergence
from lorq.adapt.tuned import Decoded, TunedLinear, as_stored, learning, leave_tuning, prepare_tuning, stored_numbers
from lorq.core.low_rank import FACTOR_TYPES
from lorq.quality import divergence
from lorq.runtime.linear import QuantLinear

OUT, IN = 12, 48
FORMATS = {
    "integer": layer_format(3, 16, False),
    "factors": layer_format(2, 48, True, 2, "int8", rotation_block=16),
    "e4m3": layer_format(4, 16, False, 3, "e4m3", permuted=True, rotation_block=16, rotation_skip=16),
    "levels": layer_format(3, 48, True, grid="normal-float", scale_rank=2),
    "vectors": layer_format(2, 48, True, vector=4, codebook_rows=6, codebook_columns=16),
    "activations": layer_format(4, 16, False, 2, input_quantization="token", output_quantization="token"),
}
formats = pytest.mark.parametrize("name", FORMATS)


def packed(random_weight, name, bias=None):
    return QuantLinear.from_weight(random_weight(OUT, IN, FORMATS[name]), bias).requires_grad_(False)


@formats
def test_a_layer_in_tuning_computes_what_the_packed_one_does(name, random_weight, generator):
    bias = torch.randn(OUT, generator=generator)
    layer = packed(random_weight, name, bias)
    x = torch.randn(2, 5, IN, generator=generator)
    torch.testing.assert_close(TunedLinear(layer)(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "activations"])
def test_gradients_are_those_of_the_dense_weight(name, random_weight, generator):
    layer = packed(random_weight, name)
    tuned, x = TunedLinear(layer), torch.randn(2, 5, IN, generator=generator).requires_grad_()
    seed = torch.randn(2, 5, OUT, generator=generator)
    tuned(x).backward(seed)
    solved = layer.value()
    numbers = {local: number.float().requires_grad_() for local, number in solved.continuous().items()}
    x_ = x.detach().clone().requires_grad_()
    (x_ @ solved.refitted(numbers).dense().T).backward(seed)
    torch.testing.assert_close(x.grad, x_.grad, rtol=1e-4, atol=1e-5)
    for local, number in numbers.items():
        torch.testing.assert_close(tuned.get_parameter(local).grad, number.grad, rtol=1e-3, atol=1e-3)


def test_no_dense_weight_is_kept_for_the_backward_pass(random_weight, generator):
    tuned, kept = TunedLinear(packed(random_weight, "factors")), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tuned(torch.randn(3, IN, generator=generator).requires_grad_())
    assert kept and OUT * IN not in [tensor.numel() for tensor in kept]


def test_products_are_in_the_type_of_autocast_and_gradients_in_float32(random_weight, generator):
    tuned, x = TunedLinear(packed(random_weight, "integer")), torch.randn(3, IN, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = tuned(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and tuned.weight_scale.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), tuned(x), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, *(kind for kind, _ in FACTOR_TYPES.values())])
def test_numbers_are_rounded_as_they_are_stored_and_gradients_pass(dtype):
    number = torch.tensor([0.3, -1.6, 100.26, -1e6], requires_grad=True)
    rounded = as_stored(number, dtype)
    rounded.sum().backward()
    assert torch.equal(number.grad, torch.ones(4))
    assert torch.equal(rounded.detach().to(dtype).float(), rounded.detach())  # nothing is lost when it is stored
    exact = {torch.int8: [0.0, -2.0, 100.0, -127.0]}.get(dtype)
    if exact:
        assert rounded.tolist() == exact
    assert rounded[3] == -FACTOR_TYPES[{torch.int8: "int8", torch.float16: "float16"}.get(dtype, "e4m3")][1]


@pytest.fixture
def model(random_weight):
    """A tiny model with packed layers."""
    model = copy.deepcopy(tiny_model())
    for block in model.model.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                weight = random_weight(module.out_features, module.in_features, layer_format(3, 8, False, 2, "int8"))
                block.set_submodule(name, QuantLinear.from_weight(weight))
    return model.eval()


def test_numbers_and_norms_learn_and_nothing_else_and_untouched_they_are_what_was_stored(model):
    norms = {name for name, p in model.named_parameters() if "norm" in name}
    stored = {
        f"{name}.{local}": number
        for name, layer in model.named_modules() if isinstance(layer, QuantLinear)
        for local, number in layer.value().continuous().items()
    }  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    prepare_tuning(model, lambda name: torch.bfloat16)
    found = learning(model)
    assert set(found) == norms | set(stored) and len(norms) == 5
    again = stored_numbers(model, found)
    assert all(torch.equal(again[name].view(torch.uint8), number.view(torch.uint8)) for name, number in stored.items())
    assert all(again[name].dtype == torch.bfloat16 and torch.equal(again[name].float(), before[name]) for name in norms)


def test_a_norm_is_rounded_to_its_stored_type_while_it_learns_and_plain_again_afterwards(model):
    prepare_tuning(model, lambda name: torch.bfloat16)
    norm = model.model.norm
    with torch.no_grad():
        learning(model)["model.norm.weight"].fill_(1.001)  # bfloat16 has 1 and 1.0078
    assert torch.equal(norm.weight.detach(), torch.ones(16))
    leave_tuning(model)
    assert "model.norm.weight" in dict(model.named_parameters()) and torch.equal(norm.weight, torch.ones(16))


def test_divergence_and_its_gradient_are_those_of_the_formula(generator, monkeypatch):
    monkeypatch.setattr("lorq.adapt.fit._CHUNK_LOGITS", 22)  # two tokens at a time
    original, logits = (torch.randn(1, 5, 11, generator=generator) for _ in range(2))
    mine = logits.clone().requires_grad_()
    found = Divergence.apply(mine, original)
    found.backward()
    torch.testing.assert_close(found.detach(), divergence(original[0], logits[0]).mean())
    formula = logits.clone().requires_grad_()
    log_p = original.log_softmax(-1)
    (log_p.exp() * (log_p - formula.log_softmax(-1))).sum(-1).mean().backward()
    torch.testing.assert_close(mine.grad, formula.grad)


def test_decoding_twice_is_asked_of_the_same_numbers(generator):
    calls = []

    def decode(number):
        calls.append(number.detach().clone())
        return number.view(4, 3)

    number = torch.randn(12, generator=generator).requires_grad_()
    Decoded.apply(torch.randn(2, 3, generator=generator), decode, number).sum().backward()
    assert len(calls) == 2 and torch.equal(*calls)
