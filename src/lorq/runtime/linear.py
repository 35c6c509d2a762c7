"""QuantLinear: the module that stands where a linear layer was."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorq.core.codes import LevelFormat, levels
from lorq.core.weight import LayerFormat, QuantizedWeight, Tile
from lorq.kernels import OPERATORS, fake_quantize, int8_linear, multiply, turn
from lorq.kernels.int8 import declines_format
from lorq.kernels.operands import STORED_NAMES
from lorq.kernels.reference import decoded_linear

# What layers of the operator's kinds of codes may store; those of other kinds name their own.
STORED = (
    *(name for name in STORED_NAMES if name != "levels"), "weight_shape", "permutation", "input_scale",
    "input_zero_point",
)  # fmt: skip


def parts_of(whole: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Stretches of a memory as tensors with storages of their own, so that savers tell them apart."""
    parts = whole.view(torch.uint8) if whole.dtype == torch.float8_e4m3fn else whole
    return [torch.from_dlpack(part).view(whole.dtype) for part in parts.split(list(lengths))]


class QuantLinear(nn.Module):
    """``y = x W^T + b`` with ``W`` kept packed.

    The stored tensors are buffers under the names of docs/format.md; those a layer does not have are None.
    Moving the module (``.to(device)``) moves them; asking for another dtype converts the bias, which alone has one, and
    leaves them alone, since codes and scales belong together. The device "meta" makes room without memory.
    """

    bias: nn.Parameter | None
    weight_shape: Tensor
    weight_packed: Tensor
    permutation: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, format: LayerFormat, *, bias: bool = False,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, format
        layout = format.layout(out_features, in_features)
        for name in dict.fromkeys((*STORED, *layout)):
            tensor = torch.zeros(layout[name][0], dtype=layout[name][1], device=device) if name in layout else None
            self.register_buffer(name, tensor)
        parameter = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", parameter)
        # The layers of one input that work together, and this one's place among them (`lorq.runtime.same_input`).
        self.together: tuple[Any, int] | None = None
        # Factors that an expert shares with others, and its number; `lorq.runtime.experts.QuantExperts` runs them. In a
        # tuple, so that they are no child of every expert.
        self.shared: tuple[Any, int] | None = None

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> "QuantLinear":
        """Wrap a solved weight."""
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, weight.format, bias=bias is not None)
        layer.load_state_dict(weight.tensors() | ({} if bias is None else {"bias": bias}))
        return layer

    def forward(self, x: Tensor) -> Tensor:
        y = None if self.together is None else self.together[0].product(self, self.together[1], x)
        return self._finish(self._product(self.into_basis(x)) if y is None else y)

    def into_basis(self, x: Tensor) -> Tensor:
        """``x T``: the input as the stored weight needs it; ``x`` itself where there is no basis."""
        if not self.format.has_basis:
            return x
        image: Tensor = self.turn(x) if self.together is None else self.together[0].image(self, self.together[1], x)
        return image

    def turn(self, x: Tensor) -> Tensor:
        """`into_basis` where there is one, whoever else reads the input."""
        return turn(x, self.permutation, self.format.rotation_block, self.format.rotation_skip)

    def multiply(self, z: Tensor) -> Tensor:
        """The output for an input that is in the basis already."""
        return self._finish(self._product(z))

    def _finish(self, y: Tensor) -> Tensor:
        bias = self.bias
        y = y if bias is None else y + bias.to(y.dtype)
        return y if self.format.output_quantization == "none" else fake_quantize(y, None, None)

    def _product(self, z: Tensor) -> Tensor:
        if self.format.input_quantization != "none":
            grid = self.input_scale, self.input_zero_point
            # Whole numbers have no gradient to give.
            learns = z.requires_grad and torch.is_grad_enabled()
            if not learns and declines_format(self.format, self.in_features, z.device, z.dtype) is None:
                codes = self.weight_packed, self.weight_scale, self.weight_zero_point
                return int8_linear(z, *codes, *grid, self.format.bits)
            z = fake_quantize(z, *grid)
        operator = self.format.codes.operator
        if operator is None:
            weight = self.format.read(self.stored(), (self.out_features, self.in_features))
            return decoded_linear(z, weight.codes.decode(), weight.low_rank)  # type: ignore[arg-type]
        return multiply(z, *self.operands(), *self.settings(), operator=operator)

    def operands(self) -> list[Tensor | None]:
        """The operator's tensors."""
        # From torch's own dicts: a module's __getattr__, twelve times, takes as long as a small product.
        tensors = {**self._buffers, **self._parameters, "levels": self.levels}
        return [tensors[name] for name in OPERATORS[self.format.codes.operator or ""].tensors]

    def settings(self) -> list[int]:
        """The operator's settings."""
        codes = self.format.codes
        return [getattr(codes, name) for name in OPERATORS[codes.operator or ""].settings]

    @property
    def levels(self) -> Tensor | None:
        """What codes stand for where that is not whole numbers, on the layer's device."""
        codes = self.format.codes
        if not isinstance(codes, LevelFormat) or codes.levels == "integer":
            return None
        return levels(codes.levels, codes.bits, self.weight_packed.device)

    def value(self) -> QuantizedWeight:
        """What is stored, an expert's part of shared factors included, as a value without its record."""
        weight = self.format.read(self.stored())
        if self.shared is None:
            return weight
        tiles, expert = self.shared
        return replace(weight, low_rank=Tile(tiles.factors(), expert))

    @property
    def weight(self) -> Tensor:
        """The dense weight, (out, in), decoded anew at every look: for reading, writing to it changes nothing."""
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        return self.value().dense().to(dtype)

    def stored(self) -> dict[str, Tensor]:
        """The stored tensors that this layer has, by local name."""
        names = self.format.layout(self.out_features, self.in_features)
        return {name: getattr(self, name) for name in names}

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain linear layer with the dense weight."""
        weight = self.value().dense()
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.to(dtype or weight.dtype), requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().to(layer.weight.dtype), requires_grad=False)
        return layer

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        bias = self._parameters["bias"]
        moved = None if bias is None else nn.Parameter(fn(bias.data), requires_grad=bias.requires_grad)
        self._parameters["bias"] = None
        try:
            super()._apply(keep_dtype, recurse)
            bias = moved
        finally:
            self._parameters["bias"] = bias
        return self

    def extra_repr(self) -> str:
        f = self.format
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, codes={f.codes}, rank={f.rank}, "
            f"rotation={f.rotation_block}, input={f.input_quantization}, bias={self.bias is not None}"
        )
