"""Rounding: choose codes for a target matrix, given the second moments of its inputs."""

from collections.abc import Callable

from lorq.core.codes import IntCodes
from lorq.core.rounding.clip import RangeSearch, clip, search_range
from lorq.core.rounding.gptq import gptq, gptq_levels
from lorq.core.rounding.gptvq import gptvq
from lorq.core.rounding.nearest import nearest, nearest_levels

# Each takes (target, hessian, grid, *, search, damping) and returns codes.
ROUNDINGS: dict[str, Callable[..., IntCodes]] = {"nearest": nearest, "clip": clip, "gptq": gptq}

__all__ = [
    "ROUNDINGS",
    "RangeSearch",
    "clip",
    "gptq",
    "gptq_levels",
    "gptvq",
    "nearest",
    "nearest_levels",
    "search_range",
]
