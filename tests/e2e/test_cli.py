"""The command line: every command once, the same bytes as from Python, and one clear line for every mistake."""

import json
import os
import re
import shlex
import shutil
import time
from collections import namedtuple

import pytest
import torch
import transformers
from helpers import folder_digests, save_folder, tiny_folder
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lorq
from lorq.adapt.adapters import ADAPTER_CONFIG
from lorq.bars import _left, _ProgressLines
from lorq.cli import main
from lorq.evaluation import _flattering
from lorq.pipeline.presets import DEFAULT, PRESETS
from lorq.show import smaller
from lorq.storage import writer
from lorq.storage.folder import LorqFolder
from lorq.storage.report import Report

SMALL = ["--samples", "4", "--seq-len", "32"]
NEAREST = ["--method", "nearest", "--group-size", "32"]
FLRQ = [
    "--method",
    "flrq",
    "--bits",
    "3",
    "--group-size",
    "32",
    "--rounding",
    "nearest",
    "--epochs",
    "0",
    "--min-gain",
    "0",
]
LAYERS = [
    f"model.layers.{i}.{name}"
    for i in range(2)
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(folder_of):
    return folder_of("llama")


@pytest.fixture
def lorq_command(capsys):
    """Run a command that must succeed; its standard output."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return captured.out

    return run


@pytest.fixture
def failing_command(capsys):
    """Run a command that must fail; its message, which is the end of standard error."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert status == 1
        assert captured.out == "" and "Traceback" not in captured.err
        before, found, message = captured.err.rpartition("lorq: ")
        assert found and (not before or before.endswith("\n"))
        return message.rstrip("\n")

    return run


@pytest.fixture(scope="module")
def flrq_folder(folder_of, text_file, tmp_path_factory):
    """What the quantize command writes, not to be changed."""
    out = tmp_path_factory.mktemp("cli") / "out"
    assert main(["quantize", str(folder_of("llama")), str(out), *FLRQ, "--calibration", str(text_file), *SMALL]) == 0
    return out


# ---- every command ----------------------------------------------------------------------------------------


def test_quantizing_from_python_gives_the_same_bytes(flrq_folder, source, text_file, tmp_path):
    method = lorq.FLRQ(bits=3, group_size=32, rounding="nearest", epochs=0, min_gain=0.0)
    report = lorq.quantize(source, tmp_path / "out", method, calibration=str(text_file), samples=4, seq_len=32)
    assert folder_digests(tmp_path / "out") == folder_digests(flrq_folder)
    assert lorq.read_report(flrq_folder).to_bytes() == report.to_bytes()


@pytest.mark.parametrize("method", list(lorq.METHODS))
def test_every_method_is_planned_from_the_command_line(method, lorq_command, folder_of, text_file, tmp_path):
    options = ["--calibration", text_file, *SMALL, "--group-size=32", "--dry-run", "--json"]
    report = json.loads(lorq_command("quantize", folder_of("mixtral"), tmp_path / "out", "--method", method, *options))
    assert report["method"] == method and len(report["layers"]) == 2 * (4 + 4 * 3)
    assert report["settings"] == vars(lorq.METHODS[method](group_size=32))


def test_what_is_printed_as_json_is_the_report(lorq_command, source, tmp_path):
    report = json.loads(lorq_command("quantize", source, tmp_path / "out", *NEAREST, "--json"))
    assert report == json.loads((tmp_path / "out" / "lorq_report.json").read_bytes())


def test_the_documentation_of_python_calibrates_and_evaluates(lorq_command, source, tmp_path):
    out = tmp_path / "out"
    table = lorq_command("quantize", source, out, *NEAREST, "--calibration=python-docs", *SMALL)
    assert "bits per weight" in table and "4.6" in table
    result = json.loads(lorq_command("evaluate", out, "--window", "16", "--windows", "2", "--json"))
    assert (result["text"], result["tokens"], result["kl_mean"]) == ("python-docs", 30, None)


def test_a_dry_run_tells_the_size_and_writes_nothing(lorq_command, flrq_folder, source, text_file, tmp_path):
    out = tmp_path / "out"
    options = [*FLRQ, "--calibration", text_file, *SMALL, "--dry-run"]
    table = lorq_command("quantize", source, out, *options)
    assert "at most" in table
    planned = json.loads(lorq_command("quantize", source, out, *options, "--json"))
    assert not out.exists() and list(tmp_path.iterdir()) == []
    real = lorq.read_report(flrq_folder)
    assert planned["bytes"] >= real.bytes and planned["bits_per_weight"] >= real.bits_per_weight
    assert [layer["name"] for layer in planned["layers"]] == [layer.name for layer in real.layers]
    assert all(layer["rank"] >= done.rank for layer, done in zip(planned["layers"], real.layers, strict=True))


@pytest.mark.parametrize(
    "before",
    [
        "--group-size -1", "--symmetric", "--no-symmetric", "--no-resume", "--no-router-weights", "--grid integer",
        "--range-search none", "--empty-exclude", "--group-size 16 --", "--bits=4",
        "--exclude q_proj", "--",
    ],
)  # fmt: skip
def test_flags_may_come_before_model_and_out(before, lorq_command, source, tmp_path):
    size = [] if "--group-size" in before else ["--group-size=32"]
    words = ["--method", "nearest", *size, *before.split(), source, tmp_path / "out"]
    assert json.loads(lorq_command("quantize", "--dry-run", "--json", *words))["method"] == "nearest"


def test_an_output_folder_that_is_a_link_to_nothing_is_refused(failing_command, source, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nothing")
    for name in ("loop", "gone"):
        assert "must be a folder, it is a link to nothing; choose" in failing_command(
            "quantize", source, tmp_path / name
        )
        with pytest.raises(NotADirectoryError, match="it is a link to nothing"):
            lorq.quantize(source, tmp_path / name, lorq.Nearest())


@pytest.mark.parametrize("words", ["--out {out} --model {model}", "--out={out} {model}", "{model} --out {out}"])
def test_model_and_out_may_be_named(words, lorq_command, source, tmp_path):
    named = words.format(model=source, out=tmp_path / "out").split()
    assert json.loads(lorq_command("quantize", *named, *NEAREST, "--dry-run", "--json"))["method"] == "nearest"


def test_inspect_shows_every_layer(lorq_command, flrq_folder):
    table = lorq_command("inspect", flrq_folder)
    report = lorq.read_report(flrq_folder)
    for layer in report.layers:
        row = next((line for line in table.splitlines() if layer.name in line), None)
        assert row, f"{layer.name} is not readable in\n{table}"
        shape = f"{layer.shape[0]}x{layer.shape[1]}"
        for cell in (shape, str(layer.rank), layer.stop, f"{layer.error_after:.4f}", f"{layer.bytes:,}"):
            assert cell in row, (cell, row)
    assert f"{report.bits_per_weight:.3f}" in table


def test_inspect_json_has_exactly_the_agreed_keys(lorq_command, flrq_folder):
    report = json.loads(lorq_command("inspect", flrq_folder, "--json"))
    runs = report.pop("runs")
    assert sorted(runs) == sorted(LAYERS) and all(set(by) == {"name", "declined"} for by in runs.values())
    assert {"bits_per_weight", "bytes", "method", "settings", "layers"} <= set(report)
    assert [layer["name"] for layer in report["layers"]] == LAYERS
    for layer in report["layers"]:
        assert {"name", "shape", "bits", "rank", "stop", "error_before", "error_after", "bytes"} <= set(layer)
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    stored = sum(layer["bytes"] for layer in report["layers"])
    assert report["bits_per_weight"] == pytest.approx(8 * stored / weights, rel=1e-12)
    assert report["bytes"] == sum(
        load.nbytes for f in flrq_folder.glob("*.safetensors") for load in load_file(f).values()
    )
    assert report == json.loads((flrq_folder / "lorq_report.json").read_bytes())


def test_evaluate_json_has_exactly_the_agreed_keys(lorq_command, flrq_folder, source, text_file):
    options = ["--text", text_file, "--window", "32", "--windows", "3", "--json"]
    result = json.loads(lorq_command("evaluate", flrq_folder, "--reference", source, *options))
    assert set(result) == {
        "perplexity", "reference_perplexity", "kl_mean", "kl_p99", "top1", "bits_per_weight", "tokens", "text",
        "window", "windows", "start_token", "perplexity_stderr", "kl_stderr", "ratio_stderr",
    }  # fmt: skip
    assert (result["tokens"], result["window"], result["windows"], result["start_token"]) == (93, 32, 3, True)
    own = json.loads(lorq_command("evaluate", source, *options))
    assert result["reference_perplexity"] == own["perplexity"] != result["perplexity"]
    without = json.loads(lorq_command("evaluate", source, *options, "--start-token=never"))
    assert not without["start_token"] and without["perplexity"] != own["perplexity"]
    assert 0 < result["kl_mean"] < result["kl_p99"] and 0 < result["top1"] < 1
    assert 0 < result["kl_stderr"] < result["kl_mean"] and result["ratio_stderr"] < result["perplexity_stderr"]
    direct = lorq.evaluate(flrq_folder, reference=source, text=str(text_file), window=32, windows=3)
    assert result == direct.as_dict()


def test_evaluating_on_the_calibration_text_says_that_it_flatters(flrq_folder, text_file, tmp_path, caplog):
    options = ["--window=16", "--windows=1", "--json"]
    other = tmp_path / "other.txt"
    other.write_bytes(text_file.read_bytes())
    for text, flatters in ((text_file, True), (other, False)):
        caplog.clear()
        assert main(["evaluate", str(flrq_folder), "--text", str(text), *options]) == 0
        assert (f"calibrated on {text.name}; if it is this text, these figures flatter it" in caplog.text) == flatters
    assert "the text it is measured on" in _flattering("python-docs")
    assert "another part of c4" in _flattering("c4")


def test_every_stage_has_a_line_where_it_begins_and_ends_into_a_file(source, text_file, tmp_path, capsys):
    out, quick = str(tmp_path / "out"), r"done in [0-9.]+ (s|min)"
    assert main(["quantize", str(source), out, *NEAREST]) == 0
    stages = [("open the model", ""), ("check weights", "2"), ("quantize", "2"), ("verify", "2")]
    assert_stages(capsys.readouterr().err, stages, quick)
    assert main(["evaluate", out, "--reference", str(source), "--text", str(text_file), "--window=16"]) == 0
    stages = [("load torch", ""), ("read the model", "2"), ("evaluate", "16")]
    assert_stages(capsys.readouterr().err, stages, quick)
    assert main(["generate", out, "Hi", "--tokens=1"]) == 0
    assert_stages(capsys.readouterr().err, [("load torch", ""), ("read the model", "")], quick)


def assert_stages(printed, stages, quick):
    lines = iter(printed.splitlines())
    for name, total in stages:
        assert next(lines) == (f"{name}: 0 of {total}" if total else name)
        assert re.fullmatch(f"{name}: {f'{total} of {total}, ' if total else ''}{quick}", next(lines))
    assert list(lines) == []


def test_a_slow_stage_has_a_line_every_ten_seconds_with_the_time_that_is_left(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("lorq.bars.time.monotonic", lambda: now[0])
    show = _ProgressLines()
    for done in (*range(7), 39, 40):
        show("quantize", done, 40)
        now[0] += 60 if done > 3 else 3
    assert capsys.readouterr().err.splitlines() == [
        "quantize: 0 of 40", "quantize: 4 of 40, 10 %, 1.8 min left", "quantize: 5 of 40, 12 %, 8.4 min left",
        "quantize: 6 of 40, 15 %, 12 min left", "quantize: 39 of 40, 97 %, 5 s left",
        "quantize: 40 of 40, done in 4.2 min",
    ]  # fmt: skip


@pytest.mark.parametrize("done, left", [(0, ""), (1, "5.0 h left"), (31, "")])
def test_a_bar_tells_the_time_left_after_one_step_however_slow(done, left):
    assert _left(600.0, done, 31) == left


def test_evaluate_and_inspect_count_the_same_bits(lorq_command, flrq_folder, text_file):
    result = json.loads(
        lorq_command("evaluate", flrq_folder, "--text", text_file, "--window=16", "--windows=1", "--json")
    )
    assert result["bits_per_weight"] == lorq.read_report(flrq_folder).bits_per_weight


def test_a_model_does_not_diverge_from_itself(lorq_command, source, text_file):
    options = ["--reference", source, "--text", text_file, "--window", "16", "--windows", "0", "--json"]
    result = json.loads(lorq_command("evaluate", source, *options))
    assert (result["kl_mean"], result["top1"], result["bits_per_weight"]) == (0, 1, 32)
    assert result["windows"] == len(text_file.read_bytes()) // 15  # and a start token
    table = lorq_command("evaluate", source, "--text", text_file, "--window", "16", "--windows", "2")
    assert "perplexity" in table and "kl" not in table


def test_generate_prints_what_the_model_writes(lorq_command, flrq_folder):
    printed = lorq_command("generate", flrq_folder, "One, two,", "--tokens", "5", "--no-chat")
    tokenizer = transformers.AutoTokenizer.from_pretrained(flrq_folder)
    prompt = tokenizer("One, two,", return_tensors="pt", return_token_type_ids=False)
    expected = lorq.load(flrq_folder).generate(**prompt, max_new_tokens=5, do_sample=False)[
        0, prompt.input_ids.shape[1] :
    ]
    assert printed == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


def test_sampling_follows_the_seed(lorq_command, flrq_folder):
    options = ["generate", flrq_folder, "x", "--tokens", "8", "--temperature", "1.5"]
    first, again, other = (lorq_command(*options, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other


def test_the_version_and_the_help_are_printed(lorq_command):
    assert lorq_command("--version").strip() == lorq.__version__
    text = lorq_command("quantize", "--method", "gptq", "--help")
    assert "--range-search" in text and "--damping" in text and "--slope-window" not in text
    assert "--slope-window" in lorq_command("quantize", "--help")


@pytest.mark.parametrize("words", [[], ["--preset", "best"]], ids=["as it is", "best"])
def test_the_help_has_what_a_preset_stands_for_as_defaults(words, lorq_command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    helps = re.sub(r"[│\s]+", " ", lorq_command("quantize", *words, "--help"))
    for flag, value in PRESETS[words[-1] if words else DEFAULT].flags().items():
        assert re.search(rf" {flag} .*?\[default: (.*?)\]", helps)[1] == value
    own = re.sub(r"[│\s]+", " ", lorq_command("quantize", "--method", "flrq", "--help"))
    assert re.search(r" --codebook .*?\[default: (.*?)\]", own)[1] == "scalar"


def test_the_end_tells_what_was_gained_and_what_can_be_done_next(lorq_command, source, text_file, tmp_path):
    told = lorq_command("quantize", source, tmp_path / "it's mine", *NEAREST)
    before = sum(t.nbytes for file in source.glob("*.safetensors") for t in load_file(file).values())
    report = lorq.read_report(tmp_path / "it's mine")
    size, ratio = f"{report.bytes / 1e6:.1f} MB", before / report.bytes
    gain = f"{size}, {ratio:.1f} times smaller than the original's {before / 1e6:.1f} MB"
    assert gain in told and gain in lorq_command("inspect", tmp_path / "it's mine")
    commands = [shlex.split(line)[1:] for line in told.splitlines() if line.startswith("next: ")]
    assert [words[:2] for words in commands] == [["lorq", "evaluate"], ["lorq", "generate"]]
    assert commands[0][-4:] == ["--window", "512", "--windows", "8"]
    small = ["--window", "64", "--windows", "1", "--text", text_file, "--json"]
    measured = json.loads(lorq_command(*commands[0][1:-4], *small))
    assert measured["kl_mean"] > 0 and lorq_command(*commands[1][1:], "--tokens=1")
    assert "next: " not in lorq_command("quantize", source, tmp_path / "dry", *NEAREST, "--dry-run")


@pytest.mark.parametrize(
    ("before", "told"),
    [(5_000_000, ", 2.5 times smaller than the original's 5.0 MB"), (1_000_000, ", the original has 1.0 MB"), (0, "")],
)
def test_what_is_not_smaller_is_not_called_so(before, told):
    run = {"original_bytes": before} if before else {}  # folders of earlier versions do not tell
    assert smaller(Report("nearest", {}, (), 2_000_000, {}, run, {}), 2_000_000) == told


def test_the_demo_quantizes_measures_and_talks(lorq_command, tmp_path, monkeypatch):
    model = tiny_folder(tmp_path / "model", "llama", max_position_embeddings=1024)
    monkeypatch.setattr("lorq.demo.demo_model", lambda: model)
    for _ in range(2):  # an earlier demo is replaced
        told = lorq_command("demo", tmp_path / "out", "--samples=2", "--windows=1")
        assert all(
            part in told
            for part in ("1. Quantize", "bits per weight", "2. Measure", "KL from the reference, mean", "3. Talk")
        )


# ---- settings that reach the layers -----------------------------------------------------------------------


def test_overridden_and_excluded_layers_show_in_the_report(lorq_command, source, tmp_path):
    out = tmp_path / "out"
    changes = [
        "--override",
        "down_proj:bits=8",
        "--override",
        r"layers\.1\..*v_proj:group_size=16",
        "--exclude",
        "q_proj",
    ]
    lorq_command("quantize", source, out, *NEAREST, *changes)
    report = lorq.read_report(out)
    bits = {layer.name: layer.bits for layer in report.layers}
    assert list(bits) == [name for name in LAYERS if "q_proj" not in name]
    assert {name for name, width in bits.items() if width == 8} == {name for name in LAYERS if "down_proj" in name}
    assert report.kept == {name: "excluded by q_proj" for name in LAYERS if "q_proj" in name}
    layers = json.loads((out / "config.json").read_bytes())["quantization_config"]["layers"]
    assert {name for name, layer in layers.items() if layer["group_size"] == 16} == {LAYERS[9]}
    weights = load_file(out / "lorq-00001-of-00002.safetensors")
    assert torch.equal(weights[f"{LAYERS[0]}.weight"], load_file(source / "model.safetensors")[f"{LAYERS[0]}.weight"])
    shown = lorq_command("inspect", out)
    assert f"not quantized: {LAYERS[0]}: excluded by q_proj" in shown


def test_the_last_matching_override_wins_and_several_add_up(source, tmp_path):
    changes = ("proj:bits=5", "v_proj:bits=6", "v_proj:symmetric=true")
    lorq.quantize(source, tmp_path / "out", lorq.Nearest(group_size=32), override=changes)
    layers = json.loads((tmp_path / "out/config.json").read_bytes())["quantization_config"]["layers"]
    for name, layer in layers.items():
        assert (layer["bits"], layer["symmetric"]) == ((6, True) if "v_proj" in name else (5, False))


def test_an_override_that_only_hits_excluded_layers_is_not_ignored(failing_command, source, tmp_path):
    changes = ["--exclude", "v_proj", "--override", "v_proj:bits=8"]
    assert "v_proj" in failing_command("quantize", source, tmp_path / "out", *NEAREST, *changes)


# ---- mistakes ---------------------------------------------------------------------------------------------

MODELS = {}  # name -> function that makes a broken model folder out of a whole one


def broken(make):
    MODELS[make.__name__] = make
    return make


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def start_anew(folder, model):
    shutil.rmtree(folder)
    save_folder(model, folder)


@broken
def no_config(folder):
    (folder / "config.json").unlink()


@broken
def no_weights(folder):
    (folder / "model.safetensors").unlink()


@broken
def no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


@broken
def config_is_no_json(folder):
    (folder / "config.json").write_text("{")


@broken
def unknown_model_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))


@broken
def truncated(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


@broken
def malformed(folder):
    (folder / "model.safetensors").write_bytes((10).to_bytes(8, "little") + b"not json!!")


@broken
def outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    weight_map = {"model.norm.weight": "../x.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@broken
def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@broken
def tensor_missing(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


@broken
def wrong_shape(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(96, 64)}))


@broken
def nan_weight(folder):
    def spoil(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
        tensors["model.layers.1.mlp.down_proj.weight"][0, :2] = torch.inf

    edit_tensors(folder, spoil)


@broken
def nan_norm(folder):
    edit_tensors(folder, lambda tensors: tensors["model.layers.1.input_layernorm.weight"].fill_(torch.nan))


@broken
def bert(folder):
    config = transformers.BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=257)
    start_anew(folder, transformers.BertModel(config))


@broken
def masked_bert(folder):
    config = transformers.BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=257)
    start_anew(folder, transformers.BertForMaskedLM(config))


@broken
def t5(folder):
    config = transformers.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=257)
    start_anew(folder, transformers.T5ForConditionalGeneration(config))


@broken
def jetmoe(folder):
    config = transformers.JetMoeConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_key_value_heads=2, kv_channels=32,
        num_local_experts=2, num_experts_per_tok=1, vocab_size=257,
    )  # fmt: skip
    start_anew(folder, transformers.JetMoeForCausalLM(config))


@broken
def quantized_already(folder):
    source = folder.rename(folder.parent / "dense")
    lorq.quantize(source, folder, lorq.Nearest(group_size=32))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no_config", r"must hold config.json, .*model does not"),
        ("no_weights", r"has neither model.safetensors nor"),
        ("config_is_no_json", r"config.json: not valid JSON .* the file is damaged"),
        ("unknown_model_type", r"nonesuch"),
        ("truncated", r"model.safetensors: truncated: header says \d+ bytes, file has \d+"),
        ("malformed", r"model.safetensors: not valid JSON"),
        ("outside", r"must name a file in or below its folder.*'\.\./x\.safetensors'"),
        ("pickled", r"pickle weights only \(pytorch_model.bin\).*safetensors"),
        ("tensor_missing", r"lacks 1 tensors.*model.layers.1.mlp.up_proj.weight"),
        ("wrong_shape", r"model.layers.1.mlp.up_proj.*96.*128|model.layers.1.mlp.up_proj.*128.*96"),
        ("nan_weight", r"model.layers.0.mlp.up_proj \(1 of 8192\), model.layers.1.mlp.down_proj \(2 of 8192\)"),
        ("bert", r"[Bb]ert"),
        ("masked_bert", r"[Bb]ert"),
        ("t5", r"causal language model, got the model type 't5'"),
        ("jetmoe", r"JetMoeForCausalLM is not supported: 83% of its blocks' weights .*input_linear.* \(2, 128, 64\)"),
        ("quantized_already", r"is already quantized \(lorq\)"),
    ],
)
def test_a_model_that_cannot_be_quantized_is_refused(model, message, failing_command, source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "model")
    MODELS[model](folder)
    found = failing_command("quantize", folder, tmp_path / "out", *NEAREST)
    assert re.search(message, found), found
    assert "\n" not in found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no_tokenizer", r"tokenizer"),
        ("nan_norm", r"not finite|finite|NaN"),
    ],
)
def test_a_model_that_cannot_be_calibrated_is_refused(model, message, failing_command, source, text_file, tmp_path):
    folder = shutil.copytree(source, tmp_path / "model")
    MODELS[model](folder)
    found = failing_command("quantize", folder, tmp_path / "out", *FLRQ, "--calibration", text_file, *SMALL)
    assert re.search(message, found), found
    assert not (tmp_path / "out/config.json").exists()


