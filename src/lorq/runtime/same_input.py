"""Layers that read one input, such as q, k and v, in one product.

What: the first layer that is called multiplies for all of them, and the others take their rows of the result. Their
tensors lie one after the other in one memory, of which each layer keeps its part.

Why: one token's product with a small layer takes little longer than its call, or its launch on a device.

What is given up: low-rank factors of several layers stand side by side, ``left`` with zeros where another layer's rows
meet a layer's own columns; layers where those would cost more than calls do run by themselves, and so do many tokens.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lorq.core.weight import LayerFormat
from lorq.kernels import few_tokens, multiply
from lorq.kernels.operands import DTYPES, STORED_NAMES
from lorq.runtime.linear import QuantLinear, one_memory
from lorq.runtime.rotation import SharedRotation

# One layer's after another's; and low-rank factors, side by side.
_ROWS = "weight_packed", "weight_scale", "weight_zero_point", "codebook", "codebook_scale"
_FACTORS = "left", "right", "left_scale", "right_scale"
# Zeros of joined factors that are not worth a call: as a share of all that is stored, in layers of many weights.
_WASTE, _MANY_WEIGHTS = 0.02, 1 << 21
_MOST_JOINS = 4  # of the same layers: tensors that are others in every pass (offloaded ones) are left alone


class Siblings:
    """The quantized layers of one parent. Which of them share an input is learned from the calls of a pass."""

    def __init__(self) -> None:
        self._run: list[weakref.ref[QuantLinear]] = []
        self._input: tuple[weakref.ref[Tensor], int] | None = None

    def learn(self, layer: QuantLinear, x: Tensor) -> None:
        """Note a call. Layers that were called with one input after another are joined once the next input comes."""
        seen, version = self._input, -1 if x.is_inference() else x._version
        run = [other for ref in self._run if (other := ref()) is not None]
        if seen is None or seen[0]() is not x or seen[1] != version or any(layer is other for other in run):
            for other in run:
                other.learned = True
            if len(run) > 1 and fit(run):
                Joined(run)
            self._run, self._input = [], (weakref.ref(x), version)
        if not layer.learned:
            self._run.append(weakref.ref(layer))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Siblings":
        return memo.setdefault(id(self), Siblings())  # type: ignore[no-any-return]  # copies learn for themselves

    def __reduce__(self) -> tuple[type["Siblings"], tuple[()]]:
        return Siblings, ()


class Joined:
    """Some layers as one, and the last product until all of them have taken their part."""

    def __init__(self, layers: list[QuantLinear]):
        self._layers = [weakref.ref(layer) for layer in layers]  # which hold this
        self._rows = [layer.out_features for layer in layers]
        self._kept: tuple[Any, ...] | None = None
        self._own: list[tuple[Tensor | None, int]] = []
        self._operands: list[Tensor | None] = [None] * len(STORED_NAMES)
        self._many: dict[torch.dtype, int] = {}
        self._joins = 0
        for place, layer in enumerate(layers):
            layer.joined = self, place
        self.refresh()

    def product(self, layer: QuantLinear, x: Tensor, place: int) -> Tensor | None:
        """The part of one layer, by its place, of the product with ``x``; None where it is to multiply by itself."""
        if x.numel() // max(1, x.shape[-1]) >= self._many.get(x.dtype, 0):
            return None
        if torch.compiler.is_compiling():
            # Every layer has the product to itself; `MergeCalls` leaves one of them.
            return self._multiply(layer, x)[place] if layer.merged else None
        # Inference tensors do not count their changes. Nothing that learns is joined.
        if x.is_inference() or (torch.is_grad_enabled() and x.requires_grad):
            return None
        kept = self._kept
        if kept is None or kept[0]() is not x or kept[1] != x._version or place in kept[3]:
            own = self._own
            if not self.refresh():
                return None
            self._joins += self._own is not own
            if self._joins > _MOST_JOINS:
                self.dissolve()
                return None
            me = weakref.proxy(self)
            kept = weakref.ref(x, lambda _: me._forget()), x._version, self._multiply(layer, x), ()
        taken = (*kept[3], place)
        self._kept = None if len(taken) == len(self._rows) else (*kept[:3], taken)
        y: Tensor = kept[2][place]
        return y

    def _forget(self) -> None:
        self._kept = None

    def _multiply(self, layer: QuantLinear, x: Tensor) -> list[Tensor]:
        y = multiply(layer.into_basis(x), *self._operands, layer.format.bits)
        # Not views of one tensor: what a layer returns may be written to.
        return [part.contiguous() for part in torch.ops.aten.unsafe_split_with_sizes(y, self._rows, -1)]

    def refresh(self) -> bool:
        """Join what the layers hold now, unless that is done; False, and no longer joined, where it does not fit."""
        layers = [layer for ref in self._layers if (layer := ref()) is not None]
        own = [(layer._buffers.get(name), _version(layer, name)) for layer in layers for name in (*_ROWS, *_FACTORS)]
        if len(own) == len(self._own) and all(a is b and n == m for (a, n), (b, m) in zip(own, self._own, strict=True)):
            return True
        if len(layers) < len(self._rows) or not fit(layers):
            self.dissolve()
            return False
        with torch.inference_mode(False):  # kept: made while measuring, it must serve training too
            self._operands[:] = _join(layers)  # in place: where compiled programs look
        self._own = [(layer._buffers[name], _version(layer, name)) for layer in layers for name in (*_ROWS, *_FACTORS)]
        device = layers[0].weight_packed.device
        self._many = {dtype: few_tokens(device, dtype) + 1 for dtype in DTYPES}
        self._kept = None
        return True

    def dissolve(self) -> None:
        """From now on the layers are by themselves; programs that were compiled otherwise fail."""
        self._kept = None
        self._operands[:] = [None] * len(STORED_NAMES)
        for ref in self._layers:
            layer = ref()
            if layer is not None:
                layer.joined = None


def _version(layer: QuantLinear, name: str) -> int:
    """Changes of a tensor that is copied where layers are joined; the others are shared."""
    tensor = layer._buffers.get(name)
    return -1 if name != "left" or tensor is None or tensor.is_inference() else tensor._version


def _join(layers: list[QuantLinear]) -> list[Tensor | None]:
    """The operator's tensors of all layers as of one, whose memory the layers share from then on."""
    tensors: dict[str, Tensor | None] = dict.fromkeys(STORED_NAMES) | {"levels": layers[0].levels}
    for name in _ROWS:
        if layers[0]._buffers[name] is not None:
            tensors[name] = one_memory(layers, name)
    ranked = [layer for layer in layers if layer.format.rank]
    if ranked:
        tensors |= _side_by_side(layers, ranked)
    return [tensors[name] for name in STORED_NAMES]


