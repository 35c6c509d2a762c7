"""Functions as commands, and what these show: summaries, figures."""

import inspect
import json
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from lorq.bars import console, notes, progress_bars
from lorq.progress import duration
from lorq.storage.measured import read_measured
from lorq.storage.report import Report, ranks_in_words


def print_summary(report: Report, out: Path | None) -> None:
    ranks = [layer.rank for layer in report.layers]
    table = Table(show_header=False)
    table.add_row("method", report.method)
    table.add_row("layers", str(len(report.layers)))
    table.add_row("bits per weight", report.bits_in_words + ("" if out else " at most"))
    if "harm" in (told := report.run.get("budget", {})):  # a budget was met, by layers of several kinds
        table.add_row("predicted divergence", f"{told['harm']:.4g} nats a token")
        widths = Counter(layer.bits for layer in report.layers)
        table.add_row("chosen", ", ".join(f"{bits} bits: {count} layers" for bits, count in sorted(widths.items())))
    table.add_row(
        "weights on disk", f"{report.bytes / 1e6:.1f} MB{'' if out else ' at most'}{smaller(report, report.bytes)}"
    )
    if any(ranks):  # of a low-rank part; methods without one have nothing to tell
        table.add_row("rank", ranks_in_words(ranks, mean=True))
    if out:
        table.add_row("mean output error", report.errors_in_words)
        table.add_row("file" if out.is_file() else "folder", str(out))
    if tuned := report.run.get("tuning"):
        table.add_row("KL on held-out text", f"{tuned['kl_after']:.4f} (before tuning: {tuned['kl_before']:.4f})")
    for found in read_measured(out).evaluations if out else ():
        table.add_row(f"on {found['text']}", figures_line(found))
        for task, metrics in found.get("tasks", {}).items():
            table.add_row(task, metrics_line(metrics))
    for told in [report.run["forecast"]] if "forecast" in report.run else ():
        for row in forecast_rows(told):
            table.add_row(*row)
    if out and (memory := read_measured(out).memory):
        foretold = read_measured(out).foretold
        table.add_row(
            "peak memory", f"{memory / 1e9:.2f} GB" + (f" ({foretold / 1e9:.2f} predicted)" if foretold else "")
        )
    if report.notes:
        table.add_row("with a note", f"{len(report.notes)}, see lorq inspect" if out else str(len(report.notes)))
    if report.seconds:
        parts = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.stages.items())
        title = "seconds" if out else "seconds of this dry run"
        table.add_row(title, f"{report.seconds:.1f}" + (f" ({parts})" if parts else ""))
    console.print(table)


def forecast_rows(told: dict[str, Any]) -> list[tuple[str, str]]:
    """What a run will take, a line each."""
    block, layer = told["measured"]
    spilled = f", {told['spilled'] / 1e9:.2f} GB in files meanwhile" if told["spilled"] else ""
    times = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in told["seconds"].items())
    if "solving" not in told["seconds"]:
        times += ", solving not predicted: a method that fits whole blocks"
    return [
        ("blocks", str(told["blocks"])),
        ("read and written", f"{told['read'] / 1e9:.2f} GB, {told['written'] / 1e9:.2f} GB at most{spilled}"),
        ("peak memory, predicted", f"{told['memory'] / 1e9:.2f} GB" if told["memory"] else "not known on this system"),
        ("time, predicted", f"{times} (from {block} and {layer}, on this machine as it is)"),
    ]


def figures_line(found: dict[str, Any]) -> str:
    """What was measured on a text, and how."""
    kl = found.get("kl_mean")
    far = "" if kl is None else f", KL {with_error(f'{kl:.4f}', found.get('kl_stderr'))}"
    told = with_error(f"{found['perplexity']:.4g}", found.get("perplexity_stderr"))
    return f"perplexity {told}{far} ({found['windows']} windows of {found['window']} tokens)"


