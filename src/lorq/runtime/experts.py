"""QuantExperts: packed experts whose shared low-rank part is computed for all of them at once."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorq.core.tile_factors import TileFactors, TileFormat
from lorq.models.experts import Expert, Experts
from lorq.runtime.experts_at_once import declines_at_once, layers_of, run_grouped
from lorq.runtime.linear import QuantLinear

_PARTS = tuple(field.name for field in fields(TileFactors))


class Tiles(nn.Module):
    """The stored tile factors of one projection of all experts.

    Args:
        out_features: of an expert's weight.
        in_features: of an expert's weight.
        format: grid, rank and so on.
        device: "meta" makes room without memory.
    """

    cells: Tensor

    def __init__(
        self, out_features: int, in_features: int, format: TileFormat, *, device: torch.device | str | None = None
    ):
        super().__init__()
        self.out_features, self.in_features, self.format = out_features, in_features, format
        layout = format.layout(out_features, in_features)
        for name in _PARTS:
            tensor = torch.zeros(layout[name][0], dtype=layout[name][1], device=device) if name in layout else None
            self.register_buffer(name, tensor)

    def factors(self) -> TileFactors:
        """The tensors as a value."""
        return TileFactors(**{name: getattr(self, name) for name in _PARTS})

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        f = self.format
        return f"grid={f.rows}x{f.columns}, experts={f.experts}, rank={f.rank}, factor_type={f.factor_type}"


class QuantExperts(nn.Module):
    """Packed experts with tile factors; their low-rank part takes one pass for all experts.

    With ``x`` a token's input, ``z`` the same in the experts' basis, ``g`` the router's weights and expert ``e`` in
    cell ``(i, j)``:

        gate, up:  P = z [right_1 .. right_R]^T once,            gate_e += left_j P_i,   by columns
        down:      a_j = sum over e in column j of g_e right_i h_e,   y += [left_1 .. left_C] [a_1 .. a_C]

    so the down projection's left factors are applied once per token and not once per expert. Equal to `one_by_one`,
    where each expert adds ``left_j (right_i z)`` of its own, but for the order of sums. Where experts are alike and
    inputs need no gradient, one call multiplies all those of a projection (`lorq.runtime.experts_at_once`). Projections
    without tile factors may be of any kind, each expert's in a basis of its own.

    Args:
        plain: the experts, which become children of this, under their numbers; layers of projections with tile factors
            are packed.
        tiles: by projection.

    Raises:
        ValueError: if a layer with tile factors is not packed.

    Source:
        TileQ's LoTileMoE as far as it is known. With one right factor for a grid row the shared projection is exact;
        with input scales for each expert (``sharing="expert"``) only `one_by_one` is, and it is used.
    """

    def __init__(self, plain: Experts, tiles: dict[str, Tiles]):
        super().__init__()
        self._plain = (plain,)  # in a tuple, so that it is no child beside its own
        for name, expert in plain.named_children():
            self.add_module(name, expert)
        plain.adapt(self)
        self.tiles = nn.ModuleDict(tiles)
        for name, module in tiles.items():
            for number, expert in enumerate(plain):
                layer = getattr(expert, name)
                if not isinstance(layer, QuantLinear):
                    raise ValueError(
                        f"experts that share factors must be packed, {number}.{name} is a {type(layer).__name__}; "
                        "the config belongs to another model"
                    )
                layer.shared = (module, number)

    @property
    def plain(self) -> Experts:
        """The experts without what they share."""
        return self._plain[0]

    def dequantize(self, dtype: torch.dtype | None = None) -> Experts:
        """Experts with dense layers, their parts of the shared factors included."""
        dense = [Expert() for _ in self.plain]
        for own, expert in zip(dense, self.plain, strict=True):
            for name, layer in expert.named_children():
                setattr(own, name, layer.dequantize(dtype) if isinstance(layer, QuantLinear) else layer)
        return self.plain.with_experts(dense).train(self.training)

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens in"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens in"]:
        """Sum of the chosen experts' outputs, each times its router weight."""
        tiles = self._factors()
        if any(t.input_scale is not None for t in tiles.values()):
            return self.one_by_one(hidden_states, top_k_index, top_k_weights)
        layers = layers_of(self.plain)
        if declines_at_once(layers, tuple(self.tiles), hidden_states, top_k_weights) is None:
            return run_grouped(layers, tiles, self.plain.between, hidden_states, top_k_index, top_k_weights)
        return _Pass(self.plain, tiles, hidden_states, top_k_index, top_k_weights).output()

    def middle(self, expert: int, inputs: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens width"]:
        """What one expert's down projection is given."""
        return self._middle(self._factors(), expert, inputs)

    def _factors(self) -> dict[str, TileFactors]:
        return {name: module.factors() for name, module in self.tiles.items()}  # type: ignore[operator]

    def one_by_one(
        self,
        x: Float[Tensor, "tokens in"],
        index: Int[Tensor, "tokens k"],
        weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens in"]:
        """Every expert for itself: the definition of what `forward` computes."""
        tiles, out = self._factors(), torch.zeros_like(x)
        for expert, token, place in _routed(index, len(self.plain)):
            middle = self._middle(tiles, expert, x[token])
            answer = self._project(tiles, "down_proj", expert, middle) * weights[token, place, None]
            out.index_add_(0, token, answer.to(out.dtype))
        return out

    def _middle(self, tiles: dict[str, TileFactors], expert: int, inputs: Tensor) -> Tensor:
        return self.plain.between(*(self._project(tiles, name, expert, inputs) for name in self.plain.entries))

    def _project(self, tiles: dict[str, TileFactors], name: str, expert: int, inputs: Tensor) -> Tensor:
        """One projection of one expert, its part of the shared factors included."""
        layer: Any = getattr(self.plain[expert], name)
        if name not in tiles:
            return layer(inputs)
        t, z = tiles[name], layer.into_basis(inputs)
        row, column = t.cells[expert].tolist()
        seen = z if t.input_scale is None else inputs * t.input_scale[expert].to(inputs.dtype)
        return layer.multiply(z) + (seen @ t.rights(z.dtype)[row].T) @ t.lefts(z.dtype)[column].T


def _routed(index: Int[Tensor, "tokens k"], experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each chosen expert with its tokens and their places; numbers past the last expert stand for none."""
    for expert in index.unique().tolist():
        if expert < experts:
            token, place = torch.where(index == expert)
            yield expert, token, place


class _Pass:
    """One pass of tokens through packed experts, low-rank parts fused."""

    def __init__(self, experts: Experts, tiles: dict[str, TileFactors], x: Tensor, index: Tensor, weights: Tensor):
        self.experts, self.tiles, self.x = experts, tiles, x
        self.routed = list(_routed(index, len(experts)))
        self.weights = [weights[token, place, None] for _, token, place in self.routed]

    def output(self) -> Tensor:
        out = torch.zeros_like(self.x)
        if not self.routed:
            return out
        projected = zip(*(self._outputs(name) for name in self.experts.entries), strict=True)
        inputs = [self.experts.between(*of_one) for of_one in projected]
        layers = self._layers("down_proj")
        packed = "down_proj" in self.tiles
        if packed:
            inputs = [layer.into_basis(x) for layer, x in zip(layers, inputs, strict=True)]
            self._add_low_rank(out, inputs)
        for (_, token, _), weight, layer, x in zip(self.routed, self.weights, layers, inputs, strict=True):
            answer = (layer.multiply(x) if packed else layer(x)) * weight
            out.index_add_(0, token, answer.to(out.dtype))
        return out

    def _layers(self, name: str) -> list[Any]:
        """A projection of each routed expert."""
        return [getattr(self.experts[expert], name) for expert, _, _ in self.routed]

    def _outputs(self, name: str) -> list[Tensor]:
        """What gate or up projections give, by routed expert."""
        layers, tokens = self._layers(name), [token for _, token, _ in self.routed]
        if name not in self.tiles:
            return [layer(self.x[token]) for layer, token in zip(layers, tokens, strict=True)]
        z = layers[0].into_basis(self.x)  # one basis for all: every expert reads the layer's input
        outputs = [layer.multiply(z[token]) for layer, token in zip(layers, tokens, strict=True)]
        return [a + b for a, b in zip(outputs, self._shared(name, z), strict=True)]

    def _shared(self, name: str, z: Tensor) -> list[Tensor]:
        """Low-rank outputs of gate or up by routed expert: one projection, then one product per grid column."""
        t = self.tiles[name]
        rights, lefts = t.rights(z.dtype), t.lefts(z.dtype)
        projected = (z @ rights.flatten(0, 1).T).unflatten(1, rights.shape[:2])  # (tokens, rows, rank)
        cells = t.cells.tolist()
        found: list[Tensor] = [z] * len(self.routed)
        for column, left in enumerate(lefts):
            members = [k for k, (expert, _, _) in enumerate(self.routed) if cells[expert][1] == column]
            if members:
                parts = [projected[self.routed[k][1], cells[self.routed[k][0]][0]] for k in members]
                answers = (torch.cat(parts) @ left.T).split([len(part) for part in parts])
                for k, answer in zip(members, answers, strict=True):
                    found[k] = answer
        return found

    def _add_low_rank(self, out: Tensor, middles: list[Tensor]) -> None:
        """The down projection's: summed over experts in rank space, then one product with all left factors."""
        t = self.tiles["down_proj"]
        rights, lefts = t.rights(out.dtype), t.lefts(out.dtype)
        cells, columns = t.cells.tolist(), len(lefts)
        sums = out.new_zeros(len(out) * columns, t.rank)
        for row, right in enumerate(rights):
            members = [k for k, (expert, _, _) in enumerate(self.routed) if cells[expert][0] == row]
            if members:
                projected = torch.cat([middles[k] for k in members]) @ right.T
                weight = torch.cat([self.weights[k] for k in members])
                place = torch.cat([self.routed[k][1] * columns + cells[self.routed[k][0]][1] for k in members])
                sums.index_add_(0, place, (projected * weight).to(sums.dtype))
        out += sums.view(len(out), -1) @ lefts.transpose(1, 2).flatten(0, 1)
