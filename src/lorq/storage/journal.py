"""The journal of a run: who it is, and which shards are finished. Every line has its own checksum."""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lorq.storage.atomic import rename_synced, sha256_of, write_synced
from lorq.storage.json_files import _short, damaged, name_below, parse_json, plain_name

JOURNAL_VERSION = 2
CHECK = "sha256_of_line"
AGAIN = "begins_again"  # in the identity of work that is never resumed


@dataclass(frozen=True)
class FinishedShard:
    """One journal line: a shard that is whole, and what its writer wants to know about it later."""

    name: str
    sha256: str
    size: int
    tensors: list[str]
    record: Any

    def is_whole(self, folder: Path) -> bool:
        """Whether the file is there with the size and the checksum that the journal gives."""
        path = folder / self.name
        return path.is_file() and path.stat().st_size == self.size and sha256_of(path) == self.sha256


@dataclass(frozen=True)
class Journal:
    """The run's identity, its shards in order, and the files that closing it may have written."""

    identity: dict[str, Any]
    shards: list[FinishedShard]
    closing: list[str]


def write_journal(path: Path, identity: dict[str, Any], shards: Iterable[FinishedShard]) -> None:
    """Begin a journal, or replace one; one JSON object per line."""
    lines: list[dict[str, Any]] = [{"identity": identity, "journal_version": JOURNAL_VERSION}]
    lines += [{"shard": asdict(shard)} for shard in shards]
    rename_synced(write_synced(path, b"".join(map(journal_line, lines))), path)


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Add a line to the journal, on the disk on return, and take it back if that fails or is stopped."""
    line, before = journal_line(entry), path.stat().st_size
    try:
        with path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):  # what stands there then is torn, or of a shard that is not there
            os.truncate(path, before)
        raise


def journal_line(entry: dict[str, Any]) -> bytes:
    """An entry as the journal has it, with the checksum of all else that is in the line."""
    return json.dumps(entry | {CHECK: _check(entry)}, sort_keys=True).encode() + b"\n"


def _check(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _read_line(line: bytes, where: str, first: bool) -> dict[str, Any]:
    """An entry whose version is read here, if it is the first, and whose checksum is right; a ValueError otherwise."""
    entry = parse_json(line, where=where)
    if first and (version := entry.get("journal_version")) != JOURNAL_VERSION:
        raise ValueError(
            f"{where}: this lorq reads journal version {JOURNAL_VERSION}, got {version!r}; "
            "go on with the lorq that wrote it"
        )
    if (told := entry.pop(CHECK, None)) != (check := _check(entry)):
        raise ValueError(
            f"{where}: {CHECK} must be that of what the line says, {check[:12]}, got {_short(told)}; the journal is "
            "damaged, delete the folder and begin again"
        )
    return entry


def read_journal(path: Path) -> Journal:
    """Read a journal; a last line torn by a crash is dropped, any other damage is a ValueError."""
    *lines, _ = path.read_bytes().split(b"\n")  # what follows the last newline is torn, or nothing
    identity: Any = None
    shards: dict[str, FinishedShard] = {}
    closing: list[str] = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            entry = _read_line(line, where, first=number == 1)
        except ValueError:
            if number == len(lines) > 1:
                break  # after a power cut a block of a file may hold anything
            raise
        if number == 1:
            identity = entry.get("identity")
        elif isinstance(names := entry.get("closing"), list):
            closing += [name_below(name, where=where) for name in names]
        else:
            shard = _finished_shard(entry.get("shard"), where)
            shards.pop(shard.name, None)  # written again after a failure: the last line counts
            shards[shard.name] = shard
    if not isinstance(identity, dict):
        raise damaged(path, f"the first line must hold the run's identity, got {_short(identity)}")
    return Journal(identity, list(shards.values()), closing)


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys (dotted) in which two identities differ, each with both values."""
    a, b = _flatten(then), _flatten(now)
    return [
        f"{key} (folder: {a.get(key, 'absent')}, now: {b.get(key, 'absent')})"
        for key in sorted(a | b)
        if a.get(key) != b.get(key)
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted key -> JSON text of the value."""
    if not isinstance(value, dict) or not value:
        return {prefix: json.dumps(value, sort_keys=True)}
    parts = (_flatten(inner, f"{prefix}.{key}" if prefix else key) for key, inner in value.items())
    return {key: text for part in parts for key, text in part.items()}


def _finished_shard(entry: Any, where: str) -> FinishedShard:
    if not isinstance(entry, dict) or set(entry) != {field.name for field in fields(FinishedShard)}:
        raise damaged(where, f"must describe one shard, got {_short(entry)}")
    plain_name(entry["name"], where=where, suffix=".safetensors")
    tensors = entry["tensors"]
    if not (
        isinstance(entry["sha256"], str)
        and type(entry["size"]) is int
        and isinstance(tensors, list)
        and all(isinstance(tensor, str) for tensor in tensors)
    ):
        raise damaged(where, f"must give sha256, size and tensor names, got {_short(entry)}")
    return FinishedShard(**entry)
