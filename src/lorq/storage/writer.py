"""A quantized folder, written so that no crash harms it.

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
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lorq.storage import atomic
from lorq.storage.atomic import TEMPORARY, rename_synced, sha256_of, sync_file, sync_folder, write_synced, writing
from lorq.storage.journal import AGAIN, FinishedShard, append_line, differences, read_journal, write_journal
from lorq.storage.json_files import json_bytes, name_below, plain_name, read_json, some_of
from lorq.storage.lock import LOCK, remove_temporary
from lorq.storage.names import INDEX, JOURNAL, MEASURED, REPORT_NAME, TUNED_BLOCKS, TUNING
from lorq.storage.out_folder import check_content, is_lorq, quant_method
from lorq.storage.safetensors_file import read_header

_log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes a checkpoint shard by shard; a run that is killed at any moment can go on where it was.

    `lorq.storage.lock.owned` keeps other runs out meanwhile.
    """

    def __init__(self, folder: Path, shards: list[FinishedShard], remedy: str = atomic.RESUME) -> None:
        self.folder, self._remedy = folder, remedy
        self._shards = {shard.name: shard for shard in shards}

    @classmethod
    def create(
        cls, folder: Path, identity: dict[str, Any], *, overwrite: bool = False, resume: bool = False,
        again: bool = False,
    ) -> "CheckpointWriter":  # fmt: skip
        """Begin a folder, or with ``resume`` go on with one.

        Args:
            identity: everything that the bytes depend on (model fingerprint, method, settings, format
                version ...), as JSON values. A resumed run must have the same.
            overwrite: first remove what an earlier lorq run wrote here; any other file stays.
            resume: keep the shards that are whole, drop the first broken one and all after it.
            again: this work is never resumed; what such work has left here unfinished is removed.

        Raises:
            FileExistsError: if the folder has content and no flag allows to use it.
            ValueError: if both flags are given, the identity differs, or the journal is damaged.
        """
        check_content(folder, overwrite=overwrite, resume=resume, again=again)
        identity = json.loads(json_bytes(identity))  # as the journal will give it back: tuples are lists
        if again:
            identity[AGAIN] = True
        remedy = atomic.AGAIN if again else atomic.RESUME
        with writing(folder / JOURNAL, 0, remedy):
            folder.mkdir(parents=True, exist_ok=True)
            remove_temporary(folder, lock=False)
            shards = _resume(folder, identity) if resume and (folder / JOURNAL).is_file() else []
            if (overwrite or again) and any(entry.name != LOCK for entry in folder.iterdir()):
                _remove_own_files(folder)
            write_journal(folder / JOURNAL, identity, shards)
        return cls(folder, shards, remedy)

    @property
    def completed(self) -> dict[str, Any]:
        """The record of every finished shard, by name, in the order of writing."""
        return {name: shard.record for name, shard in list(self._shards.items())}

    def shard_checksums(self) -> dict[str, str]:
        """sha256 (hex) of every finished shard, by name; for the report."""
        return {name: shard.sha256 for name, shard in list(self._shards.items())}

    def write_shard(self, name: str, tensors: dict[str, Tensor], record: Any) -> None:
        """Write one shard; it is whole and on the disk on return.

        Args:
            name: plain file name ending in ``.safetensors``, not written before.
            tensors: none of them in an earlier shard.
            record: JSON value that ``completed`` returns.

        Raises:
            ValueError: if the name or a tensor is there already.
            OSError: if it cannot be written; the finished shards are kept.
        """
        plain_name(name, where="shard", suffix=".safetensors")
        record = json.loads(json_bytes(record))  # as a resumed run will see it
        if name in self._shards:
            raise ValueError(f"shard {name} is already written, as one of {len(self._shards)}; skip it")
        for other in self._shards.values():
            if twice := tensors.keys() & set(other.tensors):
                raise ValueError(f"{name} repeats {len(twice)} tensors of {other.name}: {some_of(twice)}")
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        path = self.folder / name
        with writing(path, sum(tensor.nbytes for tensor in on_cpu.values()), self._remedy):
            temporary = _save_synced(path, on_cpu)
            size, checksum = temporary.stat().st_size, sha256_of(temporary)
            shard = FinishedShard(name, checksum, size, sorted(tensors), record)
            append_line(self.folder / JOURNAL, {"shard": asdict(shard)})
            rename_synced(temporary, path)
        self._shards[name] = shard

    def finish(self, *, config: dict[str, Any], files: Mapping[str, bytes | Path], index_name: str = INDEX) -> None:
        """Write the index, the extra files and at last ``config.json``; only then is it a checkpoint.

        Args:
            config: of the model, with ``quantization_config.quant_method == "lorq"``: by that a later
                ``--overwrite`` knows the folder.
            files: further files by name, which may be in folders below: their bytes, or a file to copy.
            index_name: which tensor is in which shard, in the form of a Hugging Face index.

        Raises:
            ValueError: if a name or a link leads out, a name is taken, ``config`` is not of lorq, or no shard is
                written.
            OSError: if the disk is full; the finished shards are kept.
        """
        if (method := quant_method(config)) != "lorq":
            raise ValueError(f'config needs quantization_config.quant_method "lorq", got {method!r}')
        if not self._shards:
            raise ValueError(f"{self.folder} needs at least 1 shard to finish, got 0; call write_shard first")
        plain_name(index_name, where="index_name", suffix=".index.json")
        if taken := files.keys() & {*self._shards, index_name, JOURNAL, "config.json"}:
            raise ValueError(f"extra files must have names of their own, got {some_of(taken)}")
        own = sorted([*self._shards, *(name_below(name, where="extra file") for name in files)])
        for name in files:
            _check_inside(self.folder, name)
        headers = [read_header(self.folder / name) for name in self._shards]
        stored_bytes = sum(header.file_bytes - 8 - len(header.raw) for header in headers)
        rest = {name: data.read_bytes() if isinstance(data, Path) else data for name, data in files.items()}
        rest["config.json"] = json_bytes(config)  # last: with it the folder can be loaded
        checksums = {name: hashlib.sha256(data).hexdigest() for name, data in rest.items()}
        index = {
            "metadata": {"checksums": checksums, "lorq_files": own, "total_size": stored_bytes},
            "weight_map": {tensor: shard.name for shard in self._shards.values() for tensor in shard.tensors},
        }
        contents = {index_name: json_bytes(index), **rest}
        with writing(self.folder / JOURNAL, 0, self._remedy):
            append_line(self.folder / JOURNAL, {"closing": list(reversed(contents))})
        for name, data in contents.items():
            with writing(self.folder / name, len(data), self._remedy):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                rename_synced(write_synced(self.folder / name, data), self.folder / name)
        with writing(self.folder / JOURNAL, 0, self._remedy):
            (self.folder / JOURNAL).unlink()
            sync_folder(self.folder)


