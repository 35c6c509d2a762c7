"""Fit parameters of quantized weights by gradient steps, against the output of a decoder block or of one layer."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorq.core.problem import BlockOutput
from lorq.core.stats import InputStats, output_energy

# Windows on which the loss is measured: enough to rank parameters, few enough to cost little beside the steps.
_MEASURED = 8
# Moments at which it is measured, evenly spread over the steps, besides the start.
_MOMENTS = 5
LossWeights = Literal["equal", "plain"]


@dataclass(frozen=True)
class Descent:
    """How `minimise` goes.

    Attributes:
        steps: gradient steps; 0 only measures.
        learning_rate: of the first step; falls to 0 along half a cosine.
        batch: windows of a step, at most all there are.
    """

    steps: int
    learning_rate: float
    batch: int = 1


@dataclass(frozen=True)
class Outcome:
    """What `minimise` reached.

    Attributes:
        start: loss on the measured windows before the first step.
        best: loss of the parameters that were kept, never above ``start``.
        step: steps after which these were found; 0 for the start.
    """

    start: float
    best: float
    step: int

    def __str__(self) -> str:
        return f"loss {self.start:.4g} before, {self.best:.4g} after step {self.step}"


def minimise(
    parameters: Sequence[Tensor],
    loss: Callable[[Int[Tensor, "batch"]], Float[Tensor, ""]],
    windows: int,
    descent: Descent,
    *,
    generator: torch.Generator,
) -> Outcome:
    """Change ``parameters`` in place so that the mean loss of the windows falls: Adam, its rate on half a cosine.

    Each step takes the next windows of a shuffled order, which is shuffled anew when it is used up. The loss of at
    most 8 fixed windows, evenly spread over all, is measured before the first step and at 5 moments, the last of them
    at the end; the parameters that measured best are kept, so that the result is never worse there than the start.

    Args:
        parameters: leaves of one device; the same tensors that ``loss`` reads.
        loss: mean loss of the windows of these numbers, differentiable in the parameters.
        windows: how many there are, at least 1.
        generator: of the order, which is drawn on the CPU (`cpu_generator`).

    Raises:
        ArithmeticError: if the loss is not finite.

    Source:
        LRQ, arXiv:2407.11534, the authors' code: Adam with its usual betas, cosine to 0, shuffled batches.
        Measuring and keeping the best is ours; the code keeps the last parameters.
    """
    step, batch = 0, min(descent.batch, windows)
    measured = torch.linspace(0, windows - 1, min(windows, _MEASURED)).round().long().split(batch)
    moments = {math.ceil(descent.steps * i / _MOMENTS) for i in range(1, _MOMENTS + 1)}

    def measure() -> float:
        with torch.no_grad():
            value = sum(float(loss(part)) * len(part) for part in measured) / sum(map(len, measured))
        return _finite(value, step, descent)

    start = best = measure()
    kept, kept_step = [p.detach().clone() for p in parameters], 0
    adam = torch.optim.Adam(parameters, lr=descent.learning_rate)
    order = _shuffled(windows, cpu_generator(generator))
    while step < descent.steps:
        adam.param_groups[0]["lr"] = descent.learning_rate * (1 + math.cos(math.pi * step / descent.steps)) / 2
        adam.zero_grad()
        with torch.enable_grad():
            value = loss(torch.tensor([next(order) for _ in range(batch)]))
            _finite(float(value.detach()), step, descent)
            value.backward()
        adam.step()
        step += 1
        if step in moments and (now := measure()) < best:
            best, kept, kept_step = now, [p.detach().clone() for p in parameters], step
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return Outcome(start, best, kept_step)


def _finite(loss: float, step: int, descent: Descent) -> float:
    if not math.isfinite(loss):
        remedy = (
            f"lower learning_rate, which is {descent.learning_rate:g}"
            if step
            else "the block overflows on its calibration windows before any step: work in a wider dtype"
        )
        raise ArithmeticError(f"the loss must be finite, got {loss} after step {step} of {descent.steps}; {remedy}")
    return loss


def _shuffled(count: int, generator: torch.Generator) -> Iterator[int]:
    """The numbers ``0 .. count - 1`` in ever new orders."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def block_loss(
    block: BlockOutput, weights: Callable[[], Mapping[str, Tensor]], token_weights: LossWeights
) -> Callable[[Int[Tensor, "batch"]], Float[Tensor, ""]]:
    """How far the block's output is from its target, for `minimise`.

        mean over windows and channels of  sum_t d_t (y_t - y^_t)^2

    ``weights`` makes the quantized weights from the parameters. Of ``token_weights`` "plain" is ``d_t = 1``; "equal" is
    ``d_t = 1 / mean(y_t^2)``, so that a few tokens with enormous activations (attention sinks) do not decide alone.

    Source:
        LRQ, arXiv:2407.11534, the authors' code, which has the plain sum.
    """

    def loss(windows: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
        made = weights()
        device = next(iter(made.values())).device
        targets = block.targets[windows].to(device).float()
        errors = (block.forward(made, windows).float() - targets).square().mean(-1)  # (batch, length)
        if token_weights == "equal":
            # A token of zeros gets a finite weight.
            errors = errors / targets.square().mean(-1).clamp(min=1e-30)
        return errors.sum(-1).mean()

    return loss


def layer_loss(
    target: Float[Tensor, "out in"], stats: InputStats, weight: Callable[[], Tensor]
) -> Callable[[Int[Tensor, "batch"]], Float[Tensor, ""]]:
    """``tr[(W - W^) H (W - W^)^T]`` of one layer alone; one window stands for the whole calibration."""

    def loss(windows: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
        return output_energy(weight() - target, stats.hessian)

    return loss


def cpu_generator(generator: torch.Generator) -> torch.Generator:
    """A generator on the CPU, where orders are drawn, seeded from one on any device."""
    if generator.device.type == "cpu":
        return generator
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))
