"""lorq: low-rank quantization of Hugging Face language models at 2, 3 and 4 bits."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorq import _autoload
from lorq.version import __version__ as __version__

if TYPE_CHECKING:
    from lorq import adapt
    from lorq.evaluation import Evaluation, evaluate
    from lorq.generation import generate
    from lorq.methods import (
        FLRQ,
        GPTQ,
        LRQ,
        METHODS,
        FLRQPaper,
        LoPRo,
        LoPRoPaper,
        LoRDS,
        LoRDSPaper,
        LRQPaper,
        Nearest,
        TileQ,
    )  # fmt: skip
    from lorq.pipeline.quantize import quantize
    from lorq.runtime.hf import load
    from lorq.storage.report import Report, read_report

__all__ = [
    "FLRQ", "GPTQ", "LRQ", "METHODS", "Evaluation", "FLRQPaper", "LRQPaper", "LoPRo", "LoPRoPaper", "LoRDS",
    "LoRDSPaper", "Nearest", "Report", "TileQ", "adapt", "evaluate", "generate", "load", "quantize", "read_report",
]  # fmt: skip

# Public names come when they are asked for: `import torch` runs this file (entry point of `_autoload`) and must
# not pay for transformers.
_METHODS = (
    "FLRQ", "FLRQPaper", "GPTQ", "LRQ", "LRQPaper", "LoPRo", "LoPRoPaper", "LoRDS", "LoRDSPaper", "METHODS", "Nearest",
    "TileQ",
)  # fmt: skip
_HOME = dict.fromkeys(_METHODS, "methods") | {
    "Evaluation": "evaluation", "evaluate": "evaluation", "generate": "generation", "load": "runtime.hf",
    "quantize": "pipeline.quantize", "Report": "storage.report", "read_report": "storage.report",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "adapt":
        return import_module("lorq.adapt")
    if name not in _HOME:
        raise AttributeError(f"module 'lorq' has no attribute {name!r}; public names are {', '.join(__all__)}")
    return getattr(import_module(f"lorq.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


_autoload.register()
