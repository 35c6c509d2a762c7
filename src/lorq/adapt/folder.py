"""What is known of adapters and of what takes them from small files alone, before torch is there."""

from pathlib import Path
from typing import Any

from lorq.models.locate import full_path
from lorq.storage.json_files import read_json

ADAPTER_CONFIG = "lorq_adapter.json"
ADAPTER_VERSION = 1


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """What an adapter's folder says of itself: version, base, ranks.

    Raises:
        FileNotFoundError: if the folder has no adapter.
        ValueError: if it is damaged, or of a newer version.
    """
    folder = full_path(folder)
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {ADAPTER_CONFIG}: no adapter is there; name a folder that lorq adapt wrote"
        )
    config = read_json(path)
    version = config.get("lorq_adapter")
    if version != ADAPTER_VERSION:
        raise ValueError(f"{path} has adapter version {version!r}, this lorq reads {ADAPTER_VERSION}; upgrade lorq")
    return config


def check_trainable(model: str | Path) -> None:
    """Refuse a folder whose config says that its layers have no scale factors, with a ValueError.

    Anything but a folder is not looked at.
    """
    path = full_path(model) / "config.json"
    if path.is_file():
        quantization = read_json(path).get("quantization_config")
        layers = quantization.get("layers") if isinstance(quantization, dict) else None
        formats = layers.values() if isinstance(layers, dict) else ()
        if not any(isinstance(format, dict) and format.get("scale_rank") for format in formats):
            raise untrainable(str(model), len(formats))


def untrainable(model: str, packed: int) -> ValueError:
    """The error for a model of so many packed layers, none of them with scale factors."""
    what = f"{packed} packed layers, none of them with scale factors" if packed else "no packed layers"
    return ValueError(
        f"only models quantized with lords take adapters and training, {model} has {what}; quantize it with lords"
    )
