"""Integer codes by the mixed-precision kernels that vLLM has for a device, lorq's low-rank part beside them."""

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (
    WNA16_SUPPORTED_TYPES_MAP,
    WNA16_ZP_SUPPORTED_TYPES_MAP,
)
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter

from lorq.core.codes import IntGrid
from lorq.core.low_rank import LowRank
from lorq.core.weight import QuantizedWeight

# Types of devices where vLLM's kernels are taken; a CPU has lorq's.
DEVICES = {"cuda"}


class MixedLinear(nn.Module):
    """``x (Q + L R)^T``: codes ``Q`` by a kernel of vLLM's (Marlin, Machete, humming ...), factors as two products.

    It stands for a `lorq.runtime.linear.QuantLinear` in a part of a layer.

    Args:
        kernel: made for codes of this format and shape; it reads the layer's tensors by compressed-tensors' names,
            whose layout is lorq's own.
    """

    left: Tensor | None
    right: Tensor | None

    def __init__(self, weight: QuantizedWeight, kernel: Any, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.format, self.kernel, self.out_features = weight.format, kernel, weight.shape[0]
        tensors = {name: tensor.to(device) for name, tensor in weight.codes.tensors().items()}
        packed = {"weight_loader": _loaded_already, "packed_factor": Fraction(32, weight.format.bits)}
        self.weight_packed = PackedvLLMParameter(
            data=tensors["weight_packed"], input_dim=1, output_dim=0, packed_dim=1, **packed
        )
        self.weight_scale = GroupQuantScaleParameter(
            data=tensors["weight_scale"].to(dtype), input_dim=1, output_dim=0, weight_loader=_loaded_already
        )
        if "weight_zero_point" in tensors:
            self.weight_zero_point = PackedvLLMParameter(
                data=tensors["weight_zero_point"], input_dim=1, output_dim=0, packed_dim=0, **packed
            )
        kernel.process_weights_after_loading(self)
        factors = weight.low_rank.factors(dtype) if isinstance(weight.low_rank, LowRank) else (None, None)
        for name, factor in zip(("left", "right"), factors, strict=True):
            self.register_buffer(name, None if factor is None else factor.to(device).contiguous())

    def product(self, x: Tensor) -> Tensor:
        """For an input in the weight's basis, without a bias."""
        y = self.kernel.apply_weights(self, x.contiguous(), None)
        if self.left is None or self.right is None:
            return y
        return y + nn.functional.linear(nn.functional.linear(x, self.right), self.left)


def mixed_linear(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> MixedLinear | None:
    """A weight by vLLM's kernel, None where lorq's own multiply it.

    These are the ones on a CPU, of all other kinds of codes, of inputs in 8 bits, of what no kernel of vLLM's takes;
    and in bfloat16, which would round the scales, float16 numbers, to 8 bits.
    """
    grid, (out, in_) = weight.format.codes, weight.shape
    plain = isinstance(grid, IntGrid) and weight.format.input_quantization == "none" and weight.tile is None
    if not plain or device.type not in DEVICES or dtype != torch.float16:
        return None
    assert isinstance(grid, IntGrid)
    kind = (WNA16_SUPPORTED_TYPES_MAP if grid.symmetric else WNA16_ZP_SUPPORTED_TYPES_MAP).get(grid.bits)
    group = -1 if grid.group_size == in_ else grid.group_size
    config = MPLinearLayerConfig((in_, out), (in_, out), kind, dtype, group, not grid.symmetric)
    try:
        kernel = choose_mp_linear_kernel(config)
    except ValueError:  # which names every kernel with its reason
        return None
    names = "weight_packed", "weight_scale", "weight_zero_point"
    return MixedLinear(weight, kernel(config, *names), dtype, device)


def _loaded_already(*_: Any) -> None:
    raise AssertionError("the weights are in their place")
