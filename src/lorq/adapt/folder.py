"""What is known of adapters and of what takes them from small files alone, before torch is there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorq.models.locate import full_path
from lorq.storage.atomic import TEMPORARY
from lorq.storage.json_files import read_json, some_of
from lorq.storage.lock import refuse_busy
from lorq.storage.out_folder import begins_again

ADAPTER_CONFIG = "lorq_adapter.json"
ADAPTER_TENSORS = "lorq_adapter.safetensors"  # is written first
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


def new_folder(out: Path) -> Path:
    """Refuse to write into what is there, but for what the same command has left there half.

    Raises:
        FileExistsError: saying what to do.
    """
    out = full_path(out)
    refuse_busy(out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} must be a new folder, it is a file; choose another name")
    present = [entry.name for entry in out.iterdir()] if out.is_dir() and not begins_again(out) else []
    if present := [name for name in present if not name.endswith(TEMPORARY)]:
        if present != [ADAPTER_TENSORS]:
            raise FileExistsError(
                f"{out} must be a new folder, it has {some_of(present)}; choose another, or delete it first"
            )
    return out


def check_trainable(model: str | Path, mode: str = "peft") -> None:
    """Refuse a folder whose config says that its layers cannot train in this mode, with a ValueError.

    Anything but a folder is not looked at.
    """
    path = full_path(model) / "config.json"
    if path.is_file():
        quantization = read_json(path).get("quantization_config")
        quantization = quantization if isinstance(quantization, dict) else {}
        layers = quantization.get("layers")
        check_formats(str(model), mode, layers if isinstance(layers, dict) else {}, bool(quantization.get("tiles")))


def check_formats(model: str, mode: str, formats: Mapping[str, Any], shares: bool) -> None:
    """Refuse layers that cannot train in this mode, with a ValueError.

    Args:
        model: how the error calls it.
        formats: what its config says of each layer (`lorq.storage.config.write_format`).
        shares: whether experts share factors.
    """
    if any(isinstance(format, dict) and format.get("scale_rank") for format in formats.values()):
        return
    if mode != "qat" or not formats:
        raise untrainable(model, len(formats))
    beside = {name: _beside(format) for name, format in formats.items()}
    if shares or any(beside.values()):
        name, what = next((pair for pair in beside.items() if pair[1]), ("its experts", "factors that they share"))
        raise ValueError(
            f"mode qat trains weights, and scales of groups or of low rank, and nothing beside them, {model} has "
            f"{what} ({name}); quantize it with gptq, nearest, lrq or lords"
        )


def _beside(format: Any) -> str:
    """What a layer has that does not train through the rounding; nothing if it is integers or levels alone."""
    own: dict[str, Any] = format if isinstance(format, dict) else {"codes": {"kind": "unknown"}}
    if "codes" in own:
        return f"codes of kind {own['codes'].get('kind')}"
    if own.get("vector", 1) > 1:
        return "codes of vectors"
    if own.get("rank"):
        return f"low-rank factors of rank {own['rank']}"
    return "weights in another basis" if own.get("permuted") or own.get("rotation_block") else ""


def untrainable(model: str, packed: int) -> ValueError:
    """The error for a model of so many packed layers, none of them with scale factors."""
    what = f"{packed} packed layers, none of them with scale factors" if packed else "no packed layers"
    return ValueError(
        f"only models quantized with lords take adapters, {model} has {what}; quantize it with lords"
        + (" (integer codes in groups train with mode qat)" if packed else "")
    )
