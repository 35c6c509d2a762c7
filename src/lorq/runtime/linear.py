"""QuantLinear: the module that stands where a linear layer was."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorq.core.weight import LayerFormat, QuantizedWeight, Tile
from lorq.kernels import fake_quantize
from lorq.runtime.packed import PackedWeight


def parts_of(whole: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Stretches of a memory as tensors with storages of their own, so that savers tell them apart."""
    parts = whole.view(torch.uint8) if whole.dtype == torch.float8_e4m3fn else whole
    return [torch.from_dlpack(part).view(whole.dtype) for part in parts.split(list(lengths))]


class QuantLinear(PackedWeight):
    """``y = x W^T + b`` with ``W`` kept packed (`PackedWeight`); the bias alone has a dtype that can be asked for."""

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, format: LayerFormat, *, bias: bool = False,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ):  # fmt: skip
        super().__init__(in_features, out_features, format, device)
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
        return self._finish(self.product(self.into_basis(x)) if y is None else y)

    def into_basis(self, x: Tensor) -> Tensor:
        """``x T``: the input as the stored weight needs it; ``x`` itself where there is no basis."""
        if not self.format.has_basis:
            return x
        image: Tensor = self.turn(x) if self.together is None else self.together[0].image(self, self.together[1], x)
        return image

    def multiply(self, z: Tensor) -> Tensor:
        """The output for an input that is in the basis already."""
        return self._finish(self.product(z))

    def _finish(self, y: Tensor) -> Tensor:
        bias = self.bias
        y = y if bias is None else y + bias.to(y.dtype)
        return y if self.format.output_quantization == "none" else fake_quantize(y, None, None)

    def value(self) -> QuantizedWeight:
        """What is stored, an expert's part of shared factors included, as a value without its record."""
        weight = super().value()
        if self.shared is None:
            return weight
        tiles, expert = self.shared
        return replace(weight, low_rank=Tile(tiles.factors(), expert))

    @property
    def weight(self) -> Tensor:
        """The dense weight, (out, in), decoded anew at every look: for reading, writing to it changes nothing."""
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        return self.value().dense().to(dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain linear layer with the dense weight."""
        weight = self.value().dense()
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.to(dtype or weight.dtype), requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().to(layer.weight.dtype), requires_grad=False)
        return layer

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        bias = self._parameters["bias"]
        moved = None if bias is None else nn.Parameter(fn(bias.data), requires_grad=bias.requires_grad)
        self._parameters["bias"] = None
        try:
            super()._apply(fn, recurse)
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