def _side_by_side(layers: list[QuantLinear], ranked: list[QuantLinear]) -> dict[str, Tensor]:
    """Low-rank factors of all layers as of one, block by block."""
    names = [name for name in _FACTORS[1:] if getattr(ranked[0], name) is not None]
    tensors = {name: one_memory(ranked, name) for name in names}
    example: Any = ranked[0].left
    left = example.new_zeros(sum(layer.out_features for layer in layers), sum(layer.format.rank for layer in ranked))
    row = column = 0
    for layer in layers:
        if layer.format.rank:
            left[row : row + layer.out_features, column : column + layer.format.rank] = layer.left
        row, column = row + layer.out_features, column + layer.format.rank
    return tensors | {"left": left}


def fit(layers: list[QuantLinear]) -> bool:
    """Whether layers can be one: what is stored of them fits together, and joining costs little."""
    first = layers[0].format

    def kind(f: LayerFormat) -> tuple[Any, ...]:
        return (f.bits, f.group_size, f.symmetric, f.vector, f.codebook_rows, f.codebook_columns, f.grid, f.has_basis)

    for layer in layers:
        f = layer.format
        if layer.in_features != layers[0].in_features or kind(f) != kind(first):
            return False
        if f.scale_rank or f.input_quantization != "none" or layer.shared is not None:
            return False
        if not f.symmetric and layer is not layers[-1] and layer.out_features * f.bits % 32:
            return False  # zero points of two layers would meet in a word
        if f.has_basis and layer.rotation is not layers[0].rotation:
            return False
    ranked = [layer for layer in layers if layer.format.rank]
    if len({layer.format.factor_type for layer in ranked}) > 1:
        return False
    names = [(layer, name) for layer in layers for name in (*_ROWS, *_FACTORS)]
    if any(name not in layer._buffers for layer, name in names):
        return False  # a parameter, which learns
    if len({tensor.device for layer, name in names if (tensor := layer._buffers[name]) is not None}) > 1:
        return False
    out, rank = sum(layer.out_features for layer in layers), sum(layer.format.rank for layer in ranked)
    weights = out * layers[0].in_features
    zeros = out * rank - sum(layer.out_features * layer.format.rank for layer in ranked)
    stored = sum(layer.format.stored_bits(layer.out_features, layer.in_features) for layer in layers) / 8
    return weights < _MANY_WEIGHTS or zeros <= _WASTE * stored


def join_layers(model: nn.Module) -> None:
    """Let layers of one parent that turn out to share an input multiply together."""
    for parent in model.modules():
        layers = [layer for layer in parent.children() if isinstance(layer, QuantLinear)]
        if len(layers) > 1 and not any(layer.weight_packed.is_meta for layer in layers):
            siblings = Siblings()
            for layer in layers:
                layer.siblings, layer.learned = siblings, False


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
