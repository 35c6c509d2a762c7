"""What is solved in one call: tasks, which are made where the model is and solved anywhere."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

import lorq.kernels  # noqa: F401  processes that solve import nothing else: without it they round by the references
from lorq.core.checks import all_finite
from lorq.core.problem import BlockOutput, Problem
from lorq.core.rounding import nearest
from lorq.core.stats import InputStats
from lorq.core.tile_factors import TileFormat
from lorq.core.weight import QuantizedWeight
from lorq.methods import Method, SharesFactors
from lorq.methods.common import assemble
from lorq.models.blocks import Target
from lorq.models.experts import expert_name

# By how much an error must exceed another to be called worse; less is rounding.
_WORSE = 1.001


@dataclass(frozen=True)
class Task:
    """One call of a method. Can be pickled, but where the problem has a block: that runs in the model, which stays."""

    method: Method
    problem: Problem

    @property
    def title(self) -> str:
        """The layers, as an error names them."""
        names = list(self.problem.weights)
        if self.problem.block is not None:
            return f"{names[0]} and the other layers of its block"
        return f"{names[0]} and the other experts" if self.problem.projections else ", ".join(names)


def solve_task(task: Task) -> dict[str, QuantizedWeight]:
    """The quantized weights of a task, by layer; of nothing but the task. All finite, or an ArithmeticError.

    Layers whose inputs are always zero, but for experts that share factors, are rounded to nearest. Their records have
    a note, and so have those of layers that came out worse than by that.
    """
    with _note(task.title):
        solved = _without_inputs(task)
        stats = task.problem.stats
        weights = {
            name: stats[name].corrected(weight) if name in stats else weight
            for name, weight in task.problem.weights.items()
            if name not in solved
        }
        if weights:
            solved |= task.method.solve(replace(task.problem, weights=weights))
    for name, weight in solved.items():
        with _note(name):
            check_finite(weight)
    # What is fitted to a block's output may lose by the measure of a layer.
    return solved if task.problem.block is not None else {name: _judged(weight) for name, weight in solved.items()}


def _without_inputs(task: Task) -> dict[str, QuantizedWeight]:
    """The layers whose inputs tell nothing, rounded to nearest."""
    solved, problem = {}, task.problem
    for name, weight in problem.weights.items():
        stats = problem.stats.get(name)
        if task.method.needs_stats and not problem.projections and stats is not None and stats.empty:
            plain = nearest(weight, None, task.method.largest(*weight.shape).codes.plain(weight.shape[1]))
            note = "its inputs are zero on every calibration token: rounded to nearest"
            solved[name] = assemble(weight, plain, None, stop="none", stats=stats, note=note)
    return solved


def _judged(weight: QuantizedWeight) -> QuantizedWeight:
    """With a note where the layer is worse than rounded to nearest in as many bits, in the measure of its report."""
    record = weight.record
    if not record.error_after > record.error_before * _WORSE:
        return weight
    note = f"worse than rounded to nearest: output error {record.error_after:.3g}, not {record.error_before:.3g}"
    return replace(weight, record=replace(record, note="; ".join(filter(None, (record.note, note)))))


def block_tasks(
    plan: Mapping[Target, Method],
    stats: dict[str, InputStats],
    modules: Mapping[str, Any],
    *,
    weight: Callable[[Target], Tensor],
    seed: int,
    block: BlockOutput | None = None,
) -> Iterator[Task]:
    """The tasks of a block's layers, each made when it is asked for.

    Args:
        plan: the layers and their methods.
        stats: by layer name; layers that read one input share one object, or the input's name. Emptied as tasks are
            made, since what is derived from statistics is large.
        modules: the block's experts modules by name.
        weight: a layer's weight, (out, in), float32, on the device where the work is done.
        block: what methods of scope "block" fit, all layers in one task.
    """

    def task(targets: list[Target], **others: Any) -> Task:
        weights = {target.name: weight(target) for target in targets}
        known = {name: stats.pop(name) for name in weights if name in stats}
        return Task(plan[targets[0]], Problem(weights, known, seed, **others))

    if block is not None:
        if plan:
            yield task(list(plan), methods={target.name: method for target, method in plan.items()}, block=block)
        return
    experts: set[Target] = set()
    for group in expert_groups(plan, modules):
        targets = [target for projection in group.values() for target in projection]
        experts.update(targets)
        names = tuple(tuple(target.name for target in projection) for projection in group.values())
        yield task(targets, projections=names, common_input="down_proj" not in group)
    together: dict[Any, list[Target]] = {}  # layers with one input and one method, or each for itself
    for target, method in plan.items():
        own = stats.get(target.name)
        key = target.name if method.scope == "layer" or own is None else (own.input or id(own), method)
        if target not in experts:
            together.setdefault(key, []).append(target)
    for targets in together.values():
        yield task(targets)


def expert_groups(plan: Mapping[Target, Method], modules: Mapping[str, Any]) -> list[dict[str, list[Target]]]:
    """The experts that methods of scope "experts" solve together: targets by projection, in the experts' order.

    Gate and up projections read the same inputs and make one group, unless their settings differ; the down projections
    make another. A ValueError if some experts of a projection are left out, or have other settings than the rest.
    """
    found: dict[tuple[str, str], list[Target]] = {}
    for target, method in plan.items():
        place = expert_name(target.name, modules)
        if place is not None and method.scope == "experts":
            found.setdefault((place.module, place.projection), []).append(target)
    groups: dict[Any, dict[str, list[Target]]] = {}
    for (module, projection), targets in found.items():
        methods = {plan[target] for target in targets}
        if len(targets) != len(modules[module]) or len(methods) > 1:
            raise ValueError(
                f"experts that share factors must be quantized together with the same settings, got "
                f"{len(targets)} of {len(modules[module])} experts with {len(methods)} settings "
                f"for {projection} of {module}; --exclude or --override all of them or none"
            )
        groups.setdefault((module, projection == "down_proj", *methods), {})[projection] = targets
    return list(groups.values())


def expert_formats(
    plan: Mapping[Target, Method], modules: Mapping[str, Any]
) -> Iterator[tuple[list[Target], TileFormat]]:
    """The largest tile factors of each projection that experts share."""
    for group in expert_groups(plan, modules):
        for targets in group.values():
            first = targets[0]
            method = plan[first]
            assert isinstance(method, SharesFactors)
            yield targets, method.largest_experts(first.out_features, first.in_features, len(targets))[1]


@contextmanager
def _note(name: str) -> Iterator[None]:
    """Say on an error which layer it was."""
    try:
        yield
    except (ValueError, ArithmeticError, RuntimeError) as error:
        error.add_note(f"while solving {name}")
        raise


def check_finite(weight: QuantizedWeight) -> None:
    """Nothing that is not a number is ever written: an ArithmeticError instead."""
    parts = [*weight.tensors().values(), *(weight.tile.factors.tensors().values() if weight.tile else ())]
    if not all(all_finite(part.float()) for part in parts if part.is_floating_point()):
        raise ArithmeticError("scales and factors must be finite, got NaN or infinite values; raise the damping")