PLAIN = ["quantize", "{model}", "{out}", *NEAREST]
BUSY = ["quantize", "{model}", "{out}", *FLRQ]
EVALUATE = ["evaluate", "{model}", "--text={text}", "--window=64"]
MISTAKES = {
    "no such folder": (["quantize", "{tmp}/missing", "{out}"], r"no such model: .*missing"),
    "no model": (["quantize"], r"[Mm][Oo][Dd][Ee][Ll]"),
    "no output": (["quantize", "{model}"], r"[Oo][Uu][Tt]"),
    "a file as model": (["quantize", "{text}", "{out}"], r"folder, a hub id or a .gguf file, got the file .*text.txt"),
    "unknown command": (["quantise", "{model}", "{out}"], r"quantise"),
    "unknown option": (["quantize", "{model}", "{out}", "--bitz", "3"], r"--bitz"),
    "another method's option": ([*PLAIN, "--damping", "0.1"], r"--damping"),
    "unknown method": (
        ["quantize", "{model}", "{out}", "--method", "gtpq"], r"one of flrq.*, nearest, got 'gtpq'; did you mean gptq",
    ),
    "bits of 9": ([*PLAIN, "--bits", "9"], r"bits must be between 2 and 8, got 9"),
    "bits in words": ([*PLAIN, "--bits", "three"], r"bits.*three|three.*bits"),
    "group size 0": (
        ["quantize", "{model}", "{out}", "--method=nearest", "--group-size", "0"], r"group_size must be .*got 0",
    ),
    "unknown choice": (
        [*PLAIN, "--range-search", "wide"], r"wide.*none.*saturate.*scale",
    ),
    "unknown stream": ([*PLAIN, "--stream", "both"], r"both.*original.*quantized"),
    "no samples": ([*PLAIN, "--samples", "0"], r"samples must be at least 1, got 0"),
    "a window of 1": ([*PLAIN, "--seq-len", "1"], r"seq_len must be at least 2, got 1"),
    "a seed beyond 64 bits": ([*PLAIN, "--seed", str(2**70)], r"seed.*1180591620717411303424"),
    "resume and overwrite": (
        [*PLAIN, "--resume", "--overwrite"], r"--overwrite and --resume exclude",
    ),
    "unknown device": ([*PLAIN, "--device", "gpu"], r"device must be .*got 'gpu'"),
    "absent device": ([*PLAIN, "--device", "cuda:99"], r"device must be .*got 'cuda:99'"),
    "several devices of two types": ([*PLAIN, "--device", "cpu,cuda:99"], r"device must be .*got 'cuda:99'"),
    "several devices and a cluster": (
        [*PLAIN, "--device", "cpu,cpu", "--cluster", "auto"], r"got device cpu,cpu and cluster auto; give the one",
    ),
    "meta device": ([*PLAIN, "--device", "meta"], r"device must be .*got 'meta'"),
    "override without value": (
        [*PLAIN, "--override", "down_proj:bits"], r"'REGEX:key=value', got 'down_proj:bits'",
    ),
    "unknown override key": (
        [*PLAIN, "--override", "down_proj:bit=3"],
        r"unknown setting 'bit'; known are bits, group_size",
    ),
    "bad override value": (
        [*PLAIN, "--override", "down_proj:bits=99"], r"bits must be between 2 and 8, got 99",
    ),
    "override of another type": (
        [*PLAIN, "--override", "down_proj:symmetric=maybe"],
        r"symmetric must be of type bool, got 'maybe'",
    ),
    "bad regex": (
        [*PLAIN, "--override", "down(:bits=3"], r"override must be a regular expression.*'down\('",
    ),
    "bad exclude regex": (
        [*PLAIN, "--exclude", "*proj"], r"exclude must be a regular expression.*'\*proj'",
    ),
    "pattern without a match": (
        [*PLAIN, "--exclude", "experts", "--override", "fc1:bits=3"],
        r"match none: exclude 'experts', override 'fc1'",
    ),
    "everything excluded": (
        [*PLAIN, "--exclude", "."], r"at least one layer to quantize, got 0",
    ),
    "windows beyond the model": (
        [*BUSY, "--calibration={text}", "--seq-len=129"], r"at most the model's 128 positions, got 129",
    ),
    "text too short": (
        [*BUSY, "--calibration={text}", "--samples=100", "--seq-len=64"],
        r"100 windows of 63 tokens \(and 1 to start with\) need 6300 tokens.*text.txt",
    ),
    "text empty": ([*BUSY, "--calibration={empty}", *SMALL], r"empty.txt must hold text, got 0 bytes"),
    "text missing": (
        [*BUSY, "--calibration=nowhere.txt", *SMALL], r"calibration must be one of python-docs.*'nowhere.txt'",
    ),
    "the model as output": (["quantize", "{model}", "{model}", *NEAREST], r"must not be the model's own"),
    "a file as output": (["quantize", "{model}", "{text}", *NEAREST], r"text.txt must be a folder, it is a file"),
    "inspect a model": (["inspect", "{model}"], r"did not write this folder, .* `lorq quantize .* OUT` makes"),
    "inspect nothing": (["inspect", "{tmp}/missing"], r"there is no folder .*missing; name one that `lorq quantize`"),
    "bits and a budget": (
        [*PLAIN, "--bits=4", "--bits-per-weight=3.1"],
        r"--bits-per-weight chooses each layer's bits, got --bits 4 too; .* such as --widths 4",
    ),
    "bits and a size": ([*PLAIN, "--size", "1MB", "--bits", "3"], r"--size chooses each layer's bits, got --bits 3"),
    "evaluate beyond the model": (
        ["evaluate", "{model}", "--text={text}", "--window=129"],
        r"window must be at most the model's 128 positions, got 129",
    ),
    "evaluate on too little": (
        [*EVALUATE, "--windows=99"], r"99 windows of 63 tokens .* need 6237 tokens.*\(enough for \d+\)",
    ),
    "evaluate -1 windows": ([*EVALUATE, "--windows=-1"], r"windows must be at least 0, got -1"),
    "evaluate in a wrong type": (
        [*EVALUATE, "--windows=2", "--dtype=int4"],
        r'Invalid value "int4" for --dtype. Choose from: "auto", "float32", "bfloat16", "float16"',
    ),
    "generate 0 tokens": (["generate", "{model}", "hello", "--tokens", "0"], r"tokens must be at least 1, got 0"),
    "generate when frozen": (
        ["generate", "{model}", "hello", "--temperature=-1"], r"temperature must be at least 0, got -1",
    ),
    "generate beyond the model": (
        ["generate", "{model}", "hello " * 40, "--tokens", "8", "--no-chat"], r"128 positions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_gets_one_clear_line_and_writes_nothing(mistake, failing_command, source, text_file, tmp_path):
    arguments, message = MISTAKES[mistake]
    (tmp_path / "empty.txt").touch()
    before = folder_digests(source)
    places = dict(tmp=tmp_path, out=tmp_path / "out", model=source, text=text_file, empty=tmp_path / "empty.txt")
    found = failing_command(*(argument.format(**places) for argument in arguments))
    assert re.search(message, found), found
    assert "\n" not in found
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]
    assert folder_digests(source) == before


def test_all_layers_that_a_group_size_does_not_fit_are_listed_before_any_work(failing_command, folder_of, tmp_path):
    folder = tiny_folder(tmp_path / "odd", "llama", intermediate_size=96)
    found = failing_command("quantize", folder, tmp_path / "out", "--method", "nearest", "--group-size", "64")
    places = ", ".join(f"model.layers.{index}.mlp.down_proj" for index in range(2))
    assert f"{places}: group_size must divide the width, got group_size 64 and width 96" in found
    assert "they do not for 2 of them" in found
    assert "group sizes that divide all widths: 32, 16;" in found
    assert not (tmp_path / "out").exists()


def test_a_dry_run_refuses_what_the_run_would_refuse(failing_command, source, text_file, tmp_path):
    run = ["quantize", source, tmp_path / "out", *FLRQ, "--calibration", text_file, "--dry-run"]
    assert "got 129" in failing_command(*run, "--seq-len", "129")
    assert "need 6300 tokens" in failing_command(*run, "--seq-len", "64", "--samples", "100")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    assert "not empty (thesis.txt)" in failing_command(*run, *SMALL)


def test_an_output_folder_with_other_files_is_left_alone(failing_command, source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for flags in ([], ["--overwrite"], ["--resume"]):
        found = failing_command("quantize", source, out, *NEAREST, *flags)
        assert re.search(r"out is not empty \(thesis.txt\): lorq did not write it", found)
        assert [path.read_text() for path in out.iterdir()] == ["years of work"]


def test_a_finished_folder_is_replaced_only_when_told(lorq_command, failing_command, source, tmp_path):
    out = tmp_path / "out"
    lorq_command("quantize", source, out, *NEAREST)
    before = folder_digests(out)
    assert "complete lorq checkpoint; replace it with --overwrite" in failing_command(
        "quantize", source, out, *NEAREST, "--bits=8"
    )
    # What is refused is refused before the old folder is touched.
    assert "got 9" in failing_command("quantize", source, out, *NEAREST, "--bits=9", "--overwrite")
    assert folder_digests(out) == before
    lorq_command("quantize", source, out, *NEAREST, "--bits=8", "--overwrite")
    assert {layer.bits for layer in lorq.read_report(out).layers} == {8}


def test_too_little_room_is_noticed_before_the_work(failing_command, source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    found = failing_command("quantize", source, tmp_path / "out", *NEAREST)
    assert re.search(r"^\S*out needs \d+\.\d\d MB, 1000 bytes are free", found)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_costs_only_the_block_at_hand(
    lorq_command, failing_command, flrq_folder, source, text_file, tmp_path, monkeypatch
):
    out, save = tmp_path / "out", writer.save_file
    command = ["quantize", source, out, *FLRQ, "--calibration", text_file, *SMALL]

    def full(tensors, path, **rest):
        save(tensors, path, **rest)
        if path.name.startswith("lorq-00002-of-00002"):
            os.truncate(path, 100)
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "save_file", full)
        found = failing_command(*command)
    assert re.search(
        r"no space left in .*lorq-00002-of-00002.safetensors needs [0-9.]+ \w+, [0-9.]+ \w+ are free.*--resume", found
    )
    assert not list(out.glob("*.tmp")) and not (out / "config.json").exists()
    lorq_command(*command, "--resume")
    assert folder_digests(out) == folder_digests(flrq_folder)


def test_an_interrupt_says_how_to_go_on_and_exits_as_shells_expect(source, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(lorq.Nearest, "solve", interrupt)
    assert main(["quantize", str(source), str(tmp_path / "out"), *NEAREST]) == 130
    assert "--resume" in capsys.readouterr().err


def test_an_interrupted_training_promises_no_resume(lords_folder, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(lorq, "load", interrupt)
    assert main(["adapt", str(lords_folder), str(tmp_path / "out"), "--text", "python-docs-even"]) == 130
    assert capsys.readouterr().err.endswith("\nlorq: interrupted\n")


@pytest.mark.parametrize(
    "command",
    [("evaluate", "{source}", "--adapter", "{nothing}"), ("generate", "{source}", "Hi", "--adapter", "{nothing}"),
     ("merge", "{source}", "{nothing}", "{nothing}-out")],
    ids=lambda command: command[0],
)  # fmt: skip
def test_a_missing_adapter_is_missed_before_the_model_is_read(command, source, tmp_path, failing_command, monkeypatch):
    def read(*_, **__):
        raise AssertionError("the model was read")

    for place in ("lorq.load", "lorq.runtime.hf.load"):
        monkeypatch.setattr(place, read)
    nothing = tmp_path / "nothing"
    found = failing_command(*(part.format(source=source, nothing=nothing) for part in command))
    assert f"{nothing} has no {ADAPTER_CONFIG}" in found


def test_a_model_of_few_positions_is_quantized_too(lorq_command, tmp_path):
    folder = tiny_folder(tmp_path / "short", "gpt2", n_positions=32)
    lorq_command("quantize", folder, tmp_path / "out", *NEAREST)
    assert lorq.read_report(tmp_path / "out").layers


def test_a_name_that_neither_the_disk_nor_the_hub_knows_is_refused(failing_command, tmp_path, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unknown(*_, **__):
        raise LocalEntryNotFoundError("no network")

    for name in ("snapshot_download", "HfApi.model_info"):
        monkeypatch.setattr(f"huggingface_hub.{name}", unknown)
    found = failing_command("quantize", "nobody/nothing", tmp_path / "out", *NEAREST)
    assert re.search(r"no such model: .*nobody/nothing.*\(no network\)", found)
    assert not (tmp_path / "out").exists()


# ---- training and adapters --------------------------------------------------------------------------------

TRAIN = ["--steps=3", "--batch=2", "--seq-len=16", "--learning-rate=5e-3"]


@pytest.fixture(scope="module")
def lords_folder(folder_of, text_file, tmp_path_factory):
    """A model that can be trained, not to be changed."""
    out = tmp_path_factory.mktemp("lords") / "out"
    method = lorq.LoRDS(bits=4, group_size=32, rounding="nearest", weighting="none", steps=2, refine_steps=0)
    lorq.quantize(folder_of("llama"), out, method, calibration=str(text_file), samples=4, seq_len=32)
    return out


@pytest.fixture(scope="module")
def adapter(lords_folder, text_file, tmp_path_factory):
    """What the adapt command writes, not to be changed."""
    out = tmp_path_factory.mktemp("adapters") / "mine"
    assert main(["adapt", str(lords_folder), str(out), "--text", str(text_file), "--rank=5", *TRAIN]) == 0
    return out


def test_an_adapter_trained_from_python_has_the_same_bytes(adapter, lords_folder, text_file, tmp_path):
    model = lorq.load(lords_folder)
    lorq.adapt.train(model, str(text_file), rank=5, steps=3, batch=2, seq_len=16, learning_rate=5e-3)
    lorq.adapt.save_adapter(model, tmp_path / "same")
    assert folder_digests(tmp_path / "same") == folder_digests(adapter)


def test_adapt_tells_what_it_did(lorq_command, lords_folder, text_file, tmp_path):
    run = ["adapt", lords_folder, tmp_path / "out", "--text", text_file, *TRAIN]
    began = time.monotonic()
    figures = json.loads(lorq_command(*run, "--json"))
    assert 0 < figures.pop("seconds") < time.monotonic() - began
    model = lorq.load(lords_folder)
    done = lorq.adapt.train(model, str(text_file), steps=3, batch=2, seq_len=16, learning_rate=5e-3)
    last = pytest.approx(sum(done.losses) / 3)
    assert figures == {"trained": done.parameters, "first_loss": done.losses[0], "last_loss": last}
    printed = lorq_command(*run[:2], tmp_path / "again", *run[3:])
    assert f"{done.parameters:,} numbers trained" in printed and f"{done.losses[0]:.4f} at the first" in printed


def test_adapt_through_the_rounding_writes_a_model(lorq_command, lords_folder, source, text_file, tmp_path):
    run = ["adapt", lords_folder, tmp_path / "out", "--text", text_file, "--mode=qat", "--reference", source, *TRAIN]
    lorq_command(*run)
    model = lorq.load(lords_folder)
    settings = {"steps": 3, "batch": 2, "seq_len": 16, "learning_rate": 5e-3}
    lorq.adapt.train(model, str(text_file), "qat", reference=source, **settings)
    lorq.adapt.save(model, tmp_path / "same", note="trained for 3 steps")
    assert folder_digests(tmp_path / "out") == folder_digests(tmp_path / "same") != folder_digests(lords_folder)
    lorq_command("verify", tmp_path / "out")


def test_integers_in_groups_train_through_the_rounding(lorq_command, folder_of, source, text_file, tmp_path):
    """The folder is as before but for codes and scales; both learn, the scales alone at first."""
    base, out = tmp_path / "base", tmp_path / "out"
    lorq.quantize(
        folder_of("llama"), base, lorq.GPTQ(bits=3, group_size=32), calibration=str(text_file), samples=4, seq_len=32
    )
    run = ["adapt", base, out, "--text", text_file, "--mode=qat", "--reference", source, *TRAIN, "--scale-steps=1"]
    figures = json.loads(lorq_command(*run, "--json"))
    lorq_command("verify", out)
    before, after = (LorqFolder.open(path) for path in (base, out))
    assert before.formats == after.formats and before.config == after.config
    assert "trained for 3 steps" in after.report.layers[0].note
    for name, weight in before.layers():
        old, new = weight.tensors(), after.weight(name).tensors()
        assert {key for key in old if not torch.equal(old[key], new[key])} == {"weight_packed", "weight_scale"}
    model = lorq.load(base)
    windows = {"steps": 3, "batch": 2, "seq_len": 16, "learning_rate": 5e-3, "scale_steps": 1}
    done = lorq.adapt.train(model, str(text_file), "qat", reference=source, **windows)
    assert figures["first_loss"] == done.losses[0]
    loaded = lorq.load(out)
    with torch.no_grad():
        torch.testing.assert_close(loaded(torch.arange(9)[None]).logits, model(torch.arange(9)[None]).logits)


def test_a_merged_model_evaluates_and_talks_as_the_model_with_the_adapter(
    lorq_command, lords_folder, adapter, source, text_file, tmp_path
):
    out = tmp_path / "out"
    lorq_command("merge", lords_folder, adapter, out)
    lorq_command("verify", out)
    assert {layer.rank for layer in lorq.read_report(out).layers} == {5}
    options = ["--reference", source, "--text", text_file, "--window=32", "--windows=2", "--json"]
    results = [
        json.loads(lorq_command("evaluate", *model, *options))
        for model in ([lords_folder, "--adapter", adapter], [out], [lords_folder])
    ]
    assert results[0] == results[1] != results[2]
    said = [
        lorq_command("generate", *model, "Line 3:", "--tokens=8", "--no-chat")
        for model in ([lords_folder, "--adapter", adapter], [out])
    ]
    assert said[0] == said[1]


def test_settings_of_training_are_flags(lorq_command):
    text = lorq_command("adapt", "--help")
    for flag in (
        "--steps",
        "--learning-rate",
        "--scale-rate",
        "--warmup",
        "--gradient-checkpointing",
        "--rank",
        "--seed",
    ):
        assert flag in text


ADAPT = ["adapt", "{lords}", "{out}", "--text={text}", "--seq-len=16"]
NEW_FOLDER = r"must be a new folder, it has .*; choose another, or delete it first"
TRAINING_MISTAKES = {
    "no text": (["adapt", "{lords}", "{out}"], r"[Tt][Ee][Xx][Tt]"),
    "unknown text": ([*ADAPT[:3], "--text=nowhere.txt"], r"text must be one of python-docs.*'nowhere.txt'"),
    "empty text": ([*ADAPT[:3], "--text={empty}"], r"empty.txt must hold text, got 0 bytes"),
    "short text": (
        [*ADAPT[:3], "--text={short}", "--seq-len=128"],
        r"1 window of 127 tokens .* needs 127 tokens.*short.txt.*; lower --seq-len",
    ),
    "windows beyond the model": (
        [*ADAPT[:4], "--seq-len=129"], r"seq_len must be at most the model's 128 positions, got 129",
    ),
    "unknown mode": ([*ADAPT, "--mode=lora"], r"lora.*peft.*qat"),
    "unknown setting": ([*ADAPT, "--epochs=3"], r"--epochs"),
    "no steps": ([*ADAPT, "--steps=0"], r"steps must be at least 1, got 0"),
    "a rate of 2": ([*ADAPT, "--learning-rate=2"], r"learning_rate must be between 0 and 1, got 2.0"),
    "a rank too large": ([*ADAPT, "--rank=65"], r"at most a layer's smaller side, got 65: .* is 64 x 64 with rank 1"),
    "a rank of 0": ([*ADAPT, "--rank=0"], r"rank must be at least 1, or -1 .* got 0"),
    "a seed beyond 64 bits": ([*ADAPT, f"--seed={2**70}"], r"seed must be .* got 1180591620717411303424"),
    "rank with qat": ([*ADAPT, "--mode=qat", "--rank=4"], r"rank serves mode peft, got 4 with mode qat"),
    "reference with peft": (
        [*ADAPT, "--reference={model}"], r"a reference serves mode qat, got '.*' with mode peft",
    ),
    "another architecture as reference": (
        [*ADAPT, "--mode=qat", "--reference={other}"], r"must be the original of the model, .*has nothing for",
    ),
    "no such reference": ([*ADAPT, "--mode=qat", "--reference={tmp}/no/where"], r"no such model: .*where"),
    "unknown device": ([*ADAPT, "--device=gpu"], r"device must be .*got 'gpu'"),
    "not quantized": (["adapt", "{model}", *ADAPT[2:]], r"only models quantized with lords .* no packed layers"),
    "quantized otherwise": (
        ["adapt", "{flrq}", *ADAPT[2:]], r"only models quantized with lords .* 14 packed layers, none of them with",
    ),
    "factors beside codes": (
        ["adapt", "{flrq}", *ADAPT[2:], "--mode=qat"],
        r"nothing beside them, .* has low-rank factors of rank \d+ \(.*\); quantize it with gptq",
    ),
    "no such model": (["adapt", "{tmp}/missing", *ADAPT[2:]], r"no such model: .*missing"),
    "adapter into a model": (
        ["adapt", "{lords}", "{lords}", *ADAPT[3:]], NEW_FOLDER,
    ),
    "adapter over an adapter": (
        ["adapt", "{lords}", "{adapter}", *ADAPT[3:]], NEW_FOLDER,
    ),
    "adapter over a file": (["adapt", "{lords}", "{text}", *ADAPT[3:]], r"text.txt must be a new folder, it is a file"),
    "model into a model": (
        ["adapt", "{lords}", "{lords}", *ADAPT[3:], "--mode=qat"], NEW_FOLDER,
    ),
    "merge without an adapter": (["merge", "{lords}", "{tmp}/missing", "{out}"], r"missing has no lorq_adapter.json"),
    "merge another model": (["merge", "{model}", "{adapter}", "{out}"], r"only models quantized with lords"),
    "merge into the model": (["merge", "{lords}", "{adapter}", "{lords}"], NEW_FOLDER),
    "merge a damaged adapter": (["merge", "{lords}", "{damaged}", "{out}"], r"adapter version 2, this lorq reads 1"),
    "evaluate with no adapter": (
        ["evaluate", "{lords}", "--adapter={tmp}", "--text={text}", "--window=16", "--windows=1"],
        r"has no lorq_adapter.json: no adapter is there; name a folder",
    ),
    "evaluate the original with an adapter": (
        ["evaluate", "{model}", "--adapter={adapter}", "--text={text}", "--window=16", "--windows=1"],
        r"only models quantized with lords take adapters",
    ),
    "generate with another base's": (
        ["generate", "{lords}", "hello", "--adapter={foreign}", "--tokens=1", "--no-chat"],
        r"is an adapter for the base 000000000000, this model is [0-9a-f]{12}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", list(TRAINING_MISTAKES))
def test_a_mistake_in_training_gets_one_clear_line_and_writes_nothing(
    mistake, failing_command, lords_folder, adapter, flrq_folder, folder_of, text_file, tmp_path_factory, tmp_path
):
    arguments, message = TRAINING_MISTAKES[mistake]
    (tmp_path / "empty.txt").touch()
    places = dict(
        tmp=tmp_path, out=tmp_path / "out", model=folder_of("llama"), lords=lords_folder, adapter=adapter,
        flrq=flrq_folder, other=folder_of("gpt2"), text=text_file, empty=tmp_path / "empty.txt",
    )  # fmt: skip
    places["short"] = tmp_path_factory.mktemp("texts") / "short.txt"
    places["short"].write_text("too short")
    for name, change in (("damaged", {"lorq_adapter": 2}), ("foreign", {"base": 64 * "0"})):
        places[name] = shutil.copytree(adapter, tmp_path_factory.mktemp("adapters") / name)
        config = json.loads((adapter / ADAPTER_CONFIG).read_bytes())
        (places[name] / ADAPTER_CONFIG).write_text(json.dumps(config | change))
    before = folder_digests(lords_folder)
    found = failing_command(*(argument.format(**places) for argument in arguments))
    assert re.search(message, found), found
    assert "\n" not in found
    assert {path.name for path in tmp_path.iterdir()} <= {"empty.txt", "cache"}
    assert folder_digests(lords_folder) == before


def test_products_of_bytes_move_the_figures_a_little_and_other_words_are_refused(flrq_folder, text_file, capsys):
    common = dict(text=str(text_file), window=32, windows=2)
    exact, rough = (lorq.evaluate(flrq_folder, products=way, **common) for way in ("exact", "bytes"))
    assert exact.perplexity != rough.perplexity == pytest.approx(exact.perplexity, rel=0.05)
    alone = [lorq.evaluate(flrq_folder, reference=flrq_folder, products=way, **common) for way in ("exact", "bytes")]
    assert alone[0].kl_mean < 1e-9 < alone[1].kl_mean < 0.01  # the reference stays exact
    assert main(["generate", str(flrq_folder), "Hi", "--products=int8"]) == 1
    assert capsys.readouterr().err == 'lorq: Invalid value "int8" for --products. Choose from: "exact", "bytes".\n'
    with pytest.raises(ValueError, match="products must be one of exact, bytes, got 'int8'"):
        getattr(lorq.generate, "__wrapped__", lorq.generate)(flrq_folder, "Hi", products="int8")
