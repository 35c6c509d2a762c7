"""Tensors as vLLM hands them out, kept as they are stored until a layer has all of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorq.core.faults import value_faults
from lorq.core.weight import LayerFormat, QuantizedWeight

# vLLM's names of the parts of what it has as one.
_PLACES = {"q": 0, "k": 1, "v": 2, "w1": 0, "w3": 1, "w2": 2}
_PROJECTIONS = 3  # of an expert


class Collected:
    """The stored tensors of a layer of vLLM: of each of its parts, such as q, k and v, by local name.

    The layer gets a parameter without numbers for each local name, whose loader keeps what comes, whatever its shape.

    Attributes:
        formats: of the parts by name, in their order; None for one that is not quantized.
    """

    def __init__(self, formats: Mapping[str, LayerFormat | None]):
        self.formats = dict(formats)
        self._loaded: list[dict[str, Tensor]] = [{} for _ in formats]

    def make_room(self, layer: nn.Module, out: int, in_: int, dtype: torch.dtype, stems: Sequence[str] = ("",)) -> None:
        """Register the parameters, under each stem.

        Args:
            dtype: of parts that are not quantized.
        """
        dtypes: dict[str, torch.dtype] = {}
        for format in self.formats.values():
            layout = {"weight": ((), dtype)} if format is None else format.layout(out, in_)
            dtypes |= {local: kind for local, (_, kind) in layout.items()}
        for local, kind in dtypes.items():
            for stem in stems:
                parameter: Any = nn.Parameter(torch.empty(0, dtype=kind), requires_grad=False)
                parameter.weight_loader = self._loader(local)
                layer.register_parameter(stem + local, parameter)

    def _loader(self, local: str) -> Any:
        def load(
            param: Tensor, loaded_weight: Tensor, *given: Any, shard_id: Any = None, expert_id: int | None = None,
            **_: Any,
        ) -> bool:  # fmt: skip
            # vLLM 0.32 notes the part on the tensor; others give it along, and of experts both with their names.
            own = next((value for value in (shard_id, *given[:1]) if value is not None), None)
            shard = getattr(loaded_weight, "shard_id", None) if own is None else own
            self._loaded[self._place(shard, expert_id)][local] = loaded_weight
            return True

        return load

    def _place(self, shard: Any, expert: int | None) -> int:
        place = _PLACES.get(shard, shard) if isinstance(shard, str) else 0 if shard is None else shard
        if expert is not None and isinstance(place, int):
            place += _PROJECTIONS * expert
        if not isinstance(place, int) or not 0 <= place < len(self.formats):
            raise ValueError(f"a part of {', '.join(self.formats)} must be one of these, vLLM says {shard!r}")
        return place

    def weight(self, place: int) -> QuantizedWeight | Tensor:
        """A part's weight, whole; a dense tensor where it is not quantized.

        Raises:
            ValueError: if a tensor was not loaded, has another shape, or holds what no weight can.
        """
        name, format = list(self.formats.items())[place]
        tensors = self._loaded[place]
        wanted = "weight" if format is None else "weight_shape"
        if wanted not in tensors:
            raise ValueError(f"{name} lacks {wanted}: the folder is not whole, or vLLM names it otherwise")
        if format is None:
            return tensors["weight"]
        out, in_ = tensors["weight_shape"].tolist()
        layout = format.layout(out, in_)
        wrong = [n for n, (shape, dtype) in layout.items() if n not in tensors or tensors[n].shape != shape]
        if wrong:
            raise ValueError(f"{name} must have {wrong[0]} of shape {layout[wrong[0]][0]}; download the folder again")
        own = {local: tensors[local] for local in layout}
        if fault := next(value_faults(own), None):
            raise ValueError(f"{name}.{fault}; the folder is damaged, download it again")
        return format.read(own, (out, in_))

    def forget(self) -> None:
        self._loaded = [{} for _ in self.formats]
