"""Trellis codes on the CPU in C++ (native/trellis.hpp, native/trellis_product.hpp; docs/kernels.md)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorq.core.codes import TrellisGrid
from lorq.core.codes.trellis import trellis_values
from lorq.core.rounding.trellis import encode_trellis_reference
from lorq.core.weight import LayerFormat
from lorq.kernels import cpu
from lorq.kernels.derived import Derived
from lorq.kernels.operands import DTYPES, declines_input
from lorq.kernels.reference_trellis import trellis_linear_reference

# Tokens up to which codes are multiplied directly: the two ways take the same time at 40 and more (docs/kernels.md).
FEW_TOKENS = 32


def encode(columns: Tensor, scale: Tensor, upper: Tensor, bits: int, window: int, length: int) -> tuple[Tensor, Tensor]:
    """`encode_trellis` of the rounding on the CPU; the reference where there is no library."""
    module = cpu.library()[0]
    if module is None:
        return encode_trellis_reference(columns, scale, upper, bits, window, length)
    targets, errors = columns.clone(memory_format=torch.contiguous_format), torch.empty_like(columns)
    scale, upper, values = scale.contiguous(), upper.contiguous(), trellis_values(window)
    codes = torch.empty_like(columns, dtype=torch.uint8)
    module.encode_trellis(
        *(t.data_ptr() for t in (targets, scale, upper, values, codes, errors)), *columns.shape, length, bits, window,
        torch.get_num_threads(),
    )  # fmt: skip
    return codes, errors


torch.library.impl("lorq::encode_trellis", "cpu", encode)


def declines(format: LayerFormat, in_features: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a layer is not multiplied by the C++ kernels, see `lorq.kernels.dispatch.Product`; None where it is."""
    module, why = cpu.library()
    return declines_input("cpu", device, dtype) or (why if module is None else None)


def multiply(x: Tensor, *arguments: Any) -> Tensor:
    """`lorq.kernels.trellis_linear` on the CPU: these kernels where they cover the weight, else the reference.

    Args and result are the operator's. `lorq.kernels.cpu.products` makes no difference: inputs keep 15 bits, those in
    float32 31 bits of the largest of 512.
    """
    *operands, bits, window, length = arguments
    in_features = x.shape[-1]
    weight = _WEIGHTS.of(operands, bits, window, length, in_features) if x.dtype in DTYPES else None
    if weight is None:
        return trellis_linear_reference(x, *arguments)
    out = operands[1].shape[0]
    x = x.contiguous()
    tokens, threads = x.numel() // in_features, torch.get_num_threads()
    y = x.new_empty(*x.shape[:-1], out)
    if tokens > FEW_TOKENS or not weight.multiply(x.data_ptr(), y.data_ptr(), tokens, cpu.TYPES[x.dtype], threads):
        cpu.by_strips(x.view(tokens, in_features), y.view(tokens, out), weight, operands[2:])
    return y


def _new_weight(operands: Sequence[Tensor | None], bits: int, window: int, length: int, in_features: int) -> Any:
    """A weight as the library sees it; None where its tensors do not belong together, or lie elsewhere."""
    module = cpu.library()[0]
    packed, scale, left, right, left_scale, right_scale = operands
    assert packed is not None and scale is not None
    out, grid, rank = scale.shape[0], TrellisGrid(bits, window, length), 0 if left is None else left.shape[1]
    layout = grid.layout(out, in_features)
    expected = (
        (packed, *layout["weight_packed"]), (scale, *layout["weight_scale"]), (left, (out, rank), None),
        (right, (rank, in_features), None), (left_scale, (rank,), torch.float16), (right_scale, (rank,), torch.float16),
    )  # fmt: skip
    for tensor, shape, dtype in expected:
        if tensor is None:
            continue
        types = tuple(cpu.TYPES) if dtype is None else (dtype,)
        if tensor.shape != shape or tensor.dtype not in types or not tensor.is_contiguous() or not tensor.is_cpu:
            return None
    if module is None or (left is None) != (right is None):
        return None
    try:
        grid.check(out, in_features)
    except ValueError:
        return None
    factors = cpu.factor(left, left_scale), cpu.factor(right, right_scale)
    return module.TrellisWeight(
        out, in_features, bits, window, length, packed.data_ptr(), scale.data_ptr(), *factors, rank
    )


# The library reads the tensors where they lie: one that was written to needs nothing.
_WEIGHTS = Derived(_new_weight, copies=False)
torch.library.impl("lorq::trellis_linear", "cpu", cpu.for_operator(multiply))
