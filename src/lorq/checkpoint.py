"""Checkpoints in and out: a model's folder read lazily, a quantized folder written so that no crash harms it.

An unfinished output folder holds shards and ``lorq_journal.jsonl``, and neither an index nor a
``config.json``, so nothing can load it. The journal's first line is the identity of the run (what must be
equal for a resumed run to give the same bytes); every further line is a finished shard with its checksum.
The order for one shard is: bytes to a temporary name, journal line, rename, each on the disk before the
next begins. So every file under its final name is in the journal, and a line without its file only means
that this shard is made again. ``finish`` writes ``config.json`` last and then removes the journal.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lorq import safefile
from lorq.safefile import TEMPORARY, FinishedShard, Header, damaged, json_bytes, plain_name, some_of

JOURNAL = "lorq_journal.jsonl"
INDEX = "lorq.safetensors.index.json"
_SAMPLE_BYTES = 64 * 1024
_SAMPLES = 32  # per file: 2 MiB of each are read, 60 MiB of a model in 30 shards


@dataclass(frozen=True)
class SourceCheckpoint:
    """A folder of safetensors weights, of which only the headers have been read."""

    folder: Path
    headers: dict[str, Header]  # by weight file
    files: dict[str, str]  # tensor -> weight file

    @classmethod
    def open(cls, folder: Path, *, index_name: str | None = None) -> "SourceCheckpoint":
        """Read and check the headers of ``model.safetensors``, or of the shards that an index lists.

        Like transformers, prefers ``model.safetensors`` where both are present.

        Args:
            folder: a Hugging Face model folder; its files may be links, as in the hub's cache.
            index_name: read this index instead, for example ``lorq.safetensors.index.json``.

        Raises:
            FileNotFoundError: if the folder, the weights or a listed shard is missing.
            ValueError: if only pickle files are there, or a file breaks a rule of its format.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"model folder {folder} does not exist; check the path")
        if index_name is None:
            single, index_name = "model.safetensors", "model.safetensors.index.json"
            if (folder / single).is_file():
                header = safefile.read_header(folder / single)
                return cls(folder, {single: header}, dict.fromkeys(header.tensors, single))
        index = folder / index_name
        if not index.is_file():
            raise _no_weights(folder, index_name)
        weight_map = safefile.read_weight_map(index)
        shards = sorted(set(weight_map.values()))
        if missing := [name for name in shards if not (folder / name).is_file()]:
            raise FileNotFoundError(
                f"{index} lists {len(shards)} weight files, {len(missing)} of them are missing: "
                f"{some_of(missing)}; download them again"
            )
        headers = {name: safefile.read_header(folder / name) for name in shards}
        return cls(folder, headers, _locate(headers, weight_map, index))

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted(self.files))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header."""
        return self.headers[self._file(name)].tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of one tensor, from the header."""
        return self.headers[self._file(name)].tensors[name].dtype

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        """Read one tensor, or one index of its first dimension; KeyError if the checkpoint has no such tensor."""
        file = self._file(name)
        return safefile.read_tensor(self.folder / file, self.headers[file], name, index)

    def fingerprint(self) -> str:
        """sha256 (hex) that tells this model from another or an edited one without reading it all.

        Covers ``config.json``; of every weight file the name, size and header; and of its content 32
        stretches of 64 KiB, evenly spaced with the first and the last included. Files of up to 2 MiB are
        covered whole.

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


class CheckpointWriter:
    """Writes a checkpoint shard by shard; a run that is killed at any moment can go on where it was."""

    def __init__(self, folder: Path, shards: list[FinishedShard]) -> None:
        """Use ``create``."""
        self.folder = folder
        self._shards = {shard.name: shard for shard in shards}

    @classmethod
    def create(
        cls, folder: Path, identity: dict[str, Any], *, overwrite: bool = False, resume: bool = False
    ) -> "CheckpointWriter":
        """Begin a folder, or with ``resume`` go on with one.

        Args:
            folder: made if missing.
            identity: everything that the bytes depend on (model fingerprint, method, settings, format
                version ...), as JSON values. A resumed run must have the same.
            overwrite: first remove what an earlier lorq run wrote here; any other file stays.
            resume: keep the shards that are whole, drop the first broken one and all after it. An empty
                folder is begun.

        Raises:
            FileExistsError: if the folder has content and no flag allows to use it.
            ValueError: if both flags are given, the identity differs, or the journal is damaged.
        """
        cls.check(folder, overwrite=overwrite, resume=resume)
        identity = json.loads(json_bytes(identity))  # as the journal will give it back: tuples are lists
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"*{TEMPORARY}"):
            leftover.unlink()
        shards = _resume(folder, identity) if resume and (folder / JOURNAL).is_file() else []
        if overwrite and any(folder.iterdir()):
            _remove_own_files(folder)
        safefile.write_journal(folder / JOURNAL, identity, shards)
        return cls(folder, shards)

    @staticmethod
    def check(folder: Path, *, overwrite: bool = False, resume: bool = False) -> None:
        """Refuse what ``create`` refuses by the flags and what is in the folder; changes nothing."""
        if overwrite and resume:
            raise ValueError("--overwrite and --resume exclude each other, got both; give one")
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} must be a folder, it is a file; choose another name")
        present = [entry.name for entry in folder.iterdir()] if folder.exists() else []
        present = [name for name in present if not name.endswith(TEMPORARY)]
        state = "unfinished" if JOURNAL in present else "finished" if _is_lorq(folder) else "foreign"
        allowed = (resume and state == "unfinished") or (overwrite and state != "foreign")
        if present and not allowed:
            raise FileExistsError(_refusal(folder, present, state, resume=resume))

    @property
    def completed(self) -> dict[str, Any]:
        """The record of every finished shard, by name, in the order of writing."""
        return {name: shard.record for name, shard in self._shards.items()}

    def shard_checksums(self) -> dict[str, str]:
        """sha256 (hex) of every finished shard, by name; for the report and ``verify_shards``."""
        return {name: shard.sha256 for name, shard in self._shards.items()}

    def read_shard(self, name: str) -> dict[str, Tensor]:
        """The tensors of a finished shard; KeyError if there is no such shard."""
        if name not in self._shards:
            raise KeyError(f"{self.folder} has no finished shard {name!r}, only: {some_of(self._shards)}")
        header = safefile.read_header(self.folder / name)
        return {key: safefile.read_tensor(self.folder / name, header, key) for key in header.tensors}

    def write_shard(self, name: str, tensors: dict[str, Tensor], record: Any) -> None:
        """Write one shard; it is whole and on the disk on return.

        Args:
            name: plain file name ending in ``.safetensors``, not written before.
            tensors: none of them in an earlier shard; moved to the CPU here.
            record: JSON value that ``completed`` returns.

        Raises:
            ValueError: if the name or a tensor is there already.
            OSError: if the disk is full; the finished shards are kept.
        """
        plain_name(name, where="shard", suffix=".safetensors")
        record = json.loads(json_bytes(record))  # as a resumed run will see it
        if name in self._shards:
            raise ValueError(f"shard {name} is already written, as one of {len(self._shards)}; skip it")
        for other in self._shards.values():
            if twice := tensors.keys() & set(other.tensors):
                raise ValueError(f"{name} repeats {len(twice)} tensors of {other.name}: {some_of(twice)}")
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        data = save(on_cpu, metadata={"format": "pt"})  # safetensors does not order more than one key
        shard = FinishedShard(name, hashlib.sha256(data).hexdigest(), len(data), sorted(tensors), record)
        path = self.folder / name
        with safefile.room_for(path, len(data)):
            temporary = safefile.write_synced(path, data)
            safefile.append_line(self.folder / JOURNAL, {"shard": asdict(shard)})
            safefile.rename_synced(temporary, path)
        self._shards[name] = shard

    def finish(self, *, config: dict[str, Any], files: Mapping[str, bytes | Path], index_name: str = INDEX) -> None:
        """Write the index, the extra files and at last ``config.json``; only then is it a checkpoint.

        Args:
            config: of the model, with ``quantization_config.quant_method == "lorq"``: by that a later
                ``--overwrite`` knows the folder.
            files: further files by plain name: their bytes, or a file to copy.
            index_name: which tensor is in which shard, in the form of a Hugging Face index.

        Raises:
            ValueError: if a name is not plain or taken, or ``config`` is not of lorq, or no shard is written.
            OSError: if the disk is full; the finished shards are kept.
        """
        if (method := _quant_method(config)) != "lorq":
            raise ValueError(f'config needs quantization_config.quant_method "lorq", got {method!r}')
        if not self._shards:
            raise ValueError(f"{self.folder} needs at least 1 shard to finish, got 0; call write_shard first")
        plain_name(index_name, where="index_name", suffix=".index.json")
        if taken := files.keys() & {*self._shards, index_name, JOURNAL, "config.json"}:
            raise ValueError(f"extra files must have names of their own, got {some_of(taken)}")
        own = sorted([*self._shards, *(plain_name(name, where="extra file") for name in files)])
        headers = [safefile.read_header(self.folder / name) for name in self._shards]
        stored_bytes = sum(header.file_bytes - 8 - len(header.raw) for header in headers)
        index = {
            "metadata": {"lorq_files": own, "total_size": stored_bytes},
            "weight_map": {tensor: shard.name for shard in self._shards.values() for tensor in shard.tensors},
        }
        contents = {
            index_name: json_bytes(index),
            **{name: data.read_bytes() if isinstance(data, Path) else data for name, data in files.items()},
            "config.json": json_bytes(config),  # last: with it the folder can be loaded
        }
        safefile.append_line(self.folder / JOURNAL, {"closing": list(reversed(contents))})
        for name, data in contents.items():
            with safefile.room_for(self.folder / name, len(data)):
                safefile.rename_synced(safefile.write_synced(self.folder / name, data), self.folder / name)
        (self.folder / JOURNAL).unlink()
        safefile.sync_folder(self.folder)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to begin what the disk has no room for. ``folder`` may not exist yet.

    Raises:
        OSError: (ENOSPC) if fewer than ``needed_bytes`` are free.
    """
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{folder} needs {needed_bytes} bytes, {free} are free; free some space or choose another disk",
        )


