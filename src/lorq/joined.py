"""Layers that read one input, such as q, k and v, in one product.

What: the first layer that is called multiplies for all of them, and the others take their rows of the result. Their
tensors lie one after the other in one memory, of which each layer keeps its part.

Why: one token's product with a small layer takes little longer than its call, or its launch on a device.

What is given up: low-rank factors of several layers stand side by side, ``left`` with zeros where another layer's rows
meet a layer's own columns; layers where those would cost more than calls do run by themselves, and so do many tokens.
"""

import operator
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lorq.kernels import few_tokens, multiply
from lorq.kernels.operands import DTYPES
from lorq.linear import OPERANDS, QuantLinear
from lorq.weight import LayerFormat

# One layer's after another's; and low-rank factors, side by side.
_ROWS = "weight_packed", "weight_scale", "weight_zero_point", "codebook", "codebook_scale"
_FACTORS = "left", "right", "left_scale", "right_scale"
# Zeros of joined factors that are not worth a call: as a share of all that is stored, in layers of many weights.
_WASTE, _MANY_WEIGHTS = 0.02, 1 << 21


class Siblings:
    """The quantized layers of one parent. Which of them share an input is learned from the calls of a pass."""

    def __init__(self) -> None:
        self._run: list[QuantLinear] = []
        self._input: weakref.ref[Tensor] | None = None

    def learn(self, layer: QuantLinear, x: Tensor) -> None:
        """Note a call. Layers that were called with one input after another are joined once the next input comes."""
        if self._input is None or self._input() is not x or any(layer is other for other in self._run):
            if len(self._run) > 1 and fit(self._run):
                joined = Joined(self._run)
                for place, other in enumerate(self._run):
                    other.joined = joined, place
            for other in self._run:
                other.learned = True
            self._run, self._input = [], weakref.ref(x)
        if not layer.learned:
            self._run.append(layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Siblings":
        return memo.setdefault(id(self), Siblings())  # type: ignore[no-any-return]  # copies learn for themselves

    def __reduce__(self) -> tuple[type["Siblings"], tuple[()]]:
        return Siblings, ()


class Joined:
    """Some layers as one, and the last product until all of them have taken their part."""

    def __init__(self, layers: list[QuantLinear]):
        self.layers = layers
        self._kept: tuple[Any, ...] | None = None
        self._own: list[Tensor | None] = []
        self._refresh()

    def product(self, x: Tensor, place: int) -> Tensor | None:
        """The part of one layer, by its place, of the product with ``x``; None where it is to multiply by itself."""
        traced = torch.compiler.is_compiling()  # what is compiled has run before, and is told to stay as it is
        if not traced and place == 0:
            self._refresh()
        # Inference tensors do not count their changes. Nothing that learns is joined.
        if not traced and (x.is_inference() or (torch.is_grad_enabled() and x.requires_grad)):
            return None
        if x.numel() // x.shape[-1] >= self._many.get(x.dtype, 0):
            return None
        kept, version = self._kept, 0 if traced else x._version
        if kept is None or (kept[0] if traced else kept[0]()) is not x or kept[1] != version or place in kept[3]:
            me = None if traced else weakref.proxy(self)
            seen = x if me is None else weakref.ref(x, lambda _: me._forget())
            kept = seen, version, self._multiply(x), ()
        taken = (*kept[3], place)
        self._kept = None if len(taken) == len(self.layers) else (*kept[:3], taken)
        y: Tensor = kept[2][place]
        return y

    def _forget(self) -> None:
        self._kept = None

    def _multiply(self, x: Tensor) -> tuple[Tensor, ...]:
        first = self.layers[0]
        y = multiply(first.into_basis(x), *self._operands, first.format.bits)
        return y.split([layer.out_features for layer in self.layers], -1)

    def _refresh(self) -> None:
        """Join what the layers hold, unless that is done: their tensors may be others than they were."""
        own = [layer._buffers[name] for layer in self.layers for name in (*_ROWS, *_FACTORS)]
        if self._own and all(map(operator.is_, own, self._own)):
            return
        with torch.inference_mode(False):  # kept: made while measuring, it must serve training too
            self._operands = self._join()
        self._own = [layer._buffers[name] for layer in self.layers for name in (*_ROWS, *_FACTORS)]
        device = self.layers[0].weight_packed.device
        self._many = {dtype: few_tokens(device, dtype) + 1 for dtype in DTYPES}

    def _join(self) -> list[Tensor | None]:
        tensors: dict[str, Tensor | None] = dict.fromkeys(OPERANDS) | {"levels": self.layers[0].levels}
        for name in _ROWS:
            if self.layers[0]._buffers[name] is not None:
                tensors[name] = _one_memory(self.layers, name)
        ranked = [layer for layer in self.layers if layer.format.rank]
        if ranked:
            tensors |= _side_by_side(self.layers, ranked)
        return [tensors[name] for name in OPERANDS]


def _one_memory(layers: list[QuantLinear], name: str) -> Tensor:
    """A tensor of each layer one after the other, of which the layers keep their parts."""
    parts = [getattr(layer, name) for layer in layers]
    whole = torch.cat(parts)
    for layer, part in zip(layers, whole.split([len(part) for part in parts]), strict=True):
        setattr(layer, name, part)
    return whole


def _side_by_side(layers: list[QuantLinear], ranked: list[QuantLinear]) -> dict[str, Tensor]:
    """Low-rank factors of all layers as of one, block by block."""
    names = [name for name in _FACTORS[1:] if getattr(ranked[0], name) is not None]
    tensors = {name: _one_memory(ranked, name) for name in names}
    example: Any = ranked[0].left
    rank = sum(layer.format.rank for layer in ranked)
    left = example.new_zeros(sum(layer.out_features for layer in layers), rank)
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
