"""Mixture-of-experts layers as ordinary linear layers: transformers' fused tensors taken apart, and put back.

transformers keeps all experts of a layer in two tensors, ``gate_up_proj`` (experts, 2 * width, hidden), or ``up_proj``
where there is no gate, and ``down_proj`` (experts, hidden, width). A low-rank quantizer wants each projection of each
expert on its own, so `split_experts` puts an `Experts` module there: ``experts.3.gate_proj`` is then a linear layer
like any other.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

# What `transformers.integrations.use_experts_implementation` (5.23) sets on a module with fused experts.
_DECLARED = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
# Classes that are fused in the same way and do not say so. Llama 4's are called with every expert's own copy of all
# tokens, one after the other, times the router's weights: zeros where a token is not for the expert.
_ROWS = {"Llama4TextExperts": dict(zip(_DECLARED, (True, False, False, True, True), strict=True))}


@dataclass(frozen=True)
class FusedPart:
    """One projection of one expert as a part of a fused tensor.

    Attributes:
        expert: index along the first dimension.
        half: 0 for the gate's rows, 1 for those of the up projection, None for all.
        interleaved: the halves alternate row by row and do not follow each other.
        transposed: the fused tensor keeps (in, out).
    """

    expert: int
    half: int | None
    interleaved: bool
    transposed: bool

    def of(self, fused: Tensor) -> Tensor:
        """This part of the expert's own slice of the fused tensor: a weight (out, in), or a bias.

        Example:
            >>> FusedPart(0, 1, interleaved=True, transposed=True).of(torch.arange(8).view(2, 4))
            tensor([[1, 5],
                    [3, 7]])
        """
        rows = fused.T if self.transposed and fused.ndim == 2 else fused
        if self.half is None:
            return rows
        if self.interleaved:
            return rows[self.half :: 2]
        middle = len(rows) // 2
        return rows[middle:] if self.half else rows[:middle]


class Watcher(Protocol):
    """What may look on while experts run."""

    def before(self, hidden_states: Tensor, top_k_index: Tensor) -> None:
        """All tokens of the layer, and the experts that each is routed to."""

    def ran(self, expert: int, tokens: Tensor, inputs: Tensor, middle: Tensor, weights: Tensor) -> None:
        """Which tokens are routed to one expert: its inputs, its down projection's, and the router's weights."""


class Expert(nn.Module):
    """The projections of one expert, three or, without a gate, two; `Experts` runs them."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module


