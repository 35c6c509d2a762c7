"""The methods: each a frozen dataclass of settings with a pure `solve`."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from lorq.core.problem import Problem
from lorq.core.tile_factors import TileFormat
from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.methods.common import WIDTHS
from lorq.methods.flrq import FLRQ, FLRQPaper
from lorq.methods.gptq import GPTQ
from lorq.methods.lopro import LoPRo, LoPRoPaper
from lorq.methods.lords import LoRDS, LoRDSPaper
from lorq.methods.lrq import LRQ, LRQPaper
from lorq.methods.nearest import Nearest
from lorq.methods.tileq import TileQ, TileQPaper


@runtime_checkable
class Method(Protocol):
    """What a method must have. Its dataclass fields are the settings: options, JSON keys and help at once.

    Attributes:
        scope: what one call of `solve` must cover: "layer", nothing but the layer; "input", all layers that read one
            input; "experts", as "input", and all experts of a layer (`SharesFactors`); "block", all layers of a block
            against its output, with ``block_settings``, the names of the settings that they share.
        needs_stats: whether `solve` reads the input statistics, so that calibration is run.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def scope(self) -> str: ...
    @property
    def needs_stats(self) -> bool: ...
    @property
    def bits(self) -> int: ...

    @property
    def group_size(self) -> int: ...

    def solve(self, problem: Problem) -> dict[str, QuantizedWeight]:
        """Quantize the weights of a problem, by their names."""
        ...

    def largest(self, out: int, in_: int) -> LayerFormat:
        """The largest format that `solve` can return for a weight of this shape."""
        ...


def choices_of(method: Method) -> Mapping[str, tuple[Any, ...]]:
    """Settings that a budget chooses between, with their values: a method's own ``choices``, else widths of codes."""
    return getattr(method, "choices", {"bits": WIDTHS["scalar"]})


@runtime_checkable
class SharesFactors(Method, Protocol):
    """What a method of scope "experts" has besides."""

    def largest_experts(self, out: int, in_: int, experts: int) -> tuple[LayerFormat, TileFormat]:
        """The largest formats of an expert's weight, and of the factors that a projection's experts share."""
        ...


METHODS: dict[str, type[Method]] = {
    "flrq": FLRQ,
    "flrq-paper": FLRQPaper,
    "lopro": LoPRo,
    "lopro-paper": LoPRoPaper,
    "tileq": TileQ,
    "tileq-paper": TileQPaper,
    "lrq": LRQ,
    "lrq-paper": LRQPaper,
    "lords": LoRDS,
    "lords-paper": LoRDSPaper,
    "gptq": GPTQ,
    "nearest": Nearest,
}
