"""QuantizedWeight: the value that passes from a method's solve to packing, running and reporting."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lorq.core.activations import Activations
from lorq.core.basis import Basis
from lorq.core.grids import Codebook, decode_vectors, dequantize, level_values
from lorq.core.low_rank import LowRank, factor_bits
from lorq.core.packing import packed_width
from lorq.core.scale_factors import LowRankScale
from lorq.core.tile_factors import TileFactors


@dataclass(frozen=True)
class LayerFormat:
    """What must be known of a quantized layer to make room for it before its tensors are read.

    Attributes:
        bits: stored bits of a code, per weight.
        group_size: input columns that share a scale; the width where the scale is low rank.
        symmetric: no zero points are stored.
        rank: columns of ``left``; 0 when there is no low-rank part.
        factor_type: of the low-rank factors, "float16", "int8" or "e4m3".
        vector: weights that share a code; above 1 codes stand for entries of codebooks.
        codebook_rows: rows that share a codebook; 0 without codebooks.
        codebook_columns: columns that share a codebook; likewise.
        permuted: the channels of the weight's basis (`lorq.core.basis.Basis`) are in an order of its own.
        rotation_block: size of the basis' Walsh-Hadamard blocks; 0 for none.
        rotation_skip: columns before the first block.
        grid: what codes of single weights stand for, "integer" or "normal-float" (`lorq.core.grids.levels`).
        scale_rank: rank of the matrix of scales, one for each weight; 0 where groups have one.
        input_quantization: of the layer's inputs, "none", "token" or "tensor" (`lorq.core.activations.Activations`).
        output_quantization: of its outputs, "none" or "token".
    """

    bits: int
    group_size: int
    symmetric: bool
    rank: int = 0
    factor_type: str = "float16"
    vector: int = 1
    codebook_rows: int = 0
    codebook_columns: int = 0
    permuted: bool = False
    rotation_block: int = 0
    rotation_skip: int = 0
    grid: str = "integer"
    scale_rank: int = 0
    input_quantization: str = "none"
    output_quantization: str = "none"

    @property
    def has_basis(self) -> bool:
        """Whether inputs must be taken into another basis."""
        return self.permuted or self.rotation_block > 0

    @property
    def code_bits(self) -> int:
        """Width of a code."""
        return self.bits * self.vector

    def stored_bits(self, out: int, in_: int) -> int:
        """Every bit that a layer of this format and shape stores, padding of packed rows included.

        Codes, scales (16 bits) or their factors (16 bits), zero points (``bits`` each), codebooks (8 bits an entry's
        number, 16 for the scale of each), factors and the scales of 8-bit factors, permutation (16 or 32 bits a
        channel), the grid of inputs (64).
        """
        groups = in_ // self.group_size
        codes = 32 * out * packed_width(in_ // self.vector, self.code_bits)
        scales = 16 * (self.scale_rank * (out + in_) if self.scale_rank else out * groups)
        zeros = 0 if self.symmetric else 32 * groups * packed_width(out, self.bits)
        width = factor_bits(self.factor_type)
        factors = self.rank * (width * (out + in_) + (32 if width == 8 else 0))
        tiles = (out // self.codebook_rows) * (in_ // self.codebook_columns) if self.vector > 1 else 0
        codebooks = tiles * (8 * self.vector * 2**self.code_bits + 16)
        permutation = 8 * permutation_dtype(in_).itemsize * in_ if self.permuted else 0
        activations = 64 if self.input_quantization == "tensor" else 0
        return codes + scales + zeros + factors + codebooks + permutation + activations


def permutation_dtype(width: int) -> torch.dtype:
    """The smallest integers that number the channels."""
    return torch.int16 if width <= 2**15 else torch.int32


@dataclass(frozen=True)
class Record:
    """How a layer was solved; printed by `lorq inspect`.

    Attributes:
        stop: why the rank was not larger; "none" for methods without a low-rank part.
        error_before: output error of plain rounding to nearest on the same kind of grid, relative to the
            output's energy, ``tr(D H D^T) / tr(W H W^T)``.
        error_after: the same of the result.
        note: anything else worth telling, or nothing.
    """

    stop: str
    error_before: float
    error_after: float
    note: str = ""


@dataclass(frozen=True)
class Tile:
    """Which expert's part of shared factors a weight has.

    Attributes:
        factors: of all experts of one projection.
        expert: number of the expert.
    """

    factors: TileFactors
    expert: int


@dataclass(frozen=True)
class QuantizedWeight:
    """A solved weight, ``W ~ (decode(codes) + left right) T^-1``.

    ``decode`` is ``(codes - zero_point) * scale``, ``levels[codes] * scale``, or ``codebook[codes] * scale``; T is the
    basis. The scale is one for each group, or a matrix of low rank. An expert's factors may be those of its tile; tile
    factors with an input scale stand outside the basis, ``... T^-1 + left right``.

    Attributes:
        codes: whole numbers ``0 .. 2^bits - 1``; with a codebook one for each ``vector`` neighbouring columns.
        scale: float16, in weight units; None where ``scale_factors`` has it.
        zero_point: the code of 0.0 for each group; None on symmetric grids, where it is ``2^(bits-1)``, and with a
            codebook.
        bits: stored bits of a code, per weight.
        low_rank: the factors, or None.
        record: how it was solved.
        codebook: what vector codes stand for, or None.
        basis: T, or None for the model's own channels.
        tile: factors shared with other experts, or None.
        grid: "integer", or "normal-float" (no zero point then).
        scale_factors: one scale for each weight, as a product; or None.
        activations: whether inputs and outputs are quantized when the layer runs; `dense` is the weight alone.
    """

    codes: UInt8[Tensor, "out vectors"]
    scale: Float[Tensor, "out groups"] | None
    zero_point: UInt8[Tensor, "out groups"] | None
    bits: int
    low_rank: LowRank | None = None
    record: Record = field(default_factory=lambda: Record("none", 0.0, 0.0))
    codebook: Codebook | None = None
    basis: Basis | None = None
    tile: Tile | None = None
    grid: str = "integer"
    scale_factors: LowRankScale | None = None
    activations: Activations = field(default_factory=Activations)

    @property
    def shape(self) -> tuple[int, int]:
        out, vectors = self.codes.shape
        return out, vectors * (self.codebook.entries.shape[-1] if self.codebook else 1)

    @property
    def rank(self) -> int:
        """Columns of the low-rank part, its own or its tile's, or of the scale's factors."""
        if self.tile is not None:
            return self.tile.factors.rank
        if self.scale_factors is not None:
            return self.scale_factors.rank
        return self.low_rank.rank if self.low_rank else 0

    @property
    def format(self) -> LayerFormat:
        out, in_ = self.shape
        tiles = self.codebook.scale.shape if self.codebook else None
        return LayerFormat(
            bits=self.bits,
            group_size=in_ if self.scale is None else in_ // self.scale.shape[1],
            symmetric=self.zero_point is None,
            rank=self.low_rank.rank if self.low_rank else 0,
            factor_type=self.low_rank.factor_type if self.low_rank else "float16",
            vector=self.codebook.entries.shape[-1] if self.codebook else 1,
            codebook_rows=out // tiles[0] if tiles else 0,
            codebook_columns=in_ // tiles[1] if tiles else 0,
            permuted=self.basis is not None and self.basis.permutation is not None,
            rotation_block=self.basis.block if self.basis else 0,
            rotation_skip=self.basis.skip if self.basis else 0,
            grid=self.grid,
            scale_rank=self.scale_factors.rank if self.scale_factors else 0,
            input_quantization=self.activations.input,
            output_quantization=self.activations.output,
        )

    def decoded(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """What the codes stand for, in the weight's basis."""
        if self.scale_factors is not None:
            return level_values(self.codes, self.grid, self.bits, dtype=dtype) * self.scale_factors.dense(dtype)
        assert self.scale is not None
        if self.codebook is not None:
            return decode_vectors(self.codes, self.codebook, self.scale, dtype=dtype)
        if self.grid != "integer":
            values = level_values(self.codes, self.grid, self.bits, dtype=dtype).unflatten(1, (self.scale.shape[1], -1))
            return (values * self.scale.to(dtype).unsqueeze(-1)).flatten(1)
        zero = 2 ** (self.bits - 1) if self.zero_point is None else self.zero_point
        return dequantize(self.codes, self.scale, zero, dtype=dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The full matrix that the stored parts stand for."""
        weight, outside = self.decoded(dtype), None
        if self.low_rank is not None:
            weight = weight + self.low_rank.dense(dtype)
        if self.tile is not None:
            shared = self.tile.factors.dense(self.tile.expert, dtype)
            if self.tile.factors.input_scale is None:
                weight = weight + shared
            else:
                outside = shared
        weight = weight if self.basis is None else self.basis.unrotate(weight)
        return weight if outside is None else weight + outside

    def stored_bits(self) -> int:
        """Every bit of this weight on disk, an equal share of tile factors included; see `LayerFormat.stored_bits`."""
        shared = self.tile.factors.format.share(*self.shape) if self.tile else 0
        return self.format.stored_bits(*self.shape) + shared

    @property
    def bits_per_weight(self) -> float:
        out, in_ = self.shape
        return self.stored_bits() / (out * in_)


def layer_bytes(stored_bits: int) -> int:
    """Bytes of a layer, the pair of integers that tells its shape included."""
    return -(-stored_bits // 8) + 16
