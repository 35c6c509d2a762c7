"""Layers that read one input, such as q, k and v: rotated once, and few tokens in one product (docs/kernels.md).

The first layer that is called multiplies for all of them, and the others take their rows of the result: one token's
product with a small layer takes little longer than its call, or its launch on a device.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from lorq.core.codes import IntGrid, TrellisGrid
from lorq.core.codes.trellis import TILE
from lorq.core.weight import LayerFormat
from lorq.kernels import OPERATORS, few_tokens, multiply, turn
from lorq.kernels.derived import Derived
from lorq.kernels.operands import DTYPES, code_sizes
from lorq.models.experts import Expert
from lorq.runtime.linear import QuantLinear, parts_of

# Zeros of joined factors that are not worth a call: as a share of all that is stored, in layers of many weights.
_WASTE, _MANY_WEIGHTS = 0.02, 1 << 21


class _Once:
    """What is made of an input once for several layers, each of which takes it once; for each thread its own.

    Kept until all have taken it, at the longest while the input is alive and unchanged.
    """

    def __init__(self, count: int):
        self._count = count
        # By thread: the input, its state, what was made, and who has taken it.
        self._kept: dict[int, tuple[weakref.ref[Tensor], tuple[Any, ...], Any, tuple[int, ...]]] = {}

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        # Pairs would be made while the table is read, and what they set off may come here again and change it.
        for thread in list(self._kept):
            kept = self._kept.get(thread)
            if kept is not None and kept[0] is gone:
                self._kept.pop(thread, None)

    def take(self, place: int, x: Tensor, make: Callable[[], Any]) -> Any:
        """For the layer at a place; made where it is not kept, or that layer has taken it already."""
        thread = get_ident()
        kept = self._kept.get(thread)
        state = x._version, x.requires_grad, torch.is_grad_enabled()
        if kept is None or kept[0]() is not x or kept[1] != state or place in kept[3]:
            kept = weakref.ref(x, self._forget), state, make(), ()
        input, _, made, takers = kept
        takers = *takers, place
        if len(takers) == self._count:
            self._kept.pop(thread, None)
        else:
            self._kept[thread] = input, state, made, takers
        return made


class Together:
    """Layers of one input and one basis, each called with its place among the ``count``.

    Args:
        joins: few tokens are multiplied by all of them at once.

    Attributes:
        layers: references to them; those of a copy are known after its first calls.
        program: the operator's tensors of all layers as of one, and the permutation, where compiled programs look:
            empty until `refresh`, None without such programs.
    """

    def __init__(self, count: int, joins: bool):
        self.count, self.joins = count, joins
        self.layers: list[Callable[[], QuantLinear | None]] = [lambda: None] * count
        self.program: list[Tensor | None] | None = None
        self._few: dict[torch.dtype, int] = {}
        self._images, self._parts = _Once(count), _Once(count)
        self._orders = Derived(lambda orders: torch.equal(*orders), copies=True)
        self._joined = Derived(partial(_join, self.layers), copies=True)  # `left` is copied

    def __reduce__(self) -> tuple[type["Together"], tuple[int, bool]]:
        return Together, (self.count, self.joins)

    def image(self, layer: QuantLinear, place: int, x: Tensor) -> Tensor:
        """The input in the layers' basis."""
        # In programs that lorq compiles equal calls become one (`lorq.runtime.compiled.merge_calls`). Inference tensors
        # do not count their changes.
        if torch.compiler.is_compiling() or x.is_inference():
            return layer.turn(x)
        order, image = self._images.take(place, x, lambda: (layer.permutation, layer.turn(x)))
        return image if self._alike(order, layer.permutation) else layer.turn(x)

    def _alike(self, one: Tensor | None, other: Tensor | None) -> bool:
        return one is other or (one is not None and other is not None and self._orders.of([one, other]))

    def product(self, layer: QuantLinear, place: int, x: Tensor) -> Tensor | None:
        """The layer's part of the product with ``x``; None where it is to multiply by itself."""
        if not self.joins:
            return None
        if torch.compiler.is_compiling():
            # Every layer has the product to itself; `merge_calls` leaves one of them.
            if not self.program or x.numel() > self._few.get(x.dtype, 0) * x.shape[-1]:
                return None
            return _parts(x, self.program, self._rows, layer.format)[place]
        if x.is_inference():
            return None
        known = self.layers[place]()
        if known is None:
            self.layers[place] = weakref.ref(layer)
        elif known is not layer:  # a replica
            return None
        parts = self._parts.take(place, x, lambda: self._made(x, layer.format.codes.operator))
        if parts is None or parts[1][place] != _seen(layer):
            return None
        part: Tensor = parts[0][place]
        return part

    def _made(self, x: Tensor, operator: str | None) -> tuple[list[Tensor], list[Any]] | None:
        """The layers' parts of the product with ``x``, and the tensors that they had."""
        # Nothing that learns is joined.
        few = few_tokens(x.device, x.dtype, operator)
        if x.numel() > few * x.shape[-1] or (x.requires_grad and torch.is_grad_enabled()):
            return None
        layers: list[Any] = [known() for known in self.layers]
        joined = self._as_one(layers)
        if joined is None:
            return None
        return _parts(x, *joined, layers[0].format), list(map(_seen, layers))

    def _as_one(self, layers: Sequence[Any]) -> "_One | None":
        """What the layers hold as of one; None where one is not known, or they do not fit."""
        if None in layers:
            return None
        return self._joined.of(_stored(layers), replace=partial(_share, layers))

    def refresh(self) -> None:
        """Show compiled programs what the layers hold now."""
        if self.program is not None and self.joins:
            layers: list[Any] = [known() for known in self.layers]
            operands, self._rows = self._as_one(layers) or ([], [])
            self.program[:] = operands
            if operands and operands[0] is not None:
                operator = layers[0].format.codes.operator
                self._few = {dtype: few_tokens(operands[0].device, dtype, operator) for dtype in DTYPES}


