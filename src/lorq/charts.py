"""Charts of quantized folders, as Vega-Lite specifications: plain dictionaries, which need no library to be made."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorq.storage.measured import PROTOCOL, Measured
from lorq.storage.report import LayerReport, Report

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name, which nothing fetches
# What a stored tensor is for, by the last part of its name; see docs/format.md.
PARTS = {
    "weight_packed": "codes", "weight_scale": "scales", "weight_zero_point": "scales", "scale_left": "scales",
    "scale_right": "scales", "codebook": "codebooks", "codebook_scale": "codebooks", "left": "low-rank factors",
    "right": "low-rank factors", "left_scale": "low-rank factors", "right_scale": "low-rank factors",
}  # fmt: skip
KEPT = "not quantized"
_MOST_ROWS = 14  # of a chart of bytes; the rest is one row
_ROW = 22  # pixels
_LEAST = 1e-9  # what is drawn for 0 where an axis is logarithmic


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        name: of its file, without an ending.
        title: what it shows.
        note: a sentence below the title, or "".
        spec: in Vega-Lite; as wide as the place that it is put into.
    """

    name: str
    title: str
    note: str
    spec: dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """What is drawn of one folder.

    Attributes:
        name: as short as tells it from the others.
        parts: bytes of the stored tensors, by their names.
    """

    name: str
    report: Report
    measured: Measured
    parts: Mapping[str, int]


def place_of(name: str) -> tuple[int | None, str]:
    """The depth of a module, and what it is in its block; numbers of experts become a star.

    Example:
        >>> place_of("model.layers.3.mlp.experts.5.up_proj"), place_of("lm_head")
        ((3, 'mlp.experts.*.up_proj'), (None, 'lm_head'))
    """
    found = re.match(r"(?:.*?\.)??(\d+)\.(.+)", name)
    if found is None:
        return None, name.rpartition(".")[2]
    return int(found[1]), re.sub(r"(?<=\.)\d+(?=\.)", "*", found[2])


def charts_of(folder: Folder) -> list[Chart]:
    """Everything that one folder's report tells, in the order to read it."""
    report, labels = folder.report, _labels(place_of(layer.name)[1] for layer in folder.report.layers)
    bits = _heat(report, labels, "bits", lambda layer: layer.bits, "Mean bits of a code.")
    ranks = _heat(report, labels, "rank", lambda layer: layer.rank, "Mean rank of the low-rank part.")
    errors = _heat(report, labels, "error", lambda layer: layer.error_after, "Relative error of the output.", log=True)
    note = f"Mean over a block's layers: {report.before_in_words}, and this folder"
    note += ", with its adapter. " if "low_rank_part" in report.run else ". "
    note += "The band is from the least to the largest."
    drawn = [Chart("bits", "Bits of the codes", "By depth and projection.", bits)]
    if any(layer.rank for layer in report.layers):
        drawn.append(Chart("rank", "Rank of the low-rank part", "By depth and projection.", ranks))
    drawn += [
        Chart("error", "Output error of each layer", "By depth and projection, on a logarithmic scale.", errors),
        Chart("error-by-depth", "Output error, before and after", note, _errors(report)),
    ]
    if told := report.run.get("budget"):
        drawn.append(_dial(told, report.bits_per_weight))
    drawn.append(Chart("bytes", "Where the bytes are", f"{report.bytes / 1e6:.1f} MB of tensors.", _bytes(folder)))
    if any(layer.rank for layer in report.layers):
        stops = Counter(report.stop_in_words(layer) for layer in report.layers)
        drawn.append(Chart("stops", "Why ranks are not larger", "Layers by their stop reason.", _counts(stops)))
    if folder.measured.stages:
        drawn.append(_times(folder.measured))
    return drawn


