"""vLLM's routed experts by lorq's codes and operators: each expert's projections are linear layers of their own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.runtime.experts_at_once import PROJECTIONS, declines_at_once, run_grouped
from lorq.runtime.vllm.linear import Part, free_name
from lorq.runtime.vllm.loading import Collected

_BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu": gelu}


class Routed(nn.Module):
    """A layer's experts as this device has them: all of a projection in one product, or one after the other.

    Args:
        parts: projections of the first expert, then of the second, as `PROJECTIONS` has them.
        gate: what is done to the gate's outputs.
    """

    def __init__(self, parts: Sequence[Part], gate: Callable[[Tensor], Tensor]):
        super().__init__()
        self.parts, self.gate = nn.ModuleList(parts), gate
        size = len(PROJECTIONS)
        self.experts = [parts[first : first + size] for first in range(0, len(parts), size)]
        first, down = parts[0], parts[size - 1]
        # Of one product all inputs are in one basis, and all outputs are wanted.
        alike = all(
            p.has_basis_of(first) and q.has_basis_of(first) and r.has_basis_of(down) for p, q, r in self.experts
        )
        whole = alike and not any(part.cut for part in parts)
        names = zip(PROJECTIONS, zip(*self.experts, strict=True), strict=True)
        self.layers = {name: [part.linear for part in own] for name, own in names} if whole else None

    def declines_at_once(self, x: Tensor, weights: Tensor) -> str | None:
        """Why experts run one after the other, which looks at the routing; None where they do not."""
        if self.layers is None:
            return "experts differ in how their inputs are turned, or are cut inside of codes"
        return declines_at_once(self.layers, (), x, weights)

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """The sum of the chosen experts' outputs, each times its weight.

        Args:
            x: (tokens, in).
            weights, index: (tokens, k), the router's.
        """
        if self.layers is None or self.declines_at_once(x, weights) is not None:
            return self._one_by_one(x, weights, index)
        first, down = self.experts[0][0], self.experts[0][-1]
        between: Callable[..., Tensor] = lambda gate, up: down.image(self.gate(gate) * up)  # noqa: E731
        return run_grouped(self.layers, {}, between, first.image(x), index.long(), weights)

    def _one_by_one(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for number in index.unique().tolist():
            token, place = torch.where(index == number)
            gate, up, down = self.experts[number]
            image = gate.image(x[token])
            middle = self.gate(gate(image)) * up(image if up.has_basis_of(gate) else up.image(x[token]))
            share = weights[token, place].unsqueeze(1).to(x.dtype)
            result.index_add_(0, token, (down(down.image(middle)) * share).to(result.dtype))
        return result


# By name, as tables are.
_ROUTED: WeakValueDictionary[str, Routed] = WeakValueDictionary()


@torch.library.custom_op("lorq::routed_experts", mutates_args=())
def routed_experts(x: Tensor, weights: Tensor, index: Tensor, name: str) -> Tensor:
    """`Routed` by name: an operator, since a compiled program must not look at which experts run."""
    return _ROUTED[name](x, weights, index)


@routed_experts.register_fake
def _(x: Tensor, weights: Tensor, index: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


class LorqExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The experts that tokens are routed to, as one operator.

    Args:
        layer: vLLM's.
        prefix: its name.
        formats: of all layers of the model.

    Raises:
        ValueError: for experts that are not all quantized, or run otherwise than is known here.
    """

    def __init__(self, layer: Any, prefix: str, formats: Mapping[str, LayerFormat]):
        super().__init__(layer.moe_config)
        moe, self.name, self.key = layer.moe_config, prefix, ""
        graphs = get_current_vllm_config().compilation_config.cudagraph_mode
        self.captured = graphs not in (None, CUDAGraphMode.NONE)
        names = [f"{prefix}.{n}.{projection}" for n in range(moe.num_experts) for projection in PROJECTIONS]
        several = layer.apply_router_weight_on_input and moe.experts_per_token > 1
        lacking = [name for name in names if name not in formats]
        other = {
            "have codes in all projections": lacking[:1],
            "have no biases": ["biases"] if moe.has_bias else [],
            "be gated by silu or gelu": [] if moe.is_act_and_mul and _activation(layer) in _BETWEEN else ["others"],
            "be shared by --tensor-parallel-size": ["expert parallelism"] if moe.moe_parallel_config.use_ep else [],
            "be one a token where its weight multiplies the input": [f"{moe.experts_per_token}"] if several else [],
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
        device, parallel = next(layer.parameters()).device, layer.moe_config.moe_parallel_config
        own = (parallel.tp_rank * self._width, (parallel.tp_rank + 1) * self._width)
        parts = []
        for place in range(len(self.collected.formats)):
            weight = self.collected.weight(place)
            assert isinstance(weight, QuantizedWeight)
            out, in_ = weight.shape
            down = place % len(PROJECTIONS) == 2
            parts.append(Part(weight, (0, out) if down else own, own if down else (0, in_), device))
        routed = Routed(parts, _BETWEEN[_activation(layer)])
        self._check_captured(layer, routed, device)
        self.key = self.key or free_name(_ROUTED, self.name)
        layer.lorq_routed = _ROUTED[self.key] = routed
        self.collected.forget()

    def _check_captured(self, layer: Any, routed: Routed, device: torch.device) -> None:
        """Refuse experts that look at the routing where vLLM captures graphs of a device's work, which cannot."""
        if not self.captured or device.type == "cpu":
            return
        x = torch.empty(1, routed.experts[0][0].linear.in_features, dtype=layer.params_dtype, device=device)
        if why := routed.declines_at_once(x, x.new_empty(1, layer.moe_config.experts_per_token)):
            raise ValueError(
                f"experts that vLLM captures in graphs must run in one product, those of {self.name} do not ({why}); "
                "serve with --enforce-eager"
            )

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        result: Tensor = routed_experts(x, topk_weights, topk_ids, self.key)
        return result


def _activation(layer: Any) -> str:
    return str(getattr(layer.activation, "value", layer.activation))