# The operator's tensors of several layers as of one, and the permutation; and the rows of each layer.
_One = tuple[list[Tensor | None], list[int]]


def _parts(x: Tensor, operands: Sequence[Tensor | None], rows: list[int], format: LayerFormat) -> list[Tensor]:
    """Each layer's part of the product with ``x``."""
    *stored, permutation = operands
    z = turn(x, permutation, format.rotation_block, format.rotation_skip) if format.has_basis else x
    operator = format.codes.operator or ""
    y = multiply(z, *stored, *OPERATORS[operator].settings(format.codes), operator=operator)
    # Not views of one tensor: what a layer returns may be written to.
    return [part.contiguous() for part in torch.unsafe_split_with_sizes(y, rows, -1)]


def _names(layers: Sequence[QuantLinear]) -> tuple[str, ...]:
    """Of the tensors that the operator of some layers takes."""
    return OPERATORS[layers[0].format.codes.operator or ""].tensors


def _stored(layers: Iterable[QuantLinear]) -> list[Tensor]:
    return [t for layer in layers for t in layer._buffers.values() if t is not None]


def _seen(layer: QuantLinear) -> tuple[int, ...]:
    """Which tensors a layer has."""
    return tuple(map(id, layer._buffers.values()))


@torch.inference_mode(False)  # kept: made while measuring, it must serve training too
def _join(known: Sequence[Callable[[], QuantLinear | None]], _: Sequence[Tensor | None]) -> _One | None:
    """Several layers as one.

    None where one learns, does not count its changes, or lies on another device, or orders of channels differ.
    """
    layers = [layer for own in known if (layer := own()) is not None]
    tensors = [layer.operands() for layer in layers]
    given = [tensor for own in tensors for tensor in own if tensor is not None]
    if any(isinstance(t, nn.Parameter) or t.is_inference() for t in given) or len({t.device for t in given}) > 1:
        return None
    first = layers[0].permutation
    if first is not None and not all(torch.equal(first, layer.permutation) for layer in layers):  # type: ignore[arg-type]
        return None
    joined: list[Tensor | None] = []
    for name, own in zip(_names(layers), zip(*tensors, strict=True), strict=True):
        parts = [tensor for tensor in own if tensor is not None]
        if name == "levels" or not parts:
            joined.append(own[0])
        else:
            joined.append(_side_by_side(layers) if name == "left" else torch.cat(parts))
    return [*joined, layers[0].permutation], [layer.out_features for layer in layers]


