"""Solve one block: which layers a method takes in one call, with which statistics and which randomness."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lorq.core.descent import BlockProblem
from lorq.core.problem import layer_generator
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
    device: torch.device,
) -> dict[Target, QuantizedWeight]:
    """Quantize the layers of one block.

    Args:
        plan: the layers and their methods.
        stats: by layer name; layers that read one input share one object. Emptied as layers are solved, since
            what is derived from statistics is large.
        modules: the block's experts modules by name.
        weight: reads a layer's weight, (out, in), float32, on ``device``.
        seed: of the run.
        device: where the work is done.
    """
    solved: dict[Target, QuantizedWeight] = {}
    for group in expert_groups(plan, modules):
        solved |= _solve_experts(plan, group, stats, weight=weight, seed=seed, device=device)
    for targets in _together({t: m for t, m in plan.items() if t not in solved}, stats):
        method: Any = plan[targets[0]]
        own = [stats.pop(target.name, None) for target in targets].pop()
        generators = [layer_generator(seed, target.name, device) for target in targets]
        weights = [weight(target) for target in targets]
        with _Note(", ".join(target.name for target in targets)):
            if method.scope == "layer":
                results = [method.solve(weights[0], own, generator=generators[0])]
            else:
                results = method.solve_together(weights, own, generators=generators)
        solved |= dict(zip(targets, results, strict=True))
    for target, result in solved.items():
        with _Note(target.name):
            check_finite(result)
    return {target: solved[target] for target in plan}


def solve_whole_block(
    plan: Mapping[Target, Method], problem: BlockProblem, *, seed: int, device: torch.device
) -> dict[Target, QuantizedWeight]:
    """Quantize the layers of one block by a method of scope "block", all in one call."""
    method: Any = next(iter(plan.values()))
    names = [target.name for target in plan]
    with _Note(f"{names[0]} and the other layers of its block"):
        results = method.solve_block(
            problem,
            methods={target.name: m for target, m in plan.items()},
            generators={name: layer_generator(seed, name, device) for name in names},
        )
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
    device: torch.device,
) -> dict[Target, QuantizedWeight]:
    """The experts of the projections that read the same inputs."""
    projections = list(group.values())
    method: Any = plan[projections[0][0]]
    known = [stats[target.name] for target in projections[0]]
    with _Note(f"{projections[0][0].name} and the other experts"):
        results = method.solve_experts(
            [[weight(target) for target in targets] for targets in projections],
            known,
            common_input="down_proj" not in group,
            generators=[[layer_generator(seed, t.name, device) for t in targets] for targets in projections],
        )
    for targets in projections:
        for target in targets:
            stats.pop(target.name)
    pairs = zip(projections, results, strict=True)
    return {t: w for targets, weights in pairs for t, w in zip(targets, weights, strict=True)}


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
    parts = [] if weight.scale is None else [weight.scale]
    if weight.scale_factors is not None:
        parts += [weight.scale_factors.left, weight.scale_factors.right]
    if weight.activations.scale is not None:
        parts.append(weight.activations.scale)
    if weight.low_rank is not None:
        parts += weight.low_rank.factors()
    if weight.codebook is not None:
        parts.append(weight.codebook.scale)
    if weight.tile is not None:
        factors = weight.tile.factors
        parts += [factors.lefts(), factors.rights(), *([] if factors.input_scale is None else [factors.input_scale])]
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise ArithmeticError("scales and factors must be finite, got NaN or infinite values; raise the damping")
