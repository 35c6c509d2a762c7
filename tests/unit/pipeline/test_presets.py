"""Presets: the command and Python mean the same by a name, and what a user says goes before it."""

import json
from pathlib import Path

import pytest
from helpers import tiny_folder

import lorq
from lorq.cli import main
from lorq.methods import METHODS
from lorq.pipeline.options import Options, read_options
from lorq.pipeline.presets import DEFAULT, PAPERS, PRESETS, preset

RUN = {"samples": 2, "seq_len": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("presets") / "llama", "llama")


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_means_by_a_preset_what_python_does(name, source, text_file, tmp_path, capsys):
    words = ["--preset", name, "--bits", "3", "--samples", "2", "--seq-len", "32", "--calibration", str(text_file)]
    assert main(["quantize", str(source), str(tmp_path / "command"), *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    given = preset(name, bits=3, calibration=str(text_file), **RUN)
    report = lorq.quantize(source, tmp_path / "python", **given)
    assert told["settings"] == report.settings and report.settings["codebook"] == "trellis"
    assert told["run"] == json.loads(json.dumps(report.run)) and told["checksums"] == report.checksums


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_the_pages_have_the_line_that_a_preset_stands_for(name, page):
    text = (Path(__file__).parents[3] / page).read_text(encoding="utf-8")
    line = " ".join(f"{flag} {value}" for flag, value in PRESETS[name].flags().items())
    assert f"| `{name}` | `{line}` |" in text


def test_without_a_method_python_takes_the_default_preset(source, text_file, tmp_path):
    report = lorq.quantize(source, tmp_path / "out", calibration=text_file, **RUN)
    assert report.settings == vars(PRESETS[DEFAULT].method) and report.run["token_weights"] == "gradient"


@pytest.mark.parametrize("said", [{}, {"stream": "original"}], ids=["as in the paper", "with a word of the user's"])
def test_a_papers_method_is_run_as_in_the_paper(said, source, text_file, tmp_path, capsys):
    words = [f"--{key}={value}" for key, value in said.items()]
    run = ["--samples", "2", "--seq-len", "32", "--calibration", str(text_file), "--group-size", "32"]
    assert (
        main(["quantize", str(source), str(tmp_path / "out"), "--method", "lopro-paper", *run, *words, "--json"]) == 0
    )
    got = capsys.readouterr()
    told, expected = json.loads(got.out)["run"], PAPERS["lopro-paper"] | said
    assert f"--stream {expected['stream']} --token-weights plain" in got.err
    report = lorq.quantize(
        source, tmp_path / "python", lorq.LoPRoPaper(group_size=32), calibration=text_file, **RUN, **said
    )
    for key, value in expected.items():
        assert told[key] == report.run[key] == value


def test_every_paper_is_a_methods_and_says_options_alone():
    assert set(PAPERS) < set(METHODS)
    for options in PAPERS.values():
        assert vars(read_options(dict(options))) == vars(Options()) | options


def test_what_is_said_goes_before_the_preset():
    given = preset("best", bits=2, window=12, token_weights="equal")
    assert (given["method"].bits, given["method"].window, given["token_weights"]) == (2, 12, "equal")
    with pytest.raises(ValueError, match="window must be between 8 and 16, got 17"):
        preset("best", window=17)
    with pytest.raises(TypeError, match="settings of flrq and options, got widows"):
        preset("best", widows=12)
    with pytest.raises(
        ValueError, match=r"preset must be one of fast, balanced, best, got 'bset'; did you mean best\?"
    ):
        preset("bset")


def test_a_preset_and_a_method_are_two_ways_to_say_how(source, tmp_path, capsys):
    words = ["quantize", str(source), str(tmp_path / "out"), "--preset", "fast", "--method", "gptq"]
    assert main(words) == 1
    assert "got preset fast and method gptq; keep one of them" in capsys.readouterr().err
