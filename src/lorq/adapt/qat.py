"""Quantization-aware training: weights and their scales, of low rank or of groups, learn through the rounding."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorq.adapt.adapters import adapters_of, has_product_scale, let_train, trainable_layers, use_adapter
from lorq.adapt.rounded import FakeQuantized, Rounding
from lorq.core.codes import IntCodes, LevelCodes
from lorq.kernels import fake_quantize
from lorq.models.blocks import StreamedModel
from lorq.models.locate import resolve_model
from lorq.runtime.device import own_defaults
from lorq.runtime.linear import QuantLinear


class TrainableLinear(nn.Module):
    """A layer in quantization-aware training: dense weight and scales train, the forward pass sees the rounded.

    Stands for a packed layer, whose bias, format, and handling of activations it keeps. The scales are parameters under
    the names that they are stored by: ``scale_left`` and ``scale_right``, or ``weight_scale``.
    """

    bias: nn.Parameter | None
    zero_point: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(self, layer: QuantLinear, weight: Float[Tensor, "out in"]):
        super().__init__()
        self.packed = (layer,)  # in a tuple: no child, its buffers do not count
        codes = layer.value().codes
        assert isinstance(codes, IntCodes | LevelCodes), codes
        self.weight = nn.Parameter(weight)
        self.scales = tuple(codes.continuous())
        for name, number in codes.continuous().items():
            self.register_parameter(name, nn.Parameter(number.detach().to(torch.float16).float()))
        self.register_parameter("bias", layer.bias)
        self.register_buffer("zero_point", getattr(codes, "zero_point", None), persistent=False)
        for name in ("input_scale", "input_zero_point"):
            self.register_buffer(name, getattr(layer, name), persistent=False)

    @property
    def rounding(self) -> Rounding:
        format: Any = self.packed[0].format.codes
        return Rounding(format, self.zero_point)

    def quantized(self) -> Float[Tensor, "out in"]:
        """The rounded weight, differentiable; its scales are those that float16 will hold."""
        numbers = [_as_stored(self.get_parameter(name)) for name in self.scales]
        weight = FakeQuantized.apply(self.weight, self.rounding, *numbers)
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        # The steps of `QuantLinear.multiply`, so that what was trained is, to the last bit, what will run.
        format = self.packed[0].format
        if format.input_quantization != "none":
            x = fake_quantize(x, self.input_scale, self.input_zero_point)
        y = nn.functional.linear(x, self.quantized().to(x.dtype))
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y if format.output_quantization == "none" else fake_quantize(y, None, None)

    @torch.no_grad()
    def finished(self) -> QuantLinear:
        """A packed layer with what was learned; an ArithmeticError if that is not finite."""
        layer, stored = self.packed[0], {name: self.get_parameter(name).to(torch.float16) for name in self.scales}
        for what, numbers in (
            ("scales must be finite in float16", stored.values()),
            ("weights must be finite", [self.weight]),
        ):
            if not all(bool(torch.isfinite(number).all()) for number in numbers):
                raise ArithmeticError(f"{what}, they are not; train with a lower learning rate")
        codes = self.rounding.encode(self.weight, self.rounding.scale(*(number.float() for number in stored.values())))
        learned: Any = layer.value().refitted(stored)
        solved = replace(learned, codes=replace(learned.codes, codes=codes.to(torch.uint8)))
        new = QuantLinear.from_weight(solved).to(self.weight.device).requires_grad_(False).train(self.training)
        new.bias = self.bias
        return new


def _as_stored(number: Tensor) -> Tensor:
    """Rounded to float16, straight through."""
    return number + (number.detach().to(torch.float16).to(number.dtype) - number.detach())


@own_defaults()
def prepare_qat(model: nn.Module, reference: str | Path | None = None) -> None:
    """Put trainable layers where the packed ones are; all else is frozen. `finish_qat` ends it, `cancel_qat` undoes it.

    Weights and scales train together from the first step, if the training has no ``scale_steps``.

    Args:
        model: whose layers are codes alone, integers or levels: quantized with lords, or with gptq, lrq or nearest, in
            groups. Training starts from the scales in use, an adapter's or the base's. Zero points stay.
        reference: the original, whose weights training starts from; None starts from the dequantized ones.

    Raises:
        ValueError: if a layer cannot train so, or the reference is not its original.

    Source:
        LoRDS, arXiv:2601.22716, the authors' code. Deviations: there embeddings, norms and head train as well, here
        they stay, so that a trained folder differs from its base in codes and scales alone; and there B and A train
        alone for the first 250 steps, W with them after that, which is ``scale_steps`` of the training here.
    """
    layers = trainable_layers(model)
    streamed = None if reference is None else _original(model, reference, layers)
    targets = {t.name: t for part in streamed.parts for t in part.targets} if streamed else {}
    made = {}
    for name, layer in layers.items():
        with torch.no_grad():
            dense = streamed.weight(targets[name]) if streamed else layer.value().dense()
        made[name] = TrainableLinear(layer, dense.to(layer.weight_packed.device, torch.float32)).train(layer.training)
    model.requires_grad_(False)
    for name, new in made.items():
        model.set_submodule(name, new)
    let_train(model, True, partial(_save_qat, model))


def _original(model: nn.Module, reference: str | Path, layers: dict[str, QuantLinear]) -> StreamedModel:
    """The reference, checked: its layers' shapes, and the norms and biases between them."""
    streamed = StreamedModel.open(resolve_model(reference))
    shapes = {t.name: (t.out_features, t.in_features) for part in streamed.parts for t in part.targets}
    for name, layer in layers.items():
        if shapes.get(name) != (layer.out_features, layer.in_features):
            raise ValueError(
                f"the reference must be the original of the model, {reference} has {shapes.get(name, 'nothing')} for "
                f"{name} of shape {(layer.out_features, layer.in_features)}"
            )
    own = dict(model.named_parameters())
    for name in (name for block in streamed.blocks for name in block.tensors):
        mine = own.get(name)
        if mine is not None and mine.ndim == 1:
            theirs = streamed.stored_tensor(name).to(mine.device, mine.dtype)
            if theirs.shape != mine.shape or not torch.equal(theirs, mine):
                raise ValueError(
                    f"the reference must be the original of the model, {reference} has another {name}: it is another "
                    "model, or this one was smoothed when it was quantized; leave the reference out"
                )
    return streamed


@own_defaults()
def finish_qat(model: nn.Module) -> None:
    """Put packed layers with what was learned where the trainable ones are.

    Adapters are forgotten: they belong to the codes that were. An ArithmeticError if what was learned is not finite;
    the model is left as it is.
    """
    made = {name: module.finished() for name, module in model.named_modules() if isinstance(module, TrainableLinear)}
    for name, layer in made.items():
        model.set_submodule(name, layer)
    model.requires_grad_(False)
    vars(model).pop("lorq_adapters", None)
    let_train(model, False, None)


def cancel_qat(model: nn.Module) -> None:
    """Put the packed layers back as they were; what was learned is lost."""
    for name, module in list(model.named_modules()):
        if isinstance(module, TrainableLinear):
            model.set_submodule(name, module.packed[0])
    if any(has_product_scale(layer) for layer in trainable_layers(model).values()):
        use_adapter(model, adapters_of(model).active)
    else:
        model.requires_grad_(False)
        let_train(model, False, None)


def _save_qat(model: Any, save_directory: str | Path, **ignored: Any) -> None:
    raise ValueError(
        f"a model in training is not saved, got the folder {str(save_directory)!r}; finish_qat(model) first, then "
        "lorq.adapt.save(model, folder)"
    )
