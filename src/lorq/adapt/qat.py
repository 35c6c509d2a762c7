"""Quantization-aware training of LoRDS layers: weights and scale factors learn through the rounding."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorq.adapt.adapters import adapters_of, half_factors, let_train, lords_format, lords_layers, use_adapter
from lorq.core.codes import LevelCodes, LevelFormat, LevelGrid, levels
from lorq.kernels import fake_quantize
from lorq.models.blocks import StreamedModel
from lorq.models.locate import resolve_model
from lorq.runtime.device import own_defaults
from lorq.runtime.linear import QuantLinear

# Scales this small stand for zero: nothing is divided by less.
_SMALLEST = 1e-8


class FakeLords(torch.autograd.Function):
    """``W^ = levels[q] o S``, ``q`` the nearest level to ``W / S``, ``S = B A``; the rounding is straight through.

        dL/dW = G o M,    dL/dS = G o (levels[q] - (W / S) o M),    dL/dB = dL/dS A^T,    dL/dA = B^T dL/dS

    with ``M`` for quotients that are rounded to a level of the grid before they are clamped to it: those inside the
    levels, and past the outermost by less than half of its distance to the next. Codes and scales are made again in the
    backward pass, so that it keeps W, B and A alone.

    Source:
        LoRDS, arXiv:2601.22716, training. The mask is that of its authors' code, ``clamp(round(W / |B A| + 8), 0, 15)``
        through autograd. A mask that ends at the outermost levels belongs to ``round(clamp(...))`` and is another rule:
        1.3 % of the weights lie between, and the gradients of B and A differ by 1.4 times their norm. Ours: the
        same for NormalFloat levels, which the code does not train; and S keeps its sign, as in the stored form, where
        the code has ``|B A|``: dL/dS has no sign of B A, and a weight whose S is negative takes the mirrored level.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, left: Tensor, right: Tensor, grid: LevelGrid) -> Tensor:
        ctx.grid = grid
        ctx.save_for_backward(weight, left, right)
        scale = left @ right
        return grid.decode(grid.encode(weight, _away_from_zero(scale)), scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, left, right = ctx.saved_tensors
        scale = _away_from_zero(left @ right)
        table = levels(ctx.grid.kind, ctx.grid.bits, weight.device)
        quotient = weight / scale
        # As halves are rounded to even levels: -0.5 is level 0, 15.5 no level.
        inside = (quotient >= 1.5 * table[0] - table[1] / 2) & (quotient < 1.5 * table[-1] - table[-2] / 2)
        value = ctx.grid.decode(ctx.grid.encode(weight, scale), torch.ones_like(scale))
        of_scale = value.sub_(quotient.mul_(inside)).mul_(gradients[0])
        return gradients[0] * inside, of_scale @ right.T, left.T @ of_scale, None


def _away_from_zero(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < _SMALLEST, torch.full_like(scale, _SMALLEST), scale)


class TrainableLinear(nn.Module):
    """A layer in quantization-aware training: dense weight and scale factors train, the forward pass sees the rounded.

    Stands for a packed layer, whose bias, format, and handling of activations it keeps.
    """

    bias: nn.Parameter | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(self, layer: QuantLinear, weight: Float[Tensor, "out in"]):
        super().__init__()
        self.packed = (layer,)  # in a tuple: no child, its buffers do not count
        self.grid = lords_format(layer).grid
        self.weight = nn.Parameter(weight)
        factors = half_factors(layer)
        self.scale_left, self.scale_right = nn.Parameter(factors.left.float()), nn.Parameter(factors.right.float())
        self.register_parameter("bias", layer.bias)
        for name in ("input_scale", "input_zero_point"):
            self.register_buffer(name, getattr(layer, name), persistent=False)

    def quantized(self) -> Float[Tensor, "out in"]:
        """The rounded weight, differentiable; its factors are those that float16 will hold."""
        left, right = (_as_stored(factor) for factor in (self.scale_left, self.scale_right))
        weight = FakeLords.apply(self.weight, left, right, self.grid)
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
        layer, factors = self.packed[0], half_factors(self)
        if not bool(torch.isfinite(self.weight).all()):
            raise ArithmeticError("weights must be finite, they are not; train with a lower learning rate")
        codes = self.grid.encode(self.weight, _away_from_zero(factors.dense())).to(torch.uint8)
        format = LevelFormat(self.grid.bits, self.grid.kind, layer.in_features, factors.rank)
        solved = replace(layer.value(), codes=LevelCodes(codes, factors, format))
        new = QuantLinear.from_weight(solved).to(self.weight.device).requires_grad_(False).train(self.training)
        new.bias = self.bias
        return new


def _as_stored(factor: Tensor) -> Tensor:
    """Rounded to float16, straight through."""
    return factor + (factor.detach().to(torch.float16).to(factor.dtype) - factor.detach())


@own_defaults()
def prepare_qat(model: nn.Module, reference: str | Path | None = None) -> None:
    """Put trainable layers where the packed ones are; all else is frozen. `finish_qat` ends it, `cancel_qat` undoes it.

    Weights and scale factors train together from the first step, if the training has no ``scale_steps``.

    Args:
        model: quantized with lords. Training starts from the scale factors in use, an adapter's or the base's.
        reference: the original, whose weights training starts from; None starts from the dequantized ones.

    Raises:
        ValueError: if the model is not quantized with lords, or the reference is not its original.

    Source:
        LoRDS, arXiv:2601.22716, the authors' code. Deviations: there embeddings, norms and head train as well, here
        they stay, so that a trained folder differs from its base in codes and scales alone; and there B and A train
        alone for the first 250 steps, W with them after that, which is ``scale_steps`` of the training here.
    """
    layers = lords_layers(model)
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
    use_adapter(model, adapters_of(model).active)


def _save_qat(model: Any, save_directory: str | Path, **ignored: Any) -> None:
    raise ValueError(
        f"a model in training is not saved, got the folder {str(save_directory)!r}; finish_qat(model) first, then "
        "lorq.adapt.save(model, folder)"
    )
