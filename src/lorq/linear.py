"""QuantLinear: the module that stands where a linear layer was."""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorq.activations import Activations
from lorq.basis import Basis
from lorq.factors import FACTOR_TYPES, LowRank, factor_bits
from lorq.grids import Codebook, levels
from lorq.kernels import fake_quantize, int8_linear, misfit, multiply, turn
from lorq.packing import pack, pack_columns, packed_width, unpack, unpack_columns
from lorq.scales import LowRankScale
from lorq.weight import LayerFormat, QuantizedWeight, Tile, permutation_dtype

# In the operator's order; "levels" are not stored, the format tells them.
OPERANDS = (
    "weight_packed", "weight_scale", "weight_zero_point", "levels", "scale_left", "scale_right", "codebook",
    "codebook_scale", "left", "right", "left_scale", "right_scale",
)  # fmt: skip
_STORED = (
    *(name for name in OPERANDS if name != "levels"), "weight_shape", "permutation", "input_scale", "input_zero_point",
)  # fmt: skip


def pack_weight(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a quantized weight as they are stored, by their local names (docs/format.md)."""
    tensors = {
        "weight_packed": pack(weight.codes, weight.format.code_bits),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.scale is not None:
        tensors["weight_scale"] = weight.scale.to(torch.float16)
    if weight.scale_factors is not None:
        tensors |= {"scale_left": weight.scale_factors.left, "scale_right": weight.scale_factors.right}
    if weight.zero_point is not None:
        tensors["weight_zero_point"] = pack_columns(weight.zero_point, weight.bits)
    if weight.codebook is not None:
        tensors |= {"codebook": weight.codebook.entries, "codebook_scale": weight.codebook.scale}
    if weight.basis is not None and weight.basis.permutation is not None:
        tensors["permutation"] = weight.basis.permutation.to(permutation_dtype(weight.shape[1]))
    if weight.low_rank is not None:
        parts = weight.low_rank
        tensors |= {"left": parts.left, "right": parts.right}
        if parts.left_scale is not None and parts.right_scale is not None:
            tensors |= {"left_scale": parts.left_scale, "right_scale": parts.right_scale}
    if weight.activations.scale is not None and weight.activations.zero_point is not None:
        tensors |= {"input_scale": weight.activations.scale, "input_zero_point": weight.activations.zero_point}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def stored_layout(
    out_features: int, in_features: int, format: LayerFormat
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that a layer of this format stores; the inverse is `pack_weight`."""
    groups, rank = in_features // format.group_size, format.rank
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight_packed": ((out_features, packed_width(in_features // format.vector, format.code_bits)), torch.int32),
        "weight_shape": ((2,), torch.int64),
    }
    if format.scale_rank:
        layout["scale_left"] = ((out_features, format.scale_rank), torch.float16)
        layout["scale_right"] = ((format.scale_rank, in_features), torch.float16)
    else:
        layout["weight_scale"] = ((out_features, groups), torch.float16)
    if not format.symmetric:
        layout["weight_zero_point"] = ((packed_width(out_features, format.bits), groups), torch.int32)
    if format.vector > 1:
        tiles = out_features // format.codebook_rows, in_features // format.codebook_columns
        layout["codebook"] = ((*tiles, 2**format.code_bits, format.vector), torch.int8)
        layout["codebook_scale"] = (tiles, torch.float16)
    if format.permuted:
        layout["permutation"] = ((in_features,), permutation_dtype(in_features))
    if rank:
        kind = FACTOR_TYPES[format.factor_type][0]
        layout |= {"left": ((out_features, rank), kind), "right": ((rank, in_features), kind)}
        if factor_bits(format.factor_type) == 8:
            layout |= {"left_scale": ((rank,), torch.float16), "right_scale": ((rank,), torch.float16)}
    if format.input_quantization == "tensor":
        layout |= {"input_scale": ((1,), torch.float32), "input_zero_point": ((1,), torch.int32)}
    return layout


