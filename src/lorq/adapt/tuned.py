"""Layers whose codes stay while their numbers learn: scales, low-rank factors, entries of codebooks; and norms."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lorq.core.weight import LayerFormat
from lorq.kernels import fake_quantize
from lorq.runtime.linear import QuantLinear


class Decoded(torch.autograd.Function):
    """``z W^T``, ``W`` what ``decode(*numbers)`` makes: made again in the backward pass, never kept.

        dz = dy W,    dW = dy^T z,    and from there what autograd makes of ``decode``

    The products are in the dtype of ``z``. One dense weight is in memory at a time, and what ``decode`` needs for it.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, decode: Callable[..., Tensor], *numbers: Tensor) -> Tensor:
        ctx.decode = decode
        ctx.save_for_backward(z, *numbers)
        return nn.functional.linear(z, decode(*numbers).to(z.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z, *numbers = ctx.saved_tensors
        dy = gradients[0]
        with torch.enable_grad():
            leaves = [number.detach().requires_grad_() for number in numbers]
            weight = ctx.decode(*leaves)
        dz = dy @ weight.detach().to(dy.dtype) if ctx.needs_input_grad[0] else None
        dw = dy.flatten(0, -2).T @ z.flatten(0, -2)
        return dz, None, *torch.autograd.grad(weight, leaves, dw.to(weight.dtype))


def as_stored(number: Tensor, dtype: torch.dtype) -> Tensor:
    """A number rounded to the type that it is stored in, straight through: the gradient does not see the rounding.

    What lies beyond the type's range becomes its end, for int8 -127 and 127.
    """
    rounded = number.detach()
    if dtype == torch.int8:
        rounded = rounded.round().clamp(-127, 127)
    else:
        top = torch.finfo(dtype).max
        rounded = rounded.clamp(-top, top).to(dtype).to(number.dtype)
    return number + (rounded - number.detach())


class AsStored(nn.Module):
    """`as_stored` as a parametrization."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, number: Tensor) -> Tensor:
        return as_stored(number, self.dtype)


class TunedLinear(nn.Module):
    """A packed layer in tuning: its numbers are float32 parameters, its codes stay, a byte each.

    Stands for the packed layer, whose bias, format, and handling of activations it keeps.
    """

    bias: nn.Parameter | None

    def __init__(self, layer: QuantLinear):
        super().__init__()
        self.packed = (layer,)  # in a tuple: no child, its buffers do not count
        self.solved = (layer.value(),)
        self.types = {name: number.dtype for name, number in self.solved[0].continuous().items()}
        for name, number in self.solved[0].continuous().items():
            self.register_parameter(name, nn.Parameter(number.float()))
        self.register_parameter("bias", layer.bias)

    @property
    def format(self) -> LayerFormat:
        return self.packed[0].format

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self.into_basis(x))

    def into_basis(self, x: Tensor) -> Tensor:
        layer = self.packed[0]
        return layer.turn(x) if layer.format.has_basis else x

    def multiply(self, z: Tensor) -> Tensor:
        """The steps of `QuantLinear.multiply`, with the dense weight as it will be stored."""
        layer, device = self.packed[0], z.device.type
        if layer.format.input_quantization != "none":
            z = fake_quantize(z, layer.input_scale, layer.input_zero_point)
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else z.dtype
        y = Decoded.apply(z.to(kind), self.decode, *self.numbers().values())
        assert isinstance(y, Tensor)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y if layer.format.output_quantization == "none" else fake_quantize(y, None, None)

    def numbers(self) -> dict[str, Tensor]:
        """As they will be stored, differentiable."""
        return {name: as_stored(self.get_parameter(name), dtype) for name, dtype in self.types.items()}

    def decode(self, *numbers: Tensor) -> Tensor:
        """The weight in its basis, without what experts share."""
        weight = self.solved[0].refitted(dict(zip(self.types, numbers, strict=True)))
        dense = weight.codes.decode()
        return dense if weight.low_rank is None or weight.tile is not None else dense + weight.low_rank.dense()


def prepare_tuning(model: nn.Module, stored_dtype: Callable[[str], torch.dtype]) -> None:
    """Put layers in tuning where packed ones are, and let norms learn; all else is frozen.

    Args:
        model: a loaded lorq folder, or a block of one, in float32.
        stored_dtype: of a tensor of the folder, by its name in the model.
    """
    model.requires_grad_(False)
    for name, layer in [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear)]:
        model.set_submodule(name, TunedLinear(layer).train(layer.training))
    for name, norm in list(_norms(model)):
        for local, parameter in list(norm.named_parameters(recurse=False)):
            parameter.requires_grad_(True)
            rounding = AsStored(stored_dtype(f"{name}.{local}"))
            parametrize.register_parametrization(norm, local, rounding, unsafe=True)


def _norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that have a weight and whose parameters, those of children included, are vectors."""
    for name, module in model.named_modules():
        own = dict(module.named_parameters())
        if "weight" in own and all(p.ndim == 1 for p in own.values()) and not isinstance(module, TunedLinear):
            yield name, module


def leave_tuning(model: nn.Module) -> None:
    """Let norms be plain ones again, with what they have learned. Layers in tuning are left to the caller."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AsStored):
            path, _, local = name.removesuffix(".0").rpartition(".parametrizations.")
            norm = model.get_submodule(path)
            parametrize.remove_parametrizations(norm, local)


def sizes(numbers: Sequence[Tensor]) -> list[float]:
    """The root mean square of each, by which one relative learning rate serves all; a unit for those that are zero."""
    return [float(number.detach().square().mean().sqrt()) or 1.0 for number in numbers]


def learning(model: nn.Module) -> dict[str, Tensor]:
    """What learns, by the names that it is stored under."""
    return {
        name.replace("parametrizations.", "").removesuffix(".original"): parameter
        for name, parameter in model.named_parameters() if parameter.requires_grad
    }  # fmt: skip


@torch.no_grad()
def stored_numbers(model: nn.Module, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers of `learning` in the types that they are stored in."""
    types: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if isinstance(module, TunedLinear):
            types |= {f"{name}.{local}": dtype for local, dtype in module.types.items()}
        elif isinstance(module, AsStored):
            path, local = name.removesuffix(".0").split(".parametrizations.")
            types[f"{path}.{local}"] = module.dtype
    return {name: as_stored(number, types[name]).to("cpu", types[name]) for name, number in numbers.items()}
