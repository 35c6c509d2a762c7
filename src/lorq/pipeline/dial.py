"""The dial: one budget for the whole model, and the settings that layers can be given to meet it."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from lorq.core.knapsack import Candidate, choose
from lorq.methods import Method, choices_of
from lorq.models.blocks import StreamedModel, Target
from lorq.pipeline.options import read_size
from lorq.pipeline.plan import Plan, estimate, some

# A safetensors header takes so much of a tensor beside its name, and of a file beside its tensors.
_ENTRY_BYTES, _FILE_BYTES = 96, 64


@dataclass(frozen=True)
class Choice:
    """What was chosen to meet a budget.

    Attributes:
        settings: by layer, in place of the method's own.
        harm: predicted divergence of the quantized model from the original, in nats a token.
        curve: bits a weight of all quantized layers and predicted harm, of the best choices from the smallest on.
    """

    settings: dict[str, dict[str, Any]]
    harm: float
    curve: list[list[float]]


@dataclass(frozen=True)
class Dial:
    """What can be chosen for a plan's layers, known from names and shapes alone.

    Attributes:
        changes: settings that a layer can be given in the place of the method's own.
        sizes: of each layer that is not overridden, in the order of the model: stored bits by the number of the change,
            for those that fit the layer.
        budget: stored bits that these layers can take together.
        fixed: stored bits of the layers that are overridden, and of tables.
    """

    plan: Plan
    changes: tuple[dict[str, Any], ...]
    sizes: Mapping[Target, Mapping[int, int]]
    budget: int
    fixed: int

    @classmethod
    def open(cls, plan: Plan, model: StreamedModel) -> "Dial":
        """The dial of a plan that has a budget.

        Raises:
            ValueError: if no choice meets the budget, with the nearest that one does; if a layer has no choice; if
                the method says the bits too.
        """
        bits, own = plan.method.bits, type(plan.method)().bits
        if bits != own:
            raise ValueError(
                f"a budget chooses each layer's bits, got bits {bits} too; leave bits at {own}, or choose from widths, "
                f"such as widths {bits}, or --override some layers"
            )
        overridden = [re.compile(text.rpartition(":")[0]) for text in plan.options.override]
        sizes: dict[Target, dict[int, int]] = {
            target: {} for layers in plan.blocks.values() for target in layers
            if not any(p.search(target.name) for p in overridden)
        }  # fmt: skip
        if not sizes:
            raise ValueError("a budget needs layers that it can choose for, got 0: all are overridden")
        if plan.options.widths and "bits" not in choices_of(plan.method):
            known = ", ".join(choices_of(plan.method))
            raise ValueError(
                f"widths are those of integer codes, {plan.name} as it is chooses {known}; leave --widths away"
            )
        options = {**choices_of(plan.method)} | ({"bits": plan.options.widths} if plan.options.widths else {})
        changes = tuple(dict(zip(options, values, strict=True)) for values in product(*options.values()))
        for number, change in enumerate(changes):
            for target, bits in _sizes_with(change, plan, model, sizes).items():
                sizes[target][number] = bits
        if lacking := [target.name for target, own in sizes.items() if not own]:
            known = ", ".join(f"{name} {' '.join(map(str, values))}" for name, values in options.items())
            raise ValueError(
                f"a budget needs settings that fit every layer, none of {known} fits {some(lacking)}; take other "
                "widths or another group_size, or --exclude those layers"
            )
        fixed = sum(_stored(plan, target, bytes_) for target, bytes_ in _bytes_of(plan, model) if target not in sizes)
        dial = cls(plan, changes, sizes, 0, fixed)
        return replace(dial, budget=dial._asked(model) - fixed)

    @property
    def weights(self) -> int:
        """Of all quantized layers."""
        return sum(target.out_features * target.in_features for target, _ in self.plan.jobs())

    def _asked(self, model: StreamedModel) -> int:
        """The budget of all quantized layers, in bits; a ValueError where nothing meets it."""
        options = self.plan.options
        least, most = (self.fixed + sum(end(own.values()) for own in self.sizes.values()) for end in (min, max))
        if options.size:
            name, got, unit, each, digits = "size", options.size, " MB", 8_000_000, 4
            beside, asked = _beside(self.plan, model), 8 * read_size(options.size)
        else:
            name, got, unit, each, digits = "bits_per_weight", f"{options.bits_per_weight}", "", self.weights, 3
            beside, asked = 0, math.floor(options.bits_per_weight * self.weights)
        for end, bits, rule, rounded in ((-1, least, "at least", math.ceil), (1, most, "at most", math.floor)):
            if end * (asked - beside - bits) > 0:
                near = rounded((bits + beside) / each * 10**digits) / 10**digits
                raise ValueError(
                    f"{name} must be {rule} {near}{unit} with {self.plan.name} and this model, got {got}; ask for "
                    f"that, or change group_size or method"
                )
        return asked - beside

    def level(self) -> Plan:
        """The plan with nearly as many bits everywhere: for checks that come before harm is known."""
        items = []
        for target, own in self.sizes.items():
            size = target.out_features * target.in_features
            items.append([Candidate(bits, size * 4.0 ** -(bits / size)) for bits in own.values()])
        chosen = zip(self.sizes.items(), choose(items, self.budget), strict=True)
        return self._with({target.name: self.changes[list(own)[i]] for (target, own), i in chosen})

    def met(self, choice: Choice) -> Plan:
        """The plan with what was chosen."""
        return replace(self._with(choice.settings), budget=asdict(choice))

    def _with(self, settings: Mapping[str, Mapping[str, Any]]) -> Plan:
        layers = {
            part: {t: replace(method, **settings.get(t.name, {})) for t, method in own.items()}
            for part, own in self.plan.layers.items()
        }
        return replace(self.plan, layers=layers)


def levelled(plan: Plan, model: StreamedModel) -> Plan:
    """`Dial.level`, where there is a budget."""
    return Dial.open(plan, model).level() if plan.options.has_budget else plan


def _sizes_with(
    change: Mapping[str, Any], plan: Plan, model: StreamedModel, free: Mapping[Target, Any]
) -> dict[Target, int]:
    """Stored bits of the free layers with a change, where it fits."""

    @cache  # there are thousands of experts and a few shapes
    def changed_for(method: Method, out: int, in_: int) -> Method | None:
        try:
            other = replace(method, **change)
            other.largest(out, in_)
        except ValueError:
            return None
        return other

    jobs: Iterable[tuple[Target, Any]] = plan.jobs()
    found = {t: changed_for(method, t.out_features, t.in_features) for t, method in jobs if t in free}
    fit = {target: method for target, method in found.items() if method is not None}
    layers = {part: {t: fit.get(t, method) for t, method in own.items()} for part, own in plan.layers.items()}
    changed = replace(plan, layers=layers)
    return {t: _stored(changed, t, bytes_) for t, bytes_ in _bytes_of(changed, model) if t in fit}


def _bytes_of(plan: Plan, model: StreamedModel) -> list[tuple[Target, int]]:
    """The largest bytes of every quantized layer."""
    return [(t, layer.bytes) for (t, _), layer in zip(plan.jobs(), estimate(plan, model).layers, strict=True)]


def _stored(plan: Plan, target: Target, bytes_: int) -> int:
    """Bits of a layer; where the size of files is asked for, with what their headers say of its tensors."""
    if not plan.options.size:
        return 8 * bytes_
    method = next(own[target] for own in plan.layers.values() if target in own)
    local = method.largest(target.out_features, target.in_features).layout(target.out_features, target.in_features)
    return 8 * (bytes_ + sum(len(target.name) + 1 + len(name) + _ENTRY_BYTES for name in local))


def _beside(plan: Plan, model: StreamedModel) -> int:
    """Bits of the weight files beside the quantized layers."""
    whole, kept = estimate(plan, model), plan.kept(*model.parts)
    tensors = whole.bytes - sum(layer.bytes for layer in whole.layers)
    headers = sum(len(name) + _ENTRY_BYTES for name in kept) + _FILE_BYTES * len(model.parts)
    return 8 * (tensors + headers)
