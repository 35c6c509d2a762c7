"""What a run will do: its options, which layer is quantized how, and every refusal before the work starts."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch

from lorq.core.tile_factors import TileFormat
from lorq.core.weight import layer_bytes
from lorq.methods import Method
from lorq.models.blocks import StreamedModel, Target
from lorq.models.experts import find_experts, routing_layers
from lorq.pipeline.dense_activations import KEYS_AND_VALUES
from lorq.pipeline.options import Options
from lorq.pipeline.together import expert_formats
from lorq.progress import Progress
from lorq.storage.report import LayerReport, Report


@dataclass(frozen=True)
class Run:
    """What the stages of one run share."""

    model: StreamedModel
    folder: Path
    plan: dict[str, dict[Target, Method]]  # block -> layer -> method, quantized layers only
    excluded: dict[str, str]
    method: Method
    name: str
    options: Options
    progress: Progress

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
    def needs_ranges(self) -> bool:
        """Statistics are needed for the activations, whatever the method."""
        return self.options.activations == "tensor" or self.options.smoothing > 0

    def jobs(self) -> Iterator[tuple[Target, Method]]:
        for layers in self.plan.values():
            yield from layers.items()


def plan_layers(
    model: StreamedModel, method: Method, *, exclude: tuple[str, ...] = (), override: tuple[str, ...] = ()
) -> tuple[dict[str, dict[Target, Method]], dict[str, str]]:
    """Which layer is quantized by which settings: ``({block: {layer: method}}, {excluded layer: reason})``.

    Raises:
        ValueError: for patterns that are no regular expressions or match nothing, settings that do not exist,
            for settings that do not fit a layer, all at once, and for experts that cannot share factors as asked.
    """
    patterns = [_pattern(text, "exclude") for text in exclude]
    changes = [_override(text, method) for text in override]
    used: set[tuple[str, str]] = set()
    plan: dict[str, dict[Target, Method]] = {}
    excluded: dict[str, str] = {}
    unfit: dict[str, list[str]] = {}  # by what is wrong
    routing = routing_layers(model.model)
    if method.scope == "experts" and not find_experts(model.model):
        raise ValueError(
            f"{type(method).__name__} shares factors between experts, {type(model.model).__name__} has none; "
            "use --method lopro"
        )
    for block in model.blocks:
        plan[block] = {}
        for target in model.targets(block):
            hit = next((p for p in patterns if p.search(target.name)), None)
            if hit:
                used.add(("exclude", hit.pattern))
                excluded[target.name] = f"excluded by {hit.pattern}"
                continue
            if target.name in routing:
                excluded[target.name] = routing[target.name]
                continue
            chosen = method
            for pattern, change in changes:
                if pattern.search(target.name):
                    used.add(("override", pattern.pattern))
                    chosen = replace(chosen, **change)  # type: ignore[type-var]
            try:
                chosen.largest(target.out_features, target.in_features)
            except ValueError as error:
                unfit.setdefault(str(error), []).append(target.name)
            _check_alike(chosen, method, target.name)
            plan[block][target] = chosen
    given = {("exclude", p.pattern) for p in patterns} | {("override", p.pattern) for p, _ in changes}
    if given - used:
        names = ", ".join(f"{kind} {pattern!r}" for kind, pattern in sorted(given - used))
        raise ValueError(f"patterns must match a layer that is not excluded, these match none: {names}")
    if unfit:
        shown = "\n".join(f"  {_some(names)}: {error}" for error, names in unfit.items())
        widths = {t.in_features for layers in plan.values() for t, m in layers.items() if m.group_size != -1}
        hint = ""
        fits = [g for g in (256, 128, 96, 64, 48, 32, 16) if all(w % g == 0 for w in widths)]
        if any(error.startswith("group_size") for error in unfit):
            sizes = ", ".join(map(str, fits)) or "none"
            hint = f" (group sizes that divide all widths: {sizes}; -1 is one group per row)"
        raise ValueError(
            f"settings must fit the layers; they do not for {sum(map(len, unfit.values()))} of them:\n{shown}\n"
            f"choose others{hint}, or --override or --exclude those layers"
        )
    if not any(plan.values()):
        raise ValueError("there must be at least one layer to quantize, got 0: everything is excluded")
    _check_experts(model, plan)
    return plan, excluded


def _check_alike(chosen: Any, method: Any, name: str) -> None:
    """What is solved together cannot differ from layer to layer.

    Raises:
        ValueError: naming the setting, the layer and both values.
    """
    for key in ("scope", *getattr(method, "block_settings", ())):
        if getattr(chosen, key) != getattr(method, key):
            raise ValueError(
                f"{key} serves a whole block and cannot differ from layer to layer, got {getattr(chosen, key)!r} for "
                f"{name} and {getattr(method, key)!r} for the rest; override other settings"
            )


def _some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_experts(model: StreamedModel, plan: dict[str, dict[Target, Method]]) -> None:
    """Methods that solve experts together need all of them, and a grid with room."""
    modules = find_experts(model.model)
    for layers in plan.values():
        for _ in expert_formats(layers, modules):
            pass  # refuses grids that are too small, and experts left out


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
    hints = {f.name: get_type_hints(type(method))[f.name] for f in fields(method)}  # type: ignore[arg-type]
    if key not in hints:
        raise ValueError(f"{text!r} names an unknown setting {key!r}; known are {', '.join(hints)}")
    kind = hints[key] if hints[key] in (int, float, bool) else str
    try:
        parsed = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError):
        raise ValueError(f"{text!r}: {key} must be of type {kind.__name__}, got {value!r}") from None
    replace(method, **{key: parsed})  # type: ignore[type-var]  # the settings check themselves
    return _pattern(pattern, "override"), {key: parsed}


def check_activations(run: Run) -> None:
    """Refuse to round activations where that is not possible as asked.

    Raises:
        ValueError: naming the options and what does not fit.
    """
    options = run.options
    if options.activations != "none" and run.method.scope == "experts":
        raise ValueError(
            f"activations must be none where experts share factors, got {options.activations!r} with {run.name}; "
            "use --method lopro"
        )
    turned = [t.name for t, m in run.jobs() if m.largest(t.out_features, t.in_features).has_basis]
    if options.activations == "tensor" and turned:
        raise ValueError(
            f"activations 'tensor' need inputs in the model's own channels, {run.name} rotates those of "
            f"{_some(turned)}; use activations token, or a method without rotation"
        )
    if options.kv_cache != "none":
        lacking = [
            block
            for block, layers in run.plan.items()
            if not all(any(t.name.endswith(kind) for t in layers) for kind in KEYS_AND_VALUES)
        ]
        if lacking:
            raise ValueError(
                f"kv_cache {options.kv_cache!r} needs quantized layers {' and '.join(KEYS_AND_VALUES)} in every block, "
                f"{_some(lacking)} {'has' if len(lacking) == 1 else 'have'} none; leave kv_cache none"
            )


def check_weights(run: Run) -> None:
    """Refuse weights that are not finite numbers, all layers named at once."""
    jobs = list(run.jobs())
    bad = []
    for done, (target, _) in enumerate(jobs):
        weight = run.model.weight(target)
        if not weight.is_floating_point():
            raise ValueError(f"weights must be floating point, {target.name} is {weight.dtype}; give the original")
        wrong = int((~torch.isfinite(weight)).sum())
        if wrong:
            bad.append(f"{target.name} ({wrong} of {weight.numel()})")
        run.progress("check weights", done + 1, len(jobs))
    if bad:
        raise ValueError(
            f"weights must be finite, NaN or infinite values are in {', '.join(bad)}; "
            "--exclude them or repair the model"
        )


def estimate(run: Run) -> Report:
    """The largest sizes that can come out, in the shape of a report."""
    layers = []
    tiles: dict[Target, TileFormat] = {}
    for plan in run.plan.values():
        for targets, tile in expert_formats(plan, find_experts(run.model.model)):
            tiles |= dict.fromkeys(targets, tile)
    for target, method in run.jobs():
        shape = (target.out_features, target.in_features)
        format = replace(method.largest(*shape), input_quantization=run.options.activations)
        shared = tiles.get(target)
        if shared is not None:
            format = replace(format, rank=0)
        bits = format.stored_bits(*shape) + (shared.share(*shape) if shared else 0)
        rank = shared.rank if shared else format.rank
        layers.append(LayerReport(target.name, shape, format.bits, rank, "largest", 0.0, 0.0, layer_bytes(bits)))
    return make_report(run, layers, kept_bytes=kept_bytes(run), run_info={}, checksums={})


def kept_names(run: Run, block: str | None) -> list[str]:
    """What is copied: everything outside the blocks (None), or what a block has besides quantized weights."""
    if block is None:
        return run.model.names_outside()
    quantized = {target.name + ".weight" for target in run.plan[block]}
    return [name for name in run.model.names_under(block) if name not in quantized]


def kept_bytes(run: Run) -> int:
    total = 0
    for block in (None, *run.model.blocks):
        for name in kept_names(run, block):
            tensor = run.model.stored_tensor(name)
            total += tensor.numel() * tensor.element_size()
    return total


def make_report(
    run: Run, layers: list[LayerReport], *, kept_bytes: int, run_info: dict[str, Any], checksums: dict[str, str]
) -> Report:
    unused = {name: "in the checkpoint, but the architecture has no place for it" for name in run.model.unused_tensors}
    return Report(
        method=run.name,
        settings=asdict(run.method),  # type: ignore[call-overload]
        layers=tuple(layers),
        bytes=sum(layer.bytes for layer in layers) + kept_bytes,
        kept=run.excluded | unused,
        run=run_info,
        checksums=checksums,
    )
