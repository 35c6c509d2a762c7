"""What the methods share: checks of settings, the grid of a layer, and the record of a result."""

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.grids import IntGrid
from lorq.rounding import RangeSearch, Rounded, nearest
from lorq.stats import InputStats, output_energy
from lorq.weight import LowRank, QuantizedWeight, Record

SEARCHES = {
    "none": None,
    "saturate": RangeSearch(steps=20, depth=0.5, mode="saturate"),
    "scale": RangeSearch(steps=20, depth=0.5, mode="scale"),
}


def check_grid(bits: int, group_size: int) -> None:
    """Refuse widths and group sizes that no grid has.

    Raises:
        ValueError: naming the setting, its range and the value.
    """
    if bits not in range(2, 9):
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    if group_size < 1 and group_size != -1:
        raise ValueError(f"group_size must be at least 1, or -1 for one group per row, got {group_size}")


def check_choice(name: str, value: str, known: object) -> None:
    """Refuse a name that is not in a table, and list those that are.

    Raises:
        ValueError: naming the setting, the value and the known names.
    """
    names = list(known)  # type: ignore[call-overload]
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")


def check_range(name: str, value: float | int, low: float | int, high: float | int) -> None:
    """Refuse a number outside ``low .. high``.

    Raises:
        ValueError: naming the setting, its range and the value.
    """
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, got {value}")


def layer_grid(width: int, *, bits: int, group_size: int, symmetric: bool) -> IntGrid:
    """The grid for a layer of ``width`` columns; -1 becomes the width."""
    return IntGrid(bits, width if group_size == -1 else group_size, symmetric)


def needed(stats: InputStats | None) -> InputStats:
    """The statistics, for methods that need them.

    Raises:
        ValueError: if there are none.
    """
    if stats is None:
        raise ValueError("this method needs input statistics, got None; calibrate first")
    return stats


def assemble(
    weight: Float[Tensor, "out in"],
    rounded: Rounded,
    low_rank: LowRank | None,
    *,
    stop: str,
    hessian: Float[Tensor, "in in"] | None,
) -> QuantizedWeight:
    """Put a result together and measure it against plain rounding to nearest on the same kind of grid.

    Without a Hessian (methods that need no statistics) the errors are those for white inputs.
    """
    h = torch.eye(weight.shape[1], device=weight.device) if hessian is None else hessian
    total = float(output_energy(weight, h).clamp(min=1e-30))
    plain = float(output_energy(weight - nearest(weight, None, rounded.grid).dense(), h)) / total
    result = QuantizedWeight(
        codes=rounded.codes.to(torch.uint8),
        scale=rounded.scale.to(torch.float16),
        zero_point=None if rounded.grid.symmetric else rounded.zero_point.to(torch.uint8),
        bits=rounded.grid.bits,
        low_rank=low_rank,
    )
    after = float(output_energy(weight - result.dense(), h)) / total
    return QuantizedWeight(**{**vars(result), "record": Record(stop=stop, error_before=plain, error_after=after)})
