"""Texts by name, and from files."""

import importlib
import json
import os
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lorq.models.locate import full_path

Split = Literal["calibration", "evaluation"]
# Whether windows of a text begin with a start token; "auto" as the tokenizer begins a text by itself.
StartToken = Literal["auto", "always", "never"]
# The messages of each conversation, for the chat template of a model.
Chats = list[list[dict[str, Any]]]
SELF = "self"
# c4 is 360 million documents; the first 2,000 hold about a million tokens, 400 windows of 2048.
C4_DOCUMENTS = 2000
_JSON_LINES = (".jsonl", ".ndjson")


def load_text(source: str | Path, *, split: Split = "calibration", what: str = "text") -> str | Chats:
    """The text behind ``source``, as one string; of a file of conversations, their messages.

    Args:
        source: ``python-docs`` (the English documentation every CPython carries, 465,000 characters),
            ``python-docs-even`` and ``python-docs-odd`` (every other topic of it), ``wikitext2`` and ``c4`` (through
            the package ``datasets``, by network or from its cache), or the path of a UTF-8 text file, of a file of
            JSON lines (``.jsonl``, ``.ndjson``) or of one JSON list (``.json``). Their entries are strings, objects
            with the field ``text``, or, all of them, objects with the field ``messages``, each with ``role`` and
            ``content``. Documents are joined by an empty line. A name wins over a file of that name.
        split: ``calibration`` reads training data, ``evaluation`` held-out data. ``python-docs`` and files
            have no split: both uses get the same text.
        what: the option that named the source, for messages.

    Raises:
        FileNotFoundError: if the source is neither a known name nor a file.
        ValueError: if the file is empty, not UTF-8, or has a bad entry; or if the split is unknown.
        ImportError: if the source needs ``datasets`` and it is not installed.
    """
    if split not in ("calibration", "evaluation"):
        raise ValueError(f"split must be 'calibration' or 'evaluation', got {split!r}")
    source = check_text(source, what)
    if source in TEXTS:
        return TEXTS[source](split)
    path = full_path(source)
    suffix = path.suffix.lower()
    try:
        # utf-8-sig: editors of other systems begin a file with a byte order mark, which is no text.
        text = (
            _read_json(path, lines=suffix != ".json") if suffix in (*_JSON_LINES, ".json")
            else path.read_text(encoding="utf-8-sig")
        )  # fmt: skip
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be UTF-8 text, got byte {error.object[error.start]:#04x} where UTF-8 allows "
            "none; convert the file"
        ) from error
    if not text or (isinstance(text, str) and not text.strip()):
        raise ValueError(f"{path} must hold text, got {path.stat().st_size} bytes and not one word; name another")
    return text


def check_text(source: str | Path, what: str = "text") -> str:
    """The name or path of a text; ``what`` is the option's name, for messages.

    Raises:
        TypeError: if it is neither.
        FileNotFoundError: if there is no such text.
    """
    if not isinstance(source, str | Path):
        raise TypeError(f"{what} must be the name of a text or the path of a file, got {str(source)[:60]!r}")
    source = str(source)
    if source in TEXTS or (path := full_path(source)).is_file():
        return source
    there = os.listdir(path.parent) if path.parent.is_dir() else []
    if path.is_dir():
        raise FileNotFoundError(f"{what} must be a file, {source} is a folder; name a file in it")
    close = get_close_matches(source, TEXTS, 1) or [
        str(path.parent / name) for name in get_close_matches(path.name, there, 1) if (path.parent / name).is_file()
    ]
    names = [*TEXTS, SELF] if what == "calibration" else [*TEXTS]
    raise FileNotFoundError(
        f"{what} must be one of {', '.join(names)} or a file; got {source!r}, and no such file exists"
        + (f"; did you mean {close[0]}?" if close else "")
    )


def _read_json(path: Path, *, lines: bool) -> str | Chats:
    """The documents of a file of JSON, joined; or its conversations."""
    documents: list[str] = []
    chats: Chats = []
    for place, entry in _json_lines(path) if lines else _json_list(path):
        document = entry.get("text") if isinstance(entry, dict) else entry
        messages = entry.get("messages") if isinstance(entry, dict) else None
        if isinstance(document, str):
            documents.append(_characters(document))
        elif isinstance(messages, list) and messages and all(map(_is_message, messages)):
            chats.append([message | {"content": _characters(message["content"])} for message in messages])
        else:
            fields = (
                f"the fields {', '.join(map(str, entry)) or 'none'}" if isinstance(entry, dict) else "another value"
            )
            raise ValueError(
                f"{place} must be a JSON string, an object whose field 'text' is one, or one whose 'messages' have "
                f"each a role and a text as content, got {fields}: {json.dumps(entry, ensure_ascii=False)[:60]}"
            )
    if chats and documents:
        raise ValueError(f"{path} must hold texts or conversations, got {len(documents)} and {len(chats)}; split it")
    return chats or "\n\n".join(documents)


def _is_message(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("role"), str) and isinstance(entry.get("content"), str)


def _characters(text: str) -> str:
    """The text with U+FFFD for half of a surrogate pair, which is no character and which no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    # Iterating the file splits at newlines only; str.splitlines would also split at U+2028 inside a string.
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path}, line {number}"
                yield place, _parsed(line, place)


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    entries = _parsed(text, str(path), "; a file of one document a line is named .jsonl")
    if not isinstance(entries, list):
        raise ValueError(f"{path} must be a JSON list of documents, got {text.strip()[:60]!r}; write them as a list")
    for number, entry in enumerate(entries, start=1):
        yield f"{path}, entry {number}", entry


def _parsed(text: str, place: str, remedy: str = "") -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of more than 4300 digits is no JSONDecodeError
        raise ValueError(f"{place} must be JSON: {error}; got {text.strip()[:60]!r}{remedy}") from error


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
