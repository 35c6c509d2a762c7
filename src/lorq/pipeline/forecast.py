"""What a run will take, told before it: some windows go through one block, and its largest layer is solved."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from lorq.models.blocks import Part, StreamedModel
from lorq.models.experts import find_experts
from lorq.pipeline.options import read_size
from lorq.pipeline.plan import Plan
from lorq.pipeline.tasks import Task, block_tasks, solve_task
from lorq.pipeline.walk import Streams, give_memory_back, observe
from lorq.runtime.device import memory_now, memory_peak

# Windows that are tried: one to find out how, one to time.
_WINDOWS = 2
# Of what a block's tensors take where they are packed and written, and of what Python keeps meanwhile.
WRITTEN, SPARE = 2, 1.05


@dataclass(frozen=True)
class Forecast:
    """Sizes in bytes, of this machine and process.

    Attributes:
        blocks: of the model.
        read: of weights, in all; a block that is read twice counts twice.
        kept: of what is kept of every window between blocks.
        spilled: of these, what goes to files.
        written: of the result, at most.
        memory: at its peak, of the whole process; 0 where the system does not count it.
        seconds: of calibration and solving; without solving where a method fits whole blocks.
        measured: the block and the layer that tell.
    """

    blocks: int
    read: int
    kept: int
    spilled: int
    written: int
    memory: int
    seconds: dict[str, float]
    measured: tuple[str, str]


def forecast(model: StreamedModel, plan: Plan, windows: Int[Tensor, "windows length"] | None, written: int) -> Forecast:
    """Try the largest block, and the layer of it that takes most, and reckon up.

    Time grows with the windows, the blocks and their passes, and with the weights that are solved; memory with what is
    kept of the windows. The peak is that since `reset_peak`, what came before included. Nothing is written.

    Args:
        windows: of the calibration; None where nothing looks at inputs.
        written: the size of the result at most.
    """
    part = max(model.blocks, key=lambda part: weights_of(plan, part))
    tokens = torch.zeros(1, 2, dtype=torch.int64) if windows is None else windows[:_WINDOWS]
    give_memory_back()
    with model.resident(*model.outside):
        stream = model.embed(tokens)
    loading = time.monotonic()
    with model.resident(part):
        loading = time.monotonic() - loading
        plain = replace(plan, options=replace(plan.options, token_weights="equal", stream="original", smoothing=0.0))
        layers, looking = plain.of(part), time.monotonic()
        with model.products_in(plan.options.pass_dtype):
            streams = Streams(stream, stream, quantized=False)
            found = observe(model, plain, part, streams, partial(model.run, part), None)
        looking = (time.monotonic() - looking) / (len(tokens) + 1)  # the first is run once more, to see what reads what
        experts = find_experts(model.model, part.name)
        tasks = block_tasks(
            layers, found.stats, experts,
            weight=lambda target: model.resident_weight(target).contiguous(), seed=plan.options.seed,
        ) if not plan.blockwise else iter(())  # fmt: skip
        name, solving = _solve_largest(tasks)
    count = 0 if windows is None else len(windows)
    weights = sum(target.out_features * target.in_features for target, _ in plan.jobs())
    seconds = {"calibration": count * len(model.blocks) * looking * passes(plan) + loading * len(model.blocks)}
    if not plan.blockwise:
        seconds["solving"] = solving * weights
    kept = bytes_kept(plan, model, None if windows is None else tuple(windows.shape))
    spilled = kept if kept > plan.options.spill_bytes else 0
    block_written = written * weights_of(plan, part) // max(1, weights)
    memory = (memory_peak() + (kept - spilled) + WRITTEN * block_written) * (memory_peak() > 0)
    read = bytes_read(plan, model, written)
    return Forecast(len(model.blocks), read, kept, spilled, written, int(memory * SPARE), seconds, (part.name, name))


def fitted(plan: Plan, told: Forecast) -> tuple[Plan, int]:
    """The plan within its memory budget, and the memory that it takes: what is kept of the windows goes to files where
    it does not fit.

    Raises:
        ValueError: if one block and its largest layer are too large by themselves.
    """
    budget = read_size(plan.options.memory_budget)
    if not told.memory:
        raise ValueError("memory_budget needs a count of the process's memory, which only Linux gives; leave it away")
    needed = told.memory - int((told.kept - told.spilled) * SPARE)
    if needed > budget:
        block, layer = told.measured
        raise ValueError(
            f"memory_budget must hold a block and the solving of its largest layer, {needed / 1e9:.2f} GB with {block} "
            f"and {layer} ({memory_now() / 1e9:.2f} of it Python, torch and what is read), got "
            f"{plan.options.memory_budget}; give as much, or take shorter windows (--seq-len), a method that needs "
            "less, such as nearest, or --exclude the layer"
        )
    room = min(plan.options.spill_bytes, int((budget - needed) / SPARE))
    memory = needed + (int(told.kept * SPARE) if told.kept <= room else 0)
    return replace(plan, options=replace(plan.options, spill_bytes=room)), memory


def weights_of(plan: Plan, part: Part) -> int:
    """Weights that are quantized."""
    return sum(target.out_features * target.in_features for target in plan.of(part))


def bytes_read(plan: Plan, model: StreamedModel, written: int) -> int:
    """Every tensor once, once more forward and back for gradients, what is outside the blocks twice; the result."""
    every = sum(model.stored_bytes(name) for part in model.parts for name in part.tensors)
    again = sum(model.stored_bytes(name) for part in model.outside for name in part.tensors)
    return every * (3 if plan.options.token_weights == "gradient" else 1) + again + written


def passes(plan: Plan) -> int:
    """How often a window goes through a block; back counts three times, and once to be there again."""
    once = 1 if plan.stream == "original" else 2
    return once + (plan.blockwise or plan.stream == "corrected") + 4 * (plan.options.token_weights == "gradient")


def bytes_kept(plan: Plan, model: StreamedModel, windows: tuple[int, ...] | None) -> int:
    """Bytes of hidden states between blocks, as `Streams.begin` and the way back keep them."""
    if windows is None:
        return 0
    one = 4 * math.prod(windows) * int(model.model.config.get_text_config().hidden_size)
    streams = 2 if plan.blockwise or plan.stream == "corrected" else 1
    return one * (streams + (1 + len(model.blocks) if plan.options.token_weights == "gradient" else 0))


def _solve_largest(tasks: Iterator[Task]) -> tuple[str, float]:
    """The task with most weights, solved: its first layer, and seconds a weight."""
    largest, size = None, 0
    for task in tasks:
        own = sum(weight.numel() for weight in task.problem.weights.values())
        if own > size:
            largest, size = task, own
    if largest is None:
        return "no layer alone", 0.0
    began = time.monotonic()
    solve_task(largest)
    return next(iter(largest.problem.weights)), (time.monotonic() - began) / size
