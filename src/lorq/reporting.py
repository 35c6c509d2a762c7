"""A page that shows what became of a model: charts of one or more quantized folders, in one file."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorq.charts import Chart, Folder, charts_of, comparison, protocol_in_words
from lorq.models.locate import full_path
from lorq.show import with_error
from lorq.storage.atomic import write_whole
from lorq.storage.json_files import some_of
from lorq.storage.measured import read_measured
from lorq.storage.report import Report, read_report

_MARK = '<meta name="generator" content="lorq report">'  # by which a page is known as one of these
_PNG_WIDTH, _PNG_SCALE = 560, 3


def report(
    *folders: str | Path, page: str | Path = "lorq-report.html", png: str | Path | None = None, overwrite: bool = False
) -> list[Path]:
    """One page with charts of one or more quantized folders, side by side where there are several.

    Bits, ranks and errors by depth and projection, where the bytes are and where the time went, what other budgets
    would do, and the figures of `lorq evaluate`, which a folder keeps. The page is one file and needs no network.

    Args:
        folders: folders that `lorq quantize` wrote.
        page: the file to write; an earlier page of lorq there is replaced.
        png: also write each chart as a PNG file into this folder, for papers.
        overwrite: replace pictures that are there, and a page that another program wrote.

    Returns:
        The files written, the page first.

    Raises:
        ValueError: without a folder, or for one that is damaged.
        FileNotFoundError: for what is no finished lorq folder.
        FileExistsError: if something else is at ``page``, or a picture is there.
        ModuleNotFoundError: without the package vl-convert-python, which draws.
    """
    if not folders:
        raise ValueError("report needs at least 1 folder that `lorq quantize` wrote, got 0; name one, or several")
    paths = list(dict.fromkeys(map(full_path, folders)))
    reports = [read_report(path) for path in paths]  # refuses other folders before the work
    page, place = full_path(page), None if png is None else full_path(png)
    _refuse_folder(page)
    if not overwrite:
        _refuse_foreign(page)
    for folder in (page.parent, *([place] if place else [])):
        _refuse_file(folder)
    if find_spec("vl_convert") is None:
        raise ModuleNotFoundError(
            "lorq report needs the package vl-convert-python, which draws and is not installed: "
            "pip install 'lorq[report]' (or pip install vl-convert-python)"
        )
    opened = [
        Folder(name, told, read_measured(path), _parts(path, told))
        for name, path, told in zip(_names(paths), paths, reports, strict=True)
    ]
    pictures = {} if place is None else {place / name: chart for name, chart in _pictures(opened).items()}
    _check_pictures(pictures, overwrite=overwrite)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(page, _page(opened).encode())
    _draw(pictures)
    return [page, *pictures]


def _refuse_folder(page: Path) -> None:
    """Refuse a folder in the place of a page, and names of other kinds of files, which --overwrite would replace."""
    if page.is_dir():
        raise FileExistsError(f"page must be a file, {page} is a folder; name a file in it, as {page / 'report.html'}")
    if page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(
            f"page must be a name that ends in .html, got {page}; name it {page.with_suffix('.html').name}"
        )


def _refuse_foreign(page: Path) -> None:
    """Refuse to replace what is no page of lorq."""
    if page.is_file() and _MARK.encode() not in page.read_bytes()[:4096]:
        raise FileExistsError(
            f"{page} is there, and lorq report did not write it; choose another --page, or replace it with --overwrite"
        )


def _refuse_file(folder: Path) -> None:
    """Refuse a place for files in or below a file."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"files cannot be written into {folder}: {there} is a file; choose another folder")