def unpack_weight(tensors: Mapping[str, Tensor], format: LayerFormat) -> QuantizedWeight:
    """The quantized weight behind stored tensors, without its record; the inverse of `pack_weight`."""
    out_features, in_features = tensors["weight_shape"].tolist()
    zero, low_rank, codebook, basis = tensors.get("weight_zero_point"), None, None, None
    factors = LowRankScale(tensors["scale_left"], tensors["scale_right"]) if format.scale_rank else None
    if format.rank:
        low_rank = LowRank(tensors["left"], tensors["right"], tensors.get("left_scale"), tensors.get("right_scale"))
    if format.vector > 1:
        codebook = Codebook(tensors["codebook"], tensors["codebook_scale"])
    if format.has_basis:
        basis = Basis(tensors.get("permutation"), format.rotation_block, format.rotation_skip)
    return QuantizedWeight(
        codes=unpack(tensors["weight_packed"], format.code_bits, in_features // format.vector),
        scale=tensors.get("weight_scale"),
        zero_point=None if zero is None else unpack_columns(zero, format.bits, out_features),
        bits=format.bits,
        low_rank=low_rank,
        codebook=codebook,
        basis=basis,
        grid=format.grid,
        scale_factors=factors,
        activations=Activations(
            format.input_quantization, format.output_quantization, tensors.get("input_scale"),
            tensors.get("input_zero_point"),
        ),
    )  # fmt: skip


def one_memory(layers: Sequence["QuantLinear"], name: str) -> Tensor:
    """A stored tensor of each layer, one after the other in one memory, of which the layers keep their parts."""
    parts: list[Any] = [layer._buffers[name] for layer in layers]
    whole = torch.cat(parts)
    for layer, part in zip(layers, whole.split([len(part) for part in parts]), strict=True):
        layer._buffers[name] = part
    return whole


class SharedRotation:
    """Takes an input into the basis of the layers that share it, once for all of them.

    Keeps the last input's image until all layers that share the basis have taken it, at the longest while that
    input is alive and unchanged. In programs that lorq compiles equal calls become one (`lorq.joined.merge_calls`).
    """

    def __init__(self, layers: int = 1):
        self.layers = layers
        self._forget()

    def _forget(self) -> None:
        self._seen: tuple[weakref.ref[Tensor], int, bool, bool] | None = None
        self._image: Tensor | None = None
        self._left = 0

    def __call__(self, x: Tensor, permutation: Tensor | None, format: LayerFormat) -> Tensor:
        def image() -> Tensor:
            return turn(x, permutation, format.rotation_block, format.rotation_skip)

        # Inference tensors do not count their changes.
        if self.layers == 1 or torch.compiler.is_compiling() or x.is_inference():
            return image()
        seen, kept = self._seen, self._image
        state = x._version, x.requires_grad, torch.is_grad_enabled()
        if kept is None or seen is None or seen[0]() is not x or seen[1:] != state:
            kept = self._image = image()
            # Not every sharer need read this input (o_proj beside q, k, v): with it the image goes too.
            me = weakref.proxy(self)
            self._seen, self._left = (weakref.ref(x, lambda _: me._forget()), *state), self.layers
        self._left -= 1
        if self._left == 0:
            self._forget()
        return kept

    def __deepcopy__(self, memo: dict[int, object]) -> "SharedRotation":
        # Layers that are copied together go on sharing; what is remembered stays behind.
        return SharedRotation(self.layers)

    def __reduce__(self) -> tuple[type["SharedRotation"], tuple[int]]:
        return SharedRotation, (self.layers,)


def share_rotations(model: nn.Module) -> None:
    """Let layers of one parent that have the same basis take their common input into it once."""
    for parent in model.modules():
        groups: dict[bytes, list[QuantLinear]] = {}
        for layer in parent.children():
            if isinstance(layer, QuantLinear) and layer.format.has_basis and not layer.weight_packed.is_meta:
                f, order = layer.format, layer.permutation
                key = f"{layer.in_features} {f.rotation_block} {f.rotation_skip} {layer.weight_packed.device} ".encode()
                key += b"" if order is None else order.cpu().numpy().tobytes()
                groups.setdefault(key, []).append(layer)
        for layers in groups.values():
            shared = SharedRotation(len(layers))
            for layer in layers:
                layer.rotation = shared


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
        layout = stored_layout(out_features, in_features, format)
        for name in _STORED:
            tensor = torch.zeros(layout[name][0], dtype=layout[name][1], device=device) if name in layout else None
            self.register_buffer(name, tensor)
        parameter = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", parameter)
        self.rotation = SharedRotation()
        # What learns which layers share an input, and then the product of those and this one's place (`lorq.joined`).
        self.siblings: Any = None
        self.learned = True
        self.joined: tuple[Any, int] | None = None
        self.merged = False  # whether what compiles this layer leaves one of several equal calls
        # Factors that an expert shares with others, and its number; `lorq.tiled.QuantExperts` runs them. In a
        # tuple, so that they are no child of every expert.
        self.shared: tuple[Any, int] | None = None

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> "QuantLinear":
        """Wrap a solved weight."""
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, weight.format, bias=bias is not None)
        layer.load_state_dict(pack_weight(weight) | ({} if bias is None else {"bias": bias}))
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if not self.learned and not torch.compiler.is_compiling():
            self.siblings.learn(self, x)
        y = None if self.joined is None else self.joined[0].product(self, x, self.joined[1])
        return self._finish(self._product(self.into_basis(x)) if y is None else y)

    def _unjoin(self) -> None:
        if self.joined is not None:
            self.joined[0].dissolve()
        self.learned = self.siblings is None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in OPERANDS and self.__dict__.get("joined") is not None:
            self.joined[0].refresh()  # type: ignore[index]

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if self.joined is not None:
            self.joined[0].refresh()

    def __getstate__(self) -> dict[str, Any]:
        # A copy is not of the same memory.
        return self.__dict__ | {"joined": None, "learned": self.siblings is None}

    def _replicate_for_data_parallel(self) -> "QuantLinear":
        replica: QuantLinear = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.joined, replica.siblings, replica.learned = None, None, True
        return replica

    def into_basis(self, x: Tensor) -> Tensor:
        """``x T``: the input as the stored weight needs it; ``x`` itself where there is no basis."""
        return self.rotation(x, self.permutation, self.format) if self.format.has_basis else x

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
            if not learns and misfit(self.format, self.in_features, z.device, z.dtype) is None:
                codes = self.weight_packed, self.weight_scale, self.weight_zero_point
                return int8_linear(z, *codes, *grid, self.format.bits)
            z = fake_quantize(z, *grid)
        return multiply(z, *self._operands(), self.format.bits)

    def _operands(self) -> list[Tensor | None]:
        # From torch's own dicts: a module's __getattr__, twelve times, takes as long as a small product.
        tensors = {**self._buffers, **self._parameters, "levels": self.levels}
        return [tensors[name] for name in OPERANDS]

    @property
    def levels(self) -> Tensor | None:
        """What codes stand for where that is not whole numbers, on the layer's device."""
        f = self.format
        return None if f.grid == "integer" else levels(f.grid, f.bits, self.weight_packed.device)

    def value(self) -> QuantizedWeight:
        """What is stored, an expert's part of shared factors included, as a value without its record."""
        weight = unpack_weight(self.stored(), self.format)
        if self.shared is None:
            return weight
        tiles, expert = self.shared
        return replace(weight, tile=Tile(tiles.factors(), expert))

    @property
    def weight(self) -> Tensor:
        """The dense weight, (out, in), decoded anew at every look: for reading, writing to it changes nothing."""
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        return self.value().dense().to(dtype)

    def stored(self) -> dict[str, Tensor]:
        """The stored tensors that this layer has, by local name."""
        return {name: tensor for name in _STORED if (tensor := getattr(self, name)) is not None}

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

        self._unjoin()
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
            f"group_size={f.group_size}, rank={f.rank}, vector={f.vector}, rotation={f.rotation_block}, "
            f"grid={f.grid}, scale_rank={f.scale_rank}, input={f.input_quantization}, "
            f"bias={self.bias is not None}"
        )
