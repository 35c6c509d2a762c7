"""QuantLinear: the module that stands where a linear layer was."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorq.kernels import quant_linear
from lorq.packing import pack, pack_columns, packed_width, unpack, unpack_columns
from lorq.weight import LayerFormat, LowRank, QuantizedWeight

_STORED = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape",
    "left", "right", "left_scale", "right_scale",
)  # fmt: skip


def pack_weight(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a quantized weight as they are stored, by their local names (docs/format.md)."""
    tensors = {
        "weight_packed": pack(weight.codes, weight.bits),
        "weight_scale": weight.scale.to(torch.float16),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        tensors["weight_zero_point"] = pack_columns(weight.zero_point, weight.bits)
    if weight.low_rank is not None:
        parts = weight.low_rank
        tensors |= {"left": parts.left, "right": parts.right}
        if parts.left_scale is not None and parts.right_scale is not None:
            tensors |= {"left_scale": parts.left_scale, "right_scale": parts.right_scale}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def stored_layout(
    out_features: int, in_features: int, format: LayerFormat
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that a layer of this format stores; the inverse is `pack_weight`."""
    groups, rank = in_features // format.group_size, format.rank
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight_packed": ((out_features, packed_width(in_features, format.bits)), torch.int32),
        "weight_scale": ((out_features, groups), torch.float16),
        "weight_shape": ((2,), torch.int64),
    }
    if not format.symmetric:
        layout["weight_zero_point"] = ((packed_width(out_features, format.bits), groups), torch.int32)
    if rank:
        kind = torch.int8 if format.factor_bits == 8 else torch.float16
        layout |= {"left": ((out_features, rank), kind), "right": ((rank, in_features), kind)}
        if format.factor_bits == 8:
            layout |= {"left_scale": ((rank,), torch.float16), "right_scale": ((rank,), torch.float16)}
    return layout


def unpack_weight(tensors: Mapping[str, Tensor], format: LayerFormat) -> QuantizedWeight:
    """The quantized weight behind stored tensors, without its record; the inverse of `pack_weight`."""
    out_features, in_features = tensors["weight_shape"].tolist()
    zero, low_rank = tensors.get("weight_zero_point"), None
    if format.rank:
        low_rank = LowRank(tensors["left"], tensors["right"], tensors.get("left_scale"), tensors.get("right_scale"))
    return QuantizedWeight(
        codes=unpack(tensors["weight_packed"], format.bits, in_features),
        scale=tensors["weight_scale"],
        zero_point=None if zero is None else unpack_columns(zero, format.bits, out_features),
        bits=format.bits,
        low_rank=low_rank,
    )


class QuantLinear(nn.Module):
    """``y = x W^T + b`` with ``W`` kept packed.

    The stored tensors are buffers under the names of docs/format.md; those a layer does not have are None.
    Moving the module (``.to(device)``) moves them; asking for another dtype converts the bias and leaves
    them alone, since codes and scales belong together.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        format: bits, group size, rank and so on.
        bias: whether there is a bias.
        dtype: of the bias.
        device: "meta" makes room without memory.
    """

    bias: nn.Parameter | None
    weight_shape: Tensor

    def __init__(
        self, in_features: int, out_features: int, format: LayerFormat, *, bias: bool = False,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, format
        layout = stored_layout(out_features, in_features, format)
        for name in _STORED:
            tensor = torch.zeros(layout[name][0], dtype=layout[name][1], device=device) if name in layout else None
            self.register_buffer(name, tensor)
        parameter = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", parameter)

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> "QuantLinear":
        """Wrap a solved weight."""
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, weight.format, bias=bias is not None)
        layer.load_state_dict(pack_weight(weight) | ({} if bias is None else {"bias": bias}))
        return layer

    def forward(self, x: Tensor) -> Tensor:
        y = quant_linear(
            x, self.weight_packed, self.weight_scale, self.weight_zero_point,
            self.left, self.right, self.left_scale, self.right_scale, self.format.bits,
        )  # fmt: skip
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def weight(self) -> Tensor:
        """The dense weight, (out, in), decoded anew at every look: for reading, writing to it changes nothing."""
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        return unpack_weight(self.stored(), self.format).dense().to(dtype)

    def stored(self) -> dict[str, Tensor]:
        """The stored tensors that this layer has, by local name."""
        return {name: tensor for name in _STORED if (tensor := getattr(self, name)) is not None}

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain linear layer with the dense weight."""
        weight = unpack_weight(self.stored(), self.format).dense()
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
            f"in_features={self.in_features}, out_features={self.out_features}, bits={f.bits}, "
            f"group_size={f.group_size}, rank={f.rank}, bias={self.bias is not None}"
        )
