"""What users bring to the doors: their names, files, settings and machines."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import BYTES, folder_digests
from tokenizers import AddedToken
from transformers import AutoTokenizer

import lorq
from lorq.cli import main
from lorq.models import self_text
from lorq.refusals import _SWITCHES, _VALUED, _method_names

NEAREST = ["--method", "nearest", "--group-size", "32"]
SMALL = ["--group-size", "32", "--samples", "2", "--seq-len", "16"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(folder_of, tmp_path_factory):
    """A small lorq folder, not to be changed."""
    out = tmp_path_factory.mktemp("doors") / "out"
    lorq.quantize(folder_of("llama"), out, lorq.LoPRo(bits=4, group_size=32, rank=2), samples=2, seq_len=16)
    return out


# ---- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small[q4]", "x[/q4]", "a :smile: b"])
def test_names_of_folders_are_shown_as_they_are(name, folder_of, tmp_path, capsys):
    out = tmp_path / name
    assert main(["quantize", str(folder_of("llama")), str(out), *NEAREST]) == 0
    assert main(["inspect", str(out)]) == 0
    assert capsys.readouterr().out.count(name) == 4  # both say where it is, and quantize what comes next


def test_a_tilde_is_the_home_folder_at_every_door(folder_of, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(shutil.copytree(folder_of("llama"), tmp_path / "m"))
    method = lorq.LoRDS(bits=4, group_size=32, rounding="nearest", weighting="none", steps=1)
    (tmp_path / "text.txt").write_text("prose " * 99)
    lorq.quantize("~/m", "~/q", method, calibration="~/text.txt", samples=2, seq_len=16)
    assert lorq.read_report("~/q").method == "lords"
    model = lorq.load("~/q")
    lorq.adapt.train(model, "~/text.txt", steps=1, batch=1, seq_len=16)
    lorq.adapt.save_adapter(model, "~/a")
    lorq.evaluate("~/q", adapter="~/a", text="~/text.txt", window=16, windows=1)
    assert main(["merge", "~/q", "~/a", "~/merged"]) == 0
    assert {"q", "a", "merged"} <= set(os.listdir(tmp_path)) and "~" not in os.listdir()


def test_what_comes_next_names_the_command_as_it_was_called(monkeypatch, tmp_path):
    from lorq.show import called_as

    for called, by_name, told in (
        (tmp_path / "my bin/lorq", None, f"'{tmp_path}/my bin/lorq'"), (tmp_path / "lorq", tmp_path / "lorq", "lorq"),
        (tmp_path / "pytest", None, "lorq"),
    ):  # fmt: skip
        called.parent.mkdir(exist_ok=True)
        called.touch()
        monkeypatch.setattr(sys, "argv", [str(called)])
        monkeypatch.setattr("shutil.which", lambda _, found=by_name: found and str(found))
        assert called_as() == told


# ---- tokenizers -------------------------------------------------------------------------------------------


@pytest.fixture
def of_remote_code(folder_of, tmp_path):
    """A model whose tokenizer needs code that its folder brings along, and which leaves a trace when it runs."""
    folder = shutil.copytree(folder_of("llama"), tmp_path / "remote")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | own))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    return folder


@pytest.mark.parametrize("lacking", [False, True], ids=["remote code", "none"])
def test_a_tokenizer_that_cannot_be_had_is_refused_before_weights_are_read(
    lacking, of_remote_code, text_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    if lacking:
        for file in of_remote_code.glob("tokenizer*"):
            file.unlink()
    rule = "has no tokenizer" if lacking else "needs code of its own, which lorq does not run"
    text = ["--calibration", str(text_file)]
    for command in (
        ["quantize", of_remote_code, tmp_path / "out", *SMALL, *text],
        ["quantize", of_remote_code, tmp_path / "out", *SMALL, *text, "--dry-run"],
        ["evaluate", of_remote_code, "--text", text_file], ["generate", of_remote_code, "Hi"],
    ):  # fmt: skip
        assert main([*map(str, command)]) == 1
        printed = capsys.readouterr().err
        assert re.search(f"lorq: .*{rule}.*--calibration self, or with --method nearest", printed), printed
        assert "check weights" not in printed and "trust_remote_code" not in printed
    for way in (NEAREST, ["--method", "gptq", *SMALL]):  # and these need none
        assert main(["quantize", str(of_remote_code), str(tmp_path / way[1]), *way]) == 0
    assert not (tmp_path / "ran").exists()


def test_tokens_that_the_model_does_not_know_are_named(folder_of, tmp_path, capsys):
    folder = shutil.copytree(folder_of("llama"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<new>", special=False)])
    tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text("<new> hello " * 99)
    given = ["--calibration", str(tmp_path / "text.txt"), *SMALL]
    for command in (["quantize", str(folder), str(tmp_path / "out"), *given], ["generate", str(folder), "a <new> day"]):
        assert main(command) == 1
        assert f"size {BYTES + 1}, " in (printed := capsys.readouterr().err) and f"{BYTES + 1} ('<new>')" in printed


def test_a_quantized_model_tells_what_its_calibration_windows_begin_with(folder_of, text_file, tmp_path):
    for rule, started in (("auto", True), ("never", False)):
        report = lorq.quantize(
            folder_of("llama"), tmp_path / rule, lorq.GPTQ(group_size=32), calibration=text_file, samples=2,
            seq_len=16, start_token=rule,
        )  # fmt: skip
        assert report.run["start_token"] is started


# ---- generation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 4}, {"num_return_sequences": 2, "do_sample": True}, {"prompt_lookup_num_tokens": 2},
        {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5}, {"penalty_alpha": 0.6, "top_k": 4},
        {"stop_strings": ["never"]}, {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=lambda asked: next(iter(asked)),
)  # fmt: skip
def test_a_folder_that_asks_for_several_answers_gives_one(asked, folder, tmp_path):
    expected = "".join(lorq.generate(folder, "Hi", tokens=4))
    other = shutil.copytree(folder, tmp_path / "other")
    plain = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps(plain | asked))
    assert "".join(lorq.generate(other, "Hi", tokens=4)) == expected


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_answer_goes_on_where_standard_output_cannot_hold_a_character(encoding, tmp_path):
    script = (
        "import sys, lorq, lorq.cli\n"
        "from lorq.show import print_pieces\n"
        "lorq.cli._run = lambda _: print_pieces(['a \\ufffd', ' \\u4e2d b'])\n"
        "sys.exit(lorq.cli.main([]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": encoding}
    )
    assert (done.returncode, done.stdout) == (0, "a ? ? b\n"), done.stderr


# ---- torch's defaults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["float64", "bfloat16", "meta"])
def test_the_callers_defaults_for_tensors_change_nothing(other, folder, folder_of, text_file, tmp_path):
    text, method = {"text": str(text_file), "window": 16, "windows": 2}, lorq.LoPRo(bits=4, group_size=32, rank=2)

    def measured():
        return lorq.evaluate(folder, **text), "".join(lorq.generate(folder, "Hi", tokens=3))

    expected = measured()
    torch.set_default_device("meta") if other == "meta" else torch.set_default_dtype(getattr(torch, other))
    try:
        before = torch.get_default_dtype(), torch.get_default_device()
        lorq.quantize(folder_of("llama"), tmp_path / "out", method, samples=2, seq_len=16)
        assert measured() == expected
        assert (torch.get_default_dtype(), torch.get_default_device()) == before
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert folder_digests(tmp_path / "out") == folder_digests(folder)


# ---- what goes wrong --------------------------------------------------------------------------------------


BUG, FULL = r"a bug of lorq, or files that it does not foresee: ", r"memory does not suffice "


@pytest.mark.parametrize(
    "error, told",
    [
        (
            IndexError("list index"),
            BUG + r"IndexError: list index \(test_doors.py:\d+\); please .*LORQ_TRACE=1",
        ),
        (RuntimeError("a\nb"), BUG + r"RuntimeError: a b .*; what is finished is kept, the same command with --resume"),
        (RuntimeError("CUDA out of memory."), FULL + r"\(CUDA out of memory. while .*\); take a smaller"),
        (RuntimeError("alloc: not enough memory: you"), FULL + r".*fewer --samples.*--resume goes on"),
        (MemoryError(), FULL),
    ],
)
def test_whatever_goes_wrong_ends_in_one_line(error, told, folder_of, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(lorq.Nearest, "solve", fail)
    command = ["quantize", str(folder_of("llama")), str(tmp_path / "out"), *NEAREST]
    assert main(command) == 1
    printed = capsys.readouterr().err.splitlines()
    assert printed[-2] == "quantize: 0 of 2" and re.match(f"lorq: {told}", printed[-1]), printed
    monkeypatch.setenv("LORQ_TRACE", "1")
    with pytest.raises(type(error)):
        main([*command, "--overwrite"])


def test_hours_of_writing_are_told_of_with_what_to_do(model, tokenizer, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr("lorq.models.self_text.time.monotonic", lambda: now.append(now[-1] + 60) or now[-1])
    caplog.set_level(logging.WARNING)
    self_text.self_windows(model, tokenizer, windows=20, length=20, seed=0)
    # A minute for 16 steps of 16 windows, of 20 * 19 tokens: a minute and a half.
    assert not caplog.records
    monkeypatch.setattr(self_text, "_LONG_SECONDS", 80)
    self_text.self_windows(model, tokenizer, windows=20, length=20, seed=0)
    assert "takes about 1.5 min; fewer --samples" in caplog.text and caplog.text.count("takes about") == 1


def test_what_is_known_before_torch_is_what_is_so():
    from lorq.pipeline.options import Options

    assert _method_names() == list(lorq.METHODS)
    defaults = vars(Options()) | {"method": "", "preset": "", "tune": 0, "json": False}
    for kind in lorq.METHODS.values():
        defaults |= vars(kind())
    flags = {f"--{name.replace('_', '-')}": isinstance(value, bool) for name, value in defaults.items()}
    assert {flag for flag, switch in flags.items() if switch} == set(_SWITCHES)
    assert {flag for flag, switch in flags.items() if not switch} >= set(_VALUED)
