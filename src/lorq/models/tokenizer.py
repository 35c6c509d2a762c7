"""A model's tokenizer: whether there is one, and opening it without running anybody's code."""

import logging
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing transformers takes seconds; here it is only named
    import transformers

_log = logging.getLogger(__name__)
# Names of files that tokenizers are read from.
_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
_WITHOUT = "quantizing needs none with --calibration self, or with --method nearest"


def check_tokenizer(folder: Path) -> None:
    """Refuse a folder that has no file of a tokenizer, with a FileNotFoundError."""
    if not any(fnmatch(file.name, pattern) for file in folder.iterdir() for pattern in _FILES):
        raise FileNotFoundError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or the like), without which no text can be "
            f"read; copy it from where the model came from ({_WITHOUT})"
        )


def open_tokenizer(folder: Path) -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer of a model's folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it needs code of its own, which is never run, or cannot be read.
    """
    check_tokenizer(folder)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        empty = not tokenizer.get_vocab()
    except Exception as error:  # what a file can raise there has no end
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"the tokenizer of {folder} needs code of its own, which lorq does not run; convert it to a "
                f"tokenizer.json first ({_WITHOUT})"
            ) from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the tokenizer of {folder} could not be read: {reason}; {_WITHOUT}") from error
    if empty:
        raise ValueError(f"the tokenizer of {folder} has no vocabulary; copy its files again ({_WITHOUT})")
    return tokenizer


def tokenizer_if_any(folder: Path) -> "transformers.PreTrainedTokenizerBase | None":
    """The tokenizer of a model's folder; None, and a line in the log, where `open_tokenizer` refuses it."""
    try:
        return open_tokenizer(folder)
    except (FileNotFoundError, ValueError) as error:
        _log.info("going on without a tokenizer: %s", str(error).partition(";")[0])
        return None
