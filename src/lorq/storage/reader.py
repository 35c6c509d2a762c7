"""A folder's weights, read tensor by tensor."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lorq.storage.atomic import sha256_of
from lorq.storage.json_files import _short, damaged, plain_name, read_json, some_of
from lorq.storage.names import JOURNAL
from lorq.storage.safetensors_file import Header, read_header, read_tensor


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> weight file of a Hugging Face index, every file a plain name beside the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(index, f"weight_map must map tensor names to files, got {type(weight_map).__name__}")
    return {
        tensor: plain_name(file, where=f"{index}: weight_map[{_short(tensor)}]", suffix=".safetensors")
        for tensor, file in weight_map.items()
    }


_SAMPLE_BYTES = 64 * 1024
_SAMPLES = 32  # per file: 2 MiB of each are read, 60 MiB of a model in 30 shards


@dataclass(frozen=True)
class WeightFiles:
    """A folder of safetensors weights, of which only the headers have been read."""

    folder: Path
    headers: dict[str, Header]  # by weight file
    files: dict[str, str]  # tensor -> weight file

    @classmethod
    def open(cls, folder: Path, *, index_name: str | None = None) -> "WeightFiles":
        """Read and check the headers of ``model.safetensors``, or of the shards that an index lists.

        Like transformers, prefers ``model.safetensors`` where both are present.

        ``index_name`` is an index to read instead. Files may be links, as in the hub's cache.

        Raises:
            FileNotFoundError: if the folder, the weights or a listed shard is missing.
            ValueError: if only pickle files are there, or a file breaks a rule of its format.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"model folder {folder} does not exist; check the path")
        if index_name is None:
            single, index_name = "model.safetensors", "model.safetensors.index.json"
            if (folder / single).is_file():
                header = read_header(folder / single)
                return cls(folder, {single: header}, dict.fromkeys(header.tensors, single))
        index = folder / index_name
        if not index.is_file():
            raise _no_weights(folder, index_name)
        weight_map = read_weight_map(index)
        shards = sorted(set(weight_map.values()))
        if missing := [name for name in shards if not (folder / name).is_file()]:
            raise FileNotFoundError(
                f"{index} lists {len(shards)} weight files, {len(missing)} of them are missing: "
                f"{some_of(missing)}; download them again"
            )
        headers = {name: read_header(folder / name) for name in shards}
        return cls(folder, headers, _locate(headers, weight_map, index))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted(self.files))

    @cached_property
    def by_module(self) -> dict[str, list[str]]:
        """The names of each module's own tensors, sorted, by module."""
        found: dict[str, list[str]] = {}
        for name in self.names:
            found.setdefault(name.rpartition(".")[0], []).append(name)
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header."""
        return self.headers[self._file(name)].tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of one tensor, from the header."""
        return self.headers[self._file(name)].tensors[name].dtype

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        """Read one tensor, or one index of its first dimension; KeyError if the checkpoint has no such tensor."""
        file = self._file(name)
        return read_tensor(self.folder / file, self.headers[file], name, index)

    def fingerprint(self) -> str:
        """sha256 (hex) that tells this model from another or an edited one without reading it all.

        Covers ``config.json``; of every weight file the name, size and header; and of its content 32 evenly spaced
        stretches of 64 KiB, the first and the last included.

        Raises:
            FileNotFoundError: if ``config.json`` is missing.
        """
        config = self.folder / "config.json"
        if not config.is_file():
            raise FileNotFoundError(f"{config} does not exist; download the model again")
        digest = hashlib.sha256()
        for part in (config.read_bytes(), *self._samples()):
            # With the length, no two lists of parts run together.
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()

    def _samples(self) -> Iterator[bytes]:
        for name, header in sorted(self.headers.items()):
            yield f"{name} {header.file_bytes}".encode()
            yield header.raw
            last = max(header.file_bytes - _SAMPLE_BYTES, 0)
            with (self.folder / name).open("rb") as file:
                for start in sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)}):
                    file.seek(start)
                    yield file.read(_SAMPLE_BYTES)

    def _file(self, name: str) -> str:
        if name not in self.files:
            raise KeyError(f"{self.folder} has no tensor {name!r} among its {len(self.files)}: {some_of(self.files)}")
        return self.files[name]


def _no_weights(folder: Path, index_name: str) -> Exception:
    """The error for a folder that has no weights to read, by what it has instead."""
    present = sorted(entry.name for entry in folder.iterdir())
    if JOURNAL in present:
        return FileNotFoundError(f"{folder} is an unfinished lorq run; finish it with --resume")
    pickled = [name for name in present if name.endswith((".bin", ".pt", ".pth", ".bin.index.json"))]
    if pickled:
        return ValueError(
            f"{folder} has pickle weights only ({some_of(pickled)}), and reading pickle runs code from the "
            "file; if you trust it, convert it to safetensors with transformers' save_pretrained"
        )
    return FileNotFoundError(
        f"{folder} has neither model.safetensors nor {index_name}, only: {some_of(present) or 'nothing'}; "
        "download the model again"
    )


def _locate(headers: dict[str, Header], weight_map: dict[str, str], index: Path) -> dict[str, str]:
    """Which file holds each tensor. The headers decide; the index must not promise more or otherwise."""
    files: dict[str, str] = {}
    for name, header in headers.items():
        if twice := header.tensors.keys() & files.keys():
            raise damaged(index, f"{len(twice)} tensors are in {name} and in another shard: {some_of(twice)}")
        files |= dict.fromkeys(header.tensors, name)
    if wrong := [f"{tensor} in {file}" for tensor, file in weight_map.items() if files.get(tensor) != file]:
        raise damaged(index, f"{len(wrong)} tensors are listed but not in their shard: {some_of(wrong)}")
    return files


def verify_shards(folder: Path, checksums: Mapping[str, str]) -> None:
    """Compare every shard with its sha256, as ``shard_checksums`` gave it to the report.

    Raises:
        ValueError: naming all shards that are missing or differ.
    """
    wrong = []
    for name, expected in checksums.items():
        path = folder / plain_name(name, where="checksums", suffix=".safetensors")
        found = sha256_of(path) if path.is_file() else "missing"
        if found != expected:
            wrong.append(f"{name} (expected {expected[:12]}, got {found[:12]})")
    if wrong:
        raise ValueError(
            f"{folder}: {len(wrong)} of {len(checksums)} shards are not as written: {some_of(wrong)}; "
            "download or write them again"
        )
