"""A LoRA file for llama.cpp: `llama-cli -m QUANTIZED --lora OUT/adapter.gguf`."""

from pathlib import Path

from lorq.foreign.choose import Compensated
from lorq.foreign.gguf_file import GgufFile, row_order, write_lora

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

    Rows go to where the GGUF file has them: those of Llama's q and k are in another order there.

    Raises:
        ValueError: if a layer is not in the GGUF file as the model has it.
    """
    targets = {t.name: t for targets in done.couple.targets.values() for t in targets}
    found = {}
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
        found[own] = factors.left[order], factors.right
    return write_lora(folder / ADAPTER, file.architecture, found)
