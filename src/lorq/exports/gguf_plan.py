"""Which tensors a GGUF file has of a folder, in which type, and their values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorq.core.codes import GgufGrid
from lorq.core.low_rank import LowRank
from lorq.core.weight import QuantizedWeight
from lorq.exports.gguf_model import Architecture, Source, find_sources, language_names
from lorq.exports.gguf_types import Encoded, encode, exact_type, fits, row_bytes, without_factors
from lorq.exports.plain import too_large
from lorq.exports.request import GgufOptions, refusal
from lorq.progress import CHOOSE, Progress, no_progress
from lorq.storage.folder import LorqFolder


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file.

    Attributes:
        shape: as the model has it, experts first.
    """

    source: Source
    type: str
    shape: tuple[int, ...]

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], row_bytes(self.type, self.shape[-1]))


@dataclass
class Losses:
    """What rounding to types has changed.

    Attributes:
        changed: sum of squared differences.
        whole: sum of squares of what was rounded.
        rounded: number of tensors that are not what the folder has.
        worst: of these the one that changed most, and by how much of its norm.
        left: what is not in the file at all.
    """

    changed: float = 0.0
    whole: float = 0.0
    rounded: int = 0
    worst: tuple[float, str] = (0.0, "")
    left: str = ""

    def add(self, name: str, parts: Sequence[Encoded]) -> None:
        changed, whole = sum(p.changed for p in parts), sum(p.whole for p in parts)
        if not changed:
            return
        self.changed += changed
        self.whole += whole
        self.rounded += 1
        self.worst = max(self.worst, ((changed / max(whole, 1e-300)) ** 0.5, name))

    def in_words(self, tensors: int) -> dict[str, str]:
        """As an export tells what is lost; nothing where nothing is."""
        told = {"tensors": self.left} if self.left else {}
        if not self.rounded:
            return told
        all_ = (self.changed / max(self.whole, 1e-300)) ** 0.5
        return told | {
            "rounding": f"{self.rounded} of {tensors} tensors are rounded, which changes them by {all_:.2g} of their "
            f"norm; {self.worst[1]} most, by {self.worst[0]:.2g}"
        }


