"""Help and wrong input are answered before torch and transformers are there."""

import os
import subprocess
import sys
import time

import pytest

SCRIPT = """
import sys
from lorq.cli import main
status = main(sys.argv[1:])
print("loaded:", *{"torch", "transformers", "numpy"} & set(sys.modules))
sys.exit(status)
"""
BENCH = ("sketch", "experts", "decode", "adapt", "quantize")
COMMANDS = (
    "evaluate",
    "inspect",
    "verify",
    "report",
    "export",
    "push",
    "generate",
    "tune",
    "adapt",
    "merge",
    "families",
    "demo",
    "bench",
)
HELP = ["", *COMMANDS, *(f"bench {name}" for name in BENCH)]
MISTAKES = {
    "quantise {model} {out}": 'Unknown command "quantise"',
    "evaluate {model} --nope": "Unknown option: --nope",
    "evaluate {missing}": "no such model: {missing}",
    "evaluate {empty}": "{empty} does not",
    "evaluate {model} --reference {missing}": "no such model: {missing}",
    "generate {missing} Hi": "no such model: {missing}",
    "generate {empty} Hi": "{empty} does not",
    "report": "report needs at least 1 folder that `lorq quantize` wrote, got 0",
    "report {missing}": "there is no folder {missing}",
    "report {model}": "{model} has no lorq_report.json",
    "inspect {missing}": "there is no folder {missing}",
    "inspect {model}": "{model} has no lorq_report.json",
    "verify {missing}": "there is no folder {missing}",
    "adapt {missing} {out} --text python-docs": "no such model: {missing}",
    "adapt {model} {out} --text python-docs": "{model} has no packed layers",
    "adapt {other} {out} --text python-docs": "{other} has 2 packed layers, none of them with scale factors",
    "adapt {model} {used} --text python-docs": "{used} must be a new folder",
    "tune {missing} {out} --reference {model}": "no such model: {missing}",
    "tune {model} {out} --reference {missing}": "no such model: {missing}",
    "tune {model} {out} --reference {model}": "{model} has no lorq_report.json",
    "tune {model} {out} --reference {model} --steps 0": "steps or block_steps must be at least 1, got 0 for both",
    "tune {model} {out} --reference {model} --steps -1": "steps must be at least 0, got -1",
    "tune {model} {out} --reference {model} --text nothing.txt": "text must be one of python-docs",
    "merge {missing} {empty} {out}": "no such model: {missing}",
    "merge {model} {empty} {out}": "{empty} has no lorq_adapter.json",
    "merge {model} {empty} {used}": "{used} must be a new folder",
    "quantize {missing} {out}": "no such model: {missing}",
    "quantize {missing} {out} --method lopro --bits=3": "no such model: {missing}",
    "quantize {empty} {out}": "{empty} does not",
    "quantize {model} {used}": "{used} is not empty (thesis.txt)",
    "quantize --bits 3 --dry-run {model} {used}": "{used} is not empty (thesis.txt)",
    "quantize --exclude {empty} --resume {missing} {out}": "no such model: {missing}",
    "quantize {model} {out} --method gtpq": "nearest, got 'gtpq'; did you mean gptq?",
    "quantize {model} {out} --calibration={missing}": "calibration must be one of python-docs",
    "quantize {typo} {out}": "nor a hub id; did you mean {model}?",
    "quantize nobody/nothing {out}": "no such model: there is no folder or file nobody/nothing, and the hub did not",
    "evaluate {model}": "{model} has no tokenizer",
    "evaluate {model} --text wikitext": "'wikitext', and no such file exists; did you mean wikitext2?",
    "evaluate {model} --window 1": "window must be at least 2, got 1",
    "evaluate {model} --dtype int3": 'Invalid value "int3" for --dtype',
    "generate {model} Hi": "{model} has no tokenizer",
    "generate {model} Hi --products byte": 'Invalid value "byte" for --products',
    "generate {model} Hi --tokens 0": "tokens must be at least 1, got 0",
    "adapt {model} {out} --text nothing.txt": "text must be one of python-docs",
    "export {missing} {out} --to dense": "no such model: {missing}",
    "export {model} {out} --to dense": "{model} has no lorq_report.json",
    "export {model} {out} --to densa": "got 'densa'; did you mean dense?",
    "export {model} {out}": "to must be given unless OUT ends in .gguf",
    "export {model} {used} --to dense": "{used} must be new",
    "export {model} {used} --to dense --overwrite": "exported and nothing else, to be replaced, it has thesis.txt",
    "export {model} {out} --to dense --dtype int4": 'Invalid value "int4" for --dtype',
    "push {missing} org/name": "there is no folder {missing}",
    "push {model} org/name": "{model} has no lorq_report.json",
    "families nothing-like-it": "no model type or class of transformers has 'nothing-like-it' in its name",
    "families nothing-like-it --json": "has 'nothing-like-it' in its name",
    "quantize": "MODEL and OUT are missing; usage: lorq quantize MODEL OUT [OPTIONS]",
    "merge {model}": "ADAPTER is missing; usage: lorq merge MODEL ADAPTER",
    "bench adapt": "MODEL is missing; usage: lorq bench adapt MODEL",
    "adapt {model} {out}": 'Command "adapt" parameter --text requires',
    "evaluate {model} --text {empty}": "text must be a file, {empty} is a folder",
    "quantize {model} {out} --calibration {empty}": "calibration must be a file, {empty} is a folder",
    "bench adapt {missing}": "no such model: {missing}",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    home = tmp_path_factory.mktemp("startup")
    for name in ("model", "other", "empty", "used"):
        (home / name).mkdir()
    (home / "model/config.json").write_text('{"model_type": "llama"}')
    layers = '{"a": {"bits": 4}, "b": {"bits": 4, "scale_rank": 0}}'
    (home / "other/config.json").write_text(
        f'{{"quantization_config": {{"quant_method": "lorq", "layers": {layers}}}}}'
    )
    (home / "used/thesis.txt").write_text("years of work")
    return {name: str(home / name) for name in ("model", "other", "empty", "used", "missing", "out")} | {
        "typo": f"{home}/modle"
    }


def answer(*arguments):
    """Status and standard error of a command that must load nothing heavy, and take no time that a user notices."""
    start = time.perf_counter()
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, env=offline)
    # A quarter of a second; the bound is for machines that are busy.
    assert time.perf_counter() - start < 5
    assert done.stdout.splitlines()[-1] == "loaded:", done.stdout
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", HELP)
def test_help_loads_nothing_heavy(command):
    assert answer(*command.split(), "--help") == (0, "")


def test_the_table_of_families_loads_nothing_heavy():
    assert answer("families", "gemma") == (0, "")


def test_a_reader_that_goes_away_is_no_error():
    running = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.replace("print(", "0 and print("), "families"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    running.stdout.close()
    with running:
        assert (running.stderr.read(), running.wait()) == ("", 141)


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_are_found_before_anything_heavy_is_loaded(command, places):
    status, message = answer(*(word.format(**places) for word in command.split()))
    assert status == 1 and MISTAKES[command].format(**places) in message and message.count("\n") == 1
