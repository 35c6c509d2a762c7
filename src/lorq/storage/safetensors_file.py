"""Weight files, which are hostile until checked.

Layout of a safetensors file: 8 bytes header length (little endian), the header (JSON: tensor name ->
dtype, shape, begin and end of its bytes), the bytes. ``read_header`` accepts a file only if the header
describes exactly the bytes that are there. Nothing here runs code from a file; pickle is not read.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorq.storage.json_files import _short, damaged, parse_json

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library; keeps a wrong length from filling memory
_MOST = 2**60  # entries of a tensor, or bytes before its end

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


@dataclass(frozen=True)
class StoredTensor:
    """What a header says about one tensor; ``begin`` and ``end`` count bytes after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked safetensors header: the tensors, the header's own bytes, the file size in bytes, and texts by name."""

    tensors: dict[str, StoredTensor]
    raw: bytes
    file_bytes: int
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of one safetensors file; the tensors' bytes are not touched.

    Raises:
        FileNotFoundError: if there is no regular file (or link to one) at ``path``.
        ValueError: if the file is truncated, or the header breaks a rule of the format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weight file {path} does not exist; is the folder whole?")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if prefix == b"version ":
            raise ValueError(f"{path} is a git-lfs pointer of {size} bytes; run 'git lfs pull'")
        if length > MAX_HEADER_BYTES:
            raise damaged(path, f"header length must be at most {MAX_HEADER_BYTES} bytes, got {length}")
        if size < 8 or 8 + length > size:
            raise damaged(path, f"truncated: header ends at byte {8 + length}, file has {size}")
        raw = file.read(length)
    described = parse_json(raw, where=path)
    metadata = described.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, f"__metadata__ must map names to texts, got {_short(metadata)}")
    if odd := [name for name in described if not name.isprintable()]:
        raise damaged(path, f"names of tensors must be printable, got {_short(odd[0])}")
    tensors = {name: _stored_tensor(entry, f"tensor {_short(name)}", path) for name, entry in described.items()}
    _check_extents(tensors, 8 + length, size, path)
    return Header(tensors, raw, size, metadata)


def _stored_tensor(entry: Any, what: str, path: Path) -> StoredTensor:
    """One header entry, checked on its own."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"{what} must have dtype, shape and data_offsets, got {_short(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{path}: {what} has dtype {_short(dtype)}; lorq reads only {', '.join(DTYPES)}")
    # torch counts entries and strides in 64 bits, so that no product of sizes may leave them.
    if not _are_counts(shape) or math.prod(max(size, 1) for size in shape) >= _MOST:
        raise damaged(path, f"{what} must have a shape of integers of at least 0, got {_short(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(path, f"{what} must have data_offsets [begin, end], got {_short(offsets)}")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise damaged(path, f"{what}: {shape} of {dtype} takes {needed} bytes, data_offsets say {end - begin}")
    return StoredTensor(DTYPES[dtype], tuple(shape), begin, end)


def _are_counts(values: Any) -> bool:
    """A short list of sizes or offsets that torch and files can have; a bool is no integer here."""
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(value) is int and 0 <= value < _MOST for value in values)
    )


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
