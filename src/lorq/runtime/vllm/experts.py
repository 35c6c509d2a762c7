"""vLLM's routed experts by lorq's codes and operators: each expert's projections are linear layers of their own."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.runtime.vllm.linear import Part
from lorq.runtime.vllm.loading import Collected

# vLLM's names of an expert's projections, in the order that they are kept in.
PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu": gelu}


class LorqExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The experts that tokens are routed to, one after the other.

    Args:
        layer: vLLM's.
        prefix: its name.
        formats: of all layers of the model.

    Raises:
        ValueError: for experts that are not all quantized, or run otherwise than is known here.
    """

    def __init__(self, layer: Any, prefix: str, formats: Mapping[str, LayerFormat]):
        super().__init__(layer.moe_config)
        moe, eager = layer.moe_config, get_current_vllm_config().model_config
        names = [f"{prefix}.{n}.{projection}" for n in range(moe.num_experts) for projection in PROJECTIONS.values()]
        lacking = [name for name in names if name not in formats]
        other = {
            "have codes in all projections": lacking[:1],
            "have no biases": ["biases"] if moe.has_bias else [],
            "be gated by silu or gelu": [] if moe.is_act_and_mul and _activation(layer) in _BETWEEN else ["others"],
            "be shared by --tensor-parallel-size": ["expert parallelism"] if moe.moe_parallel_config.use_ep else [],
            "run with --enforce-eager": [] if _is_eager(eager) else ["programs that vLLM compiles"],
        }
        for rule, found in other.items():
            if found:
                raise ValueError(
                    f"experts with lorq's codes must {rule}, {prefix} has {found[0]}; serve "
                    "`lorq export OUT DEST --to compressed-tensors`, or --to dense"
                )
        self.collected = Collected({name: formats[name] for name in names})

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
        params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:  # fmt: skip
        self._width = intermediate_size_per_partition
        self.collected.make_room(layer, hidden_size, hidden_size, params_dtype, stems=("w13_", "w2_"))

    def process_weights_after_loading(self, layer: Any) -> None:
        device, parallel = layer.w2_weight_packed.device, layer.moe_config.moe_parallel_config
        own = (parallel.tp_rank * self._width, (parallel.tp_rank + 1) * self._width)
        parts = []
        for place in range(len(self.collected.formats)):
            weight = self.collected.weight(place)
            assert isinstance(weight, QuantizedWeight)
            out, in_ = weight.shape
            down = place % len(PROJECTIONS) == 2
            parts.append(Part(weight, (0, out) if down else own, own if down else (0, in_)).to(device))
        layer.lorq_parts = nn.ModuleList(parts)
        self.collected.forget()

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        result, between = torch.zeros_like(x), _BETWEEN[_activation(layer)]
        for number in topk_ids.unique().tolist():
            token, place = torch.where(topk_ids == number)
            inputs, share = x[token], topk_weights[token, place].unsqueeze(1).to(x.dtype)
            if layer.apply_router_weight_on_input:
                inputs, share = inputs * share, torch.ones_like(share)
            first = len(PROJECTIONS) * number
            gate, up, down = (layer.lorq_parts[first + i] for i in range(len(PROJECTIONS)))
            image = gate.image(inputs)
            middle = between(gate(image)) * up(image if up.has_basis_of(gate) else up.image(inputs))
            result.index_add_(0, token, (down(down.image(middle)) * share).to(result.dtype))
        return result


def _activation(layer: Any) -> str:
    return str(getattr(layer.activation, "value", layer.activation))


def _is_eager(model: Any) -> bool:
    return model is None or bool(model.enforce_eager)
