"""The quantized-linear operator: one schema, a torch reference, and faster implementations per device."""

from lorq.kernels.reference import quant_linear

__all__ = ["quant_linear"]
