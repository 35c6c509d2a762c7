"""Which layers are solved in one call."""

from collections.abc import Iterator, Mapping
from typing import Any

from lorq.core.stats import InputStats
from lorq.core.tile_factors import TileFormat
from lorq.methods import Method
from lorq.models.blocks import Target
from lorq.models.experts import expert_name


def expert_groups(plan: Mapping[Target, Method], modules: Mapping[str, Any]) -> list[dict[str, list[Target]]]:
    """The experts that methods of scope "experts" solve together: targets by projection, in the experts' order.

    Gate and up projections read the same inputs and make one group, unless their settings differ; the down projections
    make another.

    Raises:
        ValueError: if some experts of a projection are left out, or have other settings than the rest.
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
            method: Any = plan[first]
            yield targets, method.largest_experts(first.out_features, first.in_features, len(targets))[1]


def _together(plan: Mapping[Target, Method], stats: Mapping[str, InputStats]) -> list[list[Target]]:
    """Layers that are solved in one call: those with one input and one method, or each for itself."""
    groups: dict[Any, list[Target]] = {}
    for target, method in plan.items():
        own = stats.get(target.name)
        alone = method.scope == "layer" or own is None
        groups.setdefault(target.name if alone else (id(own), method), []).append(target)
    return list(groups.values())