@torch.inference_mode(False)
def _share(layers: Sequence[QuantLinear], joined: _One | None) -> list[Tensor]:
    """Let the layers have the memory of what was joined; their tensors.

    Others take the place of those that were, which another thread may be multiplying with.
    """
    for name, whole in zip(_names(layers), [] if joined is None else joined[0], strict=False):
        if whole is not None and name not in ("levels", "left"):
            own = [layer._buffers for layer in layers if layer._buffers[name] is not None]
            for buffers, part in zip(own, parts_of(whole, [len(b[name]) for b in own]), strict=True):  # type: ignore[arg-type]
                buffers[name] = part
    return _stored(layers)


def _side_by_side(layers: Sequence[QuantLinear]) -> Tensor:
    """Left factors of all layers as of one, block by block."""
    example: Any = next(layer.left for layer in layers if layer.left is not None)
    parts = (example.new_zeros(layer.out_features, 0) if layer.left is None else layer.left for layer in layers)
    return torch.block_diag(*parts)


def fit(layers: Sequence[QuantLinear]) -> bool:
    """Whether layers of one input and basis can be one: their formats fit together, and joining costs little."""
    first = layers[0].format
    sizes = code_sizes(first.codes)
    if first.codes.operator is None or (sizes is not None and sizes.scale_rank):
        return False
    zero_points = isinstance(first.codes, IntGrid) and not first.codes.symmetric
    for layer in layers:
        f = layer.format
        if f.codes != first.codes or f.input_quantization != "none" or layer.shared is not None:
            return False
        if zero_points and layer is not layers[-1] and layer.out_features * f.bits % 32:
            return False  # zero points of two layers would meet in a word
        if isinstance(first.codes, TrellisGrid) and layer is not layers[-1] and layer.out_features % TILE:
            return False  # and rows in a tile
    ranked = [layer for layer in layers if layer.format.rank]
    if len({layer.format.factor_type for layer in ranked}) > 1:
        return False
    out, rank = sum(layer.out_features for layer in layers), sum(layer.format.rank for layer in ranked)
    weights = out * layers[0].in_features
    zeros = out * rank - sum(layer.out_features * layer.format.rank for layer in ranked)
    stored = sum(layer.format.stored_bits(layer.out_features, layer.in_features) for layer in layers) / 8
    return weights < _MANY_WEIGHTS or zeros <= _WASTE * stored


def _of_one_basis(layers: Iterable[QuantLinear]) -> list[list[QuantLinear]]:
    groups: dict[tuple[Any, ...], list[QuantLinear]] = {}
    for layer in layers:
        f, order = layer.format, layer.permutation
        places = b"" if order is None else order.cpu().numpy().tobytes()
        groups.setdefault((layer.in_features, f.rotation_block, f.rotation_skip, places), []).append(layer)
    return list(groups.values())


def join(model: nn.Module, inputs: Iterable[Sequence[str]]) -> None:
    """Let layers that read one input work together: those named, and the gate and up projection of every expert."""
    groups: list[list[Any]] = [[model.get_submodule(name) for name in names] for names in inputs]
    experts = [module for module in model.modules() if isinstance(module, Expert)]
    groups += [[module.gate_proj, module.up_proj] for module in experts if hasattr(module, "gate_proj")]
    for group in groups:
        # What is loaded for one call at a time stays by itself.
        if any(not isinstance(layer, QuantLinear) or layer.weight_shape.is_meta for layer in group):
            continue
        for layers in _of_one_basis(group):
            together = Together(len(layers), fit(layers))
            if len(layers) > 1 and (together.joins or layers[0].format.has_basis):
                for place, layer in enumerate(layers):
                    together.layers[place], layer.together = weakref.ref(layer), (together, place)
