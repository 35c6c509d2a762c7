"""Presets: methods with their settings, and options of a run, by what they cost."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from lorq.core.checks import check_name
from lorq.core.codes.gguf_blocks import TYPES
from lorq.methods import FLRQ, GPTQ, Method
from lorq.methods.common import preset as subclass
from lorq.models.blocks import StreamedModel
from lorq.pipeline.options import Options, method_name
from lorq.pipeline.plan import make_plan


@dataclass(frozen=True)
class Preset:
    """What stands in for the defaults of a method and of a run.

    Attributes:
        method: with its settings.
        options: those fields of `Options` that are others than their defaults.
    """

    method: Method
    options: dict[str, Any] = field(default_factory=dict)

    def flags(self) -> dict[str, str]:
        """The flags of `lorq quantize` that ask for the same, with their values."""
        changed = {key: value for key, value in vars(self.method).items() if value != getattr(type(self.method)(), key)}
        given = {"method": method_name(self.method)} | changed | self.options
        return {f"--{key.replace('_', '-')}": str(value) for key, value in given.items()}

    def as_defaults(self) -> tuple[Any, Options]:
        """Method and options whose classes have this preset's values as defaults, which is what help shows."""
        return _as_defaults(self.method), _as_defaults(replace(Options(), **self.options))


def _as_defaults(values: Any) -> Any:
    kind = type(values)
    changed = {f.name: getattr(values, f.name) for f in fields(kind) if getattr(values, f.name) != f.default}
    if not changed:
        return values
    made: Any = subclass(type(kind.__name__, (kind,), changed))
    return made()


# What each costs and reaches is in docs/results.md.
PRESETS: dict[str, Preset] = {
    "fast": Preset(FLRQ(codebook="trellis", window=10, budget=0.0, epochs=0)),
    "balanced": Preset(FLRQ(codebook="trellis", budget=0.0, epochs=0), {"token_weights": "gradient"}),
    "best": Preset(FLRQ(codebook="trellis", window=14, budget=0.0, epochs=0), {"token_weights": "gradient"}),
}
DEFAULT = "balanced"
# Options of the runs that papers describe, by method; what is given beside the method goes before them. Texts and
# numbers of windows are the run's own (FLRQ, LoPRo and TileQ have 128 x 2048 of WikiText-2), unless a paper needs more.
PAPERS: dict[str, dict[str, Any]] = {
    "lopro-paper": {"stream": "quantized", "token_weights": "plain"},
    "tileq-paper": {"stream": "quantized", "token_weights": "plain"},
    "lrq-paper": {"samples": 512, "seq_len": 1024},
}
# What stands for a preset where the output is a file for llama.cpp, whose grids hold no trellis; of the type see
# `with_type`.
TYPE: Final = "q4_k"
NARROW_TYPE: Final = "iq4_nl"
INTO_FILE = Preset(GPTQ(grid=TYPE), {"token_weights": "gradient"})


def knows_types(method: Method) -> bool:
    """Whether a method's grids, beside its other defaults, may be GGUF's types."""
    try:
        replace(type(method)(), grid=NARROW_TYPE)  # type: ignore[type-var]
    except (TypeError, ValueError):
        return False
    return True


def with_type(source: Path, method: Method, options: Options) -> tuple[Method, str]:
    """The method with a GGUF type, where none is asked for, and a line that tells which and why.

    It is `TYPE`, or `NARROW_TYPE`, of the same size, where a layer's width is no multiple of `TYPE`'s blocks.

    Raises:
        ValueError: as `lorq.pipeline.plan.make_plan` has it.
    """
    narrow, block = replace(method, grid=NARROW_TYPE), TYPES[TYPE].block  # type: ignore[type-var]
    plan = make_plan(StreamedModel.open(source, dequantize=True), narrow, options)
    own = [t for layers in plan.blocks.values() for t, chosen in layers.items() if chosen == narrow]
    unfit = [target for target in own if target.in_features % block]
    if not unfit:
        return replace(method, grid=TYPE), f"type {TYPE}: all widths are multiples of {block}"  # type: ignore[type-var]
    first = unfit[0]
    return narrow, (
        f"type {NARROW_TYPE}: {TYPE} needs widths that are multiples of {block}, which {len(unfit)} of {len(own)} "
        f"layers have not, {first.name} has {first.in_features}"
    )


def preset(name: str = DEFAULT, **changes: Any) -> dict[str, Any]:
    """Arguments of `lorq.quantize` by what they cost, such as ``lorq.quantize(model, out, **lorq.preset("best"))``.

    Args:
        name: "fast" takes 1.2 times as long as GPTQ, "balanced" weighs tokens and outputs by the model's gradients too,
            "best" searches longer.
        **changes: settings of the preset's method and options of the run, such as ``bits=3``.

    Raises:
        ValueError: for an unknown name, or a value out of range.
        TypeError: for what is neither a setting nor an option.

    Example:
        >>> preset("balanced", bits=3, samples=16)["method"].bits
        3
    """
    check_name("preset", name, PRESETS)
    chosen = PRESETS[name]
    settings, options = ({f.name for f in fields(kind)} for kind in (chosen.method, Options))  # type: ignore[arg-type]
    if unknown := sorted(set(changes) - settings - options):
        raise TypeError(
            f"a preset takes settings of {method_name(chosen.method)} and options, got {', '.join(unknown)}"
        )
    own = {key: value for key, value in changes.items() if key in settings}
    rest = {key: value for key, value in changes.items() if key in options}
    return {"method": replace(chosen.method, **own), **chosen.options, **rest}  # type: ignore[type-var]