class Experts(nn.ModuleList):
    """Stands where a fused experts module was; the experts are its children, named by their numbers.

    Args:
        fused: the module that it replaces. What happens between the projections stays what that module's class says.
        experts: in its place.
    """

    watcher: Watcher | None = None

    def __init__(self, fused: Any, experts: Iterable[Expert]):
        super().__init__(experts)
        self._fused = (fused,)  # in a tuple, so that it is no child
        self.adapt(self)

    @classmethod
    def split(cls, fused: Any) -> "Experts":
        """A fused module taken apart, which loses its parameters."""
        split = cls(fused, (Expert() for _ in range(len(fused.down_proj))))
        for name, tensor, part in split.parts():
            path, _, leaf = name.rpartition(".")
            expert, _, projection = path.partition(".")
            values = part.of(getattr(fused, tensor).detach()[part.expert]).clone()
            if leaf == "weight":
                layer = nn.Linear(values.shape[1], values.shape[0], bias=fused.has_bias, device="meta")
                setattr(split[int(expert)], projection, layer)
            setattr(split.get_submodule(path), leaf, nn.Parameter(values, requires_grad=False))
        fused._parameters.clear()
        return split

    @property
    def entries(self) -> tuple[str, ...]:
        """The projections that read the experts' input."""
        return ("gate_proj", "up_proj") if self._fused[0].has_gate else ("up_proj",)

    def adapt(self, module: nn.Module) -> None:
        """Let a module that stands for these experts be called as their class is."""
        if type(self._fused[0]).__name__ in _ROWS:
            module.register_forward_pre_hook(partial(_route_rows, len(self)))

    def with_experts(self, experts: Iterable[Expert]) -> "Experts":
        """Others in the place of the same module."""
        return Experts(self._fused[0], experts)

    def parts(self) -> Iterator[tuple[str, str, FusedPart]]:
        """Of every parameter the name here, such as "3.gate_proj.weight", the fused tensor's, and the part of it."""
        fused = self._fused[0]
        gated = (("gate_proj", "gate_up_proj", 0), ("up_proj", "gate_up_proj", 1), ("down_proj", "down_proj", None))
        plain = (("up_proj", "up_proj", None), ("down_proj", "down_proj", None))
        for expert in range(len(self)):
            for projection, tensor, half in gated if fused.has_gate else plain:
                part = FusedPart(expert, half, not fused.is_concatenated, fused.is_transposed)
                yield f"{expert}.{projection}.weight", tensor, part
                if fused.has_bias:
                    yield f"{expert}.{projection}.bias", tensor + "_bias", part

    def slice_shape(self, tensor: str) -> tuple[int, ...]:
        """Of one expert's part of a fused weight."""
        leaf = "bias" if tensor.endswith("_bias") else "weight"
        of_one: Any = self[0]
        names = self.entries if tensor.startswith(("gate_up", "up")) else ("down_proj",)
        rows, *columns = getattr(getattr(of_one, names[0]), leaf).shape
        shape = (rows * len(names), *columns)
        return shape[::-1] if self._fused[0].is_transposed else shape

    @property
    def takes_apart_in_order(self) -> bool:
        """The fused tensors are the experts' own (out, in) weights, one after the other, the gate's before up's."""
        return self._fused[0].is_concatenated and not self._fused[0].is_transposed

    def fuse(self) -> nn.Module:
        """The original module, its parameters made from the experts' dense layers."""
        fused: Any = self._fused[0]
        for leaf, ending in (("weight", ""), ("bias", "_bias")) if fused.has_bias else (("weight", ""),):
            *entries, down = (
                torch.stack([getattr(getattr(expert, projection), leaf).detach() for expert in self])
                for projection in (*self.entries, "down_proj")
            )
            first = ("gate_up_proj", self._join(entries, 1)) if fused.has_gate else ("up_proj", entries[0])
            for name, tensor in (first, ("down_proj", down)):
                if fused.is_transposed and leaf == "weight":
                    tensor = tensor.mT.contiguous()
                fused.register_parameter(name + ending, nn.Parameter(tensor, requires_grad=False))
        return fused.train(self.training)

    def _join(self, gate_and_up: Sequence[Tensor], dim: int) -> Tensor:
        """Gate and up as the class keeps them along a dimension: one after the other, or by turns."""
        if self._fused[0].is_concatenated:
            return torch.cat(tuple(gate_and_up), dim)
        return torch.stack(tuple(gate_and_up), dim + 1).flatten(dim, dim + 1)

    def middle(self, expert: int, inputs: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens width"]:
        """What one expert's down projection is given."""
        own: Any = self[expert]
        return self.between(*(getattr(own, name)(inputs) for name in self.entries))

    def between(self, *projected: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        """The model's own way from the outputs of the `entries`, in that order, to the down projection's input."""
        fused = self._fused[0]
        if not fused.has_gate:
            return fused.act_fn(*projected)
        if type(fused).__name__ in _ROWS:
            gate, up = projected
            return up * fused.act_fn(gate)
        return fused._apply_gate(self._join(projected, 1))

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens in"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens in"]:
        """Sum of the chosen experts' outputs, each times its router weight.

        An index past the last expert stands for none: expert parallelism masks tokens so.
        """
        if self.watcher:
            self.watcher.before(hidden_states, top_k_index)
        out = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            if number >= len(self):
                continue
            token, place = torch.where(top_k_index == number)
            inputs, weights = hidden_states[token], top_k_weights[token, place]
            middle = self.middle(number, inputs)
            if self.watcher:
                self.watcher.ran(number, token, inputs, middle, weights)
            answer = self[number].down_proj(middle) * weights[:, None]
            out.index_add_(0, token, answer.to(out.dtype))
        return out


def _route_rows(experts: int, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """The arguments of `Experts.forward` for experts that are called with copies of all tokens."""
    if len(args) > 1:
        return None
    rows = args[0]
    own = torch.arange(experts, device=rows.device).repeat_interleave(len(rows) // experts)
    index = torch.where(rows.any(-1), own, experts)
    return rows, index[:, None], rows.new_ones(len(rows), 1)


def find_experts(model: nn.Module, under: str = "") -> dict[str, Experts]:
    """The experts modules of a split model, or of one part of it, by full name."""
    part = model.get_submodule(under) if under else model
    return {name: module for name, module in part.named_modules(prefix=under) if isinstance(module, Experts)}


def split_experts(model: nn.Module) -> None:
    """Replace every fused experts module by `Experts`, in place; a dense model stays as it is.

    Raises:
        ValueError: if experts are built in a way that cannot be taken apart.
    """
    for module in model.modules():
        vars(module).update(_ROWS.get(type(module).__name__, {}))
    found = {name: m for name, m in model.named_modules() if all(hasattr(m, key) for key in _DECLARED)}
    for name, module in found.items():
        if reason := _declines(module):
            raise ValueError(
                f"{type(model).__name__} is not supported: {name} ({type(module).__name__}) {reason}; lorq takes "
                "apart experts with gate_up_proj or up_proj, and down_proj, only"
            )
    for name, module in found.items():
        model.set_submodule(name, Experts.split(module))


def _declines(fused: Any) -> str | None:
    """Why a declared experts module cannot be taken apart; None where it can."""
    if fused.has_post_expert_norm:
        return "has a norm after each expert"
    wanted = {"gate_up_proj" if fused.has_gate else "up_proj", "down_proj"}
    wanted |= {f"{name}_bias" for name in wanted} if fused.has_bias else set()
    held = {name for name, _ in (*fused.named_parameters(), *fused.named_buffers())}
    if held != wanted:
        return f"holds {', '.join(sorted(held))}"
    return None


def fuse_experts(model: nn.Module) -> None:
    """The inverse of `split_experts`, for a model whose layers are all dense."""
    for name, experts in find_experts(model).items():
        model.set_submodule(name, experts.fuse())


def routing_layers(model: nn.Module) -> dict[str, str]:
    """Linear layers beside experts that weigh them and do not compute, by name, each with the reason to keep it.

    Found by shape: what stands beside the experts and has a single linear layer, with an output per expert (a
    router) or with one output (the gate of a shared expert). Most routers are not linear layers at all.
    """
    found = {}
    for name, experts in find_experts(model).items():
        parent = name.rpartition(".")[0]
        for sibling, module in model.get_submodule(parent).named_children():
            linears = [(n, m) for n, m in module.named_modules(prefix=sibling) if isinstance(m, nn.Linear)]
            if len(linears) != 1 or module is experts:
                continue
            local, layer = linears[0]
            if layer.out_features == len(experts):
                found[f"{parent}.{local}"] = "routes tokens to experts, kept as it is"
            elif layer.out_features == 1:
                found[f"{parent}.{local}"] = "weighs an expert with one number per token, kept as it is"
    return found


@dataclass(frozen=True)
class ExpertName:
    """Where an expert's projection is: ``model.layers.0.mlp.experts.3.gate_proj``.

    Attributes:
        module: the experts module, ``model.layers.0.mlp.experts``.
        expert: its number.
        projection: such as ``gate_proj``.
    """

    module: str
    expert: int
    projection: str

    @property
    def tiles(self) -> str:
        """Name under which the tile factors of this projection are stored."""
        return f"{self.module}.tiles.{self.projection}"


def expert_name(name: str, modules: Mapping[str, Any]) -> ExpertName | None:
    """The parts of an expert projection's name; None for a layer outside the experts ``modules``."""
    path, _, projection = name.rpartition(".")
    module, _, number = path.rpartition(".")
    return ExpertName(module, int(number), projection) if module in modules else None
