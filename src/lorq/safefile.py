"""Files at the border: hostile until checked when read, whole or absent when written.

Layout of a safetensors file: 8 bytes header length (little endian), the header (JSON: tensor name ->
dtype, shape, begin and end of its bytes), the bytes. ``read_header`` accepts a file only if the header
describes exactly the bytes that are there. Nothing here runs code from a file; pickle is not read.
"""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}

MAX_JSON_BYTES = 100_000_000  # the limit of the safetensors library; keeps a wrong length from filling memory
TEMPORARY = ".lorq.tmp"  # appended to the name of a file being written; only lorq's own files end like this
JOURNAL_VERSION = 1


@dataclass(frozen=True)
class StoredTensor:
    """What a header says about one tensor; ``begin`` and ``end`` count bytes after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked safetensors header: the tensors, the header's own bytes, and the file size in bytes."""

    tensors: dict[str, StoredTensor]
    raw: bytes
    file_bytes: int


def read_header(path: Path) -> Header:
    """Read and check the header of one safetensors file; the tensors' bytes are not touched.

    Raises:
        FileNotFoundError: if there is no regular file (or link to one) at ``path``.
        ValueError: if the file is truncated, or the header breaks a rule of the format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weight file {path} does not exist; download it again")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if prefix == b"version ":
            raise ValueError(f"{path} is a git-lfs pointer of {size} bytes; run 'git lfs pull'")
        if length > MAX_JSON_BYTES:
            raise damaged(path, f"header length must be at most {MAX_JSON_BYTES} bytes, got {length}")
        if size < 8 or 8 + length > size:
            raise damaged(path, f"truncated: header ends at byte {8 + length}, file has {size}")
        raw = file.read(length)
    described = parse_json(raw, where=path)
    metadata = described.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, f"__metadata__ must map names to texts, got {_short(metadata)}")
    tensors = {name: _stored_tensor(entry, f"tensor {_short(name)}", path) for name, entry in described.items()}
    _check_extents(tensors, 8 + length, size, path)
    return Header(tensors, raw, size)


def _stored_tensor(entry: Any, what: str, path: Path) -> StoredTensor:
    """One header entry, checked on its own."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"{what} must have dtype, shape and data_offsets, got {_short(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{path}: {what} has dtype {_short(dtype)}; lorq reads only {', '.join(DTYPES)}")
    if not _are_counts(shape):
        raise damaged(path, f"{what} must have a shape of integers of at least 0, got {_short(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(path, f"{what} must have data_offsets [begin, end], got {_short(offsets)}")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise damaged(path, f"{what}: {shape} of {dtype} takes {needed} bytes, data_offsets say {end - begin}")
    return StoredTensor(DTYPES[dtype], tuple(shape), begin, end)


def _are_counts(values: Any) -> bool:
    """A short list of integers that torch can hold; a bool is no integer here."""
    if not isinstance(values, list) or len(values) > 64 or not all(type(value) is int for value in values):
        return False
    return all(value >= 0 for value in values) and math.prod(max(value, 1) for value in values) < 2**60


def _check_extents(tensors: dict[str, StoredTensor], start: int, size: int, path: Path) -> None:
    """The tensors' bytes must fill the file from ``start`` to ``size`` without gap or overlap."""
    described = start + max((tensor.end for tensor in tensors.values()), default=0)
    if described > size:
        raise damaged(path, f"truncated: header says {described} bytes, file has {size}")
    if described < size:
        raise damaged(path, f"header says {described} bytes, file has {size}: {size - described} too many")
    at = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != at:
            wrong = "overlaps the tensor before it" if tensor.begin < at else "leaves a gap before it"
            raise damaged(path, f"tensor {_short(name)} {wrong}: it begins at {tensor.begin}, not at {at}")
        at = tensor.end


def read_tensor(path: Path, header: Header, name: str, index: int | None = None) -> Tensor:
    """Read one tensor of a file into memory of its own, or only one index of its first dimension.

    Not through safetensors' ``safe_open``: it maps the whole file writable and private, which Linux refuses
    for a file larger than memory (safetensors 0.8, torch 2.13: "unable to mmap"), however small the tensor.
    """
    stored = header.tensors[name]
    size, shape, skip = stored.end - stored.begin, stored.shape, 0
    if index is not None:
        size, shape = size // shape[0], shape[1:]
        skip = index * size
    data = torch.empty(size, dtype=torch.uint8)
    with path.open("rb") as file:
        file.seek(8 + len(header.raw) + stored.begin + skip)
        if (got := file.readinto(data.numpy().data)) != len(data):
            raise damaged(path, f"truncated: tensor {_short(name)} has {len(data)} bytes, file has {got}")
    return data.view(stored.dtype).view(shape)


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> weight file of a Hugging Face index, every file a plain name beside the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(index, f"weight_map must map tensor names to files, got {type(weight_map).__name__}")
    return {
        tensor: plain_name(file, where=f"{index}: weight_map[{_short(tensor)}]", suffix=".safetensors")
        for tensor, file in weight_map.items()
    }


def damaged(path: Path | str, what: str) -> ValueError:
    """The error for a file that breaks a rule; ``what`` names the rule and the value."""
    return ValueError(f"{path}: {what}; the file is damaged, download or write it again")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; errors are those of ``parse_json``."""
    with path.open("rb") as file:
        return parse_json(file.read(MAX_JSON_BYTES + 1), where=path)


def parse_json(raw: bytes, *, where: Path | str) -> dict[str, Any]:
    """A JSON object in which no key appears twice.

    Raises:
        ValueError: if it is too long, not UTF-8, not JSON, nested too deep, not an object, or repeats a key.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"the key {_short(key)} appears twice")
            result[key] = value
        return result

    if len(raw) > MAX_JSON_BYTES:
        raise damaged(where, f"JSON must be at most {MAX_JSON_BYTES} bytes, got at least {len(raw)}")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise damaged(where, f"not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise damaged(where, f"JSON must be an object, got {_short(value)}")
    return value


def json_bytes(value: Any) -> bytes:
    """The one spelling of ``value`` as JSON: sorted keys, two spaces, a newline at the end."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def plain_name(name: Any, *, where: Path | str, suffix: str = "") -> str:
    """``name`` if it is a file name and nothing else: no folder, no drive, no ``..``, the suffix wanted.

    ValueError otherwise. It may still be a link: a hub cache is links into its ``blobs`` folder.
    """
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or not name.isprintable()
        or not name.endswith(suffix)
        or not PurePosixPath(name).name == name == PureWindowsPath(name).name
    ):
        wanted = f"a plain file name ending in {suffix}" if suffix else "a plain file name"
        raise ValueError(f"{where}: must name {wanted}, without a folder, got {_short(name)}")
    return name


def sha256_of(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def some_of(names: Iterable[str]) -> str:
    """The first five names, and how many more there are."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(_short(name).strip("'") for name in ordered[:5]) + rest


def write_synced(path: Path, data: bytes) -> Path:
    """Write ``data`` under the temporary name of ``path``, on the disk on return; the temporary path."""
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def rename_synced(temporary: Path, path: Path) -> None:
    """Give a finished file its name; a crash leaves the old file, the new one or none, never a part."""
    os.replace(temporary, path)
    sync_folder(path.parent)


@contextmanager
def room_for(path: Path, size: int) -> Iterator[None]:
    """Remove the part-written file when writing ``path`` fails, and say what to do when the disk is full."""
    try:
        yield
    except OSError as error:
        path.with_name(path.name + TEMPORARY).unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            error.errno,
            f"no space left in {path.parent}: {path.name} needs {size} bytes, {free} are free; what is "
            "finished is kept: free some space and continue with --resume",
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames and removals in ``folder`` last; only POSIX systems can open a folder for that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    rename_synced(write_synced(path, b"".join(map(_line, lines))), path)


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Add a line to the journal, on the disk on return, and take it back if the disk is full."""
    line, before = _line(entry), path.stat().st_size
    try:
        with room_for(path, len(line)), path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        os.truncate(path, before)
        raise


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True).encode() + b"\n"


def read_journal(path: Path) -> Journal:
    """Read a journal; a last line torn by a crash is dropped, any other damage is a ValueError."""
    *lines, _ = path.read_bytes().split(b"\n")  # what follows the last newline is torn, or nothing
    identity: Any = None
    shards: dict[str, FinishedShard] = {}
    closing: list[str] = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            entry = parse_json(line, where=where)
        except ValueError:
            if number == len(lines) > 1:
                break  # after a power cut a block of a file may hold anything
            raise
        if number == 1:
            if (version := entry.get("journal_version")) != JOURNAL_VERSION:
                raise ValueError(
                    f"{where}: this lorq reads journal version {JOURNAL_VERSION}, got {version!r}; "
                    "go on with the lorq that wrote it"
                )
            identity = entry.get("identity")
        elif isinstance(names := entry.get("closing"), list):
            closing += [plain_name(name, where=where) for name in names]
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


def _short(value: Any) -> str:
    """``repr`` cut to a line: a hostile value may be megabytes long, or steer the terminal."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