def _save_synced(path: Path, tensors: dict[str, Tensor]) -> Path:
    """`write_synced` of tensors, none of which is copied for it: a block of a large mixture has gigabytes.

    safetensors writes under a name of its own choice first, with rights of its own, so it gets a folder for that.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    scratch = path.with_name(f"writing{TEMPORARY}")
    scratch.mkdir(exist_ok=True)
    try:
        save_file(tensors, scratch / path.name, metadata={"format": "pt"})  # it does not order more than one key
        (scratch / path.name).chmod(scratch.stat().st_mode & 0o666)  # as any file made here
        sync_file(scratch / path.name)
        os.replace(scratch / path.name, temporary)
    except SafetensorError as error:
        raise atomic.system_error(error) or OSError(errno.EIO, str(error)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return temporary


def check_begun(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to resume a folder that was begun with others of these settings, which may be a part of its identity.

    Raises:
        ValueError: naming what differs.
    """
    if (folder / JOURNAL).is_file():
        then = read_journal(folder / JOURNAL).identity
        _require_same(folder, {key: then.get(key) for key in settings}, settings)


def _require_same(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    if different := differences(then, now):
        raise ValueError(
            f"{folder} was begun differently: {'; '.join(different)}; "
            "resume with the same settings, or begin again with --overwrite"
        )


def _resume(folder: Path, identity: dict[str, Any]) -> list[FinishedShard]:
    """The shards to keep. Removes the others, and what an interrupted ``finish`` has left."""
    journal = read_journal(folder / JOURNAL)
    _require_same(folder, journal.identity, identity)
    whole = list(takewhile(lambda shard: shard.is_whole(folder), journal.shards))
    _remove(folder, [*journal.closing, *(shard.name for shard in journal.shards[len(whole) :])])
    return whole


def remove_made(folder: Path) -> None:
    """Remove a folder of lorq's that is needed no more; files of others stay, and a warning says so."""
    _remove_own_files(folder)
    remove_temporary(folder)
    if left := [path.name for path in folder.iterdir()]:
        _log.warning("%s stays, it has %s, which lorq did not write", folder, some_of(left))
    else:
        folder.rmdir()


def finish_removal(folder: Path) -> None:
    """Remove what is left of a folder where a run was killed that was removing it; any other stays."""
    left = {path.name for path in folder.iterdir() if not path.name.endswith(TEMPORARY)} if folder.is_dir() else {""}
    if not left or (left == {"config.json"} and is_lorq(folder)):  # which goes last
        remove_made(folder)


def _remove_own_files(folder: Path) -> None:
    """Remove what lorq wrote; what marks the folder as lorq's goes last, so that a crash leaves the mark."""
    if (folder / JOURNAL).is_file():
        journal = read_journal(folder / JOURNAL)
        own = [*(shard.name for shard in journal.shards), *journal.closing, TUNED_BLOCKS, TUNING, JOURNAL]
    else:
        own = []
        for index in sorted(folder.glob("*.index.json")):
            metadata = read_json(index).get("metadata")
            listed = metadata.get("lorq_files") if isinstance(metadata, dict) else None
            if isinstance(listed, list):
                names = (name_below(name, where=index) for name in listed)
                own += [*(name for name in names if name != REPORT_NAME), index.name]
        own += [MEASURED, REPORT_NAME, "config.json"]
    _remove(folder, own)
    sync_folder(folder)


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files, what is part-written of them, and the folders below that they leave empty."""
    for name in names:
        _check_inside(folder, name)
        (folder / name).unlink(missing_ok=True)
        if "/" in name:  # beside the shards `create` has removed all
            (folder / f"{name}{TEMPORARY}").unlink(missing_ok=True)
        for place in list((folder / name).relative_to(folder).parents)[:-1]:
            if (folder / place).is_dir() and not any((folder / place).iterdir()):
                (folder / place).rmdir()


def _check_inside(folder: Path, name: str) -> None:
    """Refuse a file in a folder below that is a link out."""
    place, own = (os.path.realpath(path) for path in ((folder / name).parent, folder))
    if not Path(place).is_relative_to(own):
        raise ValueError(f"{folder / name} must lie in {folder}, but a link leads out of it; remove the link first")
