"""What lorq does with models on a CUDA device, against the same on the CPU."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import layer_format, tiny_folder

import lorq
from lorq.kernels import implementation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# The same numbers summed in another order.
KEPT_DB = 40


def sqnr_db(expected, found):
    return float(20 * torch.log10(expected.norm() / (expected - found).norm()))


def command(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "lorq.cli", *map(str, arguments)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "family, method, more",
    [
        ("llama", "nearest", ()), ("llama", "flrq", ()), ("llama", "lopro", ()), ("llama", "lrq", ("--steps=20",)),
        ("llama", "lords", ()), ("mixtral", "nearest", ()), ("mixtral", "tileq", ()),
    ],
)  # fmt: skip
def test_a_model_quantized_on_a_device_answers_there_as_on_the_cpu(family, method, more, tmp_path):
    width = {"hidden_size": 64, "intermediate_size": 128}
    folder = tiny_folder(tmp_path / "model", family, **width)
    out = tmp_path / "out"
    calibration = ("--calibration=self", "--samples=4", "--seq-len=32") if method != "nearest" else ()
    settings = "--bits=4", "--group-size=16", "--device=cuda"
    command("quantize", folder, out, f"--method={method}", *settings, *calibration, *more)
    ids = torch.arange(1, 17).view(1, -1)
    with torch.no_grad():
        there = lorq.load(out, device="cuda", dtype="float32")(ids.cuda()).logits.cpu()
        here = lorq.load(out, device="cpu", dtype="float32")(ids).logits
    assert sqnr_db(here, there) > KEPT_DB


def test_a_compiled_model_writes_what_it_writes_otherwise(tmp_path):
    folder, out = tiny_folder(tmp_path / "model", "llama", hidden_size=64, intermediate_size=128), tmp_path / "out"
    command("quantize", folder, out, "--method=nearest", "--bits=4", "--group-size=16", "--device=cuda")
    written = [
        command("generate", out, "abc", "--tokens=12", "--device=cuda", "--dtype=float32", *flags)
        for flags in ((), ("--compile",))
    ]
    assert written[0] == written[1] and written[0]


def test_a_layer_runs_on_the_kernel():
    format = layer_format(4, 128, False, 8, "int8")
    assert implementation(format, 512, torch.device("cuda"), torch.bfloat16).name == "Triton"


def test_bench_decode_measures_the_device():
    text = command("bench", "decode", "1024x1024", "--bits=4", "--ranks=0", "--repeats=2", "--device=cuda", "--json")
    row = json.loads(text.splitlines()[0])
    assert row["runs_on"] == "Triton" and 0 < row["milliseconds"] <= row["call_milliseconds"]
    assert row["times_int4"] > 0 and row["sqnr_db"] > KEPT_DB
