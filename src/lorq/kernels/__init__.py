"""The operators: one schema each, a torch reference, and faster implementations per device."""

from lorq.kernels import cpu_experts, triton_experts, triton_linear
from lorq.kernels.dispatch import Implementation, few_tokens, implementation, multiply, turn, why_not_experts
from lorq.kernels.int8 import covers, int8_linear, misfit
from lorq.kernels.reference import fake_quantize, quant_linear, rotate
from lorq.kernels.reference_experts import expert_linear

# Whether CUDA devices have kernels of their own; the reason if not is for who asks.
triton_linear.register()
triton_experts.register()

__all__ = [
    "Implementation", "covers", "cpu_experts", "expert_linear", "fake_quantize", "few_tokens", "implementation",
    "int8_linear", "misfit", "multiply", "quant_linear", "rotate", "turn", "why_not_experts",
]  # fmt: skip
