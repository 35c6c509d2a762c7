"""The benchmarks run on small things and report what they say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import tiny_folder

import lorq
from lorq.bench.commands import bench_decode, bench_experts, bench_quantize
from lorq.bench.quantize import PRESETS, flags
from lorq.cli import main


@pytest.fixture
def model(tmp_path):
    return tiny_folder(tmp_path / "model", "llama", max_position_embeddings=128)


def test_quantize_bench_measures_each_run_in_a_process_of_its_own(model, text_file):
    options = {"group_size": 32, "text": str(text_file), "window": 64, "windows": 2}
    rows = list(bench_quantize(str(model), bits=(8, 2), methods=["nearest"], **options))
    assert [(row["method"], row["bits"]) for row in rows] == [("nearest", 8), ("nearest", 2)]
    fine, coarse = rows
    assert 0 < fine["kl_mean"] < 0.01 < coarse["kl_mean"]
    assert fine["bits_per_weight"] == pytest.approx(8 + (16 + 8) / 32, rel=0.02)
    # The packages that quantizing needs beside torch take some hundred megabytes; a wrong unit would be far off.
    assert all(10 < row["peak_megabytes"] < 2000 for row in rows)


@pytest.mark.parametrize("name", PRESETS)
def test_the_flags_of_every_preset_mean_the_preset_and_it_can_be_planned(name, folder_of, tmp_path, monkeypatch):
    method = replace(PRESETS[name], group_size=32)
    planned = lorq.quantize(folder_of("llama"), tmp_path / "out", method, seq_len=32, dry_run=True)
    assert len(planned.layers) == 14
    given = []
    monkeypatch.setattr(lorq, "quantize", lambda *arguments, **_: given.append(arguments) or planned)
    model = str(folder_of("llama"))
    assert main(["quantize", model, "out", *flags(PRESETS[name]), "--dry-run", "--json"]) == 0
    assert given == [(model, Path("out"), PRESETS[name])]


def test_unknown_settings_in_the_bench_are_refused_with_the_known_ones(model):
    with pytest.raises(ValueError, match=r"methods must be among nearest, gptq.*, got best"):
        list(bench_quantize(str(model), methods=["best"]))


def test_bench_prints_one_json_object(capsys):
    assert main(["bench", "sketch", "--size", "64", "--rank", "4", "--repeats", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {"speedup_vs_svd", "speedup_vs_rank1", "speedup_vs_svd_lowrank", "residual_ratio"} <= set(figures)


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


def test_the_decode_bench_times_every_kind_against_the_same_dense_product(capsys):
    command = ["bench", "decode", "64x128", "--bits", "2", "--bits", "4", "--kinds", "integer", "--kinds", "lords"]
    options = [
        "--kinds",
        "rotated",
        "--kinds",
        "vector",
        "--ranks",
        "0",
        "--ranks",
        "4",
        "--group-size",
        "64",
        "--repeats",
        "1",
        "--device",
        "cpu",
    ]
    assert main([*command, *options, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["kind"], row["bits"]) for row in rows[::2]] == [
        ("integer", 2), ("integer", 4), ("lords", 2), ("lords", 4), ("rotated", 2), ("rotated", 4),
        ("vector", 2), ("vector", 4),
    ]  # fmt: skip
    assert [row["rank"] for row in rows] == [0, 4] * 8
    assert all(row["sqnr_db"] > 40 for row in rows)
    for row in rows:
        assert row["of_plain_read"] == pytest.approx(row["gigabytes_a_second"] / row["plain_read"])
        dense, int4 = row["times_dense"] * row["milliseconds"], row["times_int4"] * row["milliseconds"]
        first = rows[0]
        assert dense == pytest.approx(first["times_dense"] * first["milliseconds"]) and int4 > 0
    assert rows[0]["gigabytes_a_second"] * rows[0]["milliseconds"] * 1e6 == pytest.approx(
        64 * 128 / 4 + 2 * 64 * 2 + 64 * 2 / 4
    )


@pytest.mark.parametrize(
    "options, why",
    [
        ({"shapes": ["4096"]}, "out x in such as 4096x4096, got '4096'"),
        ({"kinds": ["float"]}, "among integer, rotated, lords, vector, trellis, got float"),
        ({"tokens": 0}, "at least 1, got 9 and 0"),
        (
            {"shapes": ["100x96"]},
            "be -1 for one group per row, got group_size 128 and shape 100x96",
        ),
        ({"group_size": 0, "kinds": ["lords"]}, "one group per row, got group_size 0 and shape 4096x4096"),
        ({"shapes": ["64x510"], "kinds": ["vector"]}, "vectors of 4 and shape 64x510"),
        ({"shapes": ["64x510"], "kinds": ["rotated"], "group_size": 2}, "for width 510 less 2"),
        ({"dtype": "auto"}, "dtype must be float32, bfloat16, float16, got 'auto'"),
        ({"bits": [4, 9]}, "between 2 and 8, got 9"),
        ({"ranks": [5000]}, "between 0 and 4096 for shape 4096x4096, got 5000"),
        ({"products": ["exact", "int8"]}, "one of exact, bytes, got 'int8'"),
    ],
    ids=lambda value: "",
)
def test_the_decode_bench_refuses_what_it_cannot_time(options, why):
    with pytest.raises(ValueError, match=why):
        list(bench_decode(*options.pop("shapes", []), **options))


def test_the_decode_bench_takes_widths_that_no_int4_operator_does():
    (row,) = bench_decode("96x100", kinds=["vector"], bits=[2], ranks=[0], repeats=1, device="cpu")
    assert row["times_int4"] is None and row["times_dense"] > 0
    (row,) = bench_decode("96x98", kinds=["vector"], bits=[3], ranks=[0], repeats=1, device="cpu")
    assert row["sqnr_db"] > 40
    (row,) = bench_decode("96x96", group_size=-1, bits=[4], ranks=[0], repeats=1, device="cpu")
    assert row["sqnr_db"] > 40


@pytest.mark.parametrize(
    "options, why",
    [
        ({"experts": 5, "rows": 2, "columns": 2}, "at most the grid's cells, got experts 5 of 32 x 16"),
        ({"experts": 4, "top_k": 5}, "top_k at most the experts.*top_k 5"),
        ({"rows": 0}, "a grid of 0 x 8"),
        ({"tokens": [1, 0]}, r"at least 1, got 5 and \[1, 0\]"),
        ({"repeats": 0}, "at least 1, got 0"),
        ({"dtype": "auto"}, "dtype must be float32, bfloat16, float16, got 'auto'"),
    ],
    ids=lambda value: "",
)
def test_the_experts_bench_refuses_what_it_cannot_time(options, why):
    with pytest.raises(ValueError, match=why):
        list(bench_experts(**{"hidden": 32, "width": 16, "rank": 2} | options))
