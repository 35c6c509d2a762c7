"""The report of a quantized folder: one record per layer, and the totals."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorq.storage.json_files import json_bytes, read_json
from lorq.storage.names import JOURNAL, REPORT_NAME


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name: module name.
        shape: (out, in).
        bits: width of a code.
        rank: of the low-rank part.
        stop, error_before, error_after: see `lorq.core.weight.Record`.
        bytes: stored for this layer, everything counted.
        note: what is out of the ordinary, such as an expert that saw too few tokens for statistics of its own.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    rank: int
    stop: str
    error_before: float
    error_after: float
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Report:
    """A quantization run's result.

    Attributes:
        method: its name.
        settings: its fields, before overrides.
        layers: in the order of the model.
        bytes: of all weight files' tensors, those left in full precision included.
        kept: parameters left as they were, by name, with the reason where it is not the rule.
        run: calibration text, samples, seed and so on, as asked for.
        checksums: sha256 of each weight file.
        measured: what `lorq evaluate` has found, see `figures`, and of which weights.
        seconds, stages: wall time of the run, and of calibration and solving; not stored, as never the same twice.
    """

    method: str
    settings: dict[str, Any]
    layers: tuple[LayerReport, ...]
    bytes: int
    kept: dict[str, str]
    run: dict[str, Any]
    checksums: dict[str, str]
    measured: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the quantized layers over the number of their weights."""
        weights = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        return 8 * sum(layer.bytes for layer in self.layers) / max(weights, 1)

    @property
    def notes(self) -> dict[str, str]:
        """The layers' notes by module, once for layers of one module with the same note, as those of an expert.

        And that the original had been quantized, and why files that lie beside its weights do not lie beside these.
        """
        modules: dict[tuple[str, str], list[str]] = {}
        for layer in self.layers:
            if layer.note:
                modules.setdefault((layer.name.rpartition(".")[0], layer.note), []).append(layer.name)
        notes = {module if len(names) > 1 else names[0]: note for (module, note), names in modules.items()}
        if "dequantized" in self.run:
            notes["all layers"] = self.run["dequantized"]
        return notes | {name: f"not copied, {why}" for name, why in self.run.get("not_copied", {}).items()}

    @property
    def figures(self) -> dict[str, Any]:
        """What was measured of these weights: ``texts`` and ``tasks``, figures by their names; {} if nothing was."""
        if self.measured.get("weights") != weights_of(self.checksums):
            return {}  # of other weights, before they were tuned, say
        return {key: value for key, value in self.measured.items() if key != "weights"}

    def as_dict(self) -> dict[str, Any]:
        """What the folder keeps; `lorq inspect --json` prints it with `runs` beside it."""
        head = {"bits_per_weight": self.bits_per_weight, "bytes": self.bytes}
        rest = {k: v for k, v in asdict(self).items() if k not in ("seconds", "stages", "bytes", "measured")}
        return head | rest | ({"measured": self.measured} if self.figures else {})

    def to_bytes(self) -> bytes:
        """The file's content; the same for the same run."""
        return json_bytes(self.as_dict())


def weights_of(checksums: Mapping[str, str]) -> str:
    """A short name for the weights of a folder."""
    return hashlib.sha256("".join(sorted(checksums.values())).encode()).hexdigest()[:16]


def read_report(folder: str | Path) -> Report:
    """The report of a finished lorq folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged.
    """
    folder = Path(folder).expanduser()
    path = folder / REPORT_NAME
    if (folder / JOURNAL).exists():
        raise FileNotFoundError(f"{folder} is an unfinished run and has no report yet; finish it with --resume")
    if not path.is_file():
        raise FileNotFoundError(_what_it_is(folder))
    content = read_json(path)
    try:
        content = {key: value for key, value in content.items() if key != "bits_per_weight"}
        layers = tuple(LayerReport(**{**entry, "shape": tuple(entry["shape"])}) for entry in content.pop("layers"))
        return Report(layers=layers, **content)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy the folder again") from error


