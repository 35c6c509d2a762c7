"""Rounding: choose codes for a target matrix, given the second moments of its inputs."""

from collections.abc import Callable

from torch import Tensor

from lorq.core.codes import IntCodes, IntGrid
from lorq.core.rounding.clip import RangeSearch, clip
from lorq.core.rounding.gguf import gguf, gguf_nearest
from lorq.core.rounding.gptq import gptq, gptq_levels
from lorq.core.rounding.gptvq import gptvq
from lorq.core.rounding.nearest import nearest, nearest_levels
from lorq.core.rounding.trellis import trellis
from lorq.core.stats import PreparedHessian

# Of a target, its inputs' Hessian, a grid and the ranges to try; a rounding leaves what it has no use for.
Rounding = Callable[[Tensor, PreparedHessian, IntGrid, RangeSearch | None], IntCodes]
ROUNDINGS: dict[str, Rounding] = {"nearest": nearest, "clip": clip, "gptq": gptq}

__all__ = [
    "ROUNDINGS",
    "RangeSearch",
    "clip",
    "gguf",
    "gguf_nearest",
    "gptq",
    "gptq_levels",
    "gptvq",
    "nearest",
    "nearest_levels",
    "trellis",
]
