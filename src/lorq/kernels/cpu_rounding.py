"""Rounding to integers with errors passed on, on the CPU in C++ (native/rounding.hpp; docs/kernels.md)."""

import torch
from torch import Tensor

from lorq.core.checks import all_finite
from lorq.core.half import LARGEST_HALF
from lorq.core.rounding.gptq import encode_integers_reference
from lorq.kernels import cpu


def encode(
    columns: Tensor, upper: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool,
    group_size: int, shares: list[float], saturate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`encode_integers` of the rounding on the CPU; the reference where there is no library."""
    asked = columns, upper, hessian, scale, zero, bits, symmetric, group_size, shares, saturate
    module = cpu.library()[0]
    if module is None or any(t.dtype != torch.float32 for t in asked[:5]):  # type: ignore[union-attr]
        return encode_integers_reference(*asked)
    columns = columns.contiguous()
    count, rows = columns.shape
    known, trials = len(scale) > 0, torch.tensor(shares, dtype=torch.float32, device="cpu")
    groups = -(-count // group_size)
    found = [t.contiguous().clone() if known else columns.new_empty(groups, rows) for t in (scale, zero)]
    codes, errors = torch.empty_like(columns, dtype=torch.uint8), torch.empty_like(columns)
    given = [t.contiguous() for t in (columns, upper, hessian, trials)]
    addresses = [t.data_ptr() if t.numel() else 0 for t in (*given, *found, codes, errors)]
    addresses[2] = addresses[2] if shares else 0
    module.encode_integers(
        *addresses, count, rows, group_size, len(shares), bits, symmetric, saturate, known, torch.get_num_threads()
    )
    if not (float(found[0].max()) <= LARGEST_HALF and all_finite(errors)):
        return encode_integers_reference(*asked)  # which says what is wrong
    return codes, found[0], found[1], errors


torch.library.impl("lorq::encode_integers", "cpu", encode)
