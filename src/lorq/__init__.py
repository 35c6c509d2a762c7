"""lorq: low-rank quantization of Hugging Face language models at 2, 3 and 4 bits."""

from importlib import import_module
from sys import modules
from typing import TYPE_CHECKING, Any

from lorq import _autoload, pools
from lorq.version import __version__ as __version__

if TYPE_CHECKING:
    from lorq import adapt as adapt
    from lorq.evaluation import Evaluation as Evaluation
    from lorq.evaluation import evaluate as evaluate
    from lorq.exporting import export as export
    from lorq.exports.request import GgufOptions as GgufOptions
    from lorq.foreign.run import compensate as compensate
    from lorq.generation import generate as generate
    from lorq.methods import *  # noqa: F403
    from lorq.pipeline.presets import preset as preset
    from lorq.pipeline.quantize import quantize as quantize
    from lorq.publishing import push as push
    from lorq.reporting import report as report
    from lorq.runtime.hf import load as load
    from lorq.storage.report import Report as Report
    from lorq.storage.report import read_report as read_report
    from lorq.tuning import tune as tune
    from lorq.verifying import Verified as Verified
    from lorq.verifying import verify as verify

# Public names come when they are asked for: `import torch` runs this file (entry point of `_autoload`) and must
# not pay for transformers. The methods' classes are public by standing in METHODS.
_HOME = {
    "METHODS": "methods", "Evaluation": "evaluation", "GgufOptions": "exports.request", "evaluate": "evaluation",
    "export": "exporting", "generate": "generation", "load": "runtime.hf", "compensate": "foreign.run",
    "preset": "pipeline.presets", "push": "publishing", "quantize": "pipeline.quantize", "tune": "tuning",
    "Report": "storage.report", "report": "reporting", "read_report": "storage.report",
    "Verified": "verifying", "verify": "verifying",
}  # fmt: skip


def _methods() -> dict[str, Any]:
    return {kind.__name__: kind for kind in import_module("lorq.methods").METHODS.values()}


def _public() -> list[str]:
    return [*_methods(), *_HOME, "adapt"]


def __getattr__(name: str) -> Any:
    if name == "adapt":
        return import_module("lorq.adapt")
    if name in _HOME:
        return getattr(import_module(f"lorq.{_HOME[name]}"), name)
    if name == "__all__":
        return _public()
    if name.startswith("_"):  # tools look for such names everywhere; torch is too much to pay for them
        raise AttributeError(f"module 'lorq' has no attribute {name!r}")
    if name in (methods := _methods()):
        return methods[name]
    raise AttributeError(f"module 'lorq' has no attribute {name!r}; public names are {', '.join(_public())}")


def __dir__() -> list[str]:
    return sorted([*_public(), "__version__"])


if "torch" not in modules:  # else it has read them, and other programs' processes are not ours to change
    pools.set_up()
_autoload.register()
