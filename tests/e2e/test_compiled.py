"""Generating with compiled steps: the same words, through the same operators, or one clear error."""

import json
import shutil
import subprocess
import sys

import pytest
from helpers import tiny_model

import lorq
from lorq.cli import main

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
# In a process of its own: torch.compile cannot trace the checks of shape annotations that a test run adds. Any break of
# the graph is an error there. The models are of one class, each compiled after the one before has run.
SCRIPT = """
import json, sys, torch, lorq
from lorq.runtime.compiled import STEPS, compile_steps

prompt = {"input_ids": torch.tensor([[5, 40, 9, 77]]), "max_new_tokens": 9, "do_sample": False}
found = []
for folder in sys.argv[1:]:
    model = lorq.load(folder)
    plain = model.generate(**prompt)
    compile_steps(model)
    with torch.inference_mode():
        answers = [model.generate(**prompt, **STEPS) for _ in range(2)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            answers.append(model.generate(**prompt, **STEPS))
    calls = {event.key: event.count for event in profile.key_averages()}
    # Tensors of joined layers that are replaced, and one that is called without the others.
    key = model.model.layers[0].self_attn.k_proj
    key.weight_scale = -3 * key.weight_scale
    with torch.inference_mode():
        changed = model.generate(**prompt, **STEPS)
    again = lorq.load(folder)
    other = again.model.layers[0].self_attn.k_proj
    other.weight_scale = -3 * other.weight_scale
    x = torch.randn(1, 1, key.in_features, dtype=model.dtype)
    torch.compile(lambda x: key(x))(x)
    with torch.no_grad():
        assert torch.equal(key(x), other(x))
    found.append({
        "plain": plain.tolist(), "answers": [answer.tolist() for answer in answers],
        "products": calls.get("lorq::quant_linear"), "rotations": calls.get("lorq::rotate"),
        "changed": changed.tolist(), "expected": again.generate(**prompt).tolist(),
    })
model.to(torch.bfloat16)
try:
    model.generate(**prompt, **STEPS)
except ValueError as error:
    print(json.dumps([*found, str(error)]))
"""
METHODS = {
    "rotated, with factors": lorq.LoPRo(bits=4, group_size=32, rank=2),
    "levels": lorq.METHODS["nearest"](bits=4, group_size=32, grid="normal-float"),
}


@pytest.mark.slow  # a minute where nothing was compiled before; make test-kernels runs it
@needs_compiler
def test_compiled_steps_write_the_same_tokens_through_the_same_operators(folder_of, text_file, tmp_path):
    for name, method in METHODS.items():
        lorq.quantize(folder_of("llama"), tmp_path / name, method, calibration=str(text_file), samples=4, seq_len=32)
    rotated, levels = (tmp_path / name for name in METHODS)
    command = [sys.executable, "-c", SCRIPT, rotated, levels, rotated]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    *models, refused = json.loads(done.stdout)
    for found in models:
        assert found["answers"] == [found["plain"]] * 3
        assert found["changed"] == found["expected"] != found["plain"]
        # Two blocks: q, k and v in one, o, gate and up in one, down; of nine passes the first is the prompt's, which
        # goes around torch's dispatcher.
        assert found["products"] == 2 * 4 * 8
    assert [found["rotations"] for found in models] == [2 * 4 * 8, None, 2 * 4 * 8]
    assert models[0] == models[2] and models[0]["plain"] != models[1]["plain"]
    assert refused == "the model was compiled in torch.float32 and is torch.bfloat16 now; load and compile it again"


def test_without_a_compiler_one_line_says_so_before_the_model_is_read(tokenizer, tmp_path, capsys):
    from torch._inductor import config

    tiny_model().config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with config.patch("cpp.cxx", ("no-such-compiler",)):
        assert main(["generate", str(tmp_path), "Hi", "--compile", "--device=cpu"]) == 1
    *stages, said = capsys.readouterr().err.splitlines()
    assert said == "lorq: to compile takes a C++ compiler, got none for no-such-compiler; install g++ or set CXX"
    assert all(stage.startswith("load torch") for stage in stages)


@needs_compiler
def test_a_model_that_cannot_be_compiled_whole_is_refused(folder_of, tmp_path, capsys):
    out = tmp_path / "experts"
    lorq.quantize(folder_of("mixtral"), out, lorq.METHODS["nearest"](group_size=32))
    capsys.readouterr()
    arguments = ["generate", str(out), "Hi", "--tokens=4", "--no-chat", "--compile", "--device=cpu"]
    assert main(arguments) == 1
    message = capsys.readouterr().err.rpartition("lorq: ")[2]
    assert message.startswith("MixtralForCausalLM cannot be compiled: ") and message.count("\n") == 1
