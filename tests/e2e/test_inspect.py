"""lorq inspect of what other programs read: exports, adapters, files for llama.cpp."""

import json

import pytest
from gguf_models import gguf_folder

import lorq
from lorq.cards import command_of
from lorq.cli import main

RANKS = lorq.FLRQ(bits=4, group_size=32, budget=2.0, min_gain=0.0, epochs=0, rounding="nearest", symmetric=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory, text_file):
    """A tiny model in q4_0, and with factors; exports of them. Not to be changed."""
    home = tmp_path_factory.mktemp("inspect")
    gguf_folder(home / "model", "llama")
    lorq.quantize(
        home / "model", home / "q4_0", lorq.GPTQ(grid="q4_0"), calibration=str(text_file), samples=2, seq_len=32
    )
    lorq.evaluate(home / "q4_0", text=text_file, window=32, windows=2)
    lorq.quantize(home / "model", home / "ranks", RANKS, calibration=str(text_file), samples=2, seq_len=32)
    lorq.export(home / "q4_0", home / "model.gguf")
    lorq.export(home / "ranks", home / "base.gguf", adapter=home / "lora.gguf")
    lorq.export(home / "ranks", home / "base", to="compressed-tensors", adapter=home / "lora")
    lorq.export(home / "q4_0", home / "dense", to="dense", dtype="bfloat16")
    return home


def inspected(place, capsys):
    """The lines and the JSON object."""
    capsys.readouterr()
    assert main(["inspect", str(place)]) == 0
    lines = [" ".join(line.strip("│ ").split()) for line in capsys.readouterr().out.splitlines()]
    assert main(["inspect", str(place), "--json"]) == 0
    return lines, json.loads(capsys.readouterr().out)


def test_a_file_says_what_it_has_and_how_it_was_made(made, capsys):
    lines, told = inspected(made / "model.gguf", capsys)
    report = lorq.read_report(made / "q4_0")
    layer = next(layer for layer in report.layers if layer.name == "model.layers.1.mlp.up_proj")
    # 128 x 64 weights in blocks of 18 bytes for 32
    assert f"blk.1.ffn_up.weight │ 128x64 │ q4_0 │ 4.50 │ {layer.error_after:.4f} │ 4,608".split() in map(
        str.split, lines
    )
    row = next(tensor for tensor in told["parts"] if tensor["name"] == "blk.1.ffn_up.weight")
    assert row["error"] == layer.error_after and row["bytes"] == 4608 and row["type"] == "q4_0"
    assert told["bits_per_weight"] == 4.5 and told["architecture"] == "llama" and told["lost"] == {}
    assert told["report"]["settings"] == report.settings and told["report"]["run"] == report.run
    assert told["evaluations"][0]["windows"] == 2 and told["version"] == lorq.__version__
    text = "\n".join(lines)
    assert "what │ a file for llama.cpp (llama)" in text and "types │ 14 q4_0, 6 f32" in text
    assert "lorq quantize MODEL OUT --method gptq --grid q4_0 --calibration text.txt" in text
    assert "lorq export OUT model.gguf" in lines and "(2 windows of 32 tokens), of the folder OUT" in text
    assert str(made) not in json.dumps(told | {"place": ""})


def test_an_export_and_its_adapter(made, capsys):
    lines, told = inspected(made / "base", capsys)
    report = lorq.read_report(made / "ranks")
    assert [part["type"] for part in told["parts"]].count("4-bit codes") == 14 == len(report.layers)
    # 4 bits, 16 for 32 weights, and two numbers of 64 bits for the shape of each layer
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    assert told["bits_per_weight"] == pytest.approx(4.5 + 14 * 128 / weights)
    assert any("whose low-rank part is in the adapter" in line for line in lines)
    lines, told = inspected(made / "lora", capsys)
    ranks = [layer.rank for layer in report.layers if layer.rank]
    assert sorted(told["ranks"]) == sorted(ranks) and told["base"] == str(made / "base")
    assert f"rank │ mean {sum(ranks) / len(ranks):.1f}, {min(ranks)} to {max(ranks)}" in lines
    lines, told = inspected(made / "lora.gguf", capsys)
    assert sorted(told["ranks"]) == sorted(ranks) and told["kind"] == "gguf adapter"
    lines, told = inspected(made / "dense", capsys)
    assert {part["type"] for part in told["parts"]} == {"bfloat16"} and "rounding" in told["lost"]
    assert "bits per weight │ 16.000 in all" in lines


def test_an_adapter_of_compensate_says_so(made, tmp_path, capsys, text_file):
    options = {"calibration": str(text_file), "samples": 2, "seq_len": 32, "rank": 2}
    lorq.compensate(made / "model", made / "q4_0", tmp_path / "lora", form="peft", **options)
    lines, told = inspected(tmp_path / "lora", capsys)
    assert set(told["ranks"]) == {2}
    same = "--rank 2 --calibration text.txt --samples 2 --seq-len 32"
    assert command_of(lorq.read_report(tmp_path / "lora")) == f"lorq compensate ORIGINAL QUANTIZED OUT {same}"
    text = "\n".join(lines)
    assert "made by │ lorq quantize ORIGINAL QUANTIZED --method gptq --grid q4_0 " in text
    assert "\nlorq compensate ORIGINAL QUANTIZED OUT --rank 2 " in text and "(without factors: " in text
    assert str(text_file) not in json.dumps(told)
    more = options | {"rank": 0, "budget": "9%", "exclude": ["o_proj", "0.mlp"], "seed": 1}
    report = lorq.compensate(made / "model", made / "q4_0", tmp_path / "other", form="peft", **more)
    own = "--budget 9% --calibration text.txt --samples 2 --seq-len 32 --exclude o_proj --exclude 0.mlp --seed 1"
    assert command_of(report) == f"lorq compensate ORIGINAL QUANTIZED OUT {own}"
    report = lorq.compensate(made / "model", made / "ranks", tmp_path / "f", form="lorq", factor_type="int8", **options)
    assert command_of(report).startswith(
        "lorq compensate ORIGINAL QUANTIZED OUT --form lorq --rank 2 --factor-type int8"
    )
    assert command_of(lorq.read_report(tmp_path / "f")) == command_of(report)
    assert told["base"] == str(made / "q4_0")


def test_what_another_program_wrote_is_told_and_what_is_damaged_refused(made, tmp_path, capsys):
    other = (made / "model.gguf").read_bytes().replace(b"lorq.", b"else.")
    (tmp_path / "other.gguf").write_bytes(other)
    lines, told = inspected(tmp_path / "other.gguf", capsys)
    assert "written by │ another program than lorq" in lines and told["report"] is None
    for name, content, words in (
        ("cut.gguf", other[:-100], "the file is damaged"),
        ("head.gguf", other[:1000], "the file is damaged"),
        ("notes.txt", b"mine", "must be a GGUF file, which begins with b'GGUF', it begins with b'mine'"),
    ):
        (tmp_path / name).write_bytes(content)
        assert main(["inspect", str(tmp_path / name)]) == 1
        assert words in (shown := capsys.readouterr().err) and shown.count("\n") == 1
