"""Which of a dial's settings do the whole model the least harm: predicted in one walk, before anything is written."""

from collections.abc import Hashable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorq.core.knapsack import Candidate, choose, frontier
from lorq.core.stats import InputStats, output_energy
from lorq.methods import Method
from lorq.models.blocks import Part, StreamedModel, Target
from lorq.models.calls import Room
from lorq.models.experts import expert_name, find_experts
from lorq.pipeline.dial import Choice, Dial
from lorq.pipeline.gradients import token_gradients
from lorq.pipeline.observe import TokenGradients, same_inputs
from lorq.pipeline.tasks import block_tasks, solve_task
from lorq.pipeline.verify import Probe, probe_tokens
from lorq.pipeline.walk import Streams, Visit, walk
from lorq.progress import PREDICT, Progress

# So many rows of a layer tell how its codes do: rows are rounded by themselves.
_ROWS = 128
# Points of the curve that a report keeps.
_POINTS = 64


@dataclass(frozen=True)
class _Unit:
    """Layers that get one setting: what each change costs and does to them together, by its number."""

    targets: list[Target]
    candidates: dict[int, Candidate]


def predict(
    dial: Dial, model: StreamedModel, windows: Int[Tensor, "windows length"], folder: Path, executor: Executor,
    progress: Progress,
) -> tuple[Choice, TokenGradients | None]:  # fmt: skip
    """The choice that does least harm within the dial's budget, by a walk through the original model.

    The harm of a layer whose weight changes by ``D`` is the second order of the divergence, from its statistics,

        sensitivity / (2 out) tr(A D H D^T),    A = diag(output_weights)

    for each token, where the layer is solved with every change. Harms of layers add up. Where rows are solved one by
    one, some rows stand for all.

    Args:
        folder: for hidden states that do not fit in memory.

    Returns:
        The choice, and the gradients that weigh the tokens, where they do, as they serve what comes next.
    """
    blocks, options, gradients = model.blocks, dial.plan.options, None
    if options.token_weights == "gradient":
        gradients = token_gradients(model, dial.plan, windows, folder, progress)
    with model.resident(*model.outside):
        inputs = model.embed(windows, Room(options.spill_bytes, folder))
        probe = Probe.begin(model, probe_tokens(model.model.config.get_text_config(), options.seed))
    units: list[_Unit] = []
    progress(PREDICT, 0, len(blocks))
    streams = Streams(inputs, inputs, quantized=False)
    for number, visit in enumerate(walk(model, dial.plan, streams, gradients=gradients), 1):
        free = [target for target in dial.plan.of(visit.part) if target in dial.sizes]
        groups = _groups(dial, model, visit.part, free, probe)
        harms = _harms(dial, model, visit, free, windows.numel(), executor)
        units += [_unit(dial, group, harms) for group in groups]
        probe.advance(model, visit.part)
        progress(PREDICT, number, len(blocks))
    return _choose(dial, units), gradients


