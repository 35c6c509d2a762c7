"""Text that the model writes itself: calibration without data, sampled with a seed and kept for the next run."""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lorq.models.locate import cache_dir, make_room
from lorq.models.windows import check_window_counts, positions_of, start_token_of
from lorq.progress import duration

if TYPE_CHECKING:  # importing a model class takes seconds; here it is only named
    import transformers
Sampled = Callable[[int, int], None]
# Part of every cache key: raise it when the sampling loop changes what it writes.
CACHE_FORMAT = 1
# After so many steps their time is known well enough, and told if the rest will take so long.
_ESTIMATE_AFTER, _LONG_SECONDS = 16, 600
_log = logging.getLogger(__name__)


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Dropout and the like off inside the block; afterwards every submodule is as it was."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


def self_windows(
    model: "transformers.PreTrainedModel",
    tokenizer: "transformers.PreTrainedTokenizerBase | None",
    *,
    windows: int,
    length: int,
    seed: int,
    batch: int = 16,
    temperature: float = 1.0,
    progress: Sampled | None = None,
) -> Int[Tensor, "windows length"]:
    """Windows that the model writes itself: calibration without any data.

    Every window starts with the start token (``bos`` of the tokenizer, else of the model's config, else
    ``eos`` of the tokenizer) and goes on with tokens sampled from the model's own distribution. Writing does
    not stop at an end token: the model goes on to the next document, until the window is full.

    Args:
        model: a causal language model that takes a key-value cache; its mode and weights stay as they are.
        tokenizer: the model's own, only its special tokens are used; None where there is none.
        windows: how many, at least 1.
        length: tokens of each window, the start token included, at least 2.
        seed: of this call's own generator; the global one is neither used nor moved.
        batch: windows written at the same time, at least 1; other batch sizes draw other texts.
        temperature: divides the logits, above 0; 1 is the model's own distribution.
        progress: called with (tokens sampled so far, tokens to sample) after every step.

    Returns:
        int64 tokens on the CPU, the same for the same model, seed, temperature and batch.

    Raises:
        ValueError: if there is no start token, or a setting is out of range.
        FloatingPointError: if a logit is not finite.
    """
    start = check_self_windows(
        tokenizer, model.config, windows=windows, length=length, batch=batch, temperature=temperature
    )
    # Allocated out here: a tensor born in inference mode could not be used in training later.
    tokens = torch.full((windows, length), start, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    total, began = windows * (length - 1), time.monotonic()
    with eval_mode(model), torch.inference_mode():
        for first in range(0, windows, batch):
            rows = tokens[first : first + batch]  # a view
            for step, logits in enumerate(_next_logits(model, rows), start=1):
                probabilities = (logits / temperature).softmax(-1)
                rows[:, step] = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
                if first == 0 and step == _ESTIMATE_AFTER:
                    _tell_of_hours((time.monotonic() - began) * total / (step * len(rows)))
                if progress is not None:
                    progress(first * (length - 1) + rows.shape[0] * step, total)
    return tokens


def _tell_of_hours(seconds: float) -> None:
    """What to do about it, if writing takes long."""
    if seconds > _LONG_SECONDS:
        _log.warning(
            "writing the calibration text takes about %s; fewer --samples or a shorter --seq-len take less, and a text "
            "(--calibration FILE, or python-docs) takes no time", duration(seconds),
        )  # fmt: skip


def _next_logits(model: "transformers.PreTrainedModel", rows: Tensor) -> Iterator[Tensor]:
    """Logits (rows, vocab) for column 1, 2, ... of ``rows``; the caller fills each column before the next."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for step in range(1, rows.shape[1]):
        last = rows[:, step - 1 : step].to(model.device)
        logits = model(input_ids=last, past_key_values=cache, use_cache=True).logits[:, -1]
        # Sampling in float32 on the CPU: one generator, the same draws, whatever device computes.
        logits = logits.float().cpu()
        if not bool(torch.isfinite(logits).all()):
            bad = int((~torch.isfinite(logits)).sum())
            raise FloatingPointError(
                f"logits must be finite to sample from, got {bad} NaN or infinite values of {logits.numel()} "
                f"at token {step}; the model overflows in {model.dtype}, load it in a wider dtype"
            )
        yield logits


def check_self_windows(
    tokenizer: Any, config: Any, *, windows: int, length: int, batch: int = 16, temperature: float = 1.0
) -> int:
    """The start token of `self_windows`, which are not written; its ValueErrors for settings."""
    check_window_counts(windows, length)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    longest = positions_of(config)
    if longest is not None and length > longest:
        raise ValueError(f"seq_len must be at most the model's {longest} positions, got {length}")
    return start_token_of(tokenizer, config)


def cached_self_windows(
    load_model: "Callable[[], transformers.PreTrainedModel]",
    tokenizer: "transformers.PreTrainedTokenizerBase | None",
    config: "transformers.PreTrainedConfig",
    *,
    fingerprint: str,
    dtype: torch.dtype,
    windows: int,
    length: int,
    seed: int,
    batch: int = 16,
    temperature: float = 1.0,
    progress: Sampled | None = None,
) -> Int[Tensor, "windows length"]:
    """``self_windows``, written once and kept in ``cache_dir()``; a kept result needs no model in memory.

    The file's name is the SHA-256 of all that decides the tokens. A file that does not hold what its name
    promises is logged and written again.

    Args:
        load_model: called only when nothing is kept; gives a model with this config and dtype of the weights.
        fingerprint: identifies the model's weights and config, for instance a checksum of its files.

    The others are as in ``self_windows``.

    Raises:
        ValueError: as in ``self_windows``; or if the fingerprint is empty or the model has another dtype.
        OSError: if the cache cannot be written; set ``LORQ_CACHE`` to a writable folder.
    """
    size: dict[str, Any] = dict(windows=windows, length=length, batch=batch, temperature=float(temperature))
    start = check_self_windows(tokenizer, config, **size)
    if not fingerprint:
        raise ValueError(f"fingerprint must identify the model, got {fingerprint!r}")
    key = {"format": CACHE_FORMAT, "model": fingerprint, "dtype": str(dtype), "start": start, "seed": seed}
    description = json.dumps(key | size, sort_keys=True)
    path = cache_dir() / f"self-{hashlib.sha256(description.encode()).hexdigest()}.safetensors"
    vocabulary = config.get_text_config().vocab_size
    if (kept := _read_cached(path, shape=(windows, length), vocabulary=vocabulary)) is not None:
        return kept
    make_room(path.parent, 8 * windows * length + (1 << 12))  # before the sampling, which takes minutes
    model = load_model()
    if model.dtype != dtype:
        raise ValueError(f"load_model must give a model of the dtype stated, {dtype}, got {model.dtype}")
    tokens = self_windows(model, tokenizer, seed=seed, progress=progress, **size)
    _write_cached(path, tokens, description)
    return tokens


def _read_cached(path: Path, *, shape: tuple[int, int], vocabulary: int) -> Tensor | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not path.exists():
        return None
    try:
        tokens = load(path.read_bytes())["tokens"]
    except (SafetensorError, KeyError, OSError) as error:
        problem = f"not a file of tokens ({error})"
    else:
        if tokens.shape != shape or tokens.dtype != torch.int64:
            problem = f"must be int64 of shape {shape}, is {tokens.dtype} of shape {tuple(tokens.shape)}"
        elif int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
            problem = f"tokens must be 0 .. {vocabulary - 1}, are {int(tokens.min())} .. {int(tokens.max())}"
        else:
            return tokens
    _log.warning("cached windows %s are corrupt, writing them again: %s", path, problem)
    return None


def _write_cached(path: Path, tokens: Tensor, description: str) -> None:
    from safetensors.torch import save

    # A unique temporary name, then a rename: readers and parallel writers never see half a file.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(save({"tokens": tokens}, metadata={"lorq": description}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