def _check_pictures(pictures: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse to replace files that are there."""
    there = [path.name for path in pictures if os.path.lexists(path)]
    if there and not overwrite:
        place = next(iter(pictures)).parent
        raise FileExistsError(
            f"{place} must have none of the pictures, it has {some_of(there)}; choose another --png, or replace them "
            "with --overwrite"
        )


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' own names, or whole paths where two have the same."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _parts(path: Path, told: Report) -> dict[str, int]:
    """Bytes of each stored tensor, by the headers of the weight files."""
    from lorq.storage.safetensors_file import read_header

    headers = [read_header(path / name) for name in told.checksums]
    return {name: tensor.end - tensor.begin for header in headers for name, tensor in header.tensors.items()}


def _page(folders: Sequence[Folder]) -> str:
    """The whole page: charting library, specifications and text."""
    library = import_module("vl_convert").javascript_bundle().replace("</script", r"<\/script")
    several = len(folders) > 1
    drawn: list[tuple[str, Chart]] = [("all-", comparison(folders))] if several else []
    sections = [_summary(folders), _figures(drawn)]
    for number, folder in enumerate(folders):
        own = [(f"f{number}-", chart) for chart in charts_of(folder)]
        heading = f"<h2 id=folder-{number}>{escape(folder.name)}</h2>" if several else ""
        sections.append(f"<section>{heading}{_figures(own)}{_table(folder.report)}</section>")
        drawn += own
    specs = json.dumps({mark + chart.name: chart.spec for mark, chart in drawn}).replace("<", r"\u003c")
    title = escape(" · ".join(folder.name for folder in folders))
    template = Path(__file__).with_name("report_page.html").read_text(encoding="utf-8")
    values = {"mark": _MARK, "title": title, "body": "\n".join(sections), "specs": specs, "library": library}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)


def _figures(drawn: Sequence[tuple[str, Chart]]) -> str:
    return "<div class=charts>" + "".join(
        f"<figure><figcaption><h3>{escape(chart.title)}</h3><p>{escape(chart.note)}</p></figcaption>"
        f'<div class=chart id="{mark}{chart.name}"></div></figure>'
        for mark, chart in drawn
    ) + "</div>"  # fmt: skip


def _summary(folders: Sequence[Folder]) -> str:
    """A row of figures for each folder."""
    heads = (
        "folder",
        "method",
        "bits per weight",
        "MB",
        "smaller",
        "mean rank",
        "output error",
        "KL",
        "perplexity",
        "measured on",
    )
    rows = []
    for number, folder in enumerate(folders):
        told, last = folder.report, folder.measured.evaluations[-1] if folder.measured.evaluations else {}
        before, ranks = told.run.get("original_bytes", 0), [layer.rank for layer in told.layers]
        name = f"<a href=#folder-{number}>{escape(folder.name)}</a>" if len(folders) > 1 else escape(folder.name)
        cells = (
            name, escape(told.method), f"{told.bits_per_weight:.3f}", f"{told.bytes / 1e6:.1f}",
            f"{before / told.bytes:.1f} times" if before else "", f"{sum(ranks) / max(len(ranks), 1):.1f}",
            f"{told.mean_error():.4f}", _number(last, "kl_mean", "kl_stderr", 4),
            _number(last, "perplexity", "perplexity_stderr", 2),
            escape(protocol_in_words(last)) if last else "",
        )  # fmt: skip
        rows.append(_row(cells))
    return f"<div class='wide summary'><table>{_row(heads, 'th')}{''.join(rows)}</table></div>"


def _number(found: Mapping[str, Any], name: str, error: str, digits: int) -> str:
    return "" if found.get(name) is None else with_error(f"{found[name]:.{digits}f}", found.get(error))


def _row(cells: Sequence[Any], tag: str = "td") -> str:
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"


def _table(told: Report) -> str:
    """All layers in numbers, folded away; what was left out, and why."""
    rows = [
        _row((
            escape(layer.name), f"{layer.shape[0]} x {layer.shape[1]}", layer.bits, layer.rank,
            escape(told.stop_in_words(layer)), f"{layer.error_before:.4f}", f"{layer.error_after:.4f}",
            f"{layer.bytes:,}", escape(layer.note),
        ))
        for layer in told.layers
    ]  # fmt: skip
    heads = _row(("layer", "shape", "bits", "rank", "stop", "before", "after", "bytes", "note"), "th")
    kept = "".join(f"<li>{escape(name)}: {escape(reason)}</li>" for name, reason in told.kept.items())
    left = f"<details><summary>Not quantized</summary><ul>{kept}</ul></details>" if kept else ""
    return (
        f"<details><summary>All {len(rows)} layers</summary><div class=wide><table>{heads}{''.join(rows)}</table></div>"
        f"</details>{left}"
    )


def _pictures(folders: Sequence[Folder]) -> dict[str, Chart]:
    """Charts by the names of their files: ``comparison.png``, and ``FOLDER-bits.png`` and so on."""
    drawn = {"comparison.png": comparison(folders)} if len(folders) > 1 else {}
    names = [Path(folder.name).name for folder in folders]
    if len(set(names)) < len(names):  # of folders elsewhere, in the order in which they were given
        names = [f"{number}-{name}" for number, name in enumerate(names, 1)]
    for name, folder in zip(names, folders, strict=True):
        drawn |= {f"{name}-{chart.name}.png": chart for chart in charts_of(folder)}
    return drawn


def _draw(pictures: Mapping[Path, Chart]) -> None:
    """Write each chart as a file."""
    draw = import_module("vl_convert").vegalite_to_png
    for file, chart in pictures.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, draw(chart.spec | {"width": _PNG_WIDTH, "background": "white"}, scale=_PNG_SCALE))
