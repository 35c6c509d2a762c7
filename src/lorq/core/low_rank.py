"""Low-rank factors as they are stored: rounding to 8 or 16 bits, and a fit that repairs the rounding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.half import stored_half
from lorq.core.linalg import times_lower
from lorq.core.packing import Layout
from lorq.core.sketch import rank1_sketch, sketch

FactorType = Literal["int8", "e4m3", "float16"]
# Largest magnitude of a stored entry; vectors of 8-bit types are scaled to reach it. For e4m3 that keeps the
# entries clear of its underflow: a unit vector of 4096 has entries near 2^-6, where its normal range ends.
FACTOR_TYPES: dict[str, tuple[torch.dtype, float]] = {
    "float16": (torch.float16, torch.finfo(torch.float16).max),
    "int8": (torch.int8, 127.0),
    "e4m3": (torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max),
}
_BY_DTYPE = {dtype: name for name, (dtype, _) in FACTOR_TYPES.items()}


@dataclass(frozen=True)
class LowRank:
    """The factors of the low-rank part, ``dense() = (left left_scale) (right_scale right)``.

    Attributes:
        left: (out, rank), float16; or int8 or float8_e4m3fn with ``left_scale``, one per column, float16.
        right: (rank, in), of the same type; 8-bit ones with ``right_scale``, one per row.
    """

    left: Tensor
    right: Tensor
    left_scale: Float[Tensor, "rank"] | None = None
    right_scale: Float[Tensor, "rank"] | None = None

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def factor_type(self) -> str:
        """Name in `FACTOR_TYPES`."""
        return _BY_DTYPE[self.left.dtype]

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

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


def factor_bits(factor_type: str) -> int:
    """Width of a stored entry: 16 or 8.

    Raises:
        ValueError: for an unknown type.
    """
    if factor_type not in FACTOR_TYPES:
        raise ValueError(f"factor_type must be one of {', '.join(FACTOR_TYPES)}, got {factor_type!r}")
    return 8 * FACTOR_TYPES[factor_type][0].itemsize


def factor_layout(out: int, in_: int, rank: int, factor_type: str) -> Layout:
    """Shape and dtype of every tensor that factors of this rank and type store, by the names of `LowRank`."""
    kind = FACTOR_TYPES[factor_type][0]
    layout: Layout = {"left": ((out, rank), kind), "right": ((rank, in_), kind)}
    if factor_bits(factor_type) == 8:
        layout |= {"left_scale": ((rank,), torch.float16), "right_scale": ((rank,), torch.float16)}
    return layout


def store_factors(
    left: Float[Tensor, "out rank"], right: Float[Tensor, "rank in"], *, factor_type: str
) -> LowRank | None:
    """Round factors to the type they are stored in; None if the rank is 0.

    Each pair is first balanced to equal largest magnitudes, ``max|l| = max|r|``, which leaves the product
    alone and keeps both inside float16's range.

    Args:
        factor_type: a name of `FACTOR_TYPES`. "int8" stores ``round(v / s)``, ``s = max|v| / 127`` for each vector;
            "e4m3" stores ``v / s`` as float8, ``s = max|v| / 448``; both keep ``s`` in float16.

    Raises:
        ValueError: for other types, or if a factor does not fit float16.
    """
    factor_bits(factor_type)  # refuses unknown types
    if left.shape[1] == 0:
        return None
    size_left, size_right = left.abs().amax(0), right.abs().amax(1)
    balance = (size_right / size_left.clamp(min=1e-30)).clamp(1e-30, 1e30).sqrt()
    left, right = left * balance, right / balance.unsqueeze(1)
    stored_half(torch.stack([left.abs().amax(), right.abs().amax()]), "low-rank factors")
    left_codes, left_scale = store_vectors(left.T, factor_type)
    right_codes, right_scale = store_vectors(right, factor_type)
    return LowRank(left_codes.T.contiguous(), right_codes, left_scale, right_scale)


def store_vectors(vectors: Float[Tensor, "*rank n"], factor_type: str) -> tuple[Tensor, Float[Tensor, "*rank"] | None]:
    """Vectors as they are stored, and a float16 scale for each where they take 8 bits."""
    dtype, top = FACTOR_TYPES[factor_type]
    if factor_type == "float16":
        return vectors.to(dtype), None
    # 2^-24 is float16's smallest positive number: a vector of zeros must not divide by zero.
    scale = (vectors.abs().amax(-1) / top).clamp(min=2.0**-24).to(torch.float16)
    codes = (vectors / scale.to(vectors.dtype).unsqueeze(-1)).clamp(-top, top)
    return (codes.round() if factor_type == "int8" else codes).to(dtype), scale


@dataclass(frozen=True)
class Metric:
    """In which norm a low-rank part is fitted: that of ``E C`` for a change ``E`` of the weight.

    On rows, ``apply`` is ``E -> E C`` and ``undo`` is ``V -> V C^-1``.
    """

    apply: Callable[[Tensor], Tensor]
    undo: Callable[[Tensor], Tensor]

    @classmethod
    def hessian(cls, factor: Float[Tensor, "in in"]) -> "Metric":
        """``C`` the lower Cholesky factor of the Hessian: the norm is the output error."""
        return cls(
            lambda e: times_lower(e, factor),
            lambda v: torch.linalg.solve_triangular(factor, v, upper=False, left=False),
        )

    @classmethod
    def activation(cls, alpha: Float[Tensor, "in"]) -> "Metric":
        """``C = diag(alpha)``: each input channel weighs as much as its activations."""
        return cls(lambda e: e * alpha, lambda v: v / alpha)

    def scaled(self, exponent: Tensor) -> "Metric":
        """``C / 2^exponent``."""
        return Metric(lambda e: torch.ldexp(self.apply(e), -exponent), lambda v: torch.ldexp(self.undo(v), exponent))


def r1svd(
    target: Float[Tensor, "out in"],
    metric: Metric,
    *,
    rank: int,
    factor_type: str = "int8",
    form: str = "block",
    iterations: int = 2,
    generator: torch.Generator,
) -> LowRank | None:
    """Factors, None at rank 0, rounded one pair at a time so that later pairs repair earlier rounding.

    With ``A = target C``, for each pair: power iteration for the leading right singular vector ``v`` of ``A``;
    ``r = round(v C^-1)``; the best ``l`` for the rounded ``r``, ``l = A (r C)^T / |r C|^2``, is rounded too; and
    ``A <- A - l (r C)`` with both as they are stored.

    Args:
        target: what the factors shall approximate, in weight units.
        metric: ``C``.
        rank, factor_type: number of pairs, at most min(out, in); of the stored factors, see `store_factors`.
        form: "rank1" starts each pair from a Gaussian vector (the paper); "block" from one blocked sketch of
            all pairs, which needs fewer products with ``A``.
        iterations: power iterations for each pair ("rank1") or of the blocked sketch ("block").
        generator: source of the test vectors, on the target's device.

    Raises:
        ValueError: if an option is out of range or ``target`` is not finite.

    Source:
        LoPRo, eq. 10-12 (R1SVD). Deviations: the left vector is fitted again to the rounded right one; the singular
        value lives in the vectors' scales; e4m3 on its range for unit vectors in e5m2; any metric.
    """
    factor_bits(factor_type)  # refuses unknown types
    if not 0 <= rank <= min(target.shape):
        raise ValueError(
            f"rank must be between 0 and min(out, in) = {min(target.shape)} for a target of shape "
            f"{tuple(target.shape)}, got {rank}"
        )
    rest = metric.apply(target)
    # Inputs may be so small that factors would leave float16's range, and squares float32's. In steps of four, so that
    # no digit of any factor changes.
    exponent = torch.frexp(rest.abs().amax()).exponent // 2 * 2
    metric, rest = metric.scaled(exponent), torch.ldexp(rest, -exponent)
    # The rank-1 form asks this only to check the other options.
    sketched = 0 if form == "rank1" else rank
    _, starts = sketch(rest, rank=sketched, form=form, iterations=iterations, generator=generator)
    if rank == 0:
        return None
    pairs = []
    for k in range(rank):
        if form == "rank1":
            _, v = rank1_sketch(rest, iterations=iterations, generator=generator)
        else:
            # What earlier rounding left over turns the vector a little; one power step follows it.
            v = rest.T @ (rest @ starts[k])
            v = v / v.norm().clamp(min=1e-30)
        pairs.append(_stored_pair(rest, v, metric, factor_type))
    left = torch.cat([pair.left for pair in pairs], 1)
    right = torch.cat([pair.right for pair in pairs])
    left_scales = [pair.left_scale for pair in pairs if pair.left_scale is not None]
    right_scales = [pair.right_scale for pair in pairs if pair.right_scale is not None]
    return LowRank(left, right, *(torch.cat(scales) for scales in (left_scales, right_scales) if scales))


def _stored_pair(rest: Float[Tensor, "out in"], v: Float[Tensor, "in"], metric: Metric, factor_type: str) -> LowRank:
    """Round one pair and take it out of ``rest``, in place."""
    one = v.new_ones(1, 1)
    rounded = store_factors(one, metric.undo(v.unsqueeze(0)), factor_type=factor_type)
    assert rounded is not None
    right = rounded.dense(v.dtype)  # (1, in), as it will be stored but for a factor
    image = metric.apply(right)  # (1, in)
    left = rest @ image.T / image.square().sum().clamp(min=1e-30)  # (out, 1)
    pair = store_factors(left, right, factor_type=factor_type)
    assert pair is not None
    stored_left, stored_right = pair.factors(v.dtype)
    rest.addmm_(stored_left, metric.apply(stored_right), alpha=-1)
    return pair
