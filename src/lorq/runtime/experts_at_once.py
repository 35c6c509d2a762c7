"""Tokens through packed experts with shared factors, all experts of a projection in one product."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from lorq.core.tile_factors import TileFactors, TileFormat
from lorq.core.weight import LayerFormat
from lorq.kernels import KERNELS, declines_experts, expert_linear, is_transformed, turn
from lorq.kernels.derived import Derived
from lorq.models.experts import Expert, Experts
from lorq.runtime.linear import QuantLinear, parts_of

PROJECTIONS = "gate_proj", "up_proj", "down_proj"  # those of experts without a gate are the last two
_STACKED = "weight_packed", "weight_scale", "weight_zero_point", "codebook", "codebook_scale", "permutation"


@torch.inference_mode(False)  # kept: made while measuring, it must serve training too
def _stack(own: Sequence[Any], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors of all experts, of one after the other, by local name, experts first."""
    return {local: torch.stack(list(own[place :: len(names)])) for place, local in enumerate(names)}


@torch.inference_mode(False)
def _share(layers: Sequence[QuantLinear], stacks: dict[str, Tensor]) -> list[Tensor]:
    """Let the layers have the memory of their stacks; their tensors."""
    for local, stack in stacks.items():
        for layer, part in zip(layers, parts_of(stack.flatten(0, 1), [stack.shape[1]] * len(stack)), strict=True):
            layer._buffers[local] = part
    return _tensors(layers, stacks)


def _tensors(layers: Sequence[QuantLinear], names: Iterable[str]) -> list[Any]:
    buffers = [layer._buffers for layer in layers]
    return [own[local] for own in buffers for local in names]


_STACKS = Derived(_stack, copies=False)


def _stacked(layers: Sequence[QuantLinear]) -> dict[str, Tensor]:
    """A projection's stored tensors of all experts."""
    names = tuple(local for local in _STACKED if layers[0]._buffers[local] is not None)
    return _STACKS.of(_tensors(layers, names), names, replace=partial(_share, layers))


def declines_stored(
    path: str, formats: Mapping[str, LayerFormat], tiled: Mapping[str, TileFormat], stored: Collection[str]
) -> str | None:
    """`declines_at_once`, as far as a folder tells it.

    Args:
        path: of the experts.
        formats: of all layers, by name.
        tiled: of the experts' shared factors, by projection.
        stored: names of all tensors.
    """
    ungated = not any(layer.startswith(f"{path}.") and layer.endswith(".gate_proj") for layer in formats)
    for name in PROJECTIONS[ungated:]:
        if name in tiled and tiled[name].input_scale:
            return f"{name} has input scales for each expert"
        own = [layer for layer in formats if layer.startswith(f"{path}.") and layer.endswith(f".{name}")]
        if name not in tiled and (not own or (name != "down_proj" and formats[own[0]].permuted)):
            return f"{name} has no shared factors"
        if len({formats[layer] for layer in own}) > 1:
            return f"{name} has experts of several formats"
        if any(f"{layer}.bias" in stored for layer in own):
            return f"{name} has biases"
    return None


def layers_of(experts: Experts) -> dict[str, list[Any]]:
    """The layers of all experts by projection, from torch's own dicts: a module's __getattr__, some hundred times,
    takes longer than what a token asks of its experts."""
    own = [module._modules for module in experts._modules.values() if isinstance(module, Expert)]
    return {name: [layers[name] for layers in own] for name in PROJECTIONS if name in own[0]}