def comparison(folders: Sequence[Folder]) -> Chart:
    """Folders side by side: bits per weight against KL where they were evaluated alike, else against output error."""
    alike, told = shared_protocol(folders)
    if len(alike) > 1:
        values = {folder.name: entry["kl_mean"] for folder, entry in alike}
        errors = {folder.name: entry.get("kl_stderr") or 0.0 for folder, entry in alike}
        left = [folder.name for folder in folders if folder.name not in values]
        note = f"Mean divergence from the original on {told}." + (
            f" Not measured so: {', '.join(left)}." if left else ""
        )
        note += " Bars are one standard error." if any(errors.values()) else ""
        return _points(folders, values, errors, "KL, nats a token", note)
    values = {folder.name: folder.report.mean_error() for folder in folders}
    note = "Mean relative error of the layers' outputs. `lorq evaluate OUT --reference MODEL`, of each, puts KL here."
    return _points(folders, values, {}, "mean output error", note)


def shared_protocol(folders: Sequence[Folder]) -> tuple[list[tuple[Folder, dict[str, Any]]], str]:
    """The evaluations by the protocol that most folders share, and that protocol in words."""
    found: dict[tuple[Any, ...], list[tuple[Folder, dict[str, Any]]]] = defaultdict(list)
    for folder in folders:
        for entry in folder.measured.evaluations:
            if entry.get("kl_mean") is not None:
                found[tuple(entry[key] for key in PROTOCOL)].append((folder, entry))
    best = max(found.values(), key=len, default=[])
    return best, protocol_in_words(best[0][1]) if best else ""


def protocol_in_words(entry: Mapping[str, Any]) -> str:
    """How an evaluation was made."""
    words = f"{entry['windows']} windows of {entry['window']} tokens of {entry['text']}"
    return words + (f", against {entry['reference']}" if entry["reference"] else "")


def _labels(names: Iterable[str]) -> dict[str, str]:
    """Names of projections, as short as tells them apart."""
    whole = list(dict.fromkeys(names))
    last = Counter(name.rpartition(".")[2] for name in whole)
    return {name: name.rpartition(".")[2] if last[name.rpartition(".")[2]] == 1 else name for name in whole}


