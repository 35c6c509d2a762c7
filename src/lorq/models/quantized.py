"""A model that somebody has quantized, opened: its layers' weights under the names that the original has."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.models.bitsandbytes import STATE, read_eight_bits, read_four_bits, read_state
from lorq.models.decoded import FLOAT8, read_float8
from lorq.models.grouped import read_awq, read_gptq, read_packed, read_plain
from lorq.models.stated import check_bits, check_groups, stated_by_gptq, stated_by_groups
from lorq.storage.folder import LorqFolder
from lorq.storage.json_files import damaged, read_json, some_of
from lorq.storage.names import DECODED_FROM
from lorq.storage.reader import WeightFiles


@runtime_checkable
class Weight(Protocol):
    """A quantized weight, read."""

    def decode(self) -> Float[Tensor, "out in"]:
        """In float32."""
        ...

    def exact(self) -> QuantizedWeight:
        """In lorq's codes, to the last bit; a ValueError that says why where these cannot have it."""
        ...


@dataclass(frozen=True)
class Packed:
    """Where a quantized weight lies: shape, names of its tensors by local name, and what makes a weight of them."""

    shape: tuple[int, int]
    parts: Mapping[str, str]
    make: Callable[[Mapping[str, Tensor]], Weight]


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
            files = WeightFiles.open(folder)
            return cls(files.folder, files.headers, files.files)
        method = str(config.get("quant_method"))
        if method == "lorq":
            lorq = LorqFolder.open(folder)
            return cls._with(lorq.reader, dict(_lorq(lorq)))
        if method not in FORMATS:
            raise ValueError(
                f"{folder} must be quantized as one of {', '.join((*FORMATS, 'lorq'))}, or be a GGUF file, its config "
                f"says {method}; give a folder of its dequantized weights instead"
            )
        files = WeightFiles.open(folder)
        layers = {f"{module}.weight": packed for module, packed in FORMATS[method](files, config)}
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
        return cls(files.folder, files.headers, dense | made, layers=layers, places=files.files)

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
        except (ValueError, RuntimeError, TypeError, KeyError, IndexError) as error:
            raise damaged(self.folder / self.files[name], f"{name} could not be read: {error}") from error

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
        return WeightFiles.open(folder)
    if told.get("quant_method") == "lorq":
        raise ValueError(f"{folder} is already quantized (lorq); give the original model")
    return replace(QuantizedFiles.of(folder, told), decoded=dtype)


def is_foreign(folder: Path) -> bool:
    """Whether a folder's weights were quantized by others, in a way that `read_dense` reads."""
    told = read_quantization(folder)
    return told is not None and told.get("quant_method") in FORMATS


def source_note(files: WeightFiles) -> str:
    """What a report says of weights that had been quantized before; "" of others."""
    if isinstance(files, QuantizedFiles) and files.layers:
        return f"{len(files.layers)} of the model's weights were quantized before ({files.method}), and dequantized"
    mark = files.folder / DECODED_FROM
    return mark.read_text(encoding="utf-8") if mark.is_file() else ""


def read_quantization(folder: Path) -> dict[str, Any] | None:
    """What a folder's config says of how its weights are quantized; None for dense ones."""
    found = read_json(folder / "config.json").get("quantization_config")
    if found is not None and not isinstance(found, dict):
        raise damaged(folder / "config.json", f"quantization_config must be an object, got {found!r}")
    return found


Found = Iterator[tuple[str, Packed]]


def _parts(
    files: WeightFiles, key: str, others: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, str]]]:
    """The modules that have a tensor ``key``: their tensors by local name.

    Raises:
        ValueError: if one lacks one of the ``others``.
    """
    for module, names in files.by_module.items():
        own = {name.rpartition(".")[2]: name for name in names}
        if key not in own:
            continue
        if lacking := [local for local in others if local not in own]:
            raise damaged(files.folder, f"{module} has {key} and lacks {some_of(lacking)}")
        yield module, {local: own[local] for local in (key, *others, *optional) if local in own}


def _matrix(files: WeightFiles, name: str) -> tuple[int, int]:
    """The shape of a tensor that must be a matrix."""
    shape = files.shape(name)
    if len(shape) != 2:
        raise damaged(files.folder / files.files[name], f"{name} must be a matrix, its shape is {shape}")
    return shape[0], shape[1]


def _gptq(files: WeightFiles, config: Mapping[str, Any]) -> Found:
    form = str(config.get("checkpoint_format", "gptq"))
    if form not in ("gptq", "gptq_v2"):
        raise ValueError(f"{files.folder} must have GPTQ's checkpoint_format gptq or gptq_v2, got {form}")
    make = partial(read_gptq, zero_offset=1 if form == "gptq" else 0)
    for module, parts in _parts(files, "qweight", ("qzeros", "scales", "g_idx")):
        words, out = _matrix(files, parts["qweight"])
        in_, stated = files.shape(parts["g_idx"])[0], stated_by_gptq(config, module)
        check_bits(files.folder, module, stated.get("bits"), words=words, columns=in_)
        groups = files.shape(parts["scales"])[0]
        check_groups(files.folder, module, stated.get("group_size"), groups=groups, columns=in_)
        yield module, Packed((out, in_), parts, make)


