"""Packed experts on the CPU, all those of a few tokens in one call, their shared factors included (native/)."""

from typing import Any

import torch
from torch import Tensor

from lorq.core.weight import LayerFormat
from lorq.kernels import cpu
from lorq.kernels.operands import DTYPES, code_sizes
from lorq.kernels.reference_experts import declines_experts


def declines(
    format: LayerFormat, in_features: int, device: torch.device, dtype: torch.dtype, pairs: float
) -> str | None:
    """Why experts of one format are not multiplied in one call, see `lorq.kernels.dispatch.Kernels`.

    Many pairs are faster one expert after the other, where each decodes its weight once.
    """
    if torch.compiler.is_compiling():
        return "a program is being compiled, which one call of C++ is no part of"
    sizes = code_sizes(format.codes)
    few = cpu.few_tokens(by_bytes=sizes is not None and sizes.whole_numbers)
    if pairs > few:
        return f"an expert has {pairs:.1f} tokens, and more than {few} are faster one expert after the other"
    return declines_experts(format) or cpu.declines(format, in_features, device, dtype)


def run(
    x: Tensor,
    expert: Tensor,
    stored: list[Tensor | None],
    levels: Tensor | None,
    shared: tuple[Tensor | None, ...] | None,
    bits: int,
) -> Tensor | None:
    """``y_p = W_e x_t + left_j right_i x_t`` for each pair ``p`` of a token and its expert ``e`` in cell ``(i, j)``.

    Args:
        x, expert, levels, bits: as of `lorq.kernels.reference_experts.expert_linear`.
        stored: packed codes, scale, zero point, codebook and its scale of all experts, experts first.
        shared: left (grid columns, out, rank) and right (grid rows, rank, in) factors, their scales (grid columns or
            rows, rank), None for 16-bit ones, and the experts' cells (experts, 2) int16; None for no such factors.

    Returns:
        (pairs, out) in the dtype of ``x``; None where the library does not take these tensors, or inputs that are not
        finite.
    """
    packed, scale, zero_point, codebook, codebook_scale = stored
    assert packed is not None
    rows, in_features = x.shape
    operands = [packed, scale, zero_point, levels, None, None, codebook, codebook_scale, None, None, None, None]
    weight = cpu.weight_of(operands, bits, in_features, experts=True) if x.dtype in DTYPES else None
    given = _read_shared(shared, packed.shape[1], in_features, len(packed))
    if weight is None or given is None:
        return None
    y = x.new_empty(expert.shape[0], packed.shape[1])
    if not expert.shape[0]:
        return y
    x, expert = x.contiguous(), expert.long().contiguous()
    places, kind = expert.shape[0] // rows, cpu.TYPES[x.dtype]
    done = weight.multiply_experts(
        len(packed), expert.data_ptr(), x.data_ptr(), y.data_ptr(), rows, places, kind, cpu.pieces(x.dtype), *given,
        torch.get_num_threads(),
    )  # fmt: skip
    return y if done else None


def _read_shared(shared: tuple[Tensor | None, ...] | None, out: int, in_: int, experts: int) -> tuple[Any, ...] | None:
    """The shared factors as the library is told of them; None where they are not as it takes them."""
    if shared is None:
        return (0, 0, 0), (0, 0, 0), 0, 0, 0, 0
    left, right, left_scale, right_scale, cells = shared
    assert left is not None and right is not None and cells is not None
    rows, columns, rank = len(right), len(left), right.shape[1]
    expected = (
        (left, (columns, out, rank), tuple(cpu.TYPES)), (right, (rows, rank, in_), tuple(cpu.TYPES)),
        (left_scale, (columns, rank), (torch.float16,)), (right_scale, (rows, rank), (torch.float16,)),
        (cells, (experts, 2), (torch.int16,)),
    )  # fmt: skip
    for tensor, shape, dtypes in expected:
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous() or not tensor.is_cpu:
            return None
    factors = (cpu.factor(left, left_scale), cpu.factor(right, right_scale))
    return *factors, rank, rows, columns, cells.data_ptr()
