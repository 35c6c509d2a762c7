"""Charts hold the numbers of the report, cell by cell."""

import math
from dataclasses import replace

import pytest

from lorq.charts import Folder, charts_of, comparison
from lorq.storage.measured import Measured
from lorq.storage.report import LayerReport, Report


def layer(name, bits=4, rank=0, after=0.01, **rest):
    return LayerReport(name, (8, 16), bits, rank, "given", 0.5, after, 100, **rest)


def folder(*layers, name="out", parts=(), evaluations=(), seconds=0.0, stages=(), run=()):
    report = Report("flrq", {}, layers, 1000, {}, dict(run), {})
    return Folder(name, report, Measured(seconds, dict(stages), tuple(evaluations)), dict(parts))


def values(chart):
    return chart.spec["data"]["values"]


def named(folder):
    return {chart.name: chart for chart in charts_of(folder)}


def evaluation(kl, window=512):
    return {
        "reference": "m", "text": "t", "window": window, "windows": 8, "start_token": False, "adapter": None,
        "dtype": "auto", "products": "exact", "kl_mean": kl, "perplexity": 1.0,
    }  # fmt: skip


def test_the_map_of_bits_has_a_cell_for_each_depth_and_projection_and_means_of_experts():
    experts = [layer(f"model.layers.1.mlp.experts.{e}.up_proj", bits) for e, bits in enumerate((2, 3, 7))]
    drawn = named(folder(layer("model.layers.0.self_attn.q_proj", 3), *experts, layer("lm_head", 8)))
    assert values(drawn["bits"]) == [
        {"depth": 0, "projection": "q_proj", "bits": 3.0, "layers": 1},
        {"depth": 1, "projection": "up_proj", "bits": 4.0, "layers": 3},
    ]
    assert "rank" not in drawn and "times" not in drawn and "dial" not in drawn


def test_projections_of_one_name_are_told_apart():
    drawn = named(folder(layer("h.0.attn.c_proj"), layer("h.0.mlp.c_proj"), layer("h.0.mlp.c_fc")))
    assert [row["projection"] for row in values(drawn["bits"])] == ["attn.c_proj", "mlp.c_proj", "c_fc"]


def test_ranks_and_stop_reasons_are_drawn_where_there_is_a_low_rank_part():
    drawn = named(folder(layer("h.0.a", rank=3), layer("h.1.a", rank=0)))
    assert [row["rank"] for row in values(drawn["rank"])] == [3, 0]
    assert values(drawn["stops"]) == [{"reason": "given", "layers": 2}]


def test_bytes_add_up_by_what_is_stored():
    parts = {
        "h.0.a.weight_packed": 50, "h.0.a.weight_scale": 8, "h.0.a.left": 4, "h.0.a.weight_shape": 16,
        "h.0.n.weight": 6, "h.1.a.weight_packed": 50, "emb.weight": 70,
    }  # fmt: skip
    rows = values(named(folder(layer("h.0.a"), layer("h.1.a"), parts=parts))["bytes"])
    found = {(row["module"], row["part"]): round(1e6 * row["MB"]) for row in rows}
    assert found == {
        ("a", "codes"): 116, ("a", "scales"): 8, ("a", "low-rank factors"): 4, ("n", "not quantized"): 6,
        ("emb", "not quantized"): 70,
    }  # fmt: skip
    assert sum(found.values()) == sum(parts.values())


def test_times_end_with_the_rest_and_the_dial_has_this_folder_as_a_point():
    curve = [[2.0, 0.5], [3.0, 0.1]]
    drawn = named(
        folder(layer("h.0.a"), seconds=10.0, stages={"solving": 7.0}, run={"budget": {"curve": curve, "harm": 0.3}})
    )
    assert values(drawn["times"]) == [{"stage": "solving", "seconds": 7.0}, {"stage": "the rest", "seconds": 3.0}]
    assert [list(row.values()) for row in values(drawn["dial"])] == curve
    assert drawn["dial"].spec["layer"][1]["data"]["values"] == [{"bits per weight": 50 / 8, "divergence": 0.3}]


def test_folders_are_compared_by_the_protocol_that_most_share_and_the_rest_is_named():
    one = folder(layer("h.0.a"), name="one", evaluations=[evaluation(0.5), evaluation(0.4, window=64)])
    two = folder(layer("h.0.a"), name="two", evaluations=[evaluation(0.2)])
    odd = folder(layer("h.0.a"), name="odd", evaluations=[evaluation(0.1, window=99)])
    chart = comparison([one, two, odd])
    assert [(row["folder"], row["KL, nats a token"]) for row in values(chart)] == [("one", 0.5), ("two", 0.2)]
    assert "8 windows of 512 tokens of t, against m. Not measured so: odd." in chart.note


def test_standard_errors_are_bars_about_the_points_that_have_them():
    told = evaluation(0.2) | {"kl_stderr": 0.01}
    folders = [
        folder(layer("h.0.a"), name="old", evaluations=[evaluation(0.5)]),
        folder(layer("h.0.a"), name="new", evaluations=[told]),
    ]
    chart = comparison(folders)
    old, new = values(chart)
    assert "from" not in old and "Bars are one standard error." in chart.note
    assert (new["from"], new["to"]) == pytest.approx((0.2 * math.exp(-0.05), 0.2 * math.exp(0.05)))
    bars, points = chart.spec["layer"]
    assert (bars["encoding"]["y"]["field"], bars["encoding"]["y2"]["field"]) == ("from", "to")
    assert points["encoding"]["y"]["field"] == "KL, nats a token"
    assert "layer" not in comparison([folders[0], folders[0]]).spec


def test_folders_without_a_common_evaluation_are_compared_by_their_output_error():
    chart = comparison([folder(layer("h.0.a", after=a), name=str(a)) for a in (0.25, 0.5)])
    assert [row["mean output error"] for row in values(chart)] == [0.25, 0.5]
    assert values(chart)[0]["bits per weight"] == pytest.approx(8 * 100 / (8 * 16))


def test_errors_are_compared_with_what_they_were_measured_against():
    fitted = layer("h.0.a", rank=16)
    for method, settings, run, words in (
        ("flrq", {}, {}, "0.0100 (rounding to nearest: 0.5000)"),
        ("nearest", {"grid": "q4_0"}, {}, "0.0100 (rounding to integers of as many bits: 0.5000)"),
        ("compensate", {}, {}, "0.0100 (without factors: 0.5000)"),
        ("compensate", {}, {"low_rank_part": "there"}, "0.0100 (without factors: 0.5000), with its adapter"),
    ):
        report = Report(method, settings, (fitted,), 1000, {}, run, {})
        assert report.errors_in_words == words
        drawn = named(Folder("out", report, Measured(0.0, {}, ()), {}))["error-by-depth"]
        assert {row["of"] for row in values(drawn)} == {report.before_in_words, "this folder"}
        assert f"layers: {report.before_in_words}, and this folder" in drawn.note
        assert drawn.spec["layer"][0]["encoding"]["color"]["scale"]["domain"][0] == report.before_in_words


def test_a_rank_that_was_asked_for_is_no_stop_reason_in_our_own_words():
    for settings, words in (({"rank": 16}, "asked for"), ({"rank": 0, "max_rank": 16}, "max rank")):
        report = Report("compensate", settings, (replace(layer("h.0.a", rank=16), stop="candidates"),), 1, {}, {}, {})
        drawn = named(Folder("out", report, Measured(0.0, {}, ()), {}))
        assert values(drawn["stops"]) == [{"reason": words, "layers": 1}]