def with_error(value: str, error: float | None) -> str:
    """A figure with its standard error in two digits, where that is known.

    Example:
        >>> with_error("0.1810", 0.00412), with_error("30.4", 12.3), with_error("1.5", None)
        ('0.1810 ± 0.0041', '30.4 ± 12', '1.5')
    """
    return value if error is None else f"{value} ± {error:#.2g}".rstrip(".")


def metrics_line(metrics: dict[str, float]) -> str:
    """A task's metrics with their standard errors, and of how many examples."""
    errors = {name: value for name, value in metrics.items() if "_stderr" in name}
    parts = []
    for name, value in metrics.items():
        if name not in errors and name != "examples":
            error = errors.get(name.replace(" (", "_stderr (") if " (" in name else f"{name}_stderr")
            parts.append(f"{name} {with_error(f'{value:.4g}', error)}")
    return ", ".join(parts) + (f" ({metrics['examples']:.0f} examples)" if "examples" in metrics else "")


def smaller(report: Report, size: int) -> str:
    """How much than the original; nothing where a folder does not tell, as those of lorq 0.1 do not.

    Args:
        size: bytes of what was made of it.
    """
    before = report.run.get("original_bytes", 0)
    if before <= size or not size:
        return f", the original has {before / 1e6:.1f} MB" if before else ""
    return f", {before / size:.1f} times smaller than the original's {before / 1e6:.1f} MB"


def print_next(*commands: tuple[Any, ...]) -> None:
    """What can be done next, a line each that can be copied, in words for the shell."""
    for words in commands:
        console.print(f"next: {called_as()} {shlex.join(map(str, words))}", soft_wrap=True)


def called_as() -> str:
    """What to type for this command: its path, unless the shell finds it by its name."""
    program = Path(sys.argv[0])
    if program.name != "lorq":  # a test, or python -m
        return "lorq"
    found = shutil.which("lorq")
    return "lorq" if found and Path(found).samefile(program) else shlex.quote(str(program))


def print_tuned(report: Report, as_json: bool) -> None:
    """What a tuning has reached."""
    if as_json:
        print(json.dumps(report.as_dict()))
        return
    tuned = report.run["tuning"]
    console.print(
        f"KL on {tuned['held_out']} windows of text that was held out: {tuned['kl_before']:.4f} before, "
        f"{tuned['kl_after']:.4f} after" + (f" step {tuned['kept_step']} of {tuned['steps']}" if tuned["steps"] else "")
    )


def print_written(paths: Iterable[Path]) -> None:
    """The files that a command has made."""
    for path in paths:
        console.print(f"wrote {path}", soft_wrap=True)


def command(function: Callable[..., Any], show: Callable[..., None], json: str = "") -> Callable[..., None]:
    """A function as a command: its signature is the flags, its docstring their help, and its result is shown.

    A parameter ``progress`` of it is no flag, it gets bars. ``show`` is called with the result and, if there is
    ``--json``, with whether that was given; ``json`` is what that prints; left out, there is no such flag.
    """
    signature = inspect.signature(function)
    parameters = [_as_flag(parameter) for name, parameter in signature.parameters.items() if name != "progress"]
    if json:
        flag = Annotated[bool, Parameter(name="--json", negative="", help=json)]
        parameters.append(inspect.Parameter("json_", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=flag))

    def run(*arguments: Any, json_: bool = False, **options: Any) -> None:
        with progress_bars() if "progress" in signature.parameters else nullcontext() as progress:
            result = function(*arguments, **options, **({} if progress is None else {"progress": progress}))
        show(result, json_) if json else show(result)

    run.__doc__ = function.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _as_flag(parameter: inspect.Parameter) -> inspect.Parameter:
    """Settings are flags like all others, and what is off unless asked for has no flag that turns it off."""
    if is_dataclass(parameter.annotation):
        return parameter.replace(annotation=Annotated[parameter.annotation, Parameter(name="*")])
    if parameter.default is False:
        return parameter.replace(annotation=Annotated[bool, Parameter(negative="")])
    return parameter