def _what_it_is(folder: Path) -> str:
    """Of a place without a report, and what to do."""
    if not folder.exists():
        return f"there is no folder {folder}; name one that `lorq quantize` wrote"
    if folder.is_file() or not (folder / "config.json").is_file():
        return f"{folder} has no {REPORT_NAME}: lorq did not write this folder; name one that `lorq quantize` wrote"
    return (
        f"{folder} has no {REPORT_NAME}: lorq did not write this folder, it looks like a model that lorq has not "
        f"quantized; `lorq quantize {folder} OUT` makes a folder of it"
    )


def html_page(report: Report, *, title: str) -> str:
    """A page with the totals, a bar for every layer's rank, its errors, and the table; needs no network."""
    from html import escape

    ranks, before = [layer.rank for layer in report.layers], [layer.error_before for layer in report.layers]
    after = [layer.error_after for layer in report.layers]
    rows = "".join(
        f"<tr><td>{escape(l.name)}</td><td>{l.shape[0]} x {l.shape[1]}</td><td>{l.bits}</td><td>{l.rank}</td>"
        f"<td>{escape(l.stop)}</td><td>{l.error_before:.4f}</td><td>{l.error_after:.4f}</td><td>{l.bytes:,}</td>"
        f"<td>{escape(l.note)}</td></tr>"
        for l in report.layers
    )
    titles = ("layer", "shape", "bits", "rank", "stop", "before", "after", "bytes", "note")
    heads = "".join(f"<th>{title}</th>" for title in titles)
    return (
        f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>body{{font:14px sans-serif;"
        "max-width:70em;margin:2em auto}td,th{text-align:right;padding:0 .7em}td:first-child{text-align:left}</style>"
        f"<h1>{escape(title)}</h1><p>{escape(report.method)}, {report.bits_per_weight:.3f} bits per weight, "
        f"{report.bytes / 1e6:.1f} MB, {len(report.layers)} layers</p>"
        f"{_budget(report)}<h2>Bits of each layer's codes</h2>{_bars([[l.bits for l in report.layers]], ['#36c'])}"
        f"<h2>Rank of each layer</h2>{_bars([ranks], ['#36c'])}"
        "<h2>Relative output error of each layer: rounding to nearest (grey), this folder (blue)</h2>"
        f"{_bars([before, after], ['#bbb', '#36c'])}<table><tr>{heads}</tr>{rows}</table>"
    )


def _budget(report: Report) -> str:
    """The curve of the best choices under all budgets, and where this folder is; nothing if it was not chosen so."""
    told = report.run.get("budget")
    if not told:
        return ""
    at, harm = report.bits_per_weight, told["harm"]
    curve = [(bits, math.log10(max(value, 1e-12))) for bits, value in told["curve"]]
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*curve, strict=True))

    def place(bits: float, value: float) -> str:
        x, y = (bits - left) / (right - left or 1.0), (value - low) / (high - low or 1.0)
        return f"{1000 * x:.1f},{200 - 200 * y:.1f}"

    line, (x, y) = " ".join(place(*point) for point in curve), place(at, math.log10(max(harm, 1e-12))).split(",")
    return (
        "<h2>Predicted divergence from the original by bits per weight, logarithmic</h2>"
        f'<svg viewBox="-10 -10 1020 220" width="100%"><polyline points="{line}" fill="none" stroke="#36c"/>'
        f'<circle cx="{x}" cy="{y}" r="5" fill="#c33"/></svg><p>{left:.3f} to {right:.3f} bits per weight, '
        f"{10**high:.4g} to {10**low:.4g} nats a token; here {at:.3f} and {harm:.4g}</p>"
    )


def _bars(series: list[list[Any]], colours: list[str]) -> str:
    """An SVG with one bar per layer, later series in front."""
    height, top = 160, max((max(values, default=0) for values in series), default=0) or 1
    width = 1000 / max(len(series[0]), 1)
    bars = "".join(
        f'<rect x="{i * width:.2f}" y="{height - height * v / top:.2f}" width="{width * 0.9:.2f}" '
        f'height="{height * v / top:.2f}" fill="{colour}"/>'
        for values, colour in zip(series, colours, strict=True)
        for i, v in enumerate(values)
    )
    return f'<svg viewBox="0 0 1000 {height}" width="100%">{bars}</svg><p>highest bar: {top:.4g}</p>'
