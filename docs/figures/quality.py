"""The picture of README: bits against divergence, from the tables of docs/results.md and docs/results/trellis.md.

python docs/figures/quality.py     # writes quality.svg beside itself; needs lorq[report]
"""

import re
from pathlib import Path

HERE = Path(__file__).parent


def points() -> list[dict]:
    """Rows of the first table, by method, and of the one of budgets; each once."""
    text = (HERE.parent / "results.md").read_text(encoding="utf-8")
    first = text.partition("\n## ")[2].partition("\n## ")[0]
    rows = [
        {"method": method, "bits": float(bits), "KL": float(kl)}
        for method, bits, kl in re.findall(r"^\| \d \| ([a-z-]+) \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \|", first, re.M)
    ]
    budgets = (HERE.parent / "results" / "trellis.md").read_text(encoding="utf-8")
    budget = budgets.partition("## At each size")[2].partition("What each part is worth")[0]
    found = re.findall(r"^\| (\d\.\d{3}) \| ([\d.]+) \| [\d.]+ \|$", budget, re.M)
    return rows + [{"method": "lorq, balanced", "bits": float(bits), "KL": float(kl)} for bits, kl in found]


def chart(rows: list[dict]) -> dict:
    """Lines over bits, on a logarithmic scale."""
    order = ["lorq, balanced", "flrq", "gptq", "flrq-paper", "nearest"]
    colours = ["#2563eb", "#22b8a6", "#f59e0b", "#a855f7", "#9a9a9a"]
    x = {"field": "bits", "type": "quantitative", "scale": {"domain": [2, 5]}, "title": "bits per weight, all counted"}
    y = {
        "field": "KL",
        "type": "quantitative",
        "scale": {"type": "log"},
        "title": "KL from the original (less is better)",
    }
    colour = {
        "field": "method", "type": "nominal", "sort": order, "scale": {"domain": order, "range": colours},
        "legend": {"title": None, "orient": "bottom", "columns": 3, "labelLimit": 260},
    }  # fmt: skip
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"values": rows}, "width": 620, "height": 300, "background": "white", "padding": 12,
        "mark": {"type": "line", "point": {"size": 70}, "strokeWidth": 2.5},
        "encoding": {"x": x, "y": y, "color": colour},
        "config": {"font": "Helvetica, Arial, sans-serif", "axis": {"gridColor": "#e5e7eb"}, "view": {"stroke": None}},
    }  # fmt: skip


if __name__ == "__main__":
    import vl_convert

    (HERE / "quality.svg").write_text(vl_convert.vegalite_to_svg(chart(points())), encoding="utf-8")
