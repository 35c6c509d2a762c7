"""The choice: how many of its candidates each layer gets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorq.core.compensation import share_ranks
from lorq.core.low_rank import LowRank, factor_bits, store_factors
from lorq.foreign.couple import Couple
from lorq.foreign.fit import Fitted
from lorq.foreign.settings import Settings
from lorq.storage.report import LayerReport
from lorq.storage.safetensors_file import read_header, read_tensor


@dataclass(frozen=True)
class Compensated:
    """What is written, in whatever form.

    Attributes:
        layers: what is known of each, and its rank.
        inputs: names of layers that read one input, for each input of several.
        places: where the candidates of each layer lie.
    """

    couple: Couple
    layers: Mapping[str, tuple[Fitted, int]]
    inputs: Sequence[Sequence[str]]
    places: Mapping[str, Path]
    factor_type: str

    @classmethod
    def choose(cls, couple: Couple, folder: Path, records: Mapping[str, Any], settings: Settings) -> "Compensated":
        """Give every layer its rank, from what `lorq.foreign.fit.fit` has left in a folder.

        Raises:
            ValueError: if no layer gets any, or nothing is to be compensated.
        """
        fitted = [
            Fitted(**layer | {"shape": tuple(layer["shape"]), "gains": tuple(layer["gains"])})
            for record in records.values()
            for layer in record["layers"]
        ]
        places = {layer["name"]: folder / shard for shard, record in records.items() for layer in record["layers"]}
        if not any(layer.gains for layer in fitted):
            raise ValueError(
                f"{couple.quantized.checkpoint.folder} must miss something of its original, it has the weights of "
                f"{couple.original.checkpoint.folder}: there is nothing to compensate"
            )
        ranks = choose_ranks(fitted, settings)
        if not any(ranks):
            raise ValueError(
                f"budget {settings.budget!r} must suffice for a pair of factors in the layer where it gains most; give "
                "more, and --resume to keep what is finished"
            )
        layers = {layer.name: (layer, rank) for layer, rank in zip(fitted, ranks, strict=True)}
        inputs = [group for record in records.values() for group in record["inputs"]]
        return cls(couple, layers, inputs, places, settings.factor_type)

    def factors(self, name: str) -> LowRank | None:
        """A layer's; None where it has none."""
        rank = self.layers[name][1]
        if not rank:
            return None
        header = read_header(self.places[name])
        left, right = (read_tensor(self.places[name], header, f"{name}.{side}") for side in ("left", "right"))
        own = LowRank(left[:, :rank].contiguous(), right[:rank])
        return own if self.factor_type == "float16" else store_factors(*own.factors(), factor_type=self.factor_type)

    def report(self, name: str) -> LayerReport:
        """What the report says of a layer; its bytes are those of weight and factors."""
        layer, rank = self.layers[name]
        energy = max(layer.energy, 1e-30)
        after = max(0.0, layer.before - sum(layer.gains[:rank]))
        bits = layer.stored_bits + rank * pair_bits(layer.shape, self.factor_type)
        width = layer.stored_bits // (layer.shape[0] * layer.shape[1])  # less what scales take
        stop = "none" if not layer.gains else "candidates" if rank == len(layer.gains) else "price"
        return LayerReport(
            name, layer.shape, width, rank, stop, layer.before / energy, after / energy, bits // 8, layer.note
        )


def pair_bits(shape: tuple[int, int], factor_type: str) -> int:
    """What a pair of factors takes, the scales of 8-bit ones included."""
    bits = factor_bits(factor_type)
    return bits * sum(shape) + (32 if bits == 8 else 0)


def choose_ranks(layers: Sequence[Fitted], settings: Settings) -> list[int]:
    """Every layer's rank: the one asked for, or what gains most under the budget."""
    if settings.rank:
        return [min(settings.rank, len(layer.gains)) for layer in layers]
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    allowed = settings.allowed(weights, sum(layer.stored_bits for layer in layers))
    gains = [torch.tensor(layer.gains, dtype=torch.float64) * layer.stake for layer in layers]
    return share_ranks(gains, [pair_bits(layer.shape, settings.factor_type) for layer in layers], allowed)[0]
