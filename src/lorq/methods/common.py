"""What the methods share: their settings' ranges, the grid of a layer, and the record of a result."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.basis import SMALLEST_BLOCK, Basis, largest_block
from lorq.core.checks import Range
from lorq.core.codes import Codes, GgufGrid, IntGrid
from lorq.core.codes.gguf_blocks import TYPES
from lorq.core.codes.trellis import LARGEST_WINDOW, MOST_BITS
from lorq.core.codes.vectors import VECTOR_LENGTHS
from lorq.core.low_rank import LowRank
from lorq.core.rounding import RangeSearch, nearest
from lorq.core.stats import InputStats, output_energy
from lorq.core.weight import QuantizedWeight, Record, Tile

Bits = Annotated[int, Range(2, 8)]
GroupSize = Annotated[int, Range(1, minus_one="one group per row")]
Share = Annotated[float, Range(0, 1)]
Damping = Annotated[float, Range(0, 10)]
Window = Annotated[int, Range(8, LARGEST_WINDOW)]
Search = Literal["none", "saturate", "scale"]
GgufType = Literal[
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "tq1_0", "tq2_0"
]  # fmt: skip
SEARCHES: dict[Search, RangeSearch | None] = {
    "none": None,
    "saturate": RangeSearch(steps=20, depth=0.5, mode="saturate"),
    "scale": RangeSearch(steps=20, depth=0.5, mode="scale"),
}

# Widths of each kind of codes that have kernels (docs/kernels.md): what a budget chooses from, if nothing else is said.
WIDTHS = {"scalar": (2, 3, 4, 6, 8), "vector": tuple(VECTOR_LENGTHS), "trellis": tuple(range(1, MOST_BITS + 1))}

# Weights below this have scales that float16 holds with few digits, or not at all; and so much of their squares may be
# lost without a word.
_SMALL, _MOST_LOST = 2.0**-14, 0.25
# Rows of a layer whose errors are told.
_ROWS = 1024
# Of the largest: what a channel's mean magnitude counts at least in the activation scale.
_LEAST_MEAN = 1e-5

M = TypeVar("M")


def preset(kind: type[M]) -> type[M]:
    """Make a subclass of a method whose body only names other defaults a method of its own.

    A class and not an instance: reports and configs tell a method's name by the type of its settings.

    Raises:
        TypeError: if the body names what is no setting.
    """
    inherited = get_type_hints(kind.__base__, include_extras=True)
    given = [name for name in vars(kind) if not name.startswith("__")]
    if unknown := sorted(set(given) - set(inherited)):
        raise TypeError(f"a preset must name settings of {kind.__base__}, got {', '.join(unknown)}")
    kind.__annotations__ = {name: inherited[name] for name in given}
    return dataclass(frozen=True)(kind)


def check_codebook(method: Any) -> None:
    """Refuse bits that a method's kind of codes does not have, and settings that trellis codes cannot keep to.

    Raises:
        ValueError: naming the settings.
    """
    known = range(2, 9) if method.codebook == "scalar" else WIDTHS[method.codebook]
    if method.bits not in known:
        raise ValueError(f"bits must be {', '.join(map(str, known))} with {method.codebook} codes, got {method.bits}")
    if method.codebook == "trellis":
        if method.rounding != "gptq" or method.symmetric:
            raise ValueError(
                "trellis codes pass errors on and have no zero points, got "
                f"rounding {method.rounding!r}, symmetric {method.symmetric}; leave them away"
            )
        if method.window < method.bits + 4:
            raise ValueError(
                f"window must be at least 4 more than bits, got window {method.window}, bits {method.bits}"
            )


def rotation(width: int) -> Basis:
    """All columns of a weight in the largest blocks that fit, up to 256; none where only pairs would.

    Example:
        >>> rotation(576).block, rotation(4096).block, rotation(90).block
        (64, 256, 0)
    """
    block = largest_block(width)
    return Basis(None, block if block >= SMALLEST_BLOCK else 0, 0)


def layer_group(width: int, group_size: int) -> int:
    """Columns of a group in a layer of ``width`` columns; -1 becomes the width.

    Raises:
        ValueError: if the group size does not divide the width.
    """
    size = width if group_size == -1 else group_size
    if width % size:
        raise ValueError(f"group_size must divide the width, got group_size {size} and width {width}")
    return size


def layer_grid(width: int, bits: int, group_size: int, symmetric: bool) -> IntGrid:
    """The grid for a layer of ``width`` columns."""
    return IntGrid(bits, layer_group(width, group_size), symmetric)


def gguf_grid(in_: int, grid: str) -> GgufGrid | None:
    """The grid of a GGUF type, for a layer of ``in_`` columns; None for names that are no type.

    Raises:
        ValueError: if the type's blocks do not divide the width.
    """
    if grid not in TYPES:
        return None
    format = GgufGrid(grid)
    format.check(1, in_)
    return format


def gguf_choices(grid: str) -> dict[str, tuple[Any, ...]]:
    """What a budget chooses from where a GGUF type is asked for: the types with blocks of no more columns."""
    return {"grid": tuple(name for name, type in TYPES.items() if type.block <= TYPES[grid].block)}


def needed(stats: InputStats | None) -> InputStats:
    """The statistics, for methods that need them; a ValueError if there are none."""
    if stats is None:
        raise ValueError("this method needs input statistics, got None; calibrate first")
    return stats


def row_weights(stats: InputStats) -> Float[Tensor, "out"] | None:
    """What an error of each output costs, where gradients have told it: the root of its mean squared gradient.

    The root, as few tokens tell it: the squares themselves do no better (docs/log.md).
    """
    return None if stats.output_weights is None else stats.output_weights.clamp(min=1e-6).sqrt()


def activation_scale(stats: InputStats, exponent: float) -> Float[Tensor, "in"]:
    """The activation scale: what the weight's columns are multiplied by before they are sketched.

        alpha = mean|x|^exponent / sqrt(max * min)

    Source:
        FLRQ, eq. 10-11; LoPRo, eq. 4. The constant cancels; it keeps float32 in range. The floor is ours, 1e-5 of the
        largest mean, for channels that are never active. The authors' code clamps what it has raised to the power, at
        1e-14 in bfloat16 models and 1e-4 in float16 ones: that would make 65 to 95 % of the channels of SmolLM2's first
        q and o alike (plain tokens), and depends on the inputs' unit.
    """
    largest = float(stats.mean_abs.max()) or 1.0
    means = stats.mean_abs.clamp(min=_LEAST_MEAN * largest)
    return (means / math.sqrt(float(means.max()) * float(means.min()))) ** exponent


def assemble(
    weight: Float[Tensor, "out in"],
    codes: Codes,
    low_rank: LowRank | Tile | None,
    *,
    stop: str,
    stats: InputStats | None,
    basis: Basis | None = None,
    plain: Codes | None = None,
    note: str = "",
) -> QuantizedWeight:
    """Put a result together and measure it against rounding to nearest in as many bits and groups, ``plain``.

    Without statistics (methods that need none) the errors are those for white inputs. Of layers of many rows some are
    measured, see `_measured`.
    """

    result = QuantizedWeight(codes, low_rank, basis)
    delta = result.dense().sub_(weight)
    note = "; ".join(filter(None, (note, _lost(weight, delta))))
    rows = _measured(weight)
    weight, delta = weight[rows], delta[rows]
    total = _energy(weight, stats)
    if exact := not 1e-30 < total < math.inf:  # numbers whose squares leave float32
        total = _energy(weight, stats, exact=True) or 1.0
    after = _energy(delta, stats, exact=exact) / total
    if plain is codes:
        return replace(result, record=Record(stop, after, after, note))
    rounded = (
        nearest(weight, None, codes.format.plain(weight.shape[1])).decode() if plain is None else plain.decode()[rows]
    )
    before = _energy(rounded.sub_(weight), stats, exact=exact) / total
    return replace(result, record=Record(stop, before, after, note))


def missed(delta: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]) -> float:
    """``tr(D H D^T)`` of the rows that `_measured` chooses: which of some results is kept."""
    return float(output_energy(delta[_measured(delta)], hessian))


def _measured(weight: Float[Tensor, "out in"]) -> Tensor | slice:
    """The rows on which a layer's errors are measured: all, or of more than twice ``_ROWS`` so many, drawn at random.

    All rows of a layer of 4096 x 4096 take longer than its rounding by `gptq`. What some tell differs by 4 to 6
    hundredths from what all tell (docs/log.md).
    """
    out = weight.shape[0]
    if out <= 2 * _ROWS:
        return slice(None)
    drawn = torch.randperm(out, generator=torch.Generator().manual_seed(0))[:_ROWS]
    return drawn.sort().values.to(weight.device)


def _energy(delta: Tensor, stats: InputStats | None, *, exact: bool = False) -> float:
    """What a change of the weight does to the output, mean squared; in float64 where that is asked for."""
    delta = delta.double() if exact else delta
    if stats is None:
        return float(torch.linalg.vector_norm(delta)) ** 2
    return float(output_energy(delta, stats.hessian.double() if exact else stats.hessian))


def _lost(weight: Tensor, delta: Tensor) -> str:
    """Says so where a weight is so small that float16 has no scales for it; else nothing."""
    largest = float(weight.abs().max())
    if not 0 < largest < _SMALL:
        return ""
    share = min(1.0, float(delta.double().square().sum() / weight.double().square().sum()))
    if share < _MOST_LOST:
        return ""
    return (
        f"its weights are too small for scales in float16, the largest is {largest:.1e}: {share:.0%} of their squares "
        "is lost"
    )
