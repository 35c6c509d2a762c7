"""A LoRA file for llama.cpp: `llama-cli -m QUANTIZED --lora OUT/adapter.gguf`."""

from pathlib import Path

from lorq.foreign.choose import Compensated
from lorq.foreign.gguf_file import GgufFile, row_order

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


def write_gguf(done: Compensated, folder: Path, file: GgufFile) -> int:
    """Write the LoRA file; the bytes of its tensors.

    llama.cpp multiplies by ``alpha / rank``, the rank of each tensor, and not at all where ``adapter.lora.alpha`` is 0,
    as here. Rows go to where the GGUF file has them: those of Llama's q and k are in another order there.

    Raises:
        ValueError: if a layer is not in the GGUF file as the model has it.
    """
    from gguf import GGUFWriter

    targets = {t.name: t for targets in done.couple.targets.values() for t in targets}
    writer = GGUFWriter(folder / ADAPTER, file.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    size = 0
    for name in done.layers:
        factors = done.factors(name)
        if factors is None:
            continue
        own = file.name_of(name)
        if own is None or own not in file.tensors:
            raise ValueError(f"{file.path} must have {name} as a tensor of its own, {own} is not there; --exclude it")
        order = row_order(file.values(own), done.couple.quantized.weight(targets[name]))
        if order is None:
            raise ValueError(
                f"{own} of {file.path} must have the rows of {name}, it has others; --exclude it, or take --form peft"
            )
        for suffix, factor in (("lora_a", factors.right), ("lora_b", factors.left[order])):
            writer.add_tensor(f"{own}.{suffix}", factor.contiguous().numpy())
            size += factor.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return size
