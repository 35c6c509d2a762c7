"""The operators: one schema each, a torch reference, and faster implementations per device."""

from lorq.kernels.choice import Implementation, implementation, multiply
from lorq.kernels.int8 import covers, int8_linear, misfit
from lorq.kernels.reference import fake_quantize, quant_linear, rotate

__all__ = [
    "Implementation", "covers", "fake_quantize", "implementation", "int8_linear", "misfit", "multiply",
    "quant_linear", "rotate",
]  # fmt: skip
