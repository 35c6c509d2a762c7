"""PackedWeight: what the modules that hold a weight in packed form have in common."""

import torch
from torch import Tensor, nn

from lorq.core.codes import LevelFormat, levels
from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.kernels import OPERATORS, fake_quantize, int8_linear, multiply, turn
from lorq.kernels.int8 import declines_format
from lorq.kernels.operands import STORED_NAMES
from lorq.kernels.reference import decoded_linear

# What layers of the operator's kinds of codes may store; those of other kinds name their own.
STORED = (
    *(name for name in STORED_NAMES if name != "levels"), "weight_shape", "permutation", "input_scale",
    "input_zero_point",
)  # fmt: skip


class PackedWeight(nn.Module):
    """A weight, (out, in), as it is stored.

    The stored tensors are buffers under the names of docs/format.md; those a weight does not have are None.
    Moving the module (``.to(device)``) moves them; asking for another dtype leaves them alone, since codes and scales
    belong together. The device "meta" makes room without memory.
    """

    weight_shape: Tensor
    weight_packed: Tensor
    permutation: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, format: LayerFormat, device: torch.device | str | None = None
    ):
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, format
        layout = format.layout(out_features, in_features)
        for name in dict.fromkeys((*STORED, *layout)):
            tensor = torch.zeros(layout[name][0], dtype=layout[name][1], device=device) if name in layout else None
            self.register_buffer(name, tensor)

    def turn(self, x: Tensor) -> Tensor:
        """``x T``: the input as the stored weight needs it, where there is a basis."""
        return turn(x, self.permutation, self.format.rotation_block, self.format.rotation_skip)

    def product(self, z: Tensor) -> Tensor:
        """``z V^T``, of an input that is in the basis already."""
        if self.format.input_quantization != "none":
            grid = self.input_scale, self.input_zero_point
            # Whole numbers have no gradient to give.
            learns = z.requires_grad and torch.is_grad_enabled()
            if not learns and declines_format(self.format, self.in_features, z.device, z.dtype) is None:
                whole = self.weight_packed, self.weight_scale, self.weight_zero_point
                return int8_linear(z, *whole, *grid, self.format.bits)
            z = fake_quantize(z, *grid)
        codes = self.format.codes
        if codes.operator is None:
            weight = self.format.read(self.stored(), (self.out_features, self.in_features))
            return decoded_linear(z, weight.codes.decode(), weight.low_rank)  # type: ignore[arg-type]
        return multiply(z, *self.operands(), *OPERATORS[codes.operator].settings(codes), operator=codes.operator)

    def operands(self) -> list[Tensor | None]:
        """The operator's tensors."""
        # From torch's own dicts: a module's __getattr__, twelve times, takes as long as a small product.
        tensors = {**self._buffers, **self._parameters, "levels": self.levels}
        return [tensors[name] for name in OPERATORS[self.format.codes.operator or ""].tensors]

    @property
    def levels(self) -> Tensor | None:
        """What codes stand for where that is not whole numbers, on the weight's device."""
        codes = self.format.codes
        if not isinstance(codes, LevelFormat) or codes.levels == "integer":
            return None
        return levels(codes.levels, codes.bits, self.weight_packed.device)

    def value(self) -> QuantizedWeight:
        """What is stored, as a value without its record."""
        return self.format.read(self.stored())

    def stored(self) -> dict[str, Tensor]:
        """The stored tensors that this weight has, by local name."""
        names = self.format.layout(self.out_features, self.in_features)
        return {name: getattr(self, name) for name in names}

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)
