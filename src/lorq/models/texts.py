"""Text to token windows: named texts and files."""

import hashlib
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from lorq.models.locate import full_path

if TYPE_CHECKING:  # importing a model class takes seconds; here it is only named
    import transformers
Split = Literal["calibration", "evaluation"]
SELF = "self"
# c4 is 360 million documents; the first 2,000 hold about a million tokens, 400 windows of 2048.
C4_DOCUMENTS = 2000


@dataclass(frozen=True)
class Windows:
    """Calibration tokens, int64, and where they come from: the text's name or path, or ``self``.

    Equal ``sha256``, of the tokens as little-endian int64, row by row, mean equal calibration.
    """

    tokens: Int[Tensor, "windows length"]
    source: str
    sha256: str


def calibration_windows(
    source: str,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    *,
    samples: int,
    seq_len: int,
    self_writer: Callable[[], Tensor],
) -> Windows:
    """``samples`` windows of ``seq_len`` tokens of ``source``; the same arguments give the same windows.

    Args:
        source: a source of ``load_text``, or ``self`` for text that the model writes.
        tokenizer: the model's own; unused for ``self``.
        samples: windows wanted, at least 1.
        seq_len: tokens of each window, at least 2.
        self_writer: returns the windows of ``self``; a ValueError if they are of another shape.
    """
    if source != SELF:
        text = load_text(source, split="calibration")
        tokens = token_windows(text, tokenizer, windows=samples, length=seq_len, what=source)
    else:
        tokens = self_writer()
        if tokens.shape != (samples, seq_len) or tokens.dtype != torch.int64:
            raise ValueError(
                f"self_writer must return int64 windows of shape {(samples, seq_len)}, "
                f"got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
    return Windows(tokens, source, hashlib.sha256(tokens.cpu().numpy().astype("<i8").tobytes()).hexdigest())


def load_text(source: str, *, split: Split = "calibration") -> str:
    """The text behind ``source``, as one string.

    Args:
        source: ``python-docs`` (the English documentation every CPython carries, 465,000 characters),
            ``python-docs-even`` and ``python-docs-odd`` (every other topic of it), ``wikitext2`` and ``c4`` (through
            the package ``datasets``, by network or from its cache), or the path of a UTF-8 text file or a ``.jsonl``
            file (a JSON string or an object with the field ``text`` on every line). Documents are joined by an empty
            line. A name wins over a file of that name.
        split: ``calibration`` reads training data, ``evaluation`` held-out data. ``python-docs`` and files
            have no split: both uses get the same text.

    Raises:
        FileNotFoundError: if the source is neither a known name nor a file.
        ValueError: if the file is empty, not UTF-8, or has a bad line; or if the split is unknown.
        ImportError: if the source needs ``datasets`` and it is not installed.
    """
    if split not in ("calibration", "evaluation"):
        raise ValueError(f"split must be 'calibration' or 'evaluation', got {split!r}")
    if source in TEXTS:
        return TEXTS[source](split)
    path = full_path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"text must be one of {', '.join(TEXTS)} or a file; got {source!r}, and no such file exists"
        )
    try:
        text = _read_jsonl(path) if path.suffix == ".jsonl" else path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be UTF-8 text, got byte {error.object[error.start]:#04x} where UTF-8 allows "
            "none; convert the file"
        ) from error
    if not text.strip():
        raise ValueError(f"{path} must hold text, got {path.stat().st_size} bytes and not one word; name another")
    return text


def _read_jsonl(path: Path) -> str:
    documents = []
    # Iterating the file splits at newlines only; str.splitlines would also split at U+2028 inside a string.
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} must be JSON: {error}; got {line[:60]!r}") from error
            document = entry.get("text") if isinstance(entry, dict) else entry
            if not isinstance(document, str):
                raise ValueError(
                    f"{path}, line {number} must be a JSON string or an object whose field 'text' is one, "
                    f"got {line.strip()[:60]!r}"
                )
            documents.append(document)
    return "\n\n".join(documents)


def _topics(which: slice) -> str:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "".join(topics[name] for name in sorted(topics)[which])


def _wikitext2(split: Split) -> str:
    part = "train" if split == "calibration" else "test"
    return "\n\n".join(_load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)["text"])


def _c4(split: Split) -> str:
    part = "train" if split == "calibration" else "validation"
    rows = _load_dataset("allenai/c4", "en", split=part, streaming=True)
    return "\n\n".join(row["text"] for row in islice(rows, C4_DOCUMENTS))


def _load_dataset(name: str, config: str, **options: Any) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"text {name!r} needs the package datasets, which is not installed: pip install 'lorq[data]', "
            "or name a file or python-docs instead"
        ) from error
    try:
        return datasets.load_dataset(name, config, **options)
    except Exception as error:
        error.add_note(f"while loading the text {name!r}; without a network, name a file or python-docs instead")
        raise


TEXTS: dict[str, Callable[[Split], str]] = {
    "python-docs": lambda split: _topics(slice(None)),
    # Every other topic: to train on one half and measure on the other.
    "python-docs-even": lambda split: _topics(slice(0, None, 2)),
    "python-docs-odd": lambda split: _topics(slice(1, None, 2)),
    "wikitext2": _wikitext2,
    "c4": _c4,
}


def text_name(source: str) -> str:
    """A text's name, of a file without its folder: that is nobody's business and differs from machine to machine."""
    return source if source in (SELF, *TEXTS) else Path(source).name


def token_windows(
    text: str,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    *,
    windows: int | None,
    length: int,
    what: str,
) -> Int[Tensor, "windows length"]:
    """Cut non-overlapping windows out of ``text``, evenly spread over it: int64 tokens, in the order of the text.

    The text is tokenized once, whole, without special tokens. Window ``i`` begins at token
    ``floor(i (tokens - length) / (windows - 1))``: the first at the start of the text, the last at its end.

    Args:
        text: the whole text; ``what`` is its name, for messages.
        tokenizer: the model's own.
        windows: how many, at least 1; None takes all that fit side by side from the start.
        length: tokens of each window, at least 2.

    Raises:
        ValueError: if the text is too short for that many windows, or a count is out of range.
    """
    check_window_counts(windows, length)
    # verbose=False: the warning about sequences beyond the model's length does not apply to a text to be cut.
    unasked = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    tokens = torch.tensor(tokenizer(text, verbose=False, **unasked)["input_ids"], dtype=torch.int64)
    total = tokens.numel() // length
    wanted = total if windows is None else windows
    if not 1 <= wanted <= total:
        needed = max(wanted, 1) * length
        raise ValueError(
            f"{max(wanted, 1)} {'windows' if wanted > 1 else 'window'} of {length} tokens "
            f"{'need' if wanted > 1 else 'needs'} {needed} tokens, but text {what!r} has {tokens.numel()} (enough for "
            f"{total}); lower {'--samples or ' if wanted > 1 else ''}--seq-len, or name a longer text"
        )
    if windows is None:
        return tokens[: total * length].view(total, length)
    starts = [i * (tokens.numel() - length) // max(wanted - 1, 1) for i in range(wanted)]
    return torch.stack([tokens[start : start + length] for start in starts])


def check_window_counts(windows: int | None, length: int) -> None:
    if windows is not None and windows < 1:
        raise ValueError(f"windows must be at least 1, got {windows}")
    if length < 2:
        raise ValueError(f"length must be at least 2 tokens, one to see and one to predict, got {length}")
