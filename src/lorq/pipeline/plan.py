"""Plan: which layer is quantized how; and every refusal before the work starts."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, get_type_hints

from lorq.core.tile_factors import TileFormat
from lorq.core.weight import layer_bytes
from lorq.methods import Method
from lorq.models.blocks import Part, StreamedModel, Target
from lorq.models.experts import find_experts, routing_layers
from lorq.models.skeleton import find_tied, kept_modules
from lorq.pipeline.dense_activations import KEYS_AND_VALUES
from lorq.pipeline.options import Options, method_name, read_method, read_options
from lorq.pipeline.tables import table_methods
from lorq.pipeline.tasks import expert_formats
from lorq.storage.report import LayerReport, Report

# The parts that are no blocks.
OUTSIDE = ("embeddings", "head")


@dataclass(frozen=True)
class Plan:
    """What a run will do: a value that can be printed, stored and compared.

    Attributes:
        layers: by part, the layers that are quantized and their methods; ``method`` is the one before overrides.
        excluded: why a layer is left as it is, by name.
        budget: what was chosen to meet one and why, as JSON values (`lorq.pipeline.dial.Choice`); else nothing.
    """

    layers: Mapping[str, Mapping[Target, Method]]
    excluded: Mapping[str, str]
    method: Method
    options: Options
    budget: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The method's."""
        return method_name(self.method)

    @property
    def settings(self) -> dict[str, Any]:
        """The method's, as JSON values."""
        return asdict(self.method)

    @property
    def blockwise(self) -> bool:
        """The method fits a whole block to the original block's output."""
        return self.method.scope == "block"

    @property
    def stream(self) -> str:
        """Whose outputs the next block is calibrated on."""
        chosen = self.options.stream
        return chosen if chosen != "auto" else "quantized" if self.blockwise else "original"

    @property
    def tables(self) -> dict[Target, Method]:
        """The table of tokens and the head, as far as they are quantized."""
        return {t: method for part in OUTSIDE for t, method in self.layers.get(part, {}).items()}

    @property
    def blocks(self) -> dict[str, Mapping[Target, Method]]:
        """The layers of the blocks."""
        return {part: layers for part, layers in self.layers.items() if part not in OUTSIDE}

    def jobs(self) -> Iterator[tuple[Target, Method]]:
        for layers in self.layers.values():
            yield from layers.items()

    def of(self, part: Part) -> Mapping[Target, Method]:
        """The part's layers that are quantized."""
        return self.layers.get(part.name, {})

    def kept(self, *parts: Part) -> list[str]:
        """The tensors of parts that are stored as they are."""
        quantized = {target.name + ".weight" for part in parts for target in self.of(part)}
        return [name for part in parts for name in part.tensors if name not in quantized]

    @property
    def observing(self) -> bool:
        """Whether inputs of any layer are; tables have statistics where the blocks' layers have some."""
        return any(self.observes(method) for layers in self.blocks.values() for method in layers.values())

    def observes(self, method: Method) -> bool:
        """Whether the inputs of a layer with this method are looked at."""
        options = self.options
        return method.needs_stats or options.has_budget or options.activations == "tensor" or options.smoothing > 0

    def as_dict(self) -> dict[str, Any]:
        """As JSON values; `from_dict` makes an equal plan of them."""
        return {
            "method": self.name,
            "settings": self.settings,
            "options": asdict(self.options),
            "layers": {
                part: [asdict(target) | self._changes(method) for target, method in layers.items()]
                for part, layers in self.layers.items()
            },
            "excluded": dict(self.excluded),
            "budget": dict(self.budget),
        }

    def _changes(self, method: Method) -> dict[str, Any]:
        """What of a layer's method is not the plan's."""
        if type(method) is not type(self.method):
            return {"method": method_name(method), "settings": asdict(method)}
        return {"settings": {key: v for key, v in vars(method).items() if v != self.settings[key]}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Plan":
        """The plan that `as_dict` has described.

        Raises:
            ValueError, TypeError: for names, settings and options that do not exist.
        """
        method = replace(read_method(values["method"]), **values["settings"])
        layers: dict[str, dict[Target, Method]] = {}
        for part, entries in values["layers"].items():
            layers[part] = {}
            for entry in entries:
                target = Target(**{key: value for key, value in entry.items() if key not in ("settings", "method")})
                own = read_method(entry["method"]) if "method" in entry else method
                layers[part][target] = replace(own, **entry["settings"])
        options = read_options(dict(values["options"]))
        return cls(layers, dict(values["excluded"]), method, options, dict(values["budget"]))


def make_plan(model: StreamedModel, method: Method, options: Options) -> Plan:
    """Which layer is quantized by which settings.

    Raises:
        ValueError: for patterns that are no regular expressions or match nothing, settings that do not exist or do not
            fit a layer, all at once, and for experts that cannot share factors as asked.
    """
    exclude = [_pattern(text, "exclude") for text in options.exclude]
    changes = [_override(text, method) for text in options.override]
    experts = find_experts(model.model)
    if method.scope == "experts" and not experts:
        raise ValueError(
            f"{type(method).__name__} shares factors between experts, {type(model.model).__name__} has none; "
            "use --method lopro"
        )
    selected, excluded = select(model, exclude)
    names = [target.name for targets in selected.values() for target in targets]
    unused = {("exclude", p.pattern) for p in exclude if f"excluded by {p.pattern}" not in excluded.values()}
    unused |= {("override", p.pattern) for p, _ in changes if not any(p.search(name) for name in names)}
    layers = {part: {t: choose(t, method, changes) for t in targets} for part, targets in selected.items()}
    plan = Plan(layers, excluded, method, options)
    tables, others = table_methods(model, method, options, calibrated=plan.observes(method))
    plan = replace(plan, layers=layers | tables, excluded=excluded | others)
    if options.stream == "corrected" and plan.blockwise:
        raise ValueError(
            f"stream 'corrected' is for methods that solve layer by layer, {plan.name} fits blocks to the original's "
            "output already; use stream quantized"
        )
    if unused:
        listed = ", ".join(f"{kind} {pattern!r}" for kind, pattern in sorted(unused))
        raise ValueError(f"patterns must match a layer that is not excluded, these match none: {listed}")
    refuse_unfit({t: own for layers in plan.blocks.values() for t, own in layers.items()})
    refuse_unfit(plan.tables, "other --embeddings, --head, --table-codebook or --table-group-size")
    if not names:
        raise ValueError("there must be at least one layer to quantize, got 0: everything is excluded")
    for own in layers.values():
        list(expert_formats(own, experts))  # refuses grids that are too small, and experts left out
    return plan


def select(model: StreamedModel, exclude: Iterable[re.Pattern[str]]) -> tuple[dict[str, list[Target]], dict[str, str]]:
    """The layers to quantize, by part, and the others' names, each with the reason."""
    routing = routing_layers(model.model)
    tied = find_tied(model.model)
    shared = {*tied, *tied.values()}
    selected: dict[str, list[Target]] = {}
    blocks = [part.name for part in model.blocks]
    inside = tuple(f"{block}." for block in blocks)
    excluded = {name: reason for name, reason in routing.items() if name.startswith(inside)}
    excluded |= kept_modules(model.model, blocks)
    for part in model.blocks:
        selected[part.name] = []
        for target in part.targets:
            hit = next((pattern.pattern for pattern in exclude if pattern.search(target.name)), None)
            if hit:
                excluded[target.name] = f"excluded by {hit}"
            elif target.name in routing:
                continue
            elif f"{target.name}.weight" in shared:
                excluded[target.name] = "shares its weight with another layer, kept as it is"
            else:
                selected[part.name].append(target)
    return selected, excluded


def choose(target: Target, method: Method, changes: Iterable[tuple[re.Pattern[str], dict[str, Any]]]) -> Method:
    """The method of one layer, with the settings that are overridden there."""
    chosen = method
    for pattern, change in changes:
        if pattern.search(target.name):
            chosen = replace(chosen, **change)
    _check_alike(chosen, method, target.name)
    return chosen


def refuse_unfit(layers: Mapping[Target, Method], remedy: str = "") -> None:
    """Refuse settings that do not fit their layers, with a ValueError for all at once, by what is wrong."""
    unfit: dict[str, list[str]] = {}
    for target, method in layers.items():
        try:
            method.largest(target.out_features, target.in_features)
        except ValueError as error:
            unfit.setdefault(str(error), []).append(target.name)
    if not unfit:
        return
    shown = "\n".join(f"  {some(names)}: {error}" for error, names in unfit.items())
    hint = ""
    if any(error.startswith("group_size") for error in unfit):
        widths = {target.in_features for target, method in layers.items() if method.group_size != -1}
        fits = [g for g in (256, 128, 96, 64, 48, 32, 16) if all(width % g == 0 for width in widths)]
        sizes = ", ".join(map(str, fits)) or "none"
        hint = f" (group sizes that divide all widths: {sizes}; -1 is one group per row)"
    rest = f"choose {remedy}{hint}" if remedy else f"choose others{hint}, or --override or --exclude those layers"
    raise ValueError(
        f"settings must fit the layers; they do not for {sum(map(len, unfit.values()))} of them:\n{shown}\n{rest}"
    )


def _check_alike(chosen: Method, method: Method, name: str) -> None:
    """What is solved together cannot differ from layer to layer."""
    for key in ("scope", *getattr(method, "block_settings", ())):
        if getattr(chosen, key) != getattr(method, key):
            raise ValueError(
                f"{key} serves a whole block and cannot differ from layer to layer, got {getattr(chosen, key)!r} for "
                f"{name} and {getattr(method, key)!r} for the rest; override other settings"
            )


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _pattern(text: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{what} must be a regular expression, got {text!r} ({error})") from None


def _override(text: str, method: Method) -> tuple[re.Pattern[str], dict[str, Any]]:
    """``REGEX:key=value`` as a pattern and a changed setting."""
    pattern, colon, change = text.rpartition(":")
    key, equals, value = change.partition("=")
    if not (colon and equals):
        raise ValueError(f"an override must read 'REGEX:key=value', got {text!r}")
    hints = {f.name: get_type_hints(type(method))[f.name] for f in fields(method)}
    if key not in hints:
        raise ValueError(f"{text!r} names an unknown setting {key!r}; known are {', '.join(hints)}")
    kind = hints[key] if hints[key] in (int, float, bool) else str
    try:
        parsed = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError):
        raise ValueError(f"{text!r}: {key} must be of type {kind.__name__}, got {value!r}") from None
    replace(method, **{key: parsed})  # the settings check themselves
    return _pattern(pattern, "override"), {key: parsed}


def check_activations(plan: Plan) -> None:
    """Refuse to round activations where that is not possible as asked, with a ValueError."""
    options = plan.options
    if options.activations != "none" and plan.method.scope == "experts":
        raise ValueError(
            f"activations must be none where experts share factors, got {options.activations!r} with {plan.name}; "
            "use --method lopro"
        )
    own = [job for layers in plan.blocks.values() for job in layers.items()]
    turned = [t.name for t, m in own if m.largest(t.out_features, t.in_features).has_basis]
    if options.activations == "tensor" and turned:
        raise ValueError(
            f"activations 'tensor' need inputs in the model's own channels, {plan.name} rotates those of "
            f"{some(turned)}; use activations token, or a method without rotation"
        )
    if options.kv_cache != "none":
        lacking = [
            part
            for part, layers in plan.blocks.items()
            if not all(any(t.name.endswith(kind) for t in layers) for kind in KEYS_AND_VALUES)
        ]
        if lacking:
            raise ValueError(
                f"kv_cache {options.kv_cache!r} needs quantized layers {' and '.join(KEYS_AND_VALUES)} in every block, "
                f"{some(lacking)} {'has' if len(lacking) == 1 else 'have'} none; leave kv_cache none"
            )


def estimate(plan: Plan, model: StreamedModel) -> Report:
    """The largest sizes that can come out, in the shape of a report; from headers alone."""
    layers = []
    tiles: dict[Target, TileFormat] = {}
    experts = find_experts(model.model)
    for own in plan.layers.values():
        for targets, tile in expert_formats(own, experts):
            tiles |= dict.fromkeys(targets, tile)
    for target, method in plan.jobs():
        shape = (target.out_features, target.in_features)
        format = method.largest(*shape)
        if target not in plan.tables:
            format = replace(format, input_quantization=plan.options.activations)
        shared = tiles.get(target)
        if shared is not None:
            format = replace(format, rank=0)
        bits = format.stored_bits(*shape) + (shared.share(*shape) if shared else 0)
        rank = shared.rank if shared else format.rank
        layers.append(LayerReport(target.name, shape, format.bits, rank, "largest", 0.0, 0.0, layer_bytes(bits)))
    stored = sum(layer.bytes for layer in layers) + sum(model.stored_bytes(name) for name in plan.kept(*model.parts))
    budget = {"budget": dict(plan.budget)} if plan.budget else {}
    return make_report(plan, model, layers, stored=stored, run_info=budget, checksums={})


def make_report(
    plan: Plan,
    model: StreamedModel,
    layers: list[LayerReport],
    *,
    stored: int,
    run_info: dict[str, Any],
    checksums: dict[str, str],
) -> Report:
    """The report of a plan that has been carried out, or will be, with ``stored`` bytes in all."""
    unused = {name: "in the checkpoint, but the architecture has no place for it" for name in model.unused_tensors}
    original = sum(model.stored_bytes(name) for part in model.parts for name in part.tensors)
    return Report(
        method=plan.name,
        settings=plan.settings,
        layers=tuple(layers),
        bytes=stored,
        kept=dict(plan.excluded) | unused,
        run=run_info | {"original_bytes": original},
        checksums=checksums,
    )
