"""The benchmarks run on small things and report what they say."""

import json

import pytest
from helpers import tiny_folder

import lorq
from lorq.bench import bench_quantize
from lorq.cli import main
from lorq.report import html_page


@pytest.fixture
def model(tmp_path):
    return tiny_folder(tmp_path / "model", "llama", max_position_embeddings=128)


def test_quantize_bench_measures_each_run_in_a_process_of_its_own(model):
    flags = ["--group-size=32"]
    rows = list(bench_quantize(str(model), bits=(8, 2), methods=["nearest"], flags=flags, window=64, windows=2))
    assert [(row["method"], row["bits"]) for row in rows] == [("nearest", 8), ("nearest", 2)]
    fine, coarse = rows
    assert 0 < fine["kl_mean"] < 0.01 < coarse["kl_mean"]
    assert fine["bits_per_weight"] == pytest.approx(8 + (16 + 8) / 32, rel=0.02)
    # The packages that quantizing needs beside torch take some hundred megabytes; a wrong unit would be far off.
    assert all(10 < row["peak_megabytes"] < 2000 and row["seconds"] > 0 for row in rows)


def test_unknown_settings_in_the_bench_are_refused_with_the_known_ones(model):
    with pytest.raises(ValueError, match=r"methods must be among nearest, gptq.*, got best"):
        list(bench_quantize(str(model), methods=["best"]))


def test_bench_prints_one_json_object(capsys):
    assert main(["bench", "sketch", "--size", "64", "--rank", "4", "--repeats", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {"speedup_vs_svd", "speedup_vs_rank1", "speedup_vs_svd_lowrank", "residual_ratio"} <= set(figures)


def test_the_page_has_a_row_for_every_layer_and_escapes_its_title(model, tmp_path):
    report = lorq.quantize(model, tmp_path / "out", lorq.Nearest(group_size=32))
    page = html_page(report, title="<b>")
    assert "<title>&lt;b&gt;</title>" in page
    assert page.count("<tr><td>") == len(report.layers) and all(layer.name in page for layer in report.layers)
    # Three series of bars: ranks, errors before, errors after.
    assert page.count("<rect ") == 3 * len(report.layers)


def test_the_experts_bench_counts_what_the_low_rank_part_needs(capsys):
    flags = "4 --hidden 64 --width 32 --rank 4 --rows 2 --columns 2 --top-k 2 --tokens 3 --repeats 1 --json".split()
    assert main(["bench", "experts", *flags]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["tokens"] == 3 and min(row[f"{form}_seconds"] for form in ("none", "each", "fused")) > 0
    # Six pairs of token and expert, three projections, both sides of each: in and out are 64 and 32.
    assert row["each_megaproducts"] == pytest.approx(6 * 3 * 4 * (64 + 32) / 1e6)
    # Gate and up: three tokens by two rows, six pairs by their columns; down: six pairs, three tokens by two columns.
    fused = 2 * (3 * 2 * 4 * 64 + 6 * 4 * 32) + 6 * 4 * 32 + 3 * 2 * 4 * 64
    assert row["fused_megaproducts"] == pytest.approx(fused / 1e6)
    assert row["fused_megabytes"] <= row["each_megabytes"]
