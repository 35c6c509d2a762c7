"""QuantizedWeight: the value that passes from a method's solve to packing, running and reporting."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lorq.core.activations import Activations
from lorq.core.basis import Basis, check_block
from lorq.core.codes import Codes, CodesFormat, LevelFormat
from lorq.core.faults import layout_faults, value_faults
from lorq.core.low_rank import LowRank, factor_layout
from lorq.core.packing import Layout, stored_bits
from lorq.core.tile_factors import TileFactors


@dataclass(frozen=True)
class LayerFormat:
    """What must be known of a quantized layer to make room for it before its tensors are read.

    Attributes:
        codes: kind and sizes of the codes (`lorq.core.codes`).
        rank: columns of ``left``; 0 when there is no low-rank part of the layer's own.
        factor_type: of the low-rank factors, "float16", "int8" or "e4m3".
        permuted: the channels of the weight's basis (`lorq.core.basis.Basis`) are in an order of its own.
        rotation_block: size of the basis' Walsh-Hadamard blocks; 0 for none, `lorq.core.basis.WHOLE` for all columns.
        rotation_skip: columns before the first block.
        input_quantization: of the layer's inputs (`lorq.core.activations.Activations`).
        output_quantization: of its outputs.
    """

    codes: CodesFormat
    rank: int = 0
    factor_type: str = "float16"
    permuted: bool = False
    rotation_block: int = 0
    rotation_skip: int = 0
    input_quantization: str = "none"
    output_quantization: str = "none"

    @property
    def bits(self) -> int:
        """Stored bits of a code, per weight."""
        return self.codes.bits

    @property
    def has_basis(self) -> bool:
        """Whether inputs must be taken into another basis."""
        return self.permuted or self.rotation_block != 0

    def check(self, out: int, in_: int) -> None:
        """Refuse a shape that codes or basis do not fit.

        Raises:
            ValueError: naming the sizes.
        """
        self.codes.check(out, in_)
        if self.rotation_block:
            check_block(in_, self.rotation_block, self.rotation_skip)

    def layout(self, out: int, in_: int) -> Layout:
        """Shape and dtype of every tensor that a layer of this format and shape stores, by local name."""
        layout: Layout = {"weight_shape": ((2,), torch.int64)} | self.codes.layout(out, in_)
        if self.permuted:
            layout["permutation"] = ((in_,), permutation_dtype(in_))
        if self.rank:
            layout |= factor_layout(out, in_, self.rank, self.factor_type)
        if self.input_quantization == "tensor":
            layout |= {"input_scale": ((1,), torch.float32), "input_zero_point": ((1,), torch.int32)}
        return layout

    def stored_bits(self, out: int, in_: int) -> int:
        """Every bit that a layer of this format and shape stores, padding of rows included, but for its shape."""
        return stored_bits({name: of for name, of in self.layout(out, in_).items() if name != "weight_shape"})

    def faults(self, tensors: Mapping[str, Tensor]) -> Iterator[str]:
        """All that is wrong with stored tensors of such a layer, by local name; nothing where `read` can read them."""
        shape = tensors.get("weight_shape")
        if shape is None or shape.dtype != torch.int64 or tuple(shape.shape) != (2,):
            told = "missing" if shape is None else f"{shape.dtype} of shape {(*shape.shape,)}"
            yield f"weight_shape must be two whole numbers (int64), it is {told}"
            return
        out, in_ = shape.tolist()
        try:
            if not 0 < min(out, in_) <= max(out, in_) < 2**31:
                raise ValueError(f"weight_shape must be 1 to 2^31 - 1, got {[out, in_]}")
            self.check(out, in_)
        except ValueError as error:
            yield str(error)
            return
        yield from layout_faults(self.layout(out, in_), tensors)
        yield from value_faults(tensors)

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, int] | None = None) -> "QuantizedWeight":
        """The weight behind stored tensors, without its record; the inverse of `QuantizedWeight.tensors`.

        Args:
            tensors: by local name.
            shape: of the weight, (out, in), where it is known: a compiled program must not read it from a tensor.
        """
        out, in_ = tensors["weight_shape"].tolist() if shape is None else shape
        grid = tensors.get("input_scale"), tensors.get("input_zero_point")
        activations = Activations(self.input_quantization, self.output_quantization, *grid)
        return QuantizedWeight(self.codes.read(tensors, out, in_), *self._beside(tensors), activations)

    def decode_rows(
        self, tensors: Mapping[str, Tensor], index: Int64[Tensor, "count"], in_: int
    ) -> Float[Tensor, "count in"]:
        """Some rows of the full matrix behind stored tensors, in any order; the others are not decoded.

        Args:
            tensors: by local name.
            in_: the weight's width.
        """
        rows, (low_rank, basis) = self.codes.decode_rows(tensors, index, in_), self._beside(tensors)
        if low_rank is not None:
            left, right = low_rank.factors()
            rows = rows + left.index_select(0, index) @ right
        return rows if basis is None else basis.unrotate(rows)

    def _beside(self, tensors: Mapping[str, Tensor]) -> tuple[LowRank | None, Basis | None]:
        low_rank, basis = None, None
        if self.rank:
            low_rank = LowRank(tensors["left"], tensors["right"], tensors.get("left_scale"), tensors.get("right_scale"))
        if self.has_basis:
            basis = Basis(tensors.get("permutation"), self.rotation_block, self.rotation_skip)
        return low_rank, basis


def permutation_dtype(width: int) -> torch.dtype:
    """The smallest integers that number the channels."""
    return torch.int16 if width <= 2**15 else torch.int32


def layer_bytes(stored_bits: int) -> int:
    """Bytes of a layer, the pair of integers that tells its shape included."""
    return -(-stored_bits // 8) + 16


@dataclass(frozen=True)
class Record:
    """How a layer was solved; printed by `lorq inspect`.

    Attributes:
        stop: why the rank was not larger; "none" for methods without a low-rank part.
        error_before: output error of plain rounding to nearest on the same kind of grid, relative to the
            output's energy, ``tr(D H D^T) / tr(W H W^T)``; of layers of many rows, that of some of them.
        error_after: the same of the result.
        note: anything else worth telling, or nothing.
    """

    stop: str
    error_before: float
    error_after: float
    note: str = ""


@dataclass(frozen=True)
class Tile:
    """The number of an expert, and the factors of all experts of its projection."""

    factors: TileFactors
    expert: int

    @property
    def rank(self) -> int:
        return self.factors.rank

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The expert's own low-rank part."""
        return self.factors.dense(self.expert, dtype)


