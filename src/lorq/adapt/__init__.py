"""Training what lords has quantized: adapters of scale factors, and training through the rounding."""

from lorq.adapt.adapters import BASE, attach, load_adapter, save_adapter, use_adapter
from lorq.adapt.qat import cancel_qat, finish_qat, prepare_qat
from lorq.adapt.save import merge, save
from lorq.adapt.train import Settings, Trained, train

__all__ = [
    "BASE", "Settings", "Trained", "attach", "cancel_qat", "finish_qat", "load_adapter", "merge", "prepare_qat", "save",
    "save_adapter", "train", "use_adapter",
]  # fmt: skip
