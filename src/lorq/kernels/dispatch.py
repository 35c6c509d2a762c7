"""Which implementation multiplies a layer, and the short way to it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorq.core.codes import CodesFormat
from lorq.core.weight import LayerFormat
from lorq.kernels import (
    cpu,
    cpu_experts,
    cpu_gguf,  # noqa: F401  registers itself
    cpu_rounding,  # noqa: F401  likewise
    cpu_trellis,
    int8,
    reference_trellis,
    triton_experts,
    triton_linear,
    triton_trellis,
)
from lorq.kernels.operands import STORED_NAMES
from lorq.kernels.reference import quant_linear, quant_linear_reference, rotate, rotate_reference
from lorq.kernels.reference_trellis import trellis_linear


@dataclass(frozen=True)
class Operator:
    """What multiplies by codes of some kinds as they are stored, by the name that their format gives as ``operator``.

    Attributes:
        call: of an input, the tensors and the numbers.
        reference: the same, of torch's own operations.
        tensors: the names of a layer's, in the operator's order; "levels" are not stored, the format tells them.
        numbers: the names of those that follow, of the codes' format.
    """

    call: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    tensors: tuple[str, ...]
    numbers: tuple[str, ...]

    def settings(self, codes: CodesFormat) -> list[int]:
        """What the operator is called with after the tensors."""
        return [getattr(codes, name) for name in self.numbers]


OPERATORS = {
    "quant_linear": Operator(quant_linear, quant_linear_reference, STORED_NAMES, ("bits",)),
    "trellis_linear": Operator(
        trellis_linear,
        reference_trellis.trellis_linear_reference,
        reference_trellis.STORED_NAMES,
        reference_trellis.NUMBERS,
    ),
}


@dataclass(frozen=True)
class Product:
    """An operator of `OPERATORS` on one type of device. Whatever it declines is the reference's.

    Attributes:
        declines: why a layer of a format, width, device and dtype of inputs is not multiplied; None where it is.
        multiply: the operator there, by the reference where it declines; also the operator's implementation.
        few_tokens: by dtype, up to how many tokens codes (of `quant_linear` whole numbers) are multiplied as they are
            stored.
    """

    declines: Callable[[LayerFormat, int, torch.device, torch.dtype], str | None]
    multiply: Callable[..., Tensor]
    few_tokens: Callable[[torch.dtype], int]


@dataclass(frozen=True)
class Kernels:
    """What runs on one type of device.

    Attributes:
        name: of the kernels.
        variant: of them that this machine has, or nothing.
        products: by operator.
        turn: `rotate` on this device, as `Product.multiply` is its operator.
        declines_experts: why experts of one format do not run in one call; `Product.declines` with the pairs of a token
            and an expert for each expert.
        run_experts: see `lorq.kernels.cpu_experts.run`; None where `expert_linear` runs, with shared factors beside it.
    """

    name: str
    variant: Callable[[], str]
    products: dict[str, Product]
    turn: Callable[..., Tensor]
    declines_experts: Callable[[LayerFormat, int, torch.device, torch.dtype, float], str | None]
    run_experts: Callable[..., Tensor | None] | None = None

    def declines(self, format: LayerFormat, in_features: int, device: torch.device, dtype: torch.dtype) -> str | None:
        """`Product.declines` of the operator of the format's codes."""
        product = self.products.get(format.codes.operator or "")
        if product is None:
            return f"codes of the kind {format.codes.kind} have no kernel"
        return product.declines(format, in_features, device, dtype)


KERNELS = {
    "cpu": Kernels(
        "C++", lambda: cpu.library()[1],
        {
            "quant_linear": Product(cpu.declines, cpu.multiply, lambda _: cpu.few_tokens(by_bytes=True)),
            "trellis_linear": Product(cpu_trellis.declines, cpu_trellis.multiply, lambda _: cpu_trellis.FEW_TOKENS),
        },
        cpu.turn, cpu_experts.declines, cpu_experts.run,
    ),
    "cuda": Kernels(
        "Triton", str,
        {
            "quant_linear": Product(triton_linear.declines, triton_linear.multiply, triton_linear.few_tokens),
            "trellis_linear": Product(triton_trellis.declines, triton_trellis.multiply, triton_trellis.few_tokens),
        },
        triton_linear.turn_or_reference, triton_experts.declines,
    ),
}  # fmt: skip


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
    """What multiplies a layer of this format when it runs, without a gradient; arguments as of `Product.declines`."""
    declined = {}
    if format.input_quantization != "none":
        why = int8.declines(format, in_features, device, dtype)
        if why is None:
            return Implementation("bytes (oneDNN)", {})
        declined["bytes (oneDNN)"] = why
    own = KERNELS.get(device.type)
    for kernels in [own] if own else KERNELS.values():
        why = kernels.declines(format, in_features, device, dtype)
        if why is None:
            variant = kernels.variant()
            return Implementation(f"{kernels.name} ({variant})" if variant else kernels.name, declined)
        declined[kernels.name] = why
    return Implementation("reference (torch)", declined)


def declines_experts(
    format: LayerFormat, in_features: int, device: torch.device, dtype: torch.dtype, pairs: float
) -> str | None:
    """Why experts of one format do not run in one call, see `Kernels`; None where they do."""
    kernels = KERNELS.get(device.type)
    if kernels is None:
        return f"no kernels run on {device.type}"
    return kernels.declines_experts(format, in_features, device, dtype, pairs)


def multiply(x: Tensor, *arguments: Any, operator: str = "quant_linear") -> Tensor:
    """An operator, without torch's dispatcher, as costly as a small layer, where nothing is traced or learns."""
    if is_transformed():
        return OPERATORS[operator].reference(x, *arguments)
    kernels = _direct(x, *arguments)
    product = None if kernels is None else kernels.products.get(operator)
    return OPERATORS[operator].call(x, *arguments) if product is None else product.multiply(x, *arguments)


def turn(x: Tensor, *arguments: Any) -> Tensor:
    """`rotate`, in the same way."""
    if is_transformed():
        return rotate_reference(x, *arguments)
    kernels = _direct(x, *arguments)
    return rotate(x, *arguments) if kernels is None else kernels.turn(x, *arguments)


def is_transformed() -> bool:
    """Inside a transform of `torch.func`, whose tensors have no memory that kernels could read."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def few_tokens(device: torch.device, dtype: torch.dtype, operator: str | None = "quant_linear") -> int:
    """`Product.few_tokens`; 0 where there are no kernels."""
    kernels = KERNELS.get(device.type)
    product = None if kernels is None else kernels.products.get(operator or "")
    return 0 if product is None else product.few_tokens(dtype)


def _direct(x: Tensor, *arguments: Any) -> Kernels | None:
    """The kernels to call without torch's dispatcher; None where that is to choose."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return None
    if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack():
        return None
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, *arguments)):
        return None
    return KERNELS.get(x.device.type)