@dataclass(frozen=True)
class QuantizedWeight:
    """A solved weight, ``W ~ (decode(codes) + left right) T^-1``; T is the basis.

    An expert's factors may be those of its tile; tile factors with an input scale stand outside the basis,
    ``... T^-1 + left right``.

    Attributes:
        low_rank: the factors, or the expert's part of those that it shares, or None.
        basis: T, or None for the model's own channels.
        activations: whether inputs and outputs are quantized when the layer runs; `dense` is the weight alone.
        record: how it was solved.
    """

    codes: Codes
    low_rank: LowRank | Tile | None = None
    basis: Basis | None = None
    activations: Activations = field(default_factory=Activations)
    record: Record = field(default_factory=lambda: Record("none", 0.0, 0.0))

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape

    @property
    def tile(self) -> Tile | None:
        """The low-rank part, where it is shared."""
        return self.low_rank if isinstance(self.low_rank, Tile) else None

    @property
    def rank(self) -> int:
        """Columns of the low-rank part, its own or its tile's, or of the scale's factors."""
        if self.low_rank is not None:
            return self.low_rank.rank
        format = self.codes.format
        return format.scale_rank if isinstance(format, LevelFormat) else 0

    @property
    def format(self) -> LayerFormat:
        own = self.low_rank if isinstance(self.low_rank, LowRank) else None
        basis = self.basis or Basis(None, 0, 0)
        return LayerFormat(
            self.codes.format,
            own.rank if own else 0,
            own.factor_type if own else "float16",
            basis.permutation is not None,
            basis.block,
            basis.skip,
            self.activations.input,
            self.activations.output,
        )

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The full matrix that the stored parts stand for."""
        weight, outside = self.codes.decode(dtype), None
        if self.low_rank is not None:
            part = self.low_rank.dense(dtype)
            if self.tile is not None and self.tile.factors.input_scale is not None:
                outside = part
            else:
                weight = weight + part
        weight = weight if self.basis is None else self.basis.unrotate(weight)
        return weight if outside is None else weight + outside

    def tensors(self) -> dict[str, Tensor]:
        """The tensors as they are stored, by their local names (docs/format.md), but for shared factors."""
        tensors: dict[str, Any] = self.codes.tensors() | {
            "weight_shape": torch.tensor(self.shape, dtype=torch.int64),
            "input_scale": self.activations.scale,
            "input_zero_point": self.activations.zero_point,
        }
        if self.basis is not None and self.basis.permutation is not None:
            tensors["permutation"] = self.basis.permutation.to(permutation_dtype(self.shape[1]))
        if isinstance(self.low_rank, LowRank):
            tensors |= self.low_rank.tensors()
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}

    def continuous(self) -> dict[str, Tensor]:
        """What of `tensors` is numbers and no codes (`lorq.core.codes.Codes.continuous`), and the factors."""
        return self.codes.continuous() | (self.low_rank.tensors() if isinstance(self.low_rank, LowRank) else {})

    def refitted(self, numbers: Mapping[str, Tensor]) -> "QuantizedWeight":
        """The same weight with other numbers for `continuous`, of any floating-point type; differentiable in them."""
        low_rank = self.low_rank
        if isinstance(low_rank, LowRank):
            low_rank = LowRank(**{name: numbers[name] for name in low_rank.tensors()})
        return replace(self, codes=self.codes.refitted(numbers), low_rank=low_rank)

    def stored_bits(self) -> int:
        """Every bit of this weight on disk, an equal share of tile factors included; see `LayerFormat.stored_bits`."""
        shared = self.tile.factors.format.share(*self.shape) if self.tile else 0
        return self.format.stored_bits(*self.shape) + shared


def join_rows(parts: Sequence[QuantizedWeight], energies: Sequence[float]) -> QuantizedWeight:
    """One weight of strips of its rows, in their order, each solved by itself.

    Args:
        parts: of one format; all but the last of a multiple of 32 rows, so that what is packed down the columns fits.
            What is no row's own, such as a basis, must be the same in all.
        energies: of the outputs of the original's strips, which the record's errors are relative to.

    Raises:
        ValueError: if the strips do not belong together.
    """
    if len(parts) == 1:
        return parts[0]
    format, shape = parts[0].format, (sum(part.shape[0] for part in parts), parts[0].shape[1])
    strips, joined = [part.tensors() for part in parts], {}
    for name, (whole, _) in format.layout(*shape).items():
        own = [strip.get(name, torch.empty(0)) for strip in strips]
        alike = own[0].shape == whole and (name == "weight_shape" or all(torch.equal(own[0], o) for o in own))
        joined[name] = own[0] if alike else torch.cat(own)
        if joined[name].shape != whole or any(part.format != format for part in parts):
            raise ValueError(
                f"strips of rows must have one format, a multiple of 32 rows but for the last, and the same {name} or "
                f"rows of it, got {[part.shape for part in parts]}; solve the weight whole"
            )
    total, notes = max(sum(energies), 1e-30), dict.fromkeys(part.record.note for part in parts)
    shares = [energy / total for energy in energies]
    before = sum(part.record.error_before * share for part, share in zip(parts, shares, strict=True))
    after = sum(part.record.error_after * share for part, share in zip(parts, shares, strict=True))
    record = Record(parts[0].record.stop, before, after, "; ".join(filter(None, notes)))
    return replace(format.read(joined, shape), record=record)
