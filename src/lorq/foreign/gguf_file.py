"""A GGUF file as llama.cpp has it: names, sizes and values of tensors, and the order of their rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorq.storage.gguf_header import read_gguf_header
from lorq.storage.seal import mark


@dataclass(frozen=True)
class GgufFile:
    """A GGUF model: its tensors by name, and which is a layer's weight."""

    path: Path
    architecture: str
    tensors: Mapping[str, Any]
    name_of: Callable[[str], str | None]

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Read the header; the tensors stay in the file.

        Raises:
            ValueError: if it is damaged, or of an architecture that the gguf package does not know.
        """
        read_gguf_header(path)
        from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

        reader = GGUFReader(path)
        said = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        architecture = str(said.get("general.architecture"))
        number = {name: number for number, name in MODEL_ARCH_NAMES.items()}.get(architecture)
        blocks = said.get(f"{architecture}.block_count")
        if number is None or not isinstance(blocks, int):
            raise ValueError(
                f"{path} must have a general.architecture that the gguf package knows and its block_count, got "
                f"{architecture!r} and {blocks!r}; take a newer gguf, or another file"
            )
        names = get_tensor_name_map(number, blocks)

        def name_of(layer: str) -> str | None:
            found: str | None = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
            return found

        return cls(path, architecture, {tensor.name: tensor for tensor in reader.tensors}, name_of)

    def stored_bytes(self, layer: str) -> int | None:
        """What a layer's weight takes; None where it is no tensor of its own."""
        tensor = self.tensors.get(self.name_of(layer) or "")
        return None if tensor is None else int(tensor.n_bytes)

    def values(self, name: str) -> Float[Tensor, "out in"]:
        """A tensor's, as `lorq.models.locate` keeps them."""
        from gguf import dequantize

        tensor = self.tensors[name]
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).to(torch.float16)


def row_order(stored: Float[Tensor, "out in"], weight: Float[Tensor, "out in"]) -> Int[Tensor, "out"] | None:
    """Which row of ``weight`` each row of ``stored`` is; None where one is not there.

    Example:
        >>> row_order(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[3.0, 4.0], [1.0, 2.0]]))
        tensor([1, 0])
    """
    if stored.shape != weight.shape:
        return None
    places: dict[bytes, list[int]] = {}
    for i, row in enumerate(weight.to(stored.dtype).numpy()):
        places.setdefault(np.ascontiguousarray(row).tobytes(), []).append(i)
    try:
        # Of rows that are alike, in their order: the first to the first.
        found = [places[np.ascontiguousarray(row).tobytes()].pop(0) for row in stored.numpy()]
    except (KeyError, IndexError):
        return None
    return torch.tensor(found)


def write_lora(
    file: Path, architecture: str, factors: Mapping[str, tuple[Tensor, Tensor]], told: Mapping[str, str] | None = None
) -> int:
    """Write an adapter for llama.cpp; the bytes of its tensors.

    llama.cpp multiplies by ``alpha / rank``, the rank of each tensor, and not at all where ``adapter.lora.alpha`` is 0,
    as here.

    Args:
        factors: left and right by the GGUF file's names of tensors, with its order of rows; of experts stacked.
        told: texts for keys of lorq's own.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(file, architecture)
    mark(writer)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    for key, text in (told or {}).items():
        writer.add_string(key, text)
    size = 0
    for name, (left, right) in factors.items():
        for suffix, factor in (("lora_a", right), ("lora_b", left)):
            writer.add_tensor(f"{name}.{suffix}", factor.contiguous().numpy())
            size += factor.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return size
