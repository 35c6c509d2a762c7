"""Which implementation multiplies a layer, and the short way to it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorq.core.weight import LayerFormat
from lorq.kernels import cpu, cpu_experts, int8, triton_experts, triton_linear
from lorq.kernels.reference import quant_linear, rotate


@dataclass(frozen=True)
class Implementation:
    """What multiplies a layer.

    Attributes:
        name: such as "C++ (avx2)", "Triton", "bytes (oneDNN)" or "reference (torch)".
        declined: why each faster one does not; empty where the fastest runs.
    """

    name: str
    declined: dict[str, str]


def implementation(format: LayerFormat, in_features: int, device: torch.device, dtype: torch.dtype) -> Implementation:
    """What multiplies a layer of this format when it runs, without a gradient.

    Args:
        format: of the layer.
        in_features: its width.
        device: that it runs on.
        dtype: of its inputs.
    """
    declined = {}
    if format.input_quantization != "none":
        why = int8.covers(format, in_features, device, dtype)
        if why is None:
            return Implementation("bytes (oneDNN)", {})
        declined["bytes (oneDNN)"] = why
    kernels, name = (cpu, "C++") if device.type == "cpu" else (triton_linear, "Triton")
    why = kernels.covers(format, in_features, device, dtype)
    if why is None:
        return Implementation(f"C++ ({cpu.library()[1]})" if name == "C++" else name, declined)
    return Implementation("reference (torch)", declined | {name: why})


def why_not_experts(
    format: LayerFormat, in_features: int, device: torch.device, dtype: torch.dtype, pairs: float
) -> str | None:
    """Why experts of one format do not run in one call; None where they do.

    Args:
        format: of the experts.
        in_features: their width.
        device: that they run on.
        dtype: of their inputs.
        pairs: of a token and an expert, for each expert.
    """
    if device.type == "cpu":
        if torch.compiler.is_compiling():
            return "a program is being compiled, which one call of C++ is no part of"
        return cpu_experts.covers(format, in_features, device, dtype, pairs)
    return triton_experts.covers(format, in_features, device, dtype)


def multiply(x: Tensor, *arguments: Any) -> Tensor:
    """`quant_linear`, without torch's dispatcher where nothing is traced and nothing learns: that costs as much as a
    small layer. Arguments and result are the operator's."""
    if not _direct(x, *arguments):
        return quant_linear(x, *arguments)
    return cpu.run(x, *arguments) if x.device.type == "cpu" else triton_linear.run(x, *arguments)


def turn(x: Tensor, *arguments: Any) -> Tensor:
    """`rotate`, in the same way."""
    if not _direct(x, *arguments):
        return rotate(x, *arguments)
    return cpu.turn(x, *arguments) if x.device.type == "cpu" else triton_linear.turn_or_reference(x, *arguments)


def few_tokens(device: torch.device, dtype: torch.dtype) -> int:
    """Tokens up to which whole numbers are multiplied as they are stored."""
    if device.type == "cpu":
        return cpu.few_tokens(by_bytes=True)
    return triton_linear.MANY_FROM.get(dtype.itemsize, 1) - 1


def _direct(x: Tensor, *arguments: Any) -> bool:
    plain = type(x) is Tensor and x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()
    plain = plain and torch._C._get_tracing_state() is None and not torch._C._len_torch_dispatch_stack()
    return plain and not (torch.is_grad_enabled() and _learns(x, *arguments))


def _learns(*tensors: Any) -> bool:
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
