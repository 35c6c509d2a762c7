"""JSON and names from files that are hostile until checked."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

# config.json and the index of a mixture with 70,000 projections of experts have 50 MB each.
MAX_JSON_BYTES = 1 << 30
# Values in values; lorq's own have 5, models' configs few more, and Python's own functions end at some hundreds.
_DEEPEST = 50
_KINDS = {str: "a text", int: "a whole number of 64 bits", float: "a number", dict: "an object", list: "a list"}
# How an error of `damaged` ends.
DAMAGED = "; the file is damaged, download or write it again"


def damaged(path: Path | str, what: str) -> ValueError:
    """The error for a file that breaks a rule; ``what`` names the rule and the value."""
    return ValueError(f"{path}: {what}{DAMAGED}")


def inconsistent(path: Path | str, what: str) -> ValueError:
    """The error for files that contradict each other, each of them whole."""
    return ValueError(f"{path}: {what}; the folder's files do not belong together: is it one model's, and whole?")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; errors are those of ``parse_json``, or that it is too long."""
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise damaged(path, f"JSON must be at most {MAX_JSON_BYTES} bytes, got {size}")
    return parse_json(path.read_bytes(), where=path)


def parse_json(raw: bytes, *, where: Path | str) -> dict[str, Any]:
    """A JSON object in which no key appears twice.

    Raises:
        ValueError: if it is not UTF-8, not JSON, nested too deep, no object, repeats a key, or has half a character.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"the key {_short(key)} appears twice")
            result[key] = value
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise damaged(where, f"not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise damaged(where, f"JSON must be an object, got {_short(value)}")
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        inner = (node.values() if type(node) is dict else node for node in level)
        level = [child for values in inner for child in values if type(child) in (dict, list)]
    if level:
        raise damaged(where, f"JSON must be at most {_DEEPEST} values deep, it is deeper")
    if b"\\ud" in raw.lower():  # of a pair of code units; one alone is no text that can be written
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise damaged(
                where, f"texts must be Unicode, {_short(error.object[error.start])} is half of a character"
            ) from None
    return value


def check_kinds(told: Any, kinds: Mapping[str, type], *, where: Path | str, what: str = "") -> None:
    """Refuse what is no object, or one some of whose values are of other kinds.

    A whole number is a number too; true and false are none.

    Args:
        kinds: the kind of each value, by its key; a key that ends in ``?`` may be missing.
        what: goes before the key in the error.

    Raises:
        ValueError: naming the key, its kind and the value.
    """
    if not isinstance(told, dict):
        raise damaged(where, f"{what.rstrip(': ') or 'JSON'} must be an object, got {_short(told)}")
    for key, kind in kinds.items():
        name = key.removesuffix("?")
        if (name != key and name not in told) or is_kind(told.get(name), kind):
            continue
        raise damaged(where, f"{what}{name} must be {_KINDS[kind]}, got {_short(told.get(name))}")


def is_kind(value: Any, kind: type) -> bool:
    """Whether a value of JSON is of a kind; see `check_kinds`."""
    if kind is int:
        return type(value) is int and -(2**63) <= value < 2**63
    return type(value) is kind or (kind is float and is_kind(value, int))


def json_bytes(value: Any) -> bytes:
    """The one spelling of ``value`` as JSON: sorted keys, two spaces, a newline at the end."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def plain_name(name: Any, *, where: Path | str, suffix: str = "") -> str:
    """``name`` if it is a file name and nothing else: no folder, no drive, no ``..``, the suffix wanted.

    ValueError otherwise. It may still be a link: a hub cache is links into its ``blobs`` folder.
    """
    if not _is_plain(name) or not name.endswith(suffix):
        wanted = f"a plain file name ending in {suffix}" if suffix else "a plain file name"
        raise ValueError(f"{where}: must name {wanted}, without a folder, got {_short(name)}")
    return str(name)


def name_below(name: Any, *, where: Path | str, suffix: str = "") -> str:
    """`plain_name`, but the file may be in folders below, ``a/b.safetensors``."""
    if not isinstance(name, str) or not name.endswith(suffix) or not all(map(_is_plain, name.split("/"))):
        ending = f" that ends in {suffix}" if suffix else ""
        raise ValueError(f"{where}: must name a file in or below its folder{ending}, got {_short(name)}")
    return name


def _is_plain(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and name.isprintable()
        and PurePosixPath(name).name == name == PureWindowsPath(name).name
    )


def some_of(names: Iterable[str]) -> str:
    """The first five names, and how many more there are."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(_short(name).strip("'") for name in ordered[:5]) + rest


def _short(value: Any, most: int = 80) -> str:
    """``repr`` cut to a line: a hostile value may be megabytes long, or steer the terminal."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."