@dataclass(frozen=True)
class Plan:
    """A folder's tensors for a file.

    Attributes:
        whole: the model's config; ``config`` is the language model's in it.
        float_type: of what is not quantized.
        adapter: the low-rank part goes into a file of its own.
    """

    folder: LorqFolder
    whole: Any
    config: Any
    architecture: Architecture
    options: GgufOptions
    float_type: str
    adapter: bool
    losses: Losses = field(default_factory=Losses)

    def check(self) -> None:
        """Refuse options that do not fit the folder.

        Raises:
            ValueError: naming the option.
        """
        ranks = [name for name, format in self.folder.formats.items() if format.rank] or list(self.folder.tiles)
        if self.adapter and self.options.fold:
            raise ValueError(
                "--adapter and --fold exclude each other: the low-rank part is beside the codes or in them"
            )
        if ranks and not (self.adapter or self.options.fold):
            raise ValueError(
                f"--to gguf needs a word for the low-rank part that {ranks[0]} has: beside the file with --adapter "
                "FILE.gguf, or rounded into the codes with --fold --type TYPE"
            )
        if not ranks and (self.adapter or self.options.fold):
            raise ValueError(f"{self.folder.path} has no low-rank part; leave --adapter and --fold out")
        if self.adapter and self.folder.tiles:
            raise ValueError(f"an adapter of llama.cpp has no factors that experts share, {ranks[0]} has; take --fold")

    def tensors(self, progress: Progress = no_progress) -> list[FileTensor]:
        """All of the file but those that are none of the model's.

        Raises:
            ValueError: if no type holds one as it is and none is named.
        """
        folder = self.folder
        shared = {f"{name}." for name in folder.tiles}
        kept = [
            name
            for name in folder.reader.names
            if (name.rpartition(".")[0] not in folder.formats or name.endswith(".bias"))
            and f"{name.rpartition('.')[0]}." not in shared
        ]
        names = [*kept, *(f"{name}.weight" for name in folder.formats)]
        own = language_names(names, alone=self.config is self.whole)
        if left := sorted({*names} - {*own.values()}):
            self.losses.left = (
                f"{len(left)} tensors that are none of the language model's, {left[0]} and so on: llama.cpp has them "
                "in a file of its own (mmproj)"
            )
        found = find_sources(own, self.config, self.architecture)
        tensors = []
        for done, source in enumerate(found):
            progress(CHOOSE, done, len(found))
            tensors.append(FileTensor(source, self._type(source), self._shape(source)))
        progress(CHOOSE, len(found), len(found))
        return tensors

    def weight(self, parameter: str) -> QuantizedWeight | Tensor:
        """A parameter of the model; of a quantized layer without the part that goes into the adapter."""
        layer = parameter.removesuffix(".weight")
        if layer not in self.folder.formats or layer == parameter:
            return self.folder.reader.tensor(parameter)
        weight = self.folder.weight(layer)
        return without_factors(weight) if self.adapter else weight

    def _stored(self, parameter: str) -> GgufGrid | None:
        """The type that a layer is stored in, as a GGUF file has it; None where it is no type, or not all of it."""
        format = self.folder.formats.get(parameter.removesuffix(".weight"))
        if format is None or not isinstance(format.codes, GgufGrid) or not parameter.endswith(".weight"):
            return None
        return None if format.has_basis or (format.rank and not self.adapter) else format.codes

    def measure(self, tensor: FileTensor) -> tuple[tuple[str, str], int]:
        """What a tensor becomes, of what, and its weights: such tensors take as long as they have weights."""
        format = self.folder.formats.get(tensor.source.parameters[0].removesuffix(".weight"))
        return (tensor.type, "" if format is None else format.codes.kind), math.prod(tensor.shape)

    def rows(self, tensor: FileTensor) -> Tensor:
        """The bytes of a tensor, in llama.cpp's order of rows."""
        parts, source = [], tensor.source
        for parameter in source.parameters:
            if (stored := self._stored(parameter)) is not None and stored.type == tensor.type:
                blocks = self.folder.tensors(parameter.removesuffix(".weight"))["weight_blocks"]
                parts.append(Encoded(blocks, 0.0, 0.0))
                continue
            weight = self.weight(parameter)
            if isinstance(weight, Tensor) and source.offset:
                weight = weight.float() + source.offset
            if isinstance(weight, Tensor) and weight.ndim == 1:
                weight = weight.unsqueeze(1)  # a number a row
            parts.append(self._encoded(parameter, weight, tensor.type))
        self.losses.add(source.name, parts)
        rows = [source.rows(part.rows) for part in parts]
        return torch.stack(rows) if source.is_stacked else rows[0]

    def _encoded(self, parameter: str, weight: QuantizedWeight | Tensor, type_: str) -> Encoded:
        part = encode(weight, type_)
        if not math.isfinite(part.changed):  # it or its scales are past what float16 holds
            values = weight if isinstance(weight, Tensor) else weight.dense()
            wider = "name a wider type: --dtype bfloat16, or bf16 or f32 for --type, --embeddings or --fallback"
            raise too_large(parameter, values, type_, wider)
        return part

    def factors(self, source: Source) -> tuple[Tensor, Tensor] | None:
        """Left and right of a tensor's low-rank part, experts' stacked; None where it has none.

        Experts of a smaller rank than the largest are filled up with zeros, which changes no product.
        """
        found = [self._factors(parameter) for parameter in source.parameters]
        rank = max(right.shape[0] for _, right in found)
        if rank == 0:
            return None
        left = torch.stack([pad(source.rows(left), (0, rank - left.shape[1])) for left, _ in found])
        right = torch.stack([pad(right, (0, 0, 0, rank - right.shape[0])) for _, right in found])
        return (left, right) if source.is_stacked else (left[0], right[0])

    def _factors(self, parameter: str) -> tuple[Tensor, Tensor]:
        """In the model's own channels, as float16 where they are stored so."""
        layer = parameter.removesuffix(".weight")
        format = self.folder.formats.get(layer)
        if format is None or format.rank == 0 or layer == parameter:
            shape = self.folder.reader.shape(parameter) if format is None else self.folder.weight(layer).shape
            return torch.empty(shape[0], 0), torch.empty(0, shape[-1])
        weight = self.folder.weight(layer)
        assert isinstance(weight.low_rank, LowRank)
        left, right = weight.low_rank.factors()
        return left, right if weight.basis is None else weight.basis.unrotate(right)

    def _shape(self, source: Source) -> tuple[int, ...]:
        first, folder = source.parameters[0], self.folder
        layer = first.removesuffix(".weight")
        if layer in folder.formats and layer != first:
            shape: tuple[int, ...] = folder.reader.told_shape(f"{layer}.weight_shape")
        else:
            shape = folder.reader.shape(first)
        if source.is_stacked:
            return (len(source.parameters), *shape)
        return shape[1:] if source.name.endswith("ffn_gate_inp_shexp.weight") else shape

    def _type(self, source: Source) -> str:
        shape, options = self._shape(source), self.options
        layers = [name.removesuffix(".weight") for name in source.parameters]
        quantized = [name for name in layers if name in self.folder.formats and name not in source.parameters]
        if len(shape) == 1 or "ffn_gate_inp" in source.name:
            return "f32"
        asked: str | None = options.embeddings if source.name.startswith(("token_embd.", "output.")) else None
        flag = "--type" if asked is None else "--embeddings"
        if asked is None and quantized:
            asked = options.type or self._exact(quantized)
            if options.type is None and len(quantized) < len(layers):
                other = next(name for name in layers if name not in quantized)
                raise self._unlike(f"{quantized[0]} is {asked}, {other} is not quantized")
        type_: str = asked or self.float_type
        if fits(type_, shape[-1]):
            return type_
        if options.fallback is not None and fits(options.fallback, shape[-1]):
            return options.fallback
        also = f" (neither do those of --fallback {options.fallback})" if options.fallback else ""
        raise ValueError(
            f"blocks of {type_} must tile a row of {source.parameters[0]}, which has {shape[-1]} columns{also}; take "
            f"another {flag}, or say with --fallback {' or '.join(n for n in ('q8_0', 'f16') if fits(n, shape[-1]))} "
            "what such tensors become"
        )

    def _exact(self, layers: list[str]) -> str:
        """The smallest type that holds a layer's codes, or those of the experts of one projection.

        Raises:
            ValueError: if there is none.
        """
        found: dict[str, str] = {}
        exact = True
        for layer in layers:
            if (stored := self._stored(f"{layer}.weight")) is not None:
                found.setdefault(stored.type, layer)
                exact = False  # in no other type
                continue
            weight = self.weight(f"{layer}.weight")
            assert isinstance(weight, QuantizedWeight)
            if (own := exact_type(weight)) is None:
                raise refusal(
                    "gguf",
                    "holds codes of GGUF's own types (--grid q4_0 and so on) and integer codes in groups of a multiple "
                    f"of 32, {layer} is {_kind(weight)}; to round it again, name a type: --type q8_0, q4_1 or f16. "
                    "A file that loses less for its size: `lorq quantize MODEL model.gguf`",
                    "dense",
                )
            found.setdefault(own, layer)
        if len(found) == 1:
            return next(iter(found))
        if not exact:
            raise self._unlike(", ".join(f"{layer} is {type_}" for type_, layer in found.items()))
        return "q5_0" if found.keys() <= {"q4_0", "q4_1", "q5_0"} else "q8_0"

    def _unlike(self, what: str) -> ValueError:
        """The error for experts of one projection that no type holds as they are."""
        return ValueError(
            f"--to gguf holds the experts of a layer in one tensor of one type, {what}; name the type to round all to: "
            f"lorq export {self.folder.path} FILE.gguf --type q8_0, or f16"
        )


def _kind(weight: QuantizedWeight) -> str:
    """What a weight is made of, in words."""
    codes = weight.codes.format
    parts = [f"{codes.kind} codes of {codes.bits} bits"]
    if size := getattr(codes, "group_size", 0):
        parts.append(f"in groups of {size}")
    if weight.low_rank is not None:
        parts.append(f"with a low-rank part of {weight.rank}")
    if weight.basis is not None:
        parts.append("in a basis of its own")
    return " ".join(parts)
