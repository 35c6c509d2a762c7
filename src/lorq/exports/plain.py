"""A folder as transformers saves one: its own names for tensors, an index, the config and what travels with it."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorq.models.experts import find_experts
from lorq.models.skeleton import get_tensor, put_tensor, read_config, skeleton
from lorq.models.stored import Stored, find_stored
from lorq.storage.companions import find_companions, with_code_of
from lorq.storage.folder import LorqFolder
from lorq.storage.json_files import json_bytes
from lorq.storage.reader import WeightFiles

# A file is begun anew past this; one block is in memory besides.
_MOST_BYTES = 2 << 30
_WIDER = "take --dtype bfloat16 or float32"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class PlainNames:
    """The names that transformers gives to a model's tensors when it saves it: experts fused or one by one, as it has
    them in files."""

    def __init__(self, folder: LorqFolder):
        self.model = skeleton(read_config(folder.path, quantized=True))
        self.experts = find_experts(self.model)

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Dense tensors by those names; all experts of a layer must be among them, or none."""
        from transformers.core_model_loading import revert_weight_conversion

        state = dict(tensors)
        for path, experts in self.experts.items():
            before = {n: get_tensor(self.model, n) for n in state if n.startswith(f"{path}.")}
            if not before:
                continue
            for name in before:
                put_tensor(self.model, name, state.pop(name))
            fused = experts.fuse()
            state |= {f"{path}.{local}": parameter.data for local, parameter in fused.named_parameters()}
            fused._parameters.clear()
            for name, tensor in before.items():  # without memory
                put_tensor(self.model, name, tensor)
        return dict(revert_weight_conversion(self.model, state))

    def layers(self, own: Iterable[str]) -> dict[str, str]:
        """What transformers calls these layers in files, by their names in the model.

        Raises:
            ValueError: for a layer that it does not store by itself.
        """
        names = {}
        for layer in own:
            stored = self._stored[f"{layer}.weight"]
            if stored.part is not None or stored.conversion is not None:
                raise ValueError(
                    f"every layer must be stored by itself, {layer} is a part of {stored.name} in transformers' files; "
                    "take --to dense"
                )
            names[layer] = stored.name.removesuffix(".weight")
        return names

    def others(self, own: Iterable[str]) -> list[str]:
        """What transformers calls the linear layers, those that it stores by themselves, that are not among these."""
        known, found = set(own), self._stored
        names = [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and n not in known]
        stored = [found[f"{name}.weight"] for name in names if f"{name}.weight" in found]
        return sorted(s.name.removesuffix(".weight") for s in stored if s.part is None and s.conversion is None)

    @cached_property
    def _stored(self) -> dict[str, Stored]:
        shapes = {n: t.shape for n, t in self.of(dict(self.model.state_dict(keep_vars=True))).items()}
        return find_stored(self.model, _Names(Path("the model"), {}, dict.fromkeys(shapes, ""), shapes=shapes))

    def is_transposed(self, layer: str) -> bool:
        """Whether the model keeps a layer's weight as (in, out)."""
        from transformers.pytorch_utils import Conv1D

        return isinstance(self.model.get_submodule(layer), Conv1D)


@dataclass(frozen=True)
class _Names(WeightFiles):
    """Names and shapes of tensors that nobody has stored."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.shapes[name])


class PlainFolder:
    """Tensors in files of a bounded size, under the names that loaders look for."""

    def __init__(self, out: Path):
        out.mkdir()
        self.out, self.bytes = out, 0
        self._pending: dict[str, Tensor] = {}
        self._files: list[list[str]] = []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors; they are written when there are enough for a file."""
        self._pending |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in self._pending.values()) >= _MOST_BYTES:
            self._write()

    def _write(self) -> None:
        self.bytes += sum(tensor.nbytes for tensor in self._pending.values())
        self._files.append(sorted(self._pending))
        save(self._pending, self.out / f"{len(self._files)}.safetensors")
        self._pending = {}

    def finish(self, folder: LorqFolder, changes: Mapping[str, Any]) -> None:
        """Name the files, and write config and index and what else the folder has, the tokenizer and so on.

        Args:
            changes: to the model's config, in place of what lorq says there.
        """
        if self._pending:
            self._write()
        count, single = len(self._files), len(self._files) == 1
        places: dict[str, str] = {}
        for number, names in enumerate(self._files, 1):
            file = "model.safetensors" if single else f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(self.out / f"{number}.safetensors", self.out / file)
            places |= dict.fromkeys(names, file)
        if not single:
            index = {"metadata": {"total_size": self.bytes}, "weight_map": places}
            (self.out / "model.safetensors.index.json").write_bytes(json_bytes(index))
        beside, _ = find_companions(folder.path)
        for name, companion in beside.items():
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            (self.out / name).write_bytes(companion.read_bytes())
        (self.out / "config.json").write_bytes(json_bytes(with_code_of(plain_config(folder, changes), beside)))


def plain_config(folder: LorqFolder, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The model's config without what lorq has put there, and with ``changes``."""
    own = ("quantization_config", "transformers_weights", "torch_dtype", "_name_or_path")
    return {key: value for key, value in folder.config.items() if key not in own} | dict(changes)


def own_dtype(folder: LorqFolder, asked: str) -> str:
    """The type asked for, or the one that the original has as its config says."""
    config = folder.config
    told = [c.get(key) for c in (config, config.get("text_config", {})) for key in ("dtype", "torch_dtype")]
    return asked if asked != "auto" else next((str(t) for t in told if t in DTYPES), "bfloat16")


def in_dtype(name: str, tensor: Tensor, dtype: torch.dtype, *, remedy: str = _WIDER) -> Tensor:
    """A tensor's numbers in another type; whole numbers stay as they are.

    Args:
        remedy: what to do where it does not.

    Raises:
        ArithmeticError: if the type does not reach as far.
    """
    if not tensor.is_floating_point():
        return tensor
    result = tensor.to(dtype)
    if not bool(result.isfinite().all()):
        raise too_large(name, tensor, str(dtype).removeprefix("torch."), remedy)
    return result


def too_large(name: str, tensor: Tensor, type_: str, remedy: str) -> ArithmeticError:
    """The error for numbers that a type would make infinite."""
    largest = float(tensor.float().abs().max())
    return ArithmeticError(f"{name} must fit {type_}, its largest value is {largest:.3g}; {remedy}")


def save(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file with rights as any file made here; safetensors keeps it to its owner."""
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(file.parent.stat().st_mode & 0o666)
