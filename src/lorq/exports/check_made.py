"""Exports, adapters, GGUF files and other models, looked at from end to end: files, tensors, values."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorq.core.codes.gguf_blocks import TYPES, BlockType
from lorq.core.faults import not_finite
from lorq.exports.gguf_told import read_file
from lorq.exports.read_back import read_made
from lorq.foreign.gguf_form import ADAPTER
from lorq.foreign.peft_form import CONFIG, WEIGHTS
from lorq.models.quantized import QuantizedFiles, read_quantization
from lorq.storage.appear import sealed_files
from lorq.storage.findings import Findings
from lorq.storage.gguf_header import GgufTensor, read_gguf_header
from lorq.storage.json_files import read_json, some_of
from lorq.storage.names import EXPORTED
from lorq.storage.reader import WeightFiles
from lorq.storage.safetensors_file import read_tensor
from lorq.storage.seal import check_seal

# Of a GGUF file's tensors, so many bytes are looked at at a time.
_STRIP = 1 << 26
_PLAIN = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def check_made(place: Path, found: Findings) -> None:
    """Compare what lorq made for other programs with its checksums, as far as it has some, and look at every tensor.

    Raises:
        FileNotFoundError: if it is nothing of that kind.
    """
    if place.is_file():
        _check_gguf(place, place.name, found)
        return
    with found.of(EXPORTED):
        _compare(place, found)
    if (place / ADAPTER).is_file():
        _check_gguf(place / ADAPTER, ADAPTER, found)
    elif (place / CONFIG).is_file():
        _check_adapter(place, found)
    else:
        _check_model(place, found)
    if (place / EXPORTED).is_file() and not found.faults:
        with found.of(EXPORTED):
            read_made(place)


def _compare(place: Path, found: Findings) -> None:
    """The checksums of an export's files, as its mark has them; a model card may be another."""
    own = sealed_files(place) if (place / EXPORTED).is_file() else {}
    there = sorted(path.name for path in place.iterdir() if path.is_file() and not path.name.startswith("."))
    found.compare_all({name: checksum for name, checksum in own.items() if name != "README.md"})
    found.unsealed += [name for name in there if name not in own and name != EXPORTED]


def _check_model(place: Path, found: Findings) -> None:
    """A model's folder, dense or quantized in any way that is read here."""
    names = sorted(path.name for path in place.glob("*.safetensors"))
    found.leave([*names, "model.safetensors.index.json"])
    headers = found.headers(names)
    stored = WeightFiles(place, headers, {t: name for name, header in headers.items() for t in header.tensors})
    files = QuantizedFiles(place, headers, stored.files)
    if set(headers) == set(names):
        with found.of("config.json"):
            files = QuantizedFiles.of(place, read_quantization(place))
    for name in found.each(stored.names):
        found.tensors += 1
        with found.of(name):
            if wrong := not_finite(stored.tensor(name)):
                found.add(name, wrong)
    for name in files.layers:
        with found.of(name.removesuffix(".weight")):
            files.weight(name)


def _check_adapter(place: Path, found: Findings) -> None:
    """One of peft: pairs of factors of the ranks that the config tells."""
    config: Mapping[str, Any] = {}
    with found.of(CONFIG):
        config = read_json(place / CONFIG)
    if not (place / WEIGHTS).is_file():
        found.add(WEIGHTS, "must be there, it is missing")
        return
    headers = found.headers([WEIGHTS])
    if WEIGHTS not in headers:
        return
    header = headers[WEIGHTS]
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, stored in header.tensors.items():
        found.tensors += 1
        module, mark, side = name.partition(".lora_")
        if mark:
            pairs.setdefault(module, {})[side[:1]] = stored.shape
        with found.of(name):
            if wrong := not_finite(read_tensor(place / WEIGHTS, header, name)):
                found.add(name, wrong)
    for module, sides in pairs.items():
        _check_pair(module.removeprefix("base_model.model."), sides, config, found)


def _check_pair(module: str, sides: dict[str, tuple[int, ...]], config: Mapping[str, Any], found: Findings) -> None:
    a, b = sides.get("A", ()), sides.get("B", ())
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        found.add(module, f"must have lora_A (rank, in) and lora_B (out, rank), got {a or 'none'} and {b or 'none'}")
        return
    patterns = config.get("rank_pattern")
    rank = patterns.get(module, config.get("r")) if isinstance(patterns, dict) else config.get("r")
    if config and rank != a[0]:
        found.add(module, f"must have the rank {rank}, as {CONFIG} says, its factors have {a[0]}")


def _check_gguf(path: Path, name: str, found: Findings) -> None:
    """A GGUF file: its checksum, its header, and the numbers in its blocks."""
    with found.of(name):
        (found.sealed if check_seal(path) else found.unsealed).append(name)
    tensors: list[GgufTensor] = []
    with found.of(name):
        tensors = read_gguf_header(path)
        read_file(path)
    unread = []
    for tensor in tensors:
        if tensor.type in _PLAIN or tensor.type in TYPES:
            found.tensors += 1
            if wrong := _numbers(path, tensor):
                found.add(tensor.name, wrong)
        else:
            unread.append(f"{tensor.name} ({tensor.type})")
    if unread:
        found.notes.append(f"not looked into, codes of types that lorq does not read: {some_of(unread)}")


def _numbers(path: Path, tensor: GgufTensor) -> str:
    """What is wrong with the floating-point numbers of a tensor, or of its blocks."""
    type_ = TYPES.get(tensor.type)
    step = 8 if type_ is None else type_.size
    most = _STRIP // step * step
    with path.open("rb") as file:
        file.seek(tensor.begin)
        for at in range(tensor.begin, tensor.end, most):
            data = torch.frombuffer(bytearray(file.read(min(most, tensor.end - at))), dtype=torch.uint8)
            for numbers in [data.view(_PLAIN[tensor.type])] if type_ is None else _halves(data, type_):
                if wrong := not_finite(numbers):
                    return f"{wrong} in the {len(data)} bytes from {at}"
    return ""


def _halves(data: Tensor, type_: BlockType) -> list[Tensor]:
    """The float16 numbers of blocks."""
    fields = dict(zip(type_.fields, data.view(-1, type_.size).split(list(type_.fields.values()), 1), strict=True))
    return [fields[name].contiguous().view(torch.float16) for name in ("d", "dmin", "min") if name in fields]
