"""Rounding: choose codes for a target matrix, given the second moments of its inputs."""

from collections.abc import Callable

from lorq.rounding.clip import RangeSearch, clip, search_range
from lorq.rounding.gptq import gptq
from lorq.rounding.gptvq import VectorRounded, gptvq
from lorq.rounding.nearest import Rounded, nearest

# Each takes (target, hessian, grid, *, search, damping) and returns Rounded.
ROUNDINGS: dict[str, Callable[..., Rounded]] = {"nearest": nearest, "clip": clip, "gptq": gptq}

__all__ = ["ROUNDINGS", "RangeSearch", "Rounded", "VectorRounded", "clip", "gptq", "gptvq", "nearest", "search_range"]