def _awq(files: WeightFiles, config: Mapping[str, Any]) -> Found:
    form, bits = str(config.get("version", "gemm")).lower(), config.get("bits", config.get("w_bit"))
    if form != "gemm" or bits != 4:
        raise ValueError(f"{files.folder} must have AWQ's version gemm in 4 bits, got {form} in {bits}")
    for module, parts in _parts(files, "qweight", ("qzeros", "scales")):
        in_, words = _matrix(files, parts["qweight"])
        size = config.get("group_size", config.get("q_group_size"))
        check_groups(files.folder, module, size, groups=files.shape(parts["scales"])[0], columns=in_)
        yield module, Packed((8 * words, in_), parts, read_awq)


def _compressed_tensors(files: WeightFiles, config: Mapping[str, Any]) -> Found:
    known = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
    groups = config.get("config_groups", {})
    forms = {str(group.get("format") or config.get("format")) for group in groups.values()}
    if unread := sorted(forms - set(known)):
        raise ValueError(
            f"{files.folder} must have compressed-tensors' format {' or '.join(known)}, got {some_of(unread)}"
        )
    if config.get("transform_config"):
        raise ValueError(
            f"{files.folder} has transform_config: its weights are rotated, and differ from the original's otherwise "
            "than by quantization"
        )
    others = ("weight_zero_point", "weight_g_idx")
    for module, parts in _parts(files, "weight_packed", ("weight_scale", "weight_shape"), others):
        shape = WeightFiles.tensor(files.aside(), parts["weight_shape"]).tolist()
        stated = stated_by_groups(groups, module)
        words = _matrix(files, parts["weight_packed"])[1]
        check_bits(files.folder, module, stated.get("num_bits"), words=words, columns=shape[1])
        if stated.get("strategy") in ("group", "channel"):
            size, found = stated.get("group_size"), files.shape(parts["weight_scale"])[-1]
            check_groups(files.folder, module, size or -1, groups=found, columns=shape[1])
        make = partial(read_packed, bits=stated.get("num_bits"))
        yield module, Packed((shape[0], shape[1]), parts, make)
    for module, parts in _parts(files, "weight", (), ("weight_scale", "weight_zero_point")):
        if "weight_scale" in parts:
            out, in_ = files.shape(parts["weight"])
            if files.dtype(parts["weight"]) in FLOAT8:
                scales = {local: name for local, name in parts.items() if local != "weight_zero_point"}
                yield module, Packed((out, in_), scales, partial(read_float8, block=_block(groups)))
            else:
                yield module, Packed((out, in_), parts, read_plain)


def _block(groups: Mapping[str, Any]) -> tuple[int, int] | None:
    """The rows and columns of compressed-tensors' blocks; None where there are none."""
    stated = [(group.get("weights") or {}).get("block_structure") for group in groups.values()]
    found = {tuple(block) for block in stated if block}
    if len(found) > 1:
        raise ValueError(f"compressed-tensors' blocks must be of one size, got {some_of(map(str, sorted(found)))}")
    return found.pop() if found else None


def _float8(files: WeightFiles, config: Mapping[str, Any]) -> Found:
    block = config.get("weight_block_size")
    make = partial(read_float8, block=tuple(block) if block else None)
    for module, parts in _parts(files, "weight", (), ("weight_scale_inv", "weight_scale")):
        if len(parts) > 1:
            out, in_ = files.shape(parts["weight"])
            yield module, Packed((out, in_), parts, make)


def _bitsandbytes(files: WeightFiles, config: Mapping[str, Any]) -> Found:
    names: dict[str, dict[str, str]] = {}
    for name in files.names:
        module, found, local = name.partition(".weight.")
        if found:
            names.setdefault(module, {"weight": f"{module}.weight"})[f"weight.{local}"] = name
    for module, parts in names.items():
        states = [name for local, name in parts.items() if local.startswith(STATE)]
        if len(states) != 1:
            raise damaged(files.folder, f"{module} must have one quant_state, got {some_of(states) or 'none'}")
        yield module, Packed(read_state(files.aside().tensor(states[0]))["shape"], parts, read_four_bits)
    for module, parts in _parts(files, "weight", (), ("SCB", "weight_format")):
        if "SCB" in parts:
            out, in_ = files.shape(parts["weight"])
            yield module, Packed((out, in_), parts, read_eight_bits)


# By quant_method: the modules that are packed, each with where and how.
FORMATS: dict[str, Callable[[WeightFiles, Mapping[str, Any]], Found]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
    "fp8": _float8,
}


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
        return _Own(format.read(tensors))

    for name, format in folder.formats.items():
        stored = [n for n in folder.reader.by_module[name] if not n.endswith(".bias")]
        out, in_ = folder.reader.aside().tensor(f"{name}.weight_shape").tolist()
        parts = {n.removeprefix(f"{name}."): n for n in stored}
        yield f"{name}.weight", Packed((out, in_), parts, partial(make, format))
