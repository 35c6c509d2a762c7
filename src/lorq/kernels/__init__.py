"""The operators: one schema each, a torch reference, and faster implementations per device."""

from lorq.kernels.dispatch import (
    KERNELS,
    OPERATORS,
    Implementation,
    declines_experts,
    few_tokens,
    implementation,
    is_transformed,
    multiply,
    turn,
)
from lorq.kernels.int8 import int8_linear
from lorq.kernels.reference import fake_quantize, quant_linear, rotate
from lorq.kernels.reference_experts import expert_linear
from lorq.kernels.reference_trellis import trellis_linear

__all__ = [
    "KERNELS", "OPERATORS", "Implementation", "declines_experts", "expert_linear", "fake_quantize", "few_tokens",
    "implementation", "int8_linear", "is_transformed", "multiply", "quant_linear", "rotate", "trellis_linear", "turn",
]  # fmt: skip
