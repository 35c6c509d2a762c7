"""Rounding: choose codes for a target matrix, given the second moments of its inputs."""

from collections.abc import Callable

from lorq.core.rounding.clip import RangeSearch, clip, search_range
from lorq.core.rounding.gptq import gptq, gptq_levels
from lorq.core.rounding.gptvq import VectorRounded, gptvq
from lorq.core.rounding.nearest import LevelRounded, Rounded, nearest, nearest_levels

# Each takes (target, hessian, grid, *, search, damping) and returns Rounded.
ROUNDINGS: dict[str, Callable[..., Rounded]] = {"nearest": nearest, "clip": clip, "gptq": gptq}

__all__ = [
    "ROUNDINGS",
    "LevelRounded",
    "RangeSearch",
    "Rounded",
    "VectorRounded",
    "clip",
    "gptq",
    "gptq_levels",
    "gptvq",
    "nearest",
    "nearest_levels",
    "search_range",
]
