"""What a run of a model will take that is too large to try here: from its shapes, and what small layers take."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from lorq.core.problem import Problem
from lorq.core.stats import StatsAccumulator
from lorq.methods import Method
from lorq.models.blocks import Part, StreamedModel, Target
from lorq.models.experts import expert_name, find_experts
from lorq.pipeline.forecast import SPARE, WRITTEN, Forecast, bytes_kept, bytes_read, passes, weights_of
from lorq.pipeline.plan import Plan
from lorq.pipeline.tasks import Task, solve_task
from lorq.runtime.device import memory_now

# Two layers of as many weights, (out, in), tell what weights take and what inputs; and the tokens they are given.
_SMALL, _TOKENS = ((1024, 512), (512, 1024)), 512
# Copies of a layer's weight, and of its Hessian with factors, that solving it has at its peak.
_COPIES = 4


def forecast_by_shapes(model: StreamedModel, plan: Plan, windows: tuple[int, int] | None, written: int) -> Forecast:
    """As `lorq.pipeline.forecast.forecast`, of nothing but shapes: no weight is read or made.

    With ``w`` weights and ``n`` inputs of a layer, solving takes ``a w + b n^3`` seconds, and a token ``c w + d n^2``:
    ``a`` to ``d`` are what `_SMALL` layers take here. Memory is a block in float32, its Hessians, four copies of
    the largest layer with its Hessian, and what is kept of the windows.

    Args:
        windows: how many of the calibration, and of how many tokens; None where nothing looks at inputs.
        written: the size of the result at most.
    """
    part = max(model.blocks, key=lambda part: weights_of(plan, part))
    seconds: dict[str, float] = {}
    if windows is not None:
        a_weight, a_square = _token_seconds()
        work = sum(_a_token(model, plan, block, a_weight, a_square) for block in model.blocks)
        seconds["calibration"] = windows[0] * windows[1] * work * passes(plan)
    if not plan.blockwise:
        per_weight, per_cube = _solving_seconds(plan.method)
        seconds["solving"] = sum(
            per_weight * t.out_features * t.in_features + per_cube * t.in_features**3 * method.needs_stats
            for t, method in plan.jobs()
        )
    kept = bytes_kept(plan, model, windows)
    spilled = kept if kept > plan.options.spill_bytes else 0
    largest = max(plan.of(part), key=_working_bytes)
    block = 4 * sum(p.numel() for p in model.model.get_submodule(part.name).parameters())
    block += sum(4 * width * width for width in _inputs(model, plan, part))
    block += WRITTEN * written * weights_of(plan, part) // max(1, sum(weights_of(plan, p) for p in model.blocks))
    memory = memory_now() + block + _COPIES * _working_bytes(largest) + kept - spilled
    layers = " and ".join(f"{out} x {in_}" for out, in_ in _SMALL)
    return Forecast(
        len(model.blocks), bytes_read(plan, model, written), kept, spilled, written, int(memory * SPARE), seconds,
        ("shapes", f"layers of {layers}"),
    )  # fmt: skip


def _working_bytes(target: Target) -> int:
    return 4 * (target.out_features * target.in_features + target.in_features**2)


def _inputs(model: StreamedModel, plan: Plan, part: Part) -> list[int]:
    """Widths of the inputs that have statistics, those of layers with one input counted once where names tell."""
    experts = find_experts(model.model, part.name)
    found: dict[tuple[str, int], int] = {}
    for target, method in plan.of(part).items():
        if plan.observes(method):
            place = expert_name(target.name, experts)
            parent, _, name = target.name.rpartition(".")
            last = name in ("o_proj", "out_proj", "dense")  # behind the attention, as wide as what is before it
            key = f"{place.module}.{place.expert}" if place else target.name if last else parent
            found[key, target.in_features] = target.in_features
    return list(found.values())


def _a_token(model: StreamedModel, plan: Plan, part: Part, a_weight: float, a_square: float) -> float:
    """Seconds of a token in a block; of experts, in those that it is routed to."""
    config = model.model.config.get_text_config()
    experts = find_experts(model.model, part.name)
    routed = {t for t in plan.of(part) if expert_name(t.name, experts) is not None}
    count = max((len(module) for module in experts.values()), default=1)
    share = getattr(config, "num_experts_per_tok", count) / count
    weights = sum(t.out_features * t.in_features * (share if t in routed else 1) for t in plan.of(part))
    squares = sum(width * width for width in _inputs(model, plan, part)) * (share if routed else 1)
    return a_weight * weights + a_square * squares


def _timed(run: Callable[[], object]) -> float:
    run()
    began = time.monotonic()
    run()
    return time.monotonic() - began


def _token_seconds() -> tuple[float, float]:
    """Of a token: a weight's multiplication, and an entry of the statistics."""
    out, in_ = _SMALL[0]
    weight, x = torch.randn(out, in_), torch.randn(_TOKENS, in_)
    return (
        _timed(lambda: x @ weight.T) / (_TOKENS * out * in_),
        _timed(lambda: StatsAccumulator(in_).add(x)) / (_TOKENS * in_ * in_),
    )


def _solving_seconds(method: Method) -> tuple[float, float]:
    """``a`` and ``b``; a method whose groups do not divide the small layers has one group per row there."""
    times = []
    for out, in_ in _SMALL:
        accumulator = StatsAccumulator(in_)
        accumulator.add(torch.randn(4 * in_, in_))
        fits = method.group_size == -1 or in_ % method.group_size == 0
        own = method if fits else replace(method, group_size=-1)  # type: ignore[type-var]
        task = Task(own, Problem({"layer": torch.randn(out, in_)}, {"layer": accumulator.finish()}, 0))
        times.append(_timed(lambda task=task: solve_task(task)))  # type: ignore[misc]
    (out, narrow), (_, wide) = _SMALL
    per_cube = max(0.0, times[1] - times[0]) / (wide**3 - narrow**3)
    return max(0.0, times[0] - per_cube * narrow**3) / (out * narrow), per_cube
