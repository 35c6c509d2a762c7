"""A LoRA file for llama.cpp: `llama-cli -m QUANTIZED --lora OUT/adapter.gguf`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorq.foreign.choose import Compensated

ADAPTER = "adapter.gguf"


def check_gguf(quantized: Path) -> None:
    """Refuse what llama.cpp does not run.

    Raises:
        ValueError: if it is no GGUF file.
        ImportError: if there is no gguf package.
    """
    if quantized.suffix.lower() != ".gguf":
        raise ValueError(f"--form gguf needs QUANTIZED to be the .gguf file that llama.cpp runs, got {quantized}")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError("a GGUF file needs the gguf package: pip install 'lorq[gguf]'") from error


def write_gguf(done: Compensated, folder: Path, quantized: Path) -> int:
    """Write the LoRA file; the bytes of its tensors.

    llama.cpp multiplies by ``alpha / rank``, the rank of each tensor, and not at all where ``adapter.lora.alpha`` is 0,
    as here. Rows go to where the GGUF file has them: those of Llama's q and k are in another order there.

    Raises:
        ValueError: if a layer is not in the GGUF file as the model has it.
    """
    from gguf import MODEL_ARCH_NAMES, GGUFReader, GGUFWriter, get_tensor_name_map

    reader = GGUFReader(quantized)
    architecture = str(reader.fields["general.architecture"].contents())
    number = {name: number for number, name in MODEL_ARCH_NAMES.items()}[architecture]
    names = get_tensor_name_map(number, len(done.couple.quantized.blocks))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    targets = {t.name: t for targets in done.couple.targets.values() for t in targets}
    writer = GGUFWriter(folder / ADAPTER, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    size = 0
    for name in done.layers:
        factors = done.factors(name)
        if factors is None:
            continue
        own = names.get_name(f"{name}.weight", try_suffixes=(".weight", ".bias"))
        if own not in tensors:
            raise ValueError(f"{quantized} must have {name} as a tensor of its own, {own} is not there; --exclude it")
        order = row_order(_values(tensors[own]), done.couple.quantized.weight(targets[name]))
        if order is None:
            raise ValueError(
                f"{own} of {quantized} must have the rows of {name}, it has others; --exclude it, or take --form peft"
            )
        for suffix, factor in (("lora_a", factors.right), ("lora_b", factors.left[order])):
            writer.add_tensor(f"{own}.{suffix}", factor.contiguous().numpy())
            size += factor.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return size


def _values(tensor: Any) -> Float[Tensor, "out in"]:
    """A GGUF tensor, as `lorq.models.locate` keeps it."""
    from gguf import dequantize

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
