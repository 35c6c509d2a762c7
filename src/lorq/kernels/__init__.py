"""The operators: one schema each, a torch reference, and faster implementations per device."""

from lorq.kernels.int8 import covers, int8_linear, misfit
from lorq.kernels.reference import fake_quantize, quant_linear, rotate

__all__ = ["covers", "fake_quantize", "int8_linear", "misfit", "quant_linear", "rotate"]
