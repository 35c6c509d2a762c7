"""A model that somebody has quantized, opened: its layers' weights under the names that the original has."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.models.decoded import FLOAT8
from lorq.models.formats import FORMATS, Packed, Weight
from lorq.models.skeleton import QUANTIZATION_KEYS
from lorq.storage.folder import LorqFolder
from lorq.storage.json_files import damaged, inconsistent, read_json, some_of
from lorq.storage.names import DECODED_FROM
from lorq.storage.reader import WeightFiles

# Where ModelOpt tells of its quantization, in newer folders beside the config, which tells the same.
MODELOPT = "hf_quant_config.json"


@dataclass(frozen=True)
class QuantizedFiles(WeightFiles):
    """Weight files in which quantized weights are read as what they stand for.

    Attributes:
        layers: the quantized weights, by the names that they have in the original, such as ``....up_proj.weight``.
        places: the file of every stored tensor.
        method: what has quantized them, by the config's word.
        decoded: the type that they are read in.
    """

    layers: Mapping[str, Packed] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict, repr=False)
    method: str = ""
    decoded: torch.dtype = torch.float32

    @classmethod
    def of(cls, folder: Path, config: Mapping[str, Any] | None) -> "QuantizedFiles":
        """The weights of a folder whose config says of its quantization ``config``; None for dense weights.

        Raises:
            ValueError: for a quantization that is not read here, or tensors that do not belong together.
        """
        if config is None:
            files = open_dense(folder)
            return cls(files.folder, files.headers, files.files, before=files.before)
        method = str(config.get("quant_method"))
        if method == "lorq":
            lorq = LorqFolder.open(folder)
            return cls._with(lorq.reader, dict(_lorq(lorq)))
        if method not in FORMATS:
            raise ValueError(
                f"{folder} must be quantized as one of {', '.join((*FORMATS, 'lorq'))}, or be a GGUF file, its config "
                f"says {method:.80}; give a folder of its dequantized weights instead"
            )
        files = WeightFiles.open(folder)
        try:
            layers = {f"{module}.weight": packed for module, packed in FORMATS[method](files, config)}
        except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, re.error) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise damaged(
                folder, f"config and tensors must be as {method} writes them, they are not ({reason})"
            ) from error
        if not layers:
            raise ValueError(f"{folder} must have weights that {method} has packed, as its config says; it has none")
        found = cls._with(files, layers)
        unread = [n for n in found.names if n not in layers and files.dtype(n) in FLOAT8]
        if unread:
            raise ValueError(
                f"{folder} has 8-bit floating point weights in a form that is not read here, {some_of(unread)}; give a "
                "folder of its dequantized weights instead"
            )
        return replace(found, method=method)

    @classmethod
    def _with(cls, files: WeightFiles, layers: dict[str, Packed]) -> "QuantizedFiles":
        taken = {name for packed in layers.values() for name in packed.parts.values()}
        dense = {name: file for name, file in files.files.items() if name not in taken}
        # A packed weight is looked for in the file of its first part.
        made = {name: files.files[next(iter(packed.parts.values()))] for name, packed in layers.items()}
        return cls(files.folder, files.headers, dense | made, before=files.before, layers=layers, places=files.files)

    def weight(self, name: str) -> Weight:
        """A quantized weight.

        Raises:
            ValueError: if its tensors do not belong together.
        """
        packed = self.layers[name]
        files = WeightFiles(self.folder, self.headers, dict(self.places), self._seen)
        parts = {local: files.tensor(stored) for local, stored in packed.parts.items()}
        try:
            return packed.make(parts)
        except (ValueError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise damaged(self.folder / self.files[name], f"{name} could not be read: {reason}") from error

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        if name not in self.layers:
            return super().tensor(name, index)
        decoded = self.weight(name).decode().to(self.decoded)
        return decoded if index is None else decoded[index]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.layers[name].shape if name in self.layers else super().shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.decoded if name in self.layers else super().dtype(name)

    def stored_bytes(self, name: str) -> int:
        """What a weight takes on disk, all that belongs to it counted."""
        if name not in self.layers:
            return self._bytes(name, self.files[name])
        return sum(self._bytes(part, self.places[part]) for part in self.layers[name].parts.values())

    def _bytes(self, stored: str, file: str) -> int:
        tensor = self.headers[file].tensors[stored]
        return tensor.end - tensor.begin


def read_dense(folder: Path, dtype: torch.dtype) -> WeightFiles:
    """The weights of a folder; those that somebody has quantized as what they stand for, rounded to ``dtype``.

    Raises:
        ValueError: if lorq has quantized them, or somebody in a way that is not read here.
    """
    told = read_quantization(folder)
    if told is None:
        return open_dense(folder)
    if told.get("quant_method") == "lorq":
        raise ValueError(f"{folder} is already quantized (lorq); give the original model")
    return replace(QuantizedFiles.of(folder, told), decoded=dtype)


def open_dense(folder: Path) -> WeightFiles:
    """The weights of a folder that nothing calls quantized.

    Raises:
        ValueError: for 8-bit floating point weights with scales, which would be read without them.
    """
    files = WeightFiles.open(folder)
    for name in files.names:
        beside = [n for n in files.by_module[name.rpartition(".")[0]] if n != name and "scale" in n.rpartition(".")[2]]
        if files.dtype(name) in FLOAT8 and beside:
            raise ValueError(
                f"{folder} must say in config.json (quantization_config) how its weights are quantized, it says "
                f"nothing of {name} ({files.dtype(name)}) and its {beside[0]}; add what belongs there, or give a "
                "folder of its dequantized weights"
            )
    return files


def is_foreign(folder: Path) -> bool:
    """Whether a folder's weights were quantized by others, in a way that `read_dense` reads.

    Raises:
        ValueError: as `open_dense`.
    """
    told = read_quantization(folder)
    if told is None and any(folder.glob("*.safetensors")):
        open_dense(folder)
    return told is not None and told.get("quant_method") in FORMATS


def source_note(files: WeightFiles) -> str:
    """What a report says of weights that had been quantized before; "" of others."""
    if isinstance(files, QuantizedFiles) and files.layers:
        return f"{len(files.layers)} of the model's weights were quantized before ({files.method}), and dequantized"
    mark = files.folder / DECODED_FROM
    return mark.read_text(encoding="utf-8") if mark.is_file() else ""


def read_quantization(folder: Path) -> dict[str, Any] | None:
    """What is told of how a folder's weights are quantized: in its config, or ModelOpt's; None for dense ones.

    Raises:
        ValueError: if it is told twice, and not the same.
    """
    file, found = folder / "config.json", None
    config = read_json(file)
    text = config.get("text_config")
    for where, own in (("", config), ("text_config.", text if isinstance(text, dict) else {})):
        for key in QUANTIZATION_KEYS:
            told = own.get(key)
            if told is not None and not isinstance(told, dict):
                raise damaged(file, f"{where}{key} must be an object, got {told!r:.80}")
            if found and told and found != told:
                raise inconsistent(file, f"{where}{key} must be as what is told before it, it differs")
            if told is not None and not isinstance(told.get("quant_method", ""), str):
                raise damaged(file, f"{where}{key}.quant_method must be a text, got {told['quant_method']!r:.80}")
            found = told if found is None else found
    if found is None and (own_file := folder / MODELOPT).is_file():
        stated = read_json(own_file).get("quantization")
        found = {"quant_method": "modelopt"} | (stated if isinstance(stated, dict) else {})
    if found and not found.get("quant_method"):
        raise damaged(file, f"quantization_config must have a quant_method, it has {some_of(found)}")
    return found


@dataclass(frozen=True)
class _Own:
    """A weight of a lorq folder."""

    weight: QuantizedWeight

    def decode(self) -> Float[Tensor, "out in"]:
        return self.weight.dense()

    def exact(self) -> QuantizedWeight:
        return self.weight


def _lorq(folder: LorqFolder) -> Iterator[tuple[str, Packed]]:
    if folder.tiles:
        raise ValueError(
            f"{folder.path} has factors that experts share (tileq), which take no others; use another method"
        )

    def make(format: LayerFormat, tensors: Mapping[str, Tensor]) -> Weight:
        if wrong := next(format.faults(tensors), None):
            raise ValueError(wrong)
        return _Own(format.read(tensors))

    for name, format in folder.formats.items():
        out, in_ = folder.reader.told_shape(f"{name}.weight_shape")
        stored = [n for n in folder.reader.by_module[name] if not n.endswith(".bias")]
        parts = {n.removeprefix(f"{name}."): n for n in stored}
        yield f"{name}.weight", Packed((out, in_), parts, partial(make, format))
