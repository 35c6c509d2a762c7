"""MODEL -> a local Hugging Face folder: a folder, a hub id, or a GGUF file."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorq.storage.names import JOURNAL

if TYPE_CHECKING:  # a wrong path is refused before torch is there
    import torch
logger = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Where lorq keeps what is slow to make again: ``$LORQ_CACHE``, else ``~/.cache/lorq``."""
    return Path(os.environ.get("LORQ_CACHE") or "~/.cache/lorq").expanduser()


def resolve_model(model: str | os.PathLike[str]) -> Path:
    """A local folder with the config and weights of ``model``.

    Args:
        model: a local Hugging Face folder; a ``.gguf`` file, which is decoded in float16 into a folder in the cache
            (`cache_dir`), once; or a hub id such as ``org/name``, which huggingface_hub downloads into its own cache.

    Raises:
        FileNotFoundError: if it is none of the three.
        ValueError: if a GGUF file cannot be decoded.
    """
    check_model(model)
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    return _decoded_gguf(path) if path.is_file() else _downloaded(str(model))


def check_model(model: str | os.PathLike[str]) -> None:
    """Refuse what a look at the path shows to be no model; what may be a hub id passes.

    Raises:
        FileNotFoundError: for a folder without a config, and for a path where nothing is.
        ValueError: for a file of another kind.
    """
    path = Path(model).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / JOURNAL).exists():
            raise FileNotFoundError(
                f"{path} is an unfinished lorq folder and cannot be loaded; "
                "finish it with the same `lorq quantize` command and --resume"
            )
        raise FileNotFoundError(f"a model folder must hold config.json, {path} does not; is this the right folder?")
    if path.is_file() and path.suffix.lower() != ".gguf":
        raise ValueError(f"MODEL must be a folder, a hub id or a .gguf file, got the file {path}")
    # A hub id is one or two plain names; anything else was meant as a path.
    parts = str(model).split("/")
    named = len(parts) <= 2 and not path.is_absolute() and all(part.strip(".") for part in parts)
    if not path.exists() and (not named or path.suffix == ".gguf"):
        raise FileNotFoundError(f"no such model: {model} is neither a folder, nor a .gguf file, nor a hub id")


def _downloaded(model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(model_id, allow_patterns=patterns))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"no such model: there is no folder or file {model_id}, and the hub did not give it either ({reason})"
        ) from error


def _decoded_gguf(path: Path) -> Path:
    """The folder that a GGUF file decodes to; decoded once, then taken from the cache."""
    stat = path.stat()
    with path.open("rb") as file:
        head = file.read(1 << 20)
    key = hashlib.sha256(head + json.dumps([path.name, stat.st_size]).encode()).hexdigest()[:16]
    return cached_folder(f"gguf/{path.stem}-{key}", lambda work: _decode_gguf(path, work))


def cached_folder(name: str, make: Callable[[Path], None]) -> Path:
    """A model folder in the cache, made once: ``make`` fills another folder, which is then renamed.

    The name, below `cache_dir`, tells everything that decides the content.
    """
    folder = cache_dir() / name
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    logger.info("making %s", folder)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        make(work)
        os.replace(work, folder)
    except OSError:
        # Another process may have put the same folder there first.
        if not (folder / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _decode_gguf(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError("reading a GGUF file needs the gguf package: pip install 'lorq[gguf]'") from error
    name, parent = path.name, str(path.parent)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            parent, gguf_file=name, dtype="float16", quantization_config=GgufConfig(dequantize=True)
        )
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{path} could not be read as a GGUF language model: {error}") from error
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(parent, gguf_file=name).save_pretrained(folder)


def load_dense(folder: Path, dtype: "torch.dtype") -> Any:
    """The whole original model."""
    from lorq.models.skeleton import model_class, read_config  # and with them torch

    return model_class(read_config(folder)).from_pretrained(folder, dtype=dtype).eval()
