"""QuantizedWeight: the value that passes from a method's solve to packing, running and reporting."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from lorq.grids import dequantize
from lorq.packing import packed_width


@dataclass(frozen=True)
class LayerFormat:
    """What must be known of a quantized layer to make room for it before its tensors are read.

    Attributes:
        bits: width of a code.
        group_size: input columns that share a scale.
        symmetric: no zero points are stored.
        rank: columns of ``left``; 0 when there is no low-rank part.
        factor_bits: 16 (float16) or 8 (int8 and one float16 scale per vector).
    """

    bits: int
    group_size: int
    symmetric: bool
    rank: int = 0
    factor_bits: int = 16

    def stored_bits(self, out: int, in_: int) -> int:
        """Every bit that a layer of this format and shape stores, padding of packed rows included.

        Codes, scales (16 bits), zero points (``bits`` each), factors and the scales of 8-bit factors.
        """
        groups = in_ // self.group_size
        codes = 32 * out * packed_width(in_, self.bits)
        scales = 16 * out * groups
        zeros = 0 if self.symmetric else 32 * groups * packed_width(out, self.bits)
        factors = self.rank * (self.factor_bits * (out + in_) + (32 if self.factor_bits == 8 else 0))
        return codes + scales + zeros + factors


@dataclass(frozen=True)
class LowRank:
    """The factors of the low-rank part, ``dense() = (left left_scale) (right_scale right)``.

    Attributes:
        left: (out, rank), float16; or int8 with ``left_scale``, one per column.
        right: (rank, in), float16; or int8 with ``right_scale``, one per row.
        left_scale: float16, present only for 8-bit factors.
        right_scale: likewise.
    """

    left: Float[Tensor, "out rank"] | Int8[Tensor, "out rank"]
    right: Float[Tensor, "rank in"] | Int8[Tensor, "rank in"]
    left_scale: Float[Tensor, "rank"] | None = None
    right_scale: Float[Tensor, "rank"] | None = None

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """``(left, right)`` with their scales multiplied in."""
        left, right = self.left.to(dtype), self.right.to(dtype)
        if self.left_scale is not None and self.right_scale is not None:
            left = left * self.left_scale.to(dtype)
            right = right * self.right_scale.to(dtype).unsqueeze(1)
        return left, right

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """``left @ right``."""
        left, right = self.factors(dtype)
        return left @ right


def store_factors(left: Float[Tensor, "out rank"], right: Float[Tensor, "rank in"], *, bits: int) -> LowRank | None:
    """Round factors to the type they are stored in.

    Each pair is first balanced to equal largest magnitudes, ``max|l| = max|r|``, which leaves the product
    alone and keeps both inside float16's range.

    Args:
        bits: 16 for float16; 8 for int8 codes ``round(v / s)``, ``s = max|v| / 127`` for each vector.

    Returns:
        The stored factors, or None if the rank is 0.

    Raises:
        ValueError: for other widths, or if a factor does not fit float16.
    """
    if bits not in (8, 16):
        raise ValueError(f"factor_bits must be 8 or 16, got {bits}")
    if left.shape[1] == 0:
        return None
    size_left, size_right = left.abs().amax(0), right.abs().amax(1)
    balance = (size_right / size_left.clamp(min=1e-30)).clamp(1e-30, 1e30).sqrt()
    left, right = left * balance, right / balance.unsqueeze(1)
    largest = float(torch.maximum(left.abs().max(), right.abs().max()))
    if not largest <= torch.finfo(torch.float16).max:
        raise ValueError(f"low-rank factors must fit float16 (at most 65504), got {largest:.4g}")
    if bits == 16:
        return LowRank(left.to(torch.float16), right.to(torch.float16))
    # 2^-24 is float16's smallest positive number: a vector of zeros must not divide by zero.
    left_scale = (left.abs().amax(0) / 127).clamp(min=2.0**-24).to(torch.float16)
    right_scale = (right.abs().amax(1) / 127).clamp(min=2.0**-24).to(torch.float16)
    left_codes = (left / left_scale.to(left.dtype)).round().clamp(-127, 127).to(torch.int8)
    right_codes = (right / right_scale.to(right.dtype).unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
    return LowRank(left_codes, right_codes, left_scale, right_scale)


@dataclass(frozen=True)
class Record:
    """How a layer was solved; printed by `lorq inspect`.

    Attributes:
        stop: why the rank was not larger; "none" for methods without a low-rank part.
        error_before: output error of plain rounding to nearest on the same kind of grid, relative to the
            output's energy, ``tr(D H D^T) / tr(W H W^T)``.
        error_after: the same of the result.
    """

    stop: str
    error_before: float
    error_after: float


@dataclass(frozen=True)
class QuantizedWeight:
    """A solved weight, ``W ~ (codes - zero_point) * scale + left @ right``.

    Attributes:
        codes: whole numbers ``0 .. 2^bits - 1``.
        scale: float16, in weight units.
        zero_point: the code of 0.0 for each group; None on symmetric grids, where it is ``2^(bits-1)``.
        bits: width of a code.
        low_rank: the factors, or None.
        record: how it was solved.
    """

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero_point: UInt8[Tensor, "out groups"] | None
    bits: int
    low_rank: LowRank | None = None
    record: Record = field(default_factory=lambda: Record("none", 0.0, 0.0))

    @property
    def shape(self) -> tuple[int, int]:
        out, in_ = self.codes.shape
        return out, in_

    @property
    def format(self) -> LayerFormat:
        return LayerFormat(
            bits=self.bits,
            group_size=self.codes.shape[1] // self.scale.shape[1],
            symmetric=self.zero_point is None,
            rank=self.low_rank.rank if self.low_rank else 0,
            factor_bits=8 if self.low_rank and self.low_rank.left_scale is not None else 16,
        )

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The full matrix that the stored parts stand for."""
        zero = 2 ** (self.bits - 1) if self.zero_point is None else self.zero_point
        weight = dequantize(self.codes, self.scale, zero, dtype=dtype)
        return weight + self.low_rank.dense(dtype) if self.low_rank else weight

    def stored_bits(self) -> int:
        """Every bit of this weight on disk; see `LayerFormat.stored_bits`."""
        return self.format.stored_bits(*self.shape)

    @property
    def bits_per_weight(self) -> float:
        return self.stored_bits() / self.codes.numel()
