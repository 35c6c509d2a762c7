"""lorq inspect: what a lorq folder, an export, an adapter or a file for llama.cpp is."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from lorq.bars import console
from lorq.cards import commands_of
from lorq.exports.made import Made, is_for_others
from lorq.models.locate import full_path
from lorq.show import figures_line, metrics_line, print_summary, smaller
from lorq.storage.report import Report, ranks_in_words, read_report

_KINDS = {"gguf": "a file for llama.cpp", "gguf adapter": "a LoRA file for llama.cpp", "adapter": "an adapter of PEFT"}


def inspect(
    out: Path, *, json_: Annotated[bool, Parameter(name="--json", negative="")] = False
) -> None:  # fmt: skip
    """The layers of a lorq folder: bits, rank, stop reason, errors and bytes, what multiplies them, and the totals.

    Of an export, an adapter or a GGUF file: its tensors and their types, bits per weight, how it was made, and what was
    lost.

    Args:
        out: a folder that `lorq quantize`, `lorq export` or `lorq compensate` wrote, or a GGUF file.
        json_: print one JSON object.
    """
    out = full_path(out)
    if is_for_others(out):
        from lorq.exports.read_back import read_made

        made = read_made(out)
        print(json.dumps(_as_dict(made))) if json_ else _show_made(made)
        return
    _inspect_folder(out, read_report(out), as_json=json_)  # refuses other folders before torch is there


def _inspect_folder(out: Path, report: Report, *, as_json: bool) -> None:
    from lorq.runtime.inspect import expert_lines, implementation_lines, layer_implementations
    from lorq.storage.folder import LorqFolder

    folder = LorqFolder.open(out)
    runs = layer_implementations(folder)
    if as_json:
        print(json.dumps(report.as_dict() | {"runs": {name: asdict(by) for name, by in runs.items()}}))
        return
    rows = [
        (
            layer.name, f"{layer.shape[0]}x{layer.shape[1]}", str(layer.bits), str(layer.rank),
            report.stop_in_words(layer), f"{layer.error_before:.4f}", f"{layer.error_after:.4f}", f"{layer.bytes:,}",
        )
        for layer in report.layers
    ]  # fmt: skip
    _print_table(("layer", "shape", "bits", "rank", "stop", "error before", "error after", "bytes"), rows)
    lines = [f"not quantized: {name}: {reason}" for name, reason in report.kept.items()]
    lines += [f"note: {name}: {note}" for name, note in report.notes.items()]
    for line in (*lines, *implementation_lines(runs), *expert_lines(folder)):
        console.print(line)
    print_summary(report, out)


def _print_table(titles: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    table = Table()
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _as_dict(made: Made) -> dict[str, Any]:
    own = {key: value for key, value in asdict(made).items() if key not in ("place", "report")}
    bits = {"bits_per_weight": made.bits_per_weight(), "bytes": made.bytes, "ranks": made.ranks}
    return own | bits | {"report": None if made.report is None else made.report.as_dict()}


def _show_made(made: Made) -> None:
    # Errors are known of the folder's layers: what was rounded again has others.
    same = "rounding" not in made.lost
    rows = [
        (
            part.name, "x".join(map(str, part.shape)), part.type, f"{8 * part.bytes / max(part.weights, 1):.2f}",
            f"{part.error:.4f}" if same and part.error is not None else "", f"{part.bytes:,}",
        )
        for part in made.parts
    ]  # fmt: skip
    _print_table(("tensor", "shape", "type", "bits", "error", "bytes"), rows)
    table = Table(show_header=False)
    for row in _summary(made):
        table.add_row(*row)
    console.print(table)


def _summary(made: Made) -> Iterable[tuple[str, str]]:
    """What is told of all its parts together."""
    what = _KINDS.get(made.kind, f"an export for readers of {made.kind}")
    yield "what", what + (f" ({made.architecture})" if made.architecture else "")
    yield "written by", f"lorq {made.version}" if made.version else "another program than lorq"
    if made.ranks:
        yield "rank", ranks_in_words(made.ranks, mean=True)
        yield "layers", str(len(made.ranks))
    if made.base:
        yield "for the model", made.base
    yield "types", made.types()
    if not made.is_adapter:
        packed = [part for part in made.parts if part.is_quantized]
        told = f"{made.bits_per_weight():.3f} in {len(packed)} tensors with codes, " if packed else ""
        yield "bits per weight", f"{told}{made.bits_per_weight(quantized=False):.3f} in all"
    than = smaller(made.report, made.bytes) if made.report is not None and not made.is_adapter else ""
    yield "tensors on disk", f"{made.bytes / 1e6:.1f} MB{than}"
    yield from _made_from(made)


def _made_from(made: Made) -> Iterable[tuple[str, str]]:
    """What is known of the folder that it was made of, and what was lost on the way."""
    if (report := made.report) is not None:
        for number, command in enumerate(commands_of(report, made.command)):
            yield "" if number else "made by", command
        whose = ", of the folder OUT" + (", whose low-rank part is in the adapter" if made.has_adapter else "")
        yield "mean output error", f"{report.errors_in_words}{whose if made.command else ', with it'}"
    for found in made.evaluations:
        yield f"on {found['text']}", f"{figures_line(found)}, of the folder OUT"
        for task, metrics in found.get("tasks", {}).items():
            yield task, f"{metrics_line(metrics)}, of the folder OUT"
    for name, how in made.lost.items():
        yield f"lost, {name}", how
