"""Problem: what one call of a method's `solve` covers, and the randomness that belongs to each layer."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorq.core.stats import InputStats


@dataclass(frozen=True)
class BlockOutput:
    """What a decoder block makes of its layers' weights, and what it should make.

    Attributes:
        forward: the block's output (batch, length, width) for given weights, by layer, and the windows of given
            numbers, as they come in the quantized stream; differentiable in the weights. It also quantizes activations
            if the run asks for it.
        targets: outputs of the original block in the original stream. May be a file mapped into memory; only batches
            move to the weights' device.
    """

    forward: Callable[[Mapping[str, Tensor], Int[Tensor, "batch"]], Tensor]
    targets: Float[Tensor, "windows length width"]


@dataclass(frozen=True)
class Problem:
    """What one call of `solve` covers: a layer, the layers of one input, experts, or a block, as the method's scope is.

    Attributes:
        weights: by layer, (out, in), float32, all on the device where the work is done.
        stats: of the layers' inputs, by the same names; layers that read one input share one object. Empty where the
            run collects none.
        methods: the settings of layers that have their own, where such are solved together (scope "block").
        projections: with scope "experts", the layers of each projection in the experts' order, of the projections that
            read the same inputs: gate and up, or down alone; else empty.
        common_input: all experts read the layer's input, so that one basis serves them all.
        block: with scope "block", the block around the layers.
        height: of the weight whose rows are solved strip by strip, of which this is one: what all strips must have in
            common goes by it. None where each weight is whole.
    """

    weights: Mapping[str, Float[Tensor, "_ _"]]
    stats: Mapping[str, InputStats]
    seed: int
    methods: Mapping[str, Any] = field(default_factory=dict)
    projections: tuple[tuple[str, ...], ...] = ()
    common_input: bool = False
    block: BlockOutput | None = None
    height: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return next(iter(self.weights.values())).device

    def generator(self, name: str) -> torch.Generator:
        """A layer's own source of randomness, at its start."""
        return layer_generator(self.seed, name, self.device)


def layer_generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A layer's own source of randomness, so that neither order nor interruption changes a bit."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