def verify_shards(folder: Path, checksums: Mapping[str, str]) -> None:
    """Compare every shard with its sha256, as ``shard_checksums`` gave it to the report.

    Raises:
        ValueError: naming all shards that are missing or differ.
    """
    wrong = []
    for name, expected in checksums.items():
        path = folder / plain_name(name, where="checksums", suffix=".safetensors")
        found = safefile.sha256_of(path) if path.is_file() else "missing"
        if found != expected:
            wrong.append(f"{name} (expected {expected[:12]}, got {found[:12]})")
    if wrong:
        raise ValueError(
            f"{folder}: {len(wrong)} of {len(checksums)} shards are not as written: {some_of(wrong)}; "
            "download or write them again"
        )


def check_begun(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to resume a folder that was begun with others of these settings, which may be a part of its identity.

    Raises:
        ValueError: naming what differs.
    """
    if (folder / JOURNAL).is_file():
        then = safefile.read_journal(folder / JOURNAL).identity
        _require_same(folder, {key: then.get(key) for key in settings}, settings)


def _require_same(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    if different := safefile.differences(then, now):
        raise ValueError(
            f"{folder} was begun differently: {'; '.join(different)}; "
            "resume with the same settings, or begin again with --overwrite"
        )


def _resume(folder: Path, identity: dict[str, Any]) -> list[FinishedShard]:
    """The shards to keep. Removes the others, and what an interrupted ``finish`` has left."""
    journal = safefile.read_journal(folder / JOURNAL)
    _require_same(folder, journal.identity, identity)
    whole = list(takewhile(lambda shard: shard.is_whole(folder), journal.shards))
    for name in [*journal.closing, *(shard.name for shard in journal.shards[len(whole) :])]:
        (folder / name).unlink(missing_ok=True)
    return whole


def _remove_own_files(folder: Path) -> None:
    """Remove what lorq wrote; what marks the folder as lorq's goes last, so that a crash leaves the mark."""
    if (folder / JOURNAL).is_file():
        journal = safefile.read_journal(folder / JOURNAL)
        own = [*(shard.name for shard in journal.shards), *journal.closing, JOURNAL]
    else:
        own = []
        for index in sorted(folder.glob("*.index.json")):
            metadata = safefile.read_json(index).get("metadata")
            listed = metadata.get("lorq_files") if isinstance(metadata, dict) else None
            if isinstance(listed, list):
                own += [*(plain_name(name, where=index) for name in listed), index.name]
        own.append("config.json")
    for name in own:
        (folder / name).unlink(missing_ok=True)
    safefile.sync_folder(folder)


def _is_lorq(folder: Path) -> bool:
    """Whether the folder holds a checkpoint that lorq has finished."""
    try:
        config = safefile.read_json(folder / "config.json")
    except (OSError, ValueError):
        return False
    return _quant_method(config) == "lorq"


def _quant_method(config: dict[str, Any]) -> Any:
    quantization = config.get("quantization_config")
    return quantization.get("quant_method") if isinstance(quantization, dict) else None


def _refusal(folder: Path, present: list[str], state: str, *, resume: bool) -> str:
    """Why a folder with content is not used as asked, by its state."""
    if state == "finished" and resume:
        return f"{folder} is already complete, nothing to resume; quantize it again with --overwrite"
    what = {
        "unfinished": "it is an unfinished lorq run; continue with --resume, or begin again with --overwrite",
        "finished": "it is a complete lorq checkpoint; replace it with --overwrite",
        "foreign": "lorq did not write it; choose an empty folder (--resume and --overwrite refuse it)",
    }
    return f"{folder} is not empty ({some_of(present)}): {what[state]}"
