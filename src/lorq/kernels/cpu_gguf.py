"""The search for steps of GGUF's groups on the CPU in C++ (native/gguf.hpp)."""

import torch
from torch import Tensor

from lorq.core.rounding.gguf_fit import search_groups_reference
from lorq.kernels import cpu


def search_groups(
    weight: Tensor, step: Tensor, low: Tensor | None, upper: Tensor | None, bits: int, zero: int, levels: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """`search_groups` of the rounding on the CPU; the reference where there is no library."""
    module = cpu.library()[0]
    if module is None or weight.dtype != torch.float32:
        return search_groups_reference(weight, step, low, upper, bits, zero, levels)
    groups, trials, rows = step.shape
    table = torch.tensor(levels, dtype=torch.float32) if levels else None
    given = [None if part is None else part.contiguous() for part in (weight, step, low, upper, table)]
    codes, best = torch.empty(weight.shape), torch.empty(groups, rows, dtype=torch.int64)
    found = [codes, best, torch.empty(groups, rows)]
    addresses = [0 if part is None else part.data_ptr() for part in (*given, *found)]
    sizes = groups, weight.shape[1], trials, rows
    module.search_groups(*addresses, *sizes, zero, len(levels) - 1 if levels else 2**bits - 1, torch.get_num_threads())
    codes, best, costs = found
    return codes, best, costs


torch.library.impl("lorq::search_groups", "cpu", search_groups)
