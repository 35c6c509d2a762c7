"""The quantize command: into a folder, or into a file for llama.cpp."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

import lorq
from lorq.bars import notes, progress_bars
from lorq.exporting import quantize_into_file
from lorq.models.locate import full_path, resolve_model
from lorq.refusals import given
from lorq.show import print_exported, print_next, print_summary
from lorq.tuning import quantize_and_tune


def is_file(out: str | Path) -> bool:
    """Whether an output's name tells of a file for llama.cpp."""
    return str(out).lower().endswith(".gguf")


def quantize_command(
    settings: Any = None, options: Any = None, methods: tuple[str, ...] = (), presets: tuple[str, ...] = (),
    *, typed: bool = True,
) -> Callable[..., None]:  # fmt: skip
    """The quantize command with one method's settings and the run's options as flags; without them, what lists show.

    Args:
        typed: False where the layers' type in a file for llama.cpp is to be chosen.
    """

    def quantize(
        model: str,
        out: Path,
        *,
        preset: str = "balanced",
        method: str = "flrq",
        settings: Any = settings,
        options: Any = options,
        tune: int | None = None,
        json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
    ) -> None:
        """Quantize MODEL into the folder OUT, or into a file OUT.gguf for llama.cpp.

        A first try in minutes: `lorq quantize MODEL OUT --bits 3 --samples 16 --seq-len 512`.

        Args:
            model: a Hugging Face folder, a hub id, or a GGUF file.
            out: the new folder; or a file for llama.cpp, by a name that ends in .gguf: then the method is gptq, unless
                one is given, and --grid is q4_k where all layers' widths are multiples of 256, else iq4_nl.
            preset: a method with its settings by what it costs, fast, balanced or best; `lorq quantize --preset NAME
                --help` shows its values as the defaults, and they are printed when the work begins.
            method: how, with the method's own defaults in place of a preset's; `lorq quantize --method NAME --help`
                lists its settings.
            tune: then tune it for so many steps on the calibration's windows, as `lorq tune` does.
            json_: print the report as one JSON object.
        """
        exported = None
        with progress_bars() as progress:
            chosen = {"progress": progress, **vars(options)}
            if is_file(out):
                own = settings if typed else _with_type(model, settings, options)
                report, exported = quantize_into_file(model, out, own, tune, **chosen)
            elif tune is None:
                report = lorq.quantize(model, out, settings, **chosen)
            else:
                report = quantize_and_tune(model, out, settings, tune, **chosen)
        if json_:
            print(json.dumps(report.as_dict()))
            return
        print_summary(report, None if options.dry_run else full_path(out))
        if exported is not None:
            print_exported(exported)
            print_next(("inspect", out))
        elif not options.dry_run:
            evaluate = "evaluate", out, "--reference", model, "--window", 512, "--windows", 8
            print_next(evaluate, ("generate", out, "your question"))

    if methods:
        quantize.__annotations__ |= {
            "preset": Literal[presets],  # type: ignore[valid-type]
            "method": Literal[methods],  # type: ignore[valid-type]
            "settings": Annotated[type(settings), Parameter(name="*")],
            "options": Annotated[type(options), Parameter(name="*")],
        }
    return quantize


def _with_type(model: str, settings: Any, options: Any) -> Any:
    from lorq.pipeline.options import read_options
    from lorq.pipeline.presets import with_type

    solver, why = with_type(resolve_model(model), settings, read_options(dict(vars(options))))
    notes.print(f"{why}; --grid names another")
    return solver


def with_preset(arguments: list[str], *, to_file: bool, helps: bool) -> tuple[list[str], Any, bool]:
    """The command line with the flags that a preset stands for, printed, unless a method is given; the
    `lorq.pipeline.presets.Preset` whose values help shows; and whether all is said, see `quantize_command`."""
    from lorq.methods import METHODS
    from lorq.pipeline.presets import DEFAULT, INTO_FILE, PAPERS, PRESETS, Preset, knows_types

    method, name = given(arguments, "--method"), given(arguments, "--preset") or (None if to_file else DEFAULT)
    chosen = INTO_FILE if name is None else PRESETS.get(name)
    own = METHODS.get(method or "flrq", METHODS["flrq"])() if method or chosen is None else chosen.method
    typed = not (to_file and knows_types(own) and name is None and given(arguments, "--grid") is None)
    if method is not None or chosen is None:
        chosen, title = Preset(own, PAPERS.get(method or "", {})), f"the run of {method}"
    else:
        title = f"preset {name}" if name else "for llama.cpp"
    flags = chosen.flags() if chosen.options or (method is None and name in (None, *PRESETS)) else {}
    if not typed:
        flags.pop("--grid", None)
    if flags and not helps:
        used = " ".join(f"{flag} {given(arguments, flag) or value}" for flag, value in flags.items())
        notes.print(f"{title}: {used}")
    more = [f"{flag}={value}" for flag, value in flags.items() if given(arguments, flag) is None]
    return arguments + more, chosen if helps else Preset(type(own)()), typed
