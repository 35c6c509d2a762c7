"""The operators: one schema each, a torch reference, and faster implementations per device."""

from lorq.kernels.reference import quant_linear, rotate

__all__ = ["quant_linear", "rotate"]
