"""The work at one block: smooth it, choose its activations, solve its layers."""

from collections.abc import Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorq.core.activations import Activations
from lorq.core.problem import BlockOutput
from lorq.core.weight import QuantizedWeight
from lorq.models.blocks import StreamedModel, Target
from lorq.models.experts import expert_name, find_experts
from lorq.pipeline.dense_activations import Smoothed, layer_activations, quantized_activations, smooth_block
from lorq.pipeline.executors import SameProcess
from lorq.pipeline.observe import same_inputs
from lorq.pipeline.plan import Plan
from lorq.pipeline.tasks import block_tasks, solve_task
from lorq.pipeline.verify import Probe
from lorq.pipeline.walk import Visit

# Tasks of a block, at least; and blocks that are in memory beside the one looked at, at most.
_TASKS, _AHEAD = 4, 8


@dataclass(frozen=True)
class Solved:
    """A block's weights, and what else goes into its file and report.

    Attributes:
        notes: what a layer's report should tell, by layer.
        changed: parameters outside the layers that smoothing changed, by name.
        inputs: names of the layers that read one input, those of experts aside, for each input of several.
    """

    weights: dict[Target, QuantizedWeight]
    notes: dict[str, str]
    changed: dict[str, Tensor]
    inputs: list[list[str]]


@dataclass(frozen=True)
class Begun:
    """A block whose layers are being solved."""

    visit: Visit
    smoothed: Smoothed
    activations: dict[str, Activations]
    calls: list[Future[dict[str, QuantizedWeight]]]


def begin_block(model: StreamedModel, plan: Plan, visit: Visit, probe: Probe, executor: Executor) -> Begun:
    """Hand over the layers of the block where a walk is. Smoothing, which the probe must have come to the block for,
    changes the resident block, solving does not."""
    part, found, layers = visit.part, visit.observed, plan.of(visit.part)
    experts = find_experts(model.model, part.name)
    smoothed = Smoothed()
    if plan.options.smoothing:
        # On each token's own range no token spoils the others', and scaled columns would cost the weights' codes.
        fixed = plan.options.activations == "tensor"
        smoothed = smooth_block(
            model.model.get_submodule(part.name),
            {target.name: model.model.get_submodule(target.name) for target in layers},
            lambda: probe.run(model, part),
            found.stats,
            prefix=part.name,
            exponent=plan.options.smoothing,
            made=[t.name for t in layers if fixed and expert_name(t.name, experts) is None],
        )
    activations = {
        t.name: layer_activations(
            t.name, found.stats.get(t.name), inputs=plan.options.activations, cache=plan.options.kv_cache
        )
        for t in layers
    }  # fmt: skip
    block = _block_output(model, visit, layers) if plan.blockwise else None
    tasks = block_tasks(
        layers, found.stats, experts,
        weight=lambda target: model.resident_weight(target).contiguous(), seed=plan.options.seed, block=block,
    )  # fmt: skip
    where = executor if block is None else SameProcess()
    with quantized_activations(model.model, {name: (own, None) for name, own in activations.items()}):
        return Begun(visit, smoothed, activations, [where.submit(solve_task, task) for task in tasks])


def end_block(model: StreamedModel, plan: Plan, begun: Begun, probe: Probe) -> Solved:
    """Wait for the layers of a block, to which the probe has come by now."""
    part, found, layers = begun.visit.part, begun.visit.observed, plan.of(begun.visit.part)
    experts = find_experts(model.model, part.name)
    solved = {name: weight for call in begun.calls for name, weight in call.result().items()}
    missing = [t.name for t in layers if t.name not in solved]
    if missing:
        raise RuntimeError(f"an executor must answer every task whole, this one left out {', '.join(missing)}")
    weights = {t: replace(solved[t.name], activations=begun.activations[t.name]) for t in layers}
    notes: dict[str, list[str]] = {}
    recorded = {target.name: weight.record.note for target, weight in weights.items()}
    for name, note in (*found.notes.items(), *begun.smoothed.notes.items(), *recorded.items()):
        if note:
            notes.setdefault(name, []).append(note)
    plain = {t.name: model.model.get_submodule(t.name) for t in layers if expert_name(t.name, experts) is None}
    inputs = same_inputs(lambda: probe.run(model, part), plain)
    return Solved(weights, {name: "; ".join(own) for name, own in notes.items()}, begun.smoothed.tensors, inputs)


def blocks_ahead(plan: Plan, executor: Executor) -> int:
    """Of how many blocks tasks may be under way when the next is looked at: of as many as keep an executor busy, where
    inputs do not wait for what the blocks before come to. None with a budget of memory, which one block is reckoned
    in."""
    parallel, options = int(getattr(executor, "parallel", 1)), plan.options
    if plan.stream != "original" or plan.blockwise or options.smoothing or options.memory_budget or parallel == 1:
        return 0
    return min(_AHEAD, 1 + parallel // _TASKS)


def _block_output(model: StreamedModel, visit: Visit, layers: Mapping[Target, object]) -> BlockOutput:
    """The resident block as methods of scope "block" take it."""
    targets, inputs, original = {target.name: target for target in layers}, visit.streams.inputs, visit.streams.original

    def forward(given: Mapping[str, Tensor], windows: Tensor) -> Tensor:
        own = {targets[name]: weight for name, weight in given.items()}
        # One window at a time: masks and rotary angles are those of one.
        return torch.stack([model.differentiable_run(visit.part, inputs, int(w), own) for w in windows])

    assert original is not None
    return BlockOutput(forward, original.hidden)
