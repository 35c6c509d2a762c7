"""Training what lords has quantized: adapters of scale factors, and training through the rounding."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorq.adapt.adapters import BASE, attach, load_adapter, save_adapter, use_adapter
    from lorq.adapt.qat import cancel_qat, finish_qat, prepare_qat
    from lorq.adapt.regroup import to_groups
    from lorq.adapt.saving import merge, save
    from lorq.adapt.settings import Groups, Settings
    from lorq.adapt.training import Trained, train

__all__ = [
    "BASE", "Groups", "Settings", "Trained", "attach", "cancel_qat", "finish_qat", "load_adapter", "merge",
    "prepare_qat", "save", "save_adapter", "to_groups", "train", "use_adapter",
]  # fmt: skip

# Public names come when they are asked for: the command line reads `Settings` without torch.
_HOME = {
    "BASE": "adapters", "attach": "adapters", "load_adapter": "adapters", "save_adapter": "adapters",
    "use_adapter": "adapters", "cancel_qat": "qat", "finish_qat": "qat", "prepare_qat": "qat", "merge": "saving",
    "save": "saving", "Groups": "settings", "Settings": "settings", "Trained": "training", "to_groups": "regroup",
    "train": "training",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lorq.adapt' has no attribute {name!r}; public names are {', '.join(__all__)}")
    return getattr(import_module(f"lorq.adapt.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
