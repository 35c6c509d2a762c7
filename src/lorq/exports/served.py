"""What the engines that read exports run, in words for what `lorq export` prints and for model cards."""

from collections.abc import Iterable, Sequence

# vLLM's --max-lora-rank is one of these.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
GPTQ_SERVED = "vLLM's reader of gptq takes symmetric codes of 4 and 8 bits alone; --to compressed-tensors serves these"
SYMMETRIC_INPUTS = "vLLM multiplies quantized inputs by symmetric codes alone; quantize with --symmetric for it"


def width_lines(widths: Iterable[int]) -> list[str]:
    """What codes of other than 4 and 8 bits need in vLLM."""
    others = sorted(set(widths) - {4, 8})
    words = f"vLLM runs {', '.join(map(str, others))} bits on CUDA devices with the package humming-kernels alone"
    return [words] if others else []


def served_rank(ranks: Sequence[int]) -> int:
    """What vLLM's slots for adapters are padded to."""
    most = max(ranks)
    return next((rank for rank in SERVED_RANKS if rank >= most), most)


def lora_flags(ranks: Sequence[int], adapter: str) -> str:
    """vLLM's, with which it lists an adapter as the model low-rank."""
    return f"--enable-lora --max-lora-rank {served_rank(ranks)} --lora-modules low-rank={adapter}"
