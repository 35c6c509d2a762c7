"""The operators: one schema each, a torch reference, and faster implementations per device."""

from lorq.kernels.choice import Implementation, implementation, multiply, turn
from lorq.kernels.int8 import covers, int8_linear, misfit
from lorq.kernels.reference import fake_quantize, quant_linear, rotate
from lorq.kernels.triton_linear import register

# Whether CUDA devices have kernels of their own; the reason if not is for who asks.
register()

__all__ = [
    "Implementation", "covers", "fake_quantize", "implementation", "int8_linear", "misfit", "multiply",
    "quant_linear", "rotate", "turn",
]  # fmt: skip
