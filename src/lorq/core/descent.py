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
MOMENTS = 5
# Added to the root of Adam's second moment.
_EPSILON = 1e-8
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


@dataclass
class State:
    """Where `minimise` is between two steps: all that it needs to go on.

    Attributes:
        step: steps taken.
        start, best, kept_step: of `Outcome` so far.
        tensors: by "parameter", "mean" and "square" (Adam's moments) and "kept", the parameters that measured best, in
            the order of the parameters.
    """

    step: int
    start: float
    best: float
    kept_step: int
    tensors: dict[str, list[Tensor]]


def minimise(
    parameters: Sequence[Tensor],
    loss: Callable[[Int[Tensor, "batch"]], Float[Tensor, ""]],
    windows: int,
    descent: Descent,
    *,
    generator: torch.Generator,
    units: Sequence[float] | None = None,
    measure: Callable[[], float] | None = None,
    state: State | None = None,
    watch: Callable[[State], None] | None = None,
) -> Outcome:
    """Change ``parameters`` in place so that the mean loss of the windows falls: Adam, its rate on half a cosine.

    Each step takes the next windows of a shuffled order, which is shuffled anew when it is used up. A loss is measured
    before the first step and at 5 moments, the last of them at the end; the parameters that measured best are kept, so
    that the result is never worse there than the start.

    Args:
        parameters: leaves of one device; the same tensors that ``loss`` reads.
        loss: mean loss of the windows of these numbers, differentiable in the parameters.
        windows: how many there are, at least 1.
        generator: of the order, which is drawn on the CPU (`cpu_generator`).
        units: in which each parameter is counted: of the size of its entries, so that one rate serves all; 1 if left
            out.
        measure: what is measured; if left out, the loss of at most 8 fixed windows, evenly spread over all.
        state: go on from there, with the same bits as without an interruption.
        watch: is shown the state after each measurement and each step; its tensors are those that the work goes on in.

    Raises:
        ArithmeticError: if the loss is not finite.

    Source:
        LRQ, arXiv:2407.11534, the authors' code: Adam with its usual betas, cosine to 0, shuffled batches.
        Measuring and keeping the best is ours; the code keeps the last parameters.
    """
    batch = min(descent.batch, windows)
    measure = measure or _of_windows(loss, windows, batch)
    moments = {math.ceil(descent.steps * i / MOMENTS) for i in range(1, MOMENTS + 1)}
    if state is None:
        start = _finite(measure(), 0, descent)
        copies = {kind: [torch.zeros_like(p) for p in parameters] for kind in ("mean", "square")}
        kept = [p.detach().clone() for p in parameters]
        state = State(0, start, start, 0, {"parameter": [p.detach() for p in parameters], **copies, "kept": kept})
    units = units or [1.0] * len(parameters)
    # As if each parameter were counted in its unit: its gradient then is so much larger.
    groups = [{"params": [p], "eps": _EPSILON / unit} for p, unit in zip(parameters, units, strict=True)]
    adam = torch.optim.Adam(groups, lr=descent.learning_rate)
    _go_on(adam, parameters, state)
    order = _shuffled(windows, cpu_generator(generator))
    for _ in range(state.step * batch):
        next(order)
    if watch is not None:
        watch(state)
    while state.step < descent.steps:
        rate = descent.learning_rate * (1 + math.cos(math.pi * state.step / descent.steps)) / 2
        for group, unit in zip(adam.param_groups, units, strict=True):
            group["lr"] = rate * unit
        adam.zero_grad()
        with torch.enable_grad():
            value = loss(torch.tensor([next(order) for _ in range(batch)]))
            _finite(float(value.detach()), state.step, descent)
            value.backward()
        adam.step()
        state.step += 1
        if state.step in moments and (now := _finite(measure(), state.step, descent)) < state.best:
            state.best, state.kept_step = now, state.step
            for kept_, parameter in zip(state.tensors["kept"], parameters, strict=True):
                kept_.copy_(parameter.detach())
        if watch is not None:
            watch(state)
    with torch.no_grad():
        for parameter, value in zip(parameters, state.tensors["kept"], strict=True):
            parameter.copy_(value)
    return Outcome(state.start, state.best, state.kept_step)


def _of_windows(loss: Callable[[Tensor], Tensor], windows: int, batch: int) -> Callable[[], float]:
    """The mean loss of at most 8 windows."""
    measured = torch.linspace(0, windows - 1, min(windows, _MEASURED)).round().long().split(batch)

    def measure() -> float:
        with torch.no_grad():
            return sum(float(loss(part)) * len(part) for part in measured) / sum(map(len, measured))

    return measure


def _go_on(adam: torch.optim.Adam, parameters: Sequence[Tensor], state: State) -> None:
    """Let an optimizer work in a state's tensors, from where it is."""
    with torch.no_grad():
        for place, parameter in enumerate(parameters):
            parameter.copy_(state.tensors["parameter"][place])
            state.tensors["parameter"][place] = parameter.detach()
            mean, square = state.tensors["mean"][place], state.tensors["square"][place]
            adam.state[parameter] = {"step": torch.tensor(float(state.step)), "exp_avg": mean, "exp_avg_sq": square}


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
        made = block.forward(weights(), windows).float()
        targets = block.targets[windows].to(made.device).float()
        errors = (made - targets).square().mean(-1)  # (batch, length)
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
