"""A folder's weights, read tensor by tensor."""

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from lorq.storage.json_files import _short, damaged, inconsistent, name_below, read_json, some_of
from lorq.storage.names import INDEX, JOURNAL
from lorq.storage.safetensors_file import Header, read_header, read_tensor


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> weight file of a Hugging Face index, every file beside or below the index."""
    told = read_json(index)
    weight_map = told.get("weight_map")
    if not isinstance(told.get("metadata", {}), dict) or (index.name == INDEX and "metadata" not in told):
        raise damaged(index, f"metadata must be an object, got {_short(told.get('metadata'))}")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(index, f"weight_map must map tensor names to files, got {type(weight_map).__name__}")
    return {
        tensor: name_below(file, where=f"{index}: weight_map[{_short(tensor)}]", suffix=".safetensors")
        for tensor, file in weight_map.items()
    }


_SAMPLE_BYTES = 64 * 1024
_SAMPLES = 32  # per file: 2 MiB of each are read, 60 MiB of a model in 30 shards


class _Sums:
    """Checksums of tensors, made beside the work: as fast as a disk reads, and without Python's lock."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, "hash")
        self._of: dict[str, Future[bytes]] = {}

    def put(self, name: str, content: memoryview) -> None:
        self._of[name] = self.pool.submit(lambda: sha256(content).digest())

    def whole(self) -> str:
        """Of all names and contents."""
        return sha256(b"".join(name.encode() + self._of[name].result() for name in sorted(self._of))).hexdigest()


@dataclass(frozen=True)
class WeightFiles:
    """A folder of safetensors weights, of which only the headers have been read."""

    folder: Path
    headers: dict[str, Header]  # by weight file
    files: dict[str, str]  # tensor -> weight file
    _seen: list[_Sums] = field(default_factory=list, repr=False, compare=False)  # see `hashed`
    before: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)  # `_states` of them

    @classmethod
    def open(cls, folder: Path, *, index_name: str | None = None) -> "WeightFiles":
        """Read and check the headers of ``model.safetensors``, or of the shards that an index lists.

        Like transformers, reads what the config names as ``transformers_weights``, else prefers ``model.safetensors``
        where both are present; tensors that an index lists and no shard has are nobody's, until somebody needs them.

        ``index_name`` is an index to read instead. Files may be links, as in the hub's cache.

        Raises:
            FileNotFoundError: if the folder, the weights or a listed shard is missing.
            ValueError: if only pickle files are there, a file breaks a rule of its format, or two disagree.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"model folder {folder} does not exist; check the path")
        name = index_name or _weights_of(folder)
        if name.endswith(".safetensors"):
            header = read_header(folder / name)
            return cls(folder, {name: header}, dict.fromkeys(header.tensors, name), before=_states(folder, [name]))
        index = folder / name
        if not index.is_file():
            raise _no_weights(folder, name)
        weight_map = read_weight_map(index)
        shards = sorted(set(weight_map.values()))
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            raise FileNotFoundError(
                f"{index} lists {len(shards)} weight files, {len(missing)} of them are missing: "
                f"{some_of(missing)}; download them again"
            )
        headers = {shard: read_header(folder / shard) for shard in shards}
        files = _locate(headers, index)
        if index_name is not None and (absent := weight_map.keys() - files.keys()):  # lorq lists what it wrote
            raise inconsistent(index, f"{len(absent)} tensors are listed but in no shard: {some_of(absent)}")
        return cls(folder, headers, files, before=_states(folder, headers))

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
        tensor = read_tensor(self.folder / file, self.headers[file], name, index)
        for seen in self._seen:
            content = tensor.reshape(-1).view(torch.uint8).numpy().data
            seen.put(json.dumps([name, index]), content)
        return tensor

    def told_shape(self, name: str) -> tuple[int, int]:
        """The shape of a weight that a stored tensor tells, (out, in).

        Raises:
            ValueError: if there is no such tensor, or it is not two whole numbers from 1.
        """
        if name not in self.files:
            raise damaged(self.folder, f"{name} must be there, it is missing")
        where = self.folder / self.files[name]
        if self.shape(name) != (2,) or self.dtype(name).is_floating_point:
            raise damaged(
                where, f"{name} must be two whole numbers, it is {self.dtype(name)} of shape {self.shape(name)}"
            )
        out, in_ = (int(size) for size in WeightFiles.tensor(self.aside(), name))
        if not 0 < min(out, in_) <= max(out, in_) < 2**31:
            raise damaged(where, f"{name} must be from 1 to 2^31 - 1, got {[out, in_]}")
        return out, in_

    def aside(self) -> "WeightFiles":
        """The same files for who only looks: what it reads is no part of what `hashed` sums."""
        return replace(self, _seen=[])

    @contextmanager
    def hashed(self) -> Iterator[Callable[[], str]]:
        """A function that gives the sha256 (hex) of all tensors, and parts of them, that are read meanwhile."""
        seen = _Sums()
        self._seen.append(seen)
        try:
            yield seen.whole
        finally:
            self._seen.remove(seen)
            seen.pool.shutdown(wait=False)

    def check_unchanged(self, remedy: str = "run the command again") -> None:
        """Refuse to go on where the weights or the config are no longer the files that were opened.

        Raises:
            ValueError: naming them, and what to do.
        """
        now = _states(self.folder, self.headers)
        if changed := [name for name, state in self.before.items() if now.get(name) != state]:
            raise ValueError(
                f"{self.folder} must stay as it is while it is read, {some_of(changed)} changed meanwhile or went; "
                f"put it back as it was, then {remedy}"
            )

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
        digest = sha256()
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


def _states(folder: Path, files: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """What no change of weight files and config leaves: number in the file system, size, time of the last change."""
    states: dict[str, tuple[int, ...]] = {}
    for name in (*files, "config.json"):
        with suppress(OSError):  # it went
            stat = (folder / name).stat()
            states[name] = stat.st_ino, stat.st_size, stat.st_mtime_ns
    return states


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
        "is it the right folder, and all of it there?"
    )


def _weights_of(folder: Path) -> str:
    """The weight file or index that transformers would read of a model's folder."""
    config = folder / "config.json"
    try:  # like transformers, which minds no key that is there twice
        named = json.loads(config.read_bytes()).get("transformers_weights") if config.is_file() else None
    except (ValueError, AttributeError) as error:
        raise damaged(config, f"must be a JSON object ({error})") from error
    if named is None:
        single = "model.safetensors"
        return single if (folder / single).is_file() else f"{single}.index.json"
    suffix = ".safetensors.index.json" if str(named).endswith(".json") else ".safetensors"
    return name_below(named, where=f"{config}: transformers_weights", suffix=suffix)


def _locate(headers: dict[str, Header], index: Path) -> dict[str, str]:
    """Which file holds each tensor. The headers decide; a tensor that is in two files must be the same in both."""
    files: dict[str, str] = {}
    for name, header in headers.items():
        twice = sorted(header.tensors.keys() & files.keys())
        if other := [tensor for tensor in twice if not _same(index.parent, headers, (files[tensor], name), tensor)]:
            raise inconsistent(
                index, f"{len(other)} tensors are in {name} and otherwise in another shard: {some_of(other)}"
            )
        files |= dict.fromkeys(header.tensors, name)
    return files


def _same(folder: Path, headers: dict[str, Header], places: tuple[str, str], tensor: str) -> bool:
    """Whether two files have the same tensor of a name, byte by byte."""
    a, b = (headers[file].tensors[tensor] for file in places)
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    one, other = (read_tensor(folder / file, headers[file], tensor).view(-1).view(torch.uint8) for file in places)
    return torch.equal(one, other)