def _heat(
    report: Report, labels: Mapping[str, str], what: str, value: Callable[[LayerReport], float], told: str,
    *, log: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A map over depth and projection; experts of a block are one cell, their mean. Layers outside blocks are left."""
    cells: dict[tuple[int, str], list[float]] = defaultdict(list)
    for layer in report.layers:
        depth, name = place_of(layer.name)
        if depth is not None:
            cells[depth, labels[name]].append(value(layer))
    rows: list[dict[str, Any]] = [
        {"depth": d, "projection": p, what: sum(v) / len(v), "layers": len(v)} for (d, p), v in cells.items()
    ]
    order = list(dict.fromkeys(labels[place_of(layer.name)[1]] for layer in report.layers))
    scale: dict[str, Any] = {"scheme": "viridis"}
    if log:
        rows = [row | {what: max(float(row[what]), _LEAST)} for row in rows]
        scale |= {"type": "log"}
    distinct = sorted({row[what] for row in rows})
    legend: dict[str, Any] = {"title": None, "orient": "top"}
    few = len(distinct) <= 6 and not log
    colour = {"field": what, "type": "ordinal" if few else "quantitative", "scale": scale, "legend": legend}
    step = max(1, math.ceil(len({row["depth"] for row in rows}) / 8))
    depths = sorted({row["depth"] for row in rows})
    axis = {"title": "depth", "values": depths[::step], "labelAngle": 0, "labelOverlap": False}
    return _spec(
        rows,
        {"type": "rect", "stroke": None, "tooltip": True},
        {
            "x": {"field": "depth", "type": "ordinal", "axis": axis},
            "y": {"field": "projection", "type": "nominal", "sort": order, "axis": {"title": None, "labelLimit": 150}},
            "color": colour,
            "tooltip": [{"field": key} for key in ("projection", "depth", what, "layers")],
        },
        height=_ROW * max(len({row["projection"] for row in rows}), 1),
        description=told,
    )


def _errors(report: Report) -> dict[str, Any]:
    """Two lines over depth, each with its band."""
    rows = [
        {"depth": depth, "error": max(error, _LEAST), "of": of}
        for layer in report.layers
        if (depth := place_of(layer.name)[0]) is not None
        for of, error in ((report.before_in_words, layer.error_before), ("this folder", layer.error_after))
    ]
    x = {"field": "depth", "type": "quantitative", "axis": {"title": "depth", "tickMinStep": 1, "grid": False}}
    scale, axis = {"type": "log"}, {"title": "relative output error", "tickCount": 5}
    colour = {
        "field": "of", "type": "nominal", "legend": {"title": None, "orient": "top", "symbolOpacity": 1},
        "scale": {"domain": [report.before_in_words, "this folder"], "range": ["#9a9a9a", "#3b82f6"]},
    }  # fmt: skip

    def y(operation: str) -> dict[str, Any]:
        return {"aggregate": operation, "field": "error", "type": "quantitative", "scale": scale, "axis": axis}

    band = {"x": x, "y": y("min"), "y2": {"aggregate": "max", "field": "error"}, "color": colour}
    line = {"x": x, "y": y("mean"), "color": colour}
    layers = [
        {"mark": {"type": "area", "opacity": 0.18}, "encoding": band},
        {"mark": {"type": "line", "point": True, "tooltip": True}, "encoding": line},
    ]
    return _base(rows) | {"layer": layers, "height": 240}


def _bytes(folder: Folder) -> dict[str, Any]:
    """Bars by projection, in parts by what is stored."""
    sizes: dict[tuple[str, str], int] = defaultdict(int)
    owners = {layer.name for layer in folder.report.layers}
    # A quantized table keeps its own name; what experts share lies beside them.
    for tensor, size in folder.parts.items():
        module, _, local = tensor.rpartition(".")
        packed = module in owners or local in PARTS
        sizes[place_of(module or tensor)[1], PARTS.get(local, "codes" if packed else KEPT)] += size
    totals = Counter[str]()
    for (name, _), size in sizes.items():
        totals[name] += size
    shown = {name for name, _ in totals.most_common(_MOST_ROWS)}
    labels = _labels(name for name, _ in sizes if name in shown)
    rows = [
        {"module": labels.get(name, "all others"), "part": part, "MB": size / 1e6}
        for (name, part), size in sizes.items()
    ]
    order = ["codes", "scales", "codebooks", "low-rank factors", KEPT]
    present = [part for part in order if any(row["part"] == part for row in rows)]
    colours = dict(zip(order, ("#3b82f6", "#22b8a6", "#a855f7", "#f59e0b", "#9a9a9a"), strict=True))
    scale = {"domain": present, "range": [colours[part] for part in present]}
    return _spec(
        rows,
        {"type": "bar", "tooltip": True},
        {
            "y": {"field": "module", "type": "nominal", "sort": "-x", "axis": {"title": None, "labelLimit": 150}},
            "x": {"field": "MB", "type": "quantitative", "aggregate": "sum", "axis": {"title": "MB", "tickCount": 5}},
            "color": {
                "field": "part",
                "type": "nominal",
                "scale": scale,
                "legend": {"title": None, "orient": "top", "columns": 2},
            },
        },
        height=_ROW * len({row["module"] for row in rows}),
        description="Bytes by module.",
    )


def _counts(counts: Mapping[str, int]) -> dict[str, Any]:
    rows = [{"reason": reason, "layers": count} for reason, count in counts.items()]
    return _bars(rows, "reason", "layers")


def _times(measured: Measured) -> Chart:
    """Seconds by stage; what no stage has is reading, checking and writing."""
    rest = measured.seconds - sum(measured.stages.values())
    stages = {**measured.stages, **({"the rest": rest} if rest > 0 else {})}
    rows = [{"stage": stage, "seconds": seconds} for stage, seconds in stages.items()]
    return Chart("times", "Where the time went", f"{measured.seconds:.0f} s in all.", _bars(rows, "stage", "seconds"))


def _bars(rows: list[dict[str, Any]], name: str, value: str) -> dict[str, Any]:
    y = {"field": name, "type": "nominal", "sort": None, "axis": {"title": None, "labelLimit": 150}}
    x = {"field": value, "type": "quantitative", "axis": {"title": value, "tickCount": 5}}
    mark = {"type": "bar", "tooltip": True, "color": "#3b82f6"}
    return _spec(rows, mark, {"y": y, "x": x}, height=_ROW * len(rows), description=value)


def _dial(told: Mapping[str, Any], at: float) -> Chart:
    """The curve of the best choices under all budgets, and where this folder is."""
    rows = [{"bits per weight": bits, "divergence": max(harm, _LEAST)} for bits, harm in told["curve"]]
    here = {"bits per weight": at, "divergence": max(told["harm"], _LEAST)}
    domain = {"scale": {"zero": False}}
    x = {"field": "bits per weight", "type": "quantitative", **domain}
    y = {
        "field": "divergence",
        "type": "quantitative",
        "scale": {"type": "log"},
        "axis": {"title": "nats a token", "tickCount": 5},
    }
    layers = [
        {"mark": {"type": "line", "color": "#3b82f6", "tooltip": True}, "encoding": {"x": x, "y": y}},
        {
            "data": {"values": [here]},
            "mark": {"type": "point", "filled": True, "size": 110, "color": "#ef4444", "tooltip": True},
            "encoding": {"x": x, "y": y},
        },
    ]
    note = (
        "Predicted divergence from the original under other budgets. The dot is this folder: "
        f"{at:.3f} bits per weight, {told['harm']:.4g} nats a token."
    )
    return Chart("dial", "What more or fewer bits would do", note, _base(rows) | {"layer": layers, "height": 240})


def _points(
    folders: Sequence[Folder], values: Mapping[str, float], errors: Mapping[str, float], what: str, note: str
) -> Chart:
    """Folders over their bits per weight; a bar of one standard error each way, on the logarithm, where it is known."""
    rows: list[dict[str, Any]] = [
        {"folder": f.name, "bits per weight": f.report.bits_per_weight, what: max(values[f.name], _LEAST)}
        for f in folders if f.name in values
    ]  # fmt: skip
    x = {
        "field": "bits per weight",
        "type": "quantitative",
        "scale": {"zero": False, "padding": 24},
        "axis": {"tickCount": 6},
    }
    # Without nice ends of the axis, which are powers of ten: bars would be dots.
    scale = {"type": "log", "padding": 18, "nice": False}
    y = {"field": what, "type": "quantitative", "scale": scale, "axis": {"tickCount": 5}}
    legend = {"title": None, "orient": "bottom", "columns": 1, "labelLimit": 320}
    colour = {"field": "folder", "type": "nominal", "sort": None, "legend": legend}
    place: dict[str, Any] = {"x": x, "y": y, "color": colour}
    mark = {"type": "point", "filled": True, "size": 140, "tooltip": True, "opacity": 1}
    drawn: dict[str, Any] = {"mark": mark, "encoding": place}
    if known := [row for row in rows if errors.get(row["folder"])]:
        for row in known:
            # That of a mean of what is never negative is at most the mean.
            share = math.exp(min(errors[row["folder"]] / row[what], 1.0))
            row |= {"standard error": errors[row["folder"]], "from": row[what] / share, "to": row[what] * share}
        ends = place | {"y": y | {"field": "from", "title": what}, "y2": {"field": "to"}}
        drawn = {"layer": [{"mark": {"type": "errorbar", "ticks": {"width": 16}}, "encoding": ends}, drawn]}
    return Chart("comparison", "Side by side", note, _base(rows) | drawn | {"height": 300})


def _base(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"$schema": SCHEMA, "data": {"values": rows}, "width": "container"}


def _spec(
    rows: list[dict[str, Any]], mark: dict[str, Any], encoding: dict[str, Any], *, height: int, description: str
) -> dict[str, Any]:
    own = {"mark": mark, "encoding": encoding, "height": height, "description": description}
    return _base(rows) | own
