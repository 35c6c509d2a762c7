"""Trellis codes on the CPU in C++ (native/trellis.hpp)."""

import torch
from torch import Tensor

from lorq.core.codes.trellis import trellis_values
from lorq.core.rounding.trellis import encode_trellis_reference
from lorq.kernels.cpu import library


def encode(columns: Tensor, scale: Tensor, upper: Tensor, bits: int, window: int, length: int) -> tuple[Tensor, Tensor]:
    """`lorq.core.rounding.trellis.encode_trellis` on the CPU; the reference where there is no library."""
    module = library()[0]
    if module is None:
        return encode_trellis_reference(columns, scale, upper, bits, window, length)
    columns = columns.clone(memory_format=torch.contiguous_format)  # each becomes what it was when its turn came
    scale, upper, values = scale.contiguous(), upper.contiguous(), trellis_values(window)
    codes, errors = torch.empty_like(columns, dtype=torch.uint8), torch.empty_like(columns)
    module.encode_trellis(
        columns.data_ptr(), scale.data_ptr(), upper.data_ptr(), values.data_ptr(), codes.data_ptr(), errors.data_ptr(),
        *columns.shape, length, bits, window, torch.get_num_threads(),
    )  # fmt: skip
    return codes, errors


torch.library.impl("lorq::encode_trellis", "cpu", encode)
