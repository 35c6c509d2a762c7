"""Everything that reads files, by what is read; each gives a digest of what it has read, or refuses in a sentence."""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import lorq
from lorq.adapt.adapters import adapters_of, base_hash, load_adapter, read_factors, use_adapter
from lorq.adapt.check_adapter import check_adapter
from lorq.exports.gguf_told import read_file
from lorq.exports.read_back import read_made
from lorq.foreign.gguf_file import GgufFile
from lorq.inspection import inspect
from lorq.models.locate import resolve_model
from lorq.models.quantized import QuantizedFiles, is_foreign, read_dense, read_quantization
from lorq.storage.appear import refuse_used, sealed_files
from lorq.storage.companions import find_companions
from lorq.storage.findings import Findings
from lorq.storage.folder import LorqFolder
from lorq.storage.json_files import read_json
from lorq.storage.measured import read_measured
from lorq.storage.report import read_report
from lorq.storage.seal import check_seal
from lorq.storage.writer import CheckpointWriter, check_begun

TOKENS = torch.arange(20)[None]
Reader = Callable[[Path], Any]


def digest(parts: Iterable[tuple[str, Any]]) -> str:
    """Of tensors, and of what else has a repr, by name."""
    summed = hashlib.sha256()
    for name, part in parts:
        summed.update(name.encode("utf-8", "surrogatepass"))
        if isinstance(part, torch.Tensor):
            summed.update(f"{part.dtype} {tuple(part.shape)}".encode())
            summed.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            summed.update(repr(part).encode("utf-8", "surrogatepass"))
    return summed.hexdigest()


def _layers(place: Path) -> str:
    folder = LorqFolder.open(place)
    rest = [name for name in folder.reader.names if name.rpartition(".")[0] not in folder.formats]
    parts = [(name, weight.dense()) for name, weight in folder.layers()]
    return digest([*parts, *((name, folder.reader.tensor(name)) for name in rest)])


@torch.no_grad()
def _load(place: Path) -> str:
    return digest([("logits", lorq.load(place, device="cpu")(TOKENS).logits)])


def _inspect(place: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        inspect(place, json_=True)
        inspect(place)


def _verify(place: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        json.dumps(lorq.verify(place).as_dict())


def _as_source(place: Path) -> str:
    files = QuantizedFiles.of(place, read_quantization(place))
    return digest((name, files.tensor(name)) for name in files.names)


def _dense_source(place: Path) -> str:
    is_foreign(place)
    files = read_dense(place, torch.float32)
    return digest((name, files.tensor(name)) for name in files.names)


def _export(place: Path) -> None:
    lorq.export(place, place.parent / "made", to="dense", overwrite=True)


def _report(place: Path) -> None:
    lorq.report(place, page=place.parent / "page.html")


def _companions(place: Path) -> str:
    taken, left = find_companions(place)
    return digest([("taken", sorted(taken)), ("left", sorted(left)), *((n, p.read_bytes()) for n, p in taken.items())])


def _json_beside(place: Path) -> None:
    read_report(place)
    read_measured(place)
    read_json(place / "lorq.safetensors.index.json")


def _used(place: Path) -> None:
    """Whether it could be replaced; that it is there is no fault of the files."""
    with contextlib.suppress(FileExistsError):
        refuse_used(place, overwrite=True)
    if place.is_dir():
        sealed_files(place)


class Adapter:
    """The base of the adapter's seed, kept between cases."""

    def __init__(self, base: Path) -> None:
        self.folder = LorqFolder.open(base)
        self.base_place, self.model = base, lorq.load(base, device="cpu")
        self.hash = base_hash(self.model)
        self.shapes = {
            n: tuple(int(x) for x in self.folder.reader.tensor(f"{n}.weight_shape")) for n in self.folder.formats
        }

    def read(self, place: Path) -> str:
        found = read_factors(place, self.hash, self.shapes)
        return digest((f"{name}.{i}", part) for name, pair in found.items() for i, part in enumerate(pair))

    @torch.no_grad()
    def load(self, place: Path) -> str:
        name = load_adapter(self.model, place, "fuzzed")
        logits = self.model(TOKENS).logits
        use_adapter(self.model)
        adapters_of(self.model).known.pop(name)
        return digest([("logits", logits)])


def _check_adapter(place: Path) -> None:
    check_adapter(place, Findings(place))


def _gguf_file(place: Path) -> str:
    file = GgufFile.open(place)
    return digest((name, file.values(name)) for name in sorted(file.tensors))


@torch.no_grad()
def _decode(place: Path) -> str:
    with contextlib.redirect_stderr(io.StringIO()):
        return digest([("logits", lorq.load(resolve_model(place), device="cpu")(TOKENS).logits)])


def _resume(place: Path) -> str:
    identity = {"method": {"bits": 3}, "seed": 0, "names": ["a", "b"]}
    check_begun(place, {"seed": 0})
    writer = CheckpointWriter.create(place, identity, resume=True)
    return digest(sorted(writer.shard_checksums().items()))


def _overwrite(place: Path) -> None:
    CheckpointWriter.create(place, {"seed": 1}, overwrite=True)


def readers_of(home: Path) -> Mapping[str, list[tuple[float, Reader]]]:
    """By kind: how often each reader is asked, and the reader."""
    adapter = Adapter(home / "lords")
    return {
        "folder": [
            (1.0, _verify), (1.0, _layers), (0.2, _load), (0.3, _inspect), (0.3, _as_source), (0.1, _export),
            (0.05, _report), (0.3, _companions), (0.5, _json_beside), (0.1, _overwrite),
        ],
        "adapter": [(1.0, _check_adapter), (1.0, _verify), (1.0, adapter.read), (0.3, adapter.load)],
        "source": [(1.0, _as_source), (1.0, _dense_source), (0.5, _verify), (0.3, _companions)],
        "made": [(1.0, _verify), (1.0, read_made), (0.5, _inspect), (0.5, _used), (0.3, _companions)],
        "gguf": [(1.0, _verify), (1.0, read_file), (1.0, check_seal), (0.5, _inspect), (0.5, _gguf_file),
                 (0.5, _used), (0.15, _decode)],
        "unfinished": [(1.0, _resume), (0.3, _overwrite), (0.2, _verify), (0.2, _inspect)],
    }  # fmt: skip