def _choose(dial: Dial, units: list[_Unit]) -> Choice:
    items = [list(unit.candidates.values()) for unit in units]
    chosen = choose(items, dial.budget)
    settings = {
        target.name: dial.changes[list(unit.candidates)[i]]
        for unit, i in zip(units, chosen, strict=True)
        for target in unit.targets
    }
    points = list(frontier(items))
    kept = points[:: -(-len(points) // _POINTS)] + points[-1:]
    curve = [[(point.bits + dial.fixed) / dial.weights, point.harm] for point in kept]
    return Choice(settings, sum(own[i].harm for own, i in zip(items, chosen, strict=True)), curve)


def _unit(dial: Dial, targets: list[Target], harms: Mapping[Target, Mapping[int, float]]) -> _Unit:
    common = set.intersection(*(set(harms[target]) for target in targets))
    candidates = {
        i: Candidate(sum(dial.sizes[t][i] for t in targets), sum(harms[t][i] for t in targets)) for i in sorted(common)
    }
    if not candidates:
        raise ValueError(
            f"layers that are fused must have settings that fit them all, {', '.join(t.name for t in targets)} have "
            "none; leave fused_alike away, or --exclude them"
        )
    return _Unit(targets, candidates)


def _groups(
    dial: Dial, model: StreamedModel, part: Part, free: list[Target], probe: Probe
) -> list[list[Target]]:  # fmt: skip
    """The layers that get one setting, each by itself where nothing ties it."""
    experts, alike = find_experts(model.model, part.name), dial.plan.options.fused_alike
    plain = {t.name: model.model.get_submodule(t.name) for t in free if expert_name(t.name, experts) is None}
    inputs = same_inputs(lambda: probe.run(model, part), plain) if alike else []
    first = {name: names[0] for names in inputs for name in names}
    groups: dict[Hashable, list[Target]] = {}
    for target in free:
        place = expert_name(target.name, experts)
        key: Hashable = first.get(target.name, target.name)
        if place is not None and (alike or dial.plan.method.scope == "experts"):
            key = place.module, place.projection == "down_proj"
        groups.setdefault(key, []).append(target)
    return list(groups.values())


def _harms(
    dial: Dial, model: StreamedModel, visit: Visit, free: list[Target], tokens: int, executor: Executor
) -> dict[Target, dict[int, float]]:
    """Of the block where a walk is, by layer and number of the change."""
    stats, experts = visit.observed.stats, find_experts(model.model, visit.part.name)
    harms: dict[Target, dict[int, float]] = {target: {} for target in free}
    some = {target.name: _of_rows(stats[target.name], target) for target in free}
    for number, change in enumerate(dial.changes):
        own = dial.plan.of(visit.part)
        methods = {t: replace(own[t], **change) for t in free if number in dial.sizes[t]}
        rows = {t: _rows(method, t) for t, method in methods.items()}
        known = {t.name: (some if rows[t] is not None else stats)[t.name] for t in methods}
        weight = partial(_weight, model, rows)
        tasks = block_tasks(methods, dict(known), experts, weight=weight, seed=dial.plan.options.seed)
        calls = [executor.submit(solve_task, task) for task in tasks]
        solved = {name: weight for call in calls for name, weight in call.result().items()}
        for target in methods:
            error = solved[target.name].dense() - weight(target)
            harms[target][number] = _harm(error, known[target.name], tokens)
    return harms


def _harm(error: Float[Tensor, "out in"], stats: InputStats, tokens: int) -> float:
    """Of a layer with an error in its weight, by the second order; some of its rows stand for all.

    Tokens that are not routed to an expert are none of its harm.
    """
    if stats.output_weights is not None:
        error = error * stats.output_weights.to(error.device).sqrt().unsqueeze(1)
    energy = float(output_energy(error, stats.hessian))
    return stats.sensitivity * energy / (2 * len(error)) * min(1.0, stats.load / tokens)


def _rows(method: Method, target: Target) -> Tensor | None:
    """Some rows of a layer, evenly spread; None for all, where a part of the method is fitted to all together."""
    out, in_ = target.out_features, target.in_features
    if out <= _ROWS or method.largest(out, in_).rank:
        return None
    try:
        method.largest(_ROWS, in_)
    except ValueError:
        return None
    return _spread(out)


def _spread(out: int) -> Tensor:
    return torch.arange(_ROWS) * out // _ROWS


def _of_rows(stats: InputStats, target: Target) -> InputStats:
    """The statistics of a layer of which some rows are left."""
    if stats.output_weights is None or target.out_features <= _ROWS:
        return stats
    return stats.of_outputs(_spread(target.out_features))


def _weight(model: StreamedModel, rows: Mapping[Target, Tensor | None], target: Target) -> Float[Tensor, "rows in"]:
    weight, index = model.resident_weight(target), rows[target]
    return (weight if index is None else weight[index.to(weight.device)]).contiguous()
