"""Tokens through packed experts with shared factors, all experts of a projection in one product."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from lorq.experts import Experts
from lorq.kernels import expert_linear, rotate, why_not_experts
from lorq.linear import QuantLinear
from lorq.tiles import TileFactors

PROJECTIONS = "gate_proj", "up_proj", "down_proj"
_STACKED = "weight_packed", "weight_scale", "weight_zero_point", "codebook", "codebook_scale", "permutation"


class Stacks:
    """The experts' stored tensors by projection, each kind in one memory, of which every layer keeps its part.

    Made at the first need and again when layers or their tensors are others, as after a move to another device.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[list[Tensor], dict[str, Tensor]]] = {}

    @torch.inference_mode(False)  # kept: made while measuring, it must serve training too
    def of(self, name: str, layers: Sequence[QuantLinear]) -> dict[str, Tensor]:
        """A projection's tensors of all experts, by local name, experts first."""
        seen, tensors = self._kept.get(name, ([], {}))
        # A layer's codes stand for all that it stores.
        if len(seen) != len(layers) or any(a.weight_packed is not b for a, b in zip(layers, seen, strict=True)):
            tensors = {}
            for local in _STACKED:
                if getattr(layers[0], local) is not None:
                    tensors[local] = torch.stack([getattr(layer, local) for layer in layers])
                    for layer, own in zip(layers, tensors[local].unbind(), strict=True):
                        setattr(layer, local, own)
            self._kept[name] = [layer.weight_packed for layer in layers], tensors
        return tensors


def why_not_grouped(experts: Experts, tiles: Mapping[str, TileFactors], x: Tensor, weights: Tensor) -> str | None:
    """Why experts do not run as `run_grouped` has it; None where they do. Nothing is read from the device.

    Args:
        experts: each with a layer for every projection.
        tiles: the shared factors, by projection.
        x: inputs of the experts.
        weights: the router's.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
        return "inputs need gradients"
    for name in PROJECTIONS:
        if name not in tiles:
            return f"{name} has no shared factors"
        first = getattr(experts[0], name)
        why = why_not_experts(first.format, first.in_features, x.device, x.dtype)
        if why is not None:
            return why
        layers = [getattr(expert, name) for expert in experts]
        if any(layer.format is not first.format and layer.format != first.format for layer in layers):
            return f"{name} has experts of several formats"
        if any(layer.bias is not None for layer in layers):
            return f"{name} has biases"
    return None


def run_grouped(
    stacks: Stacks,
    experts: Experts,
    tiles: Mapping[str, TileFactors],
    gated: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "tokens in"],
    index: Int[Tensor, "tokens k"],
    weights: Float[Tensor, "tokens k"],
) -> Float[Tensor, "tokens in"]:
    """Sum of the chosen experts' outputs, each times its router weight: what `lorq.tiled.QuantExperts` computes.

    The formulas are those of that class. A projection's packed weights take one launch for all pairs of a token and an
    expert. Nothing waits for the device, and sums have one order, so that the same inputs give the same bits.

    Args:
        stacks: of the same experts; filled where need be.
        experts: each with a layer for every projection.
        tiles: their shared factors.
        gated: what happens between the projections.
        x: inputs.
        index: the experts of each token; numbers past the last one stand for none.
        weights: the router's.
    """
    (tokens, places), down = index.shape, tiles["down_proj"]
    known = index < len(experts)
    expert, cell = index.flatten(), torch.where(known, index, 0).flatten()
    layers = {name: [getattr(expert, name) for expert in experts] for name in PROJECTIONS}
    gate_own, up_own, own = (stacks.of(name, layers[name]) for name in PROJECTIONS)
    gate = _common(layers["gate_proj"][0], gate_own, tiles["gate_proj"], x, expert)
    up = _common(layers["up_proj"][0], up_own, tiles["up_proj"], x, expert)
    h = _own_basis(layers["down_proj"][0], own, gated(gate, up), cell)
    answers = _product(layers["down_proj"][0], own, h, expert).unflatten(0, (tokens, places))
    weight = torch.where(known, weights, 0).unsqueeze(-1)
    # a_j = sum over e in column j of g_e right_i h_e. With all rights first: one product, and no order of experts.
    row, column = down.cells.long()[cell].T
    all_rows = (h @ down.rights(h.dtype).flatten(0, 1).T).unflatten(1, (-1, down.rank))
    projected = all_rows[torch.arange(len(h), device=h.device), row].unflatten(0, (tokens, places)) * weight
    lefts = down.lefts(x.dtype)
    member = functional.one_hot(column, len(lefts)).to(projected.dtype).unflatten(0, (tokens, places))
    sums = (member.mT @ projected).to(x.dtype)  # (tokens, columns, rank)
    out = (answers * weight).sum(1).to(x.dtype)
    return out + sums.flatten(1) @ lefts.transpose(1, 2).flatten(0, 1)


def _common(first: QuantLinear, own: dict[str, Tensor], t: TileFactors, x: Tensor, expert: Tensor) -> Tensor:
    """Gate or up of every pair: one basis and one projection for all experts, which read the layer's input."""
    z = first.into_basis(x)
    rights = t.rights(z.dtype)
    projected = (z @ rights.flatten(0, 1).T).unflatten(1, rights.shape[:2])
    return _product(first, own, z, expert, t.left, t.left_scale, t.cells, projected)


def _own_basis(first: QuantLinear, own: dict[str, Tensor], h: Tensor, expert: Tensor) -> Tensor:
    """Each pair's input in the basis of its expert: those differ in the order of the channels alone."""
    f = first.format
    if f.permuted:
        h = h.gather(1, own["permutation"][expert].long())
    return rotate(h, None, f.rotation_block, f.rotation_skip) if f.rotation_block else h


def _product(first: QuantLinear, own: dict[str, Tensor], z: Tensor, expert: Tensor, *shared: Tensor | None) -> Tensor:
    """`expert_linear` of a projection, given its tensors and one of its layers."""
    packed, scale, zero, book, book_scale = (own.get(name) for name in _STACKED[:5])
    return expert_linear(
        z, expert, packed, scale, zero, first.levels, book, book_scale, *(shared or [None] * 4), first.format.bits
    )