def declines_at_once(
    layers: Mapping[str, Sequence[Any]], tiled: Collection[str], x: Tensor, weights: Tensor
) -> str | None:
    """Why experts do not run as `run_grouped` has it; None where they do. Nothing is read from the device.

    Args:
        layers: of all experts, by projection.
        tiled: projections whose experts share factors, and so a basis.
        x: inputs of the experts.
        weights: the router's.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
        return "inputs need gradients"
    for name in layers:
        first = layers[name][0]
        # Without shared factors experts may be of any kind, and read their common input each in an order of its own.
        alike = all(isinstance(layer, QuantLinear) for layer in layers[name])
        if not alike or (name not in tiled and name != "down_proj" and first.format.permuted):
            return f"{name} has {'layers that are not packed' if name in tiled else 'no shared factors'}"
        why = declines_experts(first.format, first.in_features, x.device, x.dtype, weights.numel() / len(layers[name]))
        if why is not None:
            return why
        if any(layer.format is not first.format and layer.format != first.format for layer in layers[name]):
            return f"{name} has experts of several formats"
        if any(layer._parameters["bias"] is not None for layer in layers[name]):
            return f"{name} has biases"
    return None


def run_grouped(
    layers: Mapping[str, Sequence[QuantLinear]],
    tiles: Mapping[str, TileFactors],
    between: Callable[..., Tensor],
    x: Float[Tensor, "tokens in"],
    index: Int[Tensor, "tokens k"],
    weights: Float[Tensor, "tokens k"],
) -> Float[Tensor, "tokens in"]:
    """Sum of the chosen experts' outputs, each times its router weight: what `QuantExperts` computes.

    The formulas are those of that class. A projection's packed weights take one launch for all pairs of a token and an
    expert. Nothing waits for the device, and sums have one order, so that the same inputs give the same bits.

    Args:
        layers: of all experts, by projection.
        tiles: their shared factors; none to leave the low-rank part away.
        between: what happens between the projections.
        x: inputs.
        index: the experts of each token; numbers past the last one stand for none.
        weights: the router's.
    """
    (tokens, places), down = index.shape, tiles.get("down_proj")
    known = index < len(layers["down_proj"])
    expert, cell = index.flatten(), torch.where(known, index, 0).flatten()
    own = {name: _stacked(layers[name]) for name in layers}
    projected = [
        _product(layers[name][0], own[name], layers[name][0].into_basis(x), expert, tiles.get(name))
        for name in layers
        if name != "down_proj"
    ]
    last = layers["down_proj"][0]
    h = _own_basis(last, own["down_proj"], between(*projected), cell)
    weight = torch.where(known, weights, 0).unsqueeze(-1)
    # Where kernels add the factors, an expert's own part costs no more than the sum of its column's.
    inside = _run_experts(h) is not None
    answers = _product(last, own["down_proj"], h, expert, down if inside else None).unflatten(0, (tokens, places))
    out = (answers * weight).sum(1).to(x.dtype)
    return out if down is None or inside else out + _shared_down(down, h, cell, weight, x.dtype)


def _run_experts(x: Tensor) -> Callable[..., Tensor | None] | None:
    kernels = None if is_transformed() else KERNELS.get(x.device.type)
    return None if kernels is None else kernels.run_experts


def _own_basis(first: QuantLinear, own: dict[str, Tensor], h: Tensor, expert: Tensor) -> Tensor:
    """Each pair's input in the basis of its expert: those differ in the order of the channels alone."""
    f = first.format
    if f.permuted:
        h = h.gather(1, own["permutation"][expert].long())
    return turn(h, None, f.rotation_block, f.rotation_skip) if f.rotation_block else h


def _product(first: QuantLinear, own: dict[str, Tensor], z: Tensor, expert: Tensor, t: TileFactors | None) -> Tensor:
    """A projection of every pair, shared factors included, given its tensors and one of its layers."""
    packed, scale, zero, book, book_scale = stored = [own.get(name) for name in _STACKED[:5]]
    run = _run_experts(z)
    if run is not None:
        shared = None if t is None else (t.left, t.right, t.left_scale, t.right_scale, t.cells)
        y = run(z, expert, stored, first.levels, shared, first.format.bits)
        if y is not None:
            return y
    factors: list[Tensor | None] = [None] * 4
    if t is not None:
        rights = t.rights(z.dtype)
        projected = (z @ rights.flatten(0, 1).T).unflatten(1, rights.shape[:2])
        factors = [t.left, t.left_scale, t.cells, projected]
    return expert_linear(z, expert, packed, scale, zero, first.levels, book, book_scale, *factors, first.format.bits)


def _shared_down(t: TileFactors, h: Tensor, cell: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """a_j = sum over e in column j of g_e right_i h_e, then all left factors: what a token's experts add together.

    With all right factors first: one product, and no order of experts.
    """
    tokens, places, _ = weight.shape
    row, column = t.cells.long()[cell].T
    all_rows = (h @ t.rights(h.dtype).flatten(0, 1).T).unflatten(1, (-1, t.rank))
    projected = all_rows[torch.arange(len(h), device=h.device), row].unflatten(0, (tokens, places)) * weight
    lefts = t.lefts(dtype)
    member = functional.one_hot(column, len(lefts)).to(projected.dtype).unflatten(0, (tokens, places))
    sums = (member.mT @ projected).to(dtype)  # (tokens, columns, rank)
    return sums.flatten(1) @ lefts.transpose(1, 2).flatten(0, 1)
