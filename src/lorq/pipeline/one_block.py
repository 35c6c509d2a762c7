"""Solve one block: which layers a method takes in one call, with which statistics and which randomness."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lorq.core.problem import Problem
from lorq.core.stats import InputStats
from lorq.core.weight import QuantizedWeight
from lorq.methods import Method
from lorq.models.blocks import Target
from lorq.pipeline.together import _together, expert_groups


def solve_block(
    plan: Mapping[Target, Method],
    stats: dict[str, InputStats],
    modules: Mapping[str, Any],
    *,
    weight: Callable[[Target], Tensor],
    seed: int,
) -> dict[Target, QuantizedWeight]:
    """Quantize the layers of one block.

    Args:
        plan: the layers and their methods.
        stats: by layer name; layers that read one input share one object. Emptied as layers are solved, since
            what is derived from statistics is large.
        modules: the block's experts modules by name.
        weight: reads a layer's weight, (out, in), float32, on the device where the work is done.
        seed: of the run.
    """
    solved: dict[Target, QuantizedWeight] = {}
    for group in expert_groups(plan, modules):
        solved |= _solve_experts(plan, group, stats, weight=weight, seed=seed)
    for targets in _together({t: m for t, m in plan.items() if t not in solved}, stats):
        method: Any = plan[targets[0]]
        own = [stats.pop(target.name, None) for target in targets].pop()
        weights = {target.name: weight(target) for target in targets}
        with _Note(", ".join(weights)):
            results = method.solve(Problem(weights, {} if own is None else dict.fromkeys(weights, own), seed))
        solved |= {target: results[target.name] for target in targets}
    for target, result in solved.items():
        with _Note(target.name):
            check_finite(result)
    return {target: solved[target] for target in plan}


def solve_whole_block(plan: Mapping[Target, Method], problem: Problem) -> dict[Target, QuantizedWeight]:
    """Quantize the layers of one block by a method of scope "block", all in one call."""
    method: Any = next(iter(plan.values()))
    with _Note(f"{next(iter(problem.weights))} and the other layers of its block"):
        results = method.solve(problem)
    for name, result in results.items():
        with _Note(name):
            check_finite(result)
    return {target: results[target.name] for target in plan}


def _solve_experts(
    plan: Mapping[Target, Method],
    group: dict[str, list[Target]],
    stats: dict[str, InputStats],
    *,
    weight: Callable[[Target], Tensor],
    seed: int,
) -> dict[Target, QuantizedWeight]:
    """The experts of the projections that read the same inputs."""
    projections = list(group.values())
    method: Any = plan[projections[0][0]]
    experts = [target for targets in projections for target in targets]
    problem = Problem(
        {target.name: weight(target) for target in experts},
        {target.name: stats.pop(target.name) for target in experts},
        seed,
        projections=tuple(tuple(target.name for target in targets) for targets in projections),
        common_input="down_proj" not in group,
    )
    with _Note(f"{experts[0].name} and the other experts"):
        results = method.solve(problem)
    return {target: results[target.name] for target in experts}


class _Note:
    """Say on an error which layer it was."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | ArithmeticError | RuntimeError):
            error.add_note(f"while solving {self.name}")


def check_finite(weight: QuantizedWeight) -> None:
    """Nothing that is not a number is ever written.

    Raises:
        ArithmeticError: if a stored part is not finite.
    """
    parts = [*weight.tensors().values(), *(weight.tile.factors.tensors().values() if weight.tile else ())]
    if not all(bool(torch.isfinite(part.float()).all()) for part in parts if part.is_floating_point()):
        raise ArithmeticError("scales and factors must be finite, got NaN or infinite values; raise the damping")
