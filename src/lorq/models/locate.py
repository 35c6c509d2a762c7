"""MODEL -> a local Hugging Face folder: a folder, a hub id, or a GGUF file."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorq.storage.atomic import rename_synced, require_space, sha256_of, write_synced
from lorq.storage.companions import WEIGHTS
from lorq.storage.names import JOURNAL

if TYPE_CHECKING:  # a wrong path is refused before torch is there
    import torch
logger = logging.getLogger(__name__)
# Raised where the same file decodes to something else than before, which the cache may hold still.
_DECODING = 2


def cache_dir() -> Path:
    """Where lorq keeps what is slow to make again: ``$LORQ_CACHE``, else ``~/.cache/lorq``.

    Raises:
        ValueError: if there is no home folder.
    """
    try:
        return Path(os.environ.get("LORQ_CACHE") or "~/.cache/lorq").expanduser()
    except RuntimeError:
        raise ValueError(
            "lorq keeps decoded models and texts in the home folder, and there is none; set LORQ_CACHE to a folder "
            "that can be written to"
        ) from None


def make_room(folder: Path, needed_bytes: int) -> None:
    """Make a folder of the cache, for so many bytes that are not there yet.

    Raises:
        OSError: if it cannot be written to, or the disk has no room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # a folder may be there and not be writable
            pass
        require_space(folder, needed_bytes)
    except OSError as error:
        error.add_note("while making room in lorq's cache; set LORQ_CACHE to another folder that can be written to")
        raise


def full_path(path: str | os.PathLike[str]) -> Path:
    """A path whose ``~`` is a home folder; a ValueError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path} names a home folder, and there is none; give the whole path") from None


def resolve_model(model: str | os.PathLike[str]) -> Path:
    """A local folder with the config and weights of ``model``.

    Args:
        model: a local Hugging Face folder; a ``.gguf`` file, which is decoded into a folder in the cache (`cache_dir`),
            once, in float16, or in float32 where that does not hold it; or a hub id such as ``org/name``, which
            huggingface_hub downloads into its own cache.

    Raises:
        FileNotFoundError: if it is none of the three.
        ValueError: if a GGUF file cannot be decoded.
    """
    check_model(model)
    path = full_path(model)
    if path.is_dir():
        return path
    return _decoded_gguf(path) if path.is_file() else _downloaded(str(model))


def check_model(model: str | os.PathLike[str]) -> None:
    """Refuse what a look at the path shows to be no model; what may be a hub id passes.

    Raises:
        FileNotFoundError: for a folder without a config, and for a path where nothing is.
        ValueError: for a file of another kind.
    """
    path = full_path(model)
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


def refuse_adapter(folder: Path) -> None:
    """Refuse a model's folder with an adapter of peft, which transformers would load on top of the weights.

    Raises:
        ValueError: saying what to do.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} also has an adapter (adapter_config.json), which lorq would leave out and transformers loads; "
            "merge it into the weights first (peft's merge_and_unload), or remove its files"
        )


def _downloaded(model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    # All that may travel with the weights; of these none that neither lorq nor transformers reads.
    others = [f"*{suffix}" for suffix in WEIGHTS if suffix not in (".safetensors", ".index.json")]
    try:
        return Path(snapshot_download(model_id, ignore_patterns=[*others, "consolidated*", "original/*", "onnx/*"]))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"no such model: there is no folder or file {model_id}, and the hub did not give it either ({reason})"
        ) from error


def _decoded_gguf(path: Path) -> Path:
    """The folder that a GGUF file decodes to; decoded once, then taken from the cache."""
    from lorq.models.gguf_source import decode_gguf

    name = f"gguf/{path.stem}-{_content_of(path)[:16]}-{_DECODING}"
    return cached_folder(name, lambda work: decode_gguf(path, work, make_room))


def _content_of(path: Path) -> str:
    """sha256 of a file, computed once and then known by what no change of the file leaves as it is."""
    stat, real = path.stat(), str(path.resolve())
    seen = json.dumps([real, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    note = cache_dir() / "gguf" / "known" / hashlib.sha256(seen.encode()).hexdigest()
    if note.is_file() and len(known := note.read_text()) == 64:
        return known
    make_room(note.parent, 0)
    logger.info("reading %s", path)
    known = sha256_of(path)
    with suppress(OSError):  # another process may have noted it; nothing depends on it
        rename_synced(write_synced(note, known.encode()), note)
    return known


def cached_folder(name: str, make: Callable[[Path], None]) -> Path:
    """A model folder in the cache, made once: ``make`` fills another folder, which is then renamed.

    The name, below `cache_dir`, tells everything that decides the content.
    """
    folder = cache_dir() / name
    if (folder / "config.json").is_file():
        return folder
    make_room(folder.parent, 0)
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


def load_dense(folder: Path, dtype: "torch.dtype") -> Any:
    """The whole original model; of one that others have quantized what that stands for."""
    from lorq.models.blocks import StreamedModel
    from lorq.models.quantized import is_foreign
    from lorq.models.skeleton import put_tensor, read_config, with_weights  # and with them torch

    if is_foreign(folder):
        streamed = StreamedModel.open(folder, dequantize=True)
        for name in streamed.model.state_dict(keep_vars=True):
            tensor = streamed.stored_tensor(name)
            put_tensor(streamed.model, name, tensor.to(dtype) if streamed.is_parameter(name) else tensor)
        return streamed.model
    return with_weights(read_config(folder), folder, dtype)