def print_exported(done: Any) -> None:
    """What an export has written, what is lost, and how to go on."""
    console.print(f"wrote {done.out}, {done.bytes / 1e6:.1f} MB", soft_wrap=True)
    for line in (*(f"lost, {what}: {how}" for what, how in done.lost.items()), *done.lines):
        console.print(line, soft_wrap=True)


def print_pushed(done: Any) -> None:
    """Where it is, or the card by itself."""
    if done.note:
        notes.print(f"note: {done.note}")
    if not done.url:
        print(done.card, end="")
        return
    console.print(f"pushed to {done.url}", soft_wrap=True)


def print_pieces(pieces: Iterable[str]) -> None:
    """Text, each piece when it comes, and the end of the line."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


# The fields of an `lorq.Evaluation` in words, with their units.
_FIGURES = {
    "perplexity": ("perplexity", "{}"),
    "reference_perplexity": ("perplexity of the reference", "{:.4g}"),
    "ratio": ("perplexity over the reference's", "{}"),
    "kl_mean": ("KL from the reference, mean", "{} nats a token"),
    "kl_p99": ("KL from the reference, 99th percentile", "{:.4g} nats"),
    "top1": ("same first choice as the reference", "{:.2%} of tokens"),
    "bits_per_weight": ("bits per weight", "{:.3f}"),
    "tokens": ("predicted", "{:,} tokens"),
    "text": ("text", "{}"),
    "window": ("length of a window", "{} tokens"),
    "windows": ("windows", "{}"),
    "start_token": ("windows begin with a start token", "{}"),
}


def print_evaluation(figures: dict[str, Any], as_json: bool) -> None:
    """A table of what was measured, in words with units, or one JSON object of the fields."""
    told = {key: value for key, value in figures.items() if value is not None}
    shown = told | {"perplexity": with_error(f"{told['perplexity']:.4g}", told.get("perplexity_stderr"))}
    if "kl_mean" in told:
        ratio = told["perplexity"] / told["reference_perplexity"]
        shown["ratio"] = with_error(f"{ratio:.4g}", told.get("ratio_stderr"))
        shown["kl_mean"] = with_error(f"{told['kl_mean']:.4f}", told.get("kl_stderr"))
    words = {
        words: shown[key] if isinstance(shown[key], bool) else form.format(shown[key])
        for key, (words, form) in _FIGURES.items()
        if key in shown
    }
    print_figures(figures if as_json else words | {"tasks": told.get("tasks", {})}, as_json)


def print_figures(figures: dict[str, Any], as_json: bool) -> None:
    """A table of what there is, or one JSON object."""
    if as_json:
        print(json.dumps(figures))
        return
    table = Table(show_header=False)
    for key, value in figures.items():
        if isinstance(value, dict):  # of tasks
            for task, metrics in value.items():
                table.add_row(task, metrics_line(metrics))
        elif value is not None:
            table.add_row(key, _words(value))
    console.print(table)


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_each(rows: Iterable[dict[str, Any]], as_json: bool) -> None:
    """`print_figures` of each row when it comes."""
    for row in rows:
        print_figures(row, as_json)


def print_rows(rows: Iterable[dict[str, Any]], as_json: bool) -> None:
    """Rows with the same keys as one table, or each as a line of JSON when it comes."""
    table: Table | None = None
    for row in rows:
        if as_json:
            print(json.dumps(row), flush=True)
            continue
        # With spaces, names break into lines where there is no room for them.
        table = table or Table(*(key.replace("_", " ") for key in row))
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    if table:
        console.print(table)


def print_families(rows: list[dict[str, str]]) -> None:
    """A table of model types, and how many of them work."""
    table = Table()
    for title in ("model type", "class", "verdict", "reason"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(row["model_type"], row["class"], row["verdict"], row["reason"])
    console.print(table)
    verdicts = [row["verdict"] for row in rows]
    if "not built" in verdicts:
        console.print("not built: no small model of it could be made here, so nothing is known")
    console.print(
        f"{verdicts.count('works')} of {len(rows)} work, {verdicts.count('refused')} are refused, "
        f"{verdicts.count('not built')} are not built"
    )
