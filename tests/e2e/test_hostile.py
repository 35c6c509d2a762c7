"""Files that somebody has damaged, or made to harm: what the fuzzer found once, and some of its cases each time."""

import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mutate import read_parts, write_parts
from readers import readers_of
from safetensors.torch import load_file, save_file
from seeds import LAYER, make_seeds

import lorq
from lorq.cli import main
from lorq.exports.gguf_told import read_file
from lorq.models.quantized import QuantizedFiles, read_dense, read_quantization
from lorq.storage.folder import LorqFolder
from lorq.storage.gguf_header import read_gguf_header
from lorq.storage.kept import read_kept, write_kept
from lorq.storage.report import read_report

FUZZER = Path(__file__).parents[1] / "fuzz" / "fuzz.py"
FIRST = "lorq-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The fuzzer's seeds. Not to be changed."""
    home = tmp_path_factory.mktemp("hostile")
    make_seeds(home)
    return home


@pytest.fixture
def copy(home, tmp_path, monkeypatch):
    """A seed that may be damaged."""
    monkeypatch.setenv("LORQ_CACHE", str(tmp_path / "cache"))

    def of(name):
        if (home / name).is_file():
            return Path(shutil.copyfile(home / name, tmp_path / name))
        return Path(shutil.copytree(home / name, tmp_path / name))

    return of


def edit(file, change):
    told = json.loads(file.read_text())
    change(told)
    file.write_text(json.dumps(told))


def test_some_cases_of_the_fuzzer_are_refused_in_a_sentence_or_read_right():
    """`python tests/fuzz/fuzz.py --minutes 60` asks others; a case that fails there belongs below."""
    done = subprocess.run(
        [sys.executable, str(FUZZER), "--cases", "112"], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert re.search(r"112 cases .* 0 crashes, 0 failures", done.stdout)


def as_source(place):
    files = QuantizedFiles.of(place, read_quantization(place))
    return [files.tensor(name) for name in files.names]


def dense(place):
    files = read_dense(place, torch.float32)
    return [files.tensor(name) for name in files.names]


def layers(place):
    return [weight.dense() for _, weight in LorqFolder.open(place).layers()]


def load(place):
    return lorq.load(place, device="cpu")


def report(change):
    return lambda folder: edit(folder / "lorq_report.json", change)


def config(change):
    return lambda folder: edit(folder / "config.json", change)


def quantization(change):
    return config(lambda told: change(told["quantization_config"]))


def groups(change):
    return quantization(lambda told: change(told["config_groups"]["group_0"]))


def tensors(change, file="model.safetensors"):
    def damage(folder):
        found = load_file(folder / file)
        change(found)
        save_file(found, folder / file, metadata={"format": "pt"})

    return damage


def deep(times):
    value = 1
    for _ in range(times):
        value = [value]
    return value


def in_layer(local, change, file="model.safetensors"):
    return tensors(lambda found: found.update({f"{LAYER}.{local}": change(found[f"{LAYER}.{local}"])}), file)


def swapped(one, other, file=FIRST):
    def swap(found):
        found[one], found[other] = found[other], found[one]

    return tensors(swap, file)


# What is damaged, how, who reads it, and what is said.
FOLDERS = {
    "report: a layer's shape has one size": (
        "ranks", report(lambda told: told["layers"][0].update(shape=[64])), read_report, r"shape must be two numbers"),
    "report: a shape is nested": (
        "ranks", report(lambda told: told["layers"][0].update(shape=[[[]]])), read_report, r"shape must be two num"),
    "report: a shape of texts": (
        "ranks", report(lambda told: told["layers"][0].update(shape=["a", 64])), read_report, r"shape must be two num"),
    "report: bytes too many for a number": (
        "ranks", report(lambda told: told.update(bytes=10**400)), read_report, r"bytes must be a whole number of 64"),
    "report: an error is a text": (
        "ranks", report(lambda told: told["layers"][0].update(error_after="0")), read_report, r"must be a number, got"),
    "report: a reason is none": (
        "ranks", report(lambda told: told["kept"].update(a=None)), read_report, r"kept: a must be a text, got None"),
    "report: a tuning is a list": (
        "ranks", report(lambda told: told["run"].update(tuning=[])), read_report, r"run: tuning must be an object"),
    "report: an unknown key": (
        "ranks", report(lambda told: told.update(more=1)), read_report, r"it must have the keys of a report, more is"),
    "JSON 600 deep": (
        "ranks", report(lambda told: told.update(settings=deep(600))), read_report, r"at most 50 values deep"),
    "half of a character": (
        "ranks", report(lambda told: told.update(method="\ud800")), read_report, r"half of a character"),
    "config: a theta that is an object": (
        "ranks", config(lambda told: told.update(rope_parameters={"rope_type": "default", "rope_theta": {}})), load,
        r"config.json does not make a LlamaForCausalLM|could not be read"),
    "config: a kind of positions that is a list": (
        "ranks", config(lambda told: told.update(rope_parameters={"rope_type": [1], "rope_theta": 1e4})), load,
        r"config.json does not make a LlamaForCausalLM|could not be read"),
    "config: a size that is a word": (
        "ranks", config(lambda told: told.update(intermediate_size="I64")), load, r"config of .* could not be read"),
    "config: an array": ("ranks", lambda p: (p / "config.json").write_text("[]"), load, r"JSON must be an object, got"),
    "config: a key of thousands of letters": (
        "ranks", quantization(lambda told: told["layers"][LAYER].update({"x" * 5000: 1})), layers,
        r"must have the keys"),
    "index: no metadata": (
        "ranks", lambda p: edit(p / "lorq.safetensors.index.json", lambda told: told.pop("metadata")), load,
        r"metadata must be an object, got None"),
    "index: metadata is a word": (
        "ranks", lambda p: edit(p / "lorq.safetensors.index.json", lambda told: told.update(metadata="0")), layers,
        r"metadata must be an object, got '0'"),
    "a table of whole numbers": (
        "lords", tensors(lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"].int()}),
                         "lorq-00000-of-00001.safetensors"), load, r"embed_tokens.weight is torch.int32, not floating"),
    "two layers' tensors change places": (
        "gptq", swapped("model.layers.0.self_attn.o_proj.weight_zero_point", f"{LAYER}.weight_scale"), as_source,
        r"must be (int32|float16) of shape .*, it is (int32|float16) of shape"),
    "a shape that is a matrix": (
        "trellis", swapped("model.layers.0.mlp.down_proj.left", "model.layers.0.self_attn.q_proj.weight_shape"),
        as_source, r"must be two whole numbers, it is torch"),
    "an infinite factor": (
        "ranks", in_layer("left_scale", lambda t: t * torch.inf, FIRST), layers, r"left_scale must be finite, \d+ of"),
    "a scale that is none is not loaded": (
        "gptq", in_layer("weight_scale", lambda t: t * torch.nan, FIRST), load, r"weight_scale must be finite, \d+ of"),
    "an expert's cell outside the grid": (
        "shared", tensors(lambda t: [own.fill_(99) for name, own in t.items() if name.endswith(".cells")], FIRST),
        layers, r"cells must lie in a grid of"),
    "a name that steers the terminal": (
        "gptq", tensors(lambda t: t.update({"a\x1b[2J": torch.zeros(1)}), FIRST), layers, r"must be printable, got"),
}  # fmt: skip
OTHERS = {
    "gptq: zero points in three dimensions": (
        "gptq4act", in_layer("qzeros", lambda t: t.unsqueeze(-1)), dense, r"qzeros must be a matrix, its shape is"),
    "gptq: bits are a word of thousands of letters": (
        "gptq4act", quantization(lambda told: told.update(bits="x" * 5000)), dense, r"bits must be 1 to 8"),
    "compressed-tensors: a shape of words": (
        "ct4", in_layer("weight_shape", lambda t: torch.zeros(3, 4).int()), dense, r"must be two whole numbers, it is"),
    "compressed-tensors: a group is a number": (
        "ct4", quantization(lambda told: told["config_groups"].update(group_0=7)), dense, r"group_0 must be an object"),
    "compressed-tensors: weights are a list": (
        "ct4", groups(lambda told: told.update(weights=["a"])), dense, r"weights must be an object, got \['a'\]"),
    "compressed-tensors: targets are nested": (
        "int-quantized", groups(lambda told: told.update(targets=[[1]])), dense, r"targets must be texts, got \[1\]"),
    "compressed-tensors: a pattern that is none": (
        "int-quantized", groups(lambda told: told.update(targets=["re:("])), dense, r"as compressed-tensors writes"),
    "bitsandbytes: no weight": (
        "nf4", tensors(lambda t: t.pop(f"{LAYER}.weight")), dense, r"lacks weight"),
    "bitsandbytes: rows without columns": (
        "int8", in_layer("weight", lambda t: t.flatten()), dense, r"weight must be a matrix, its shape is"),
    "float8: a row": ("fp8", in_layer("weight", lambda t: t.flatten()), dense, r"weight must be a matrix, its shape"),
    "the method is an object": (
        "int8", quantization(lambda told: told.update(quant_method={})), dense, r"quant_method must be a text, got"),
    "an export says that false was lost": (
        "packed", lambda p: edit(p / "lorq_export.json", lambda told: told.update(lost={"a": False})),
        lambda p: lorq.inspection.inspect(p), r"lost: a must be a text, got False"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*FOLDERS, *OTHERS])
def test_what_the_fuzzer_found_is_refused_with_the_rule_and_the_value(case, copy):
    seed, damage, read, words = (FOLDERS | OTHERS)[case]
    place = copy(seed)
    damage(place)
    with pytest.raises(ValueError, match=words) as refused:
        read(place)
    assert len(str(refused.value)) < 1500
    assert lorq.verify(place).faults, "verify says so too"


def changed(file, old, new):
    content = file.read_bytes()
    assert content.count(old) >= 1
    file.write_bytes(content.replace(old, new, 1))


ARRAY = struct.pack("<IIQ", 9, 0, 2**60)  # of bytes, more than any file has
GGUF = {
    "an array that has no end": (
        b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama", b"general.architecture" + ARRAY + b"l",
        r"values of .* must be as many as the file has room for, got 1152921504606846976"),
    "a text that has no end": (
        b"general.architecture" + struct.pack("<IQ", 8, 5), b"general.architecture" + struct.pack("<IQ", 8, 2**63),
        r"ends at byte \d+, the file has"),
    "a type of values that is none": (
        b"general.architecture" + struct.pack("<I", 8), b"general.architecture" + struct.pack("<I", 99),
        r"must have values of a type from 0 to 12, got type 99"),
}  # fmt: skip


@pytest.mark.parametrize("case", GGUF)
def test_a_gguf_files_counts_are_not_believed(case, copy):
    old, new, words = GGUF[case]
    file = copy("model.gguf")
    changed(file, old, new)
    for read in (read_file, read_gguf_header, load):
        with pytest.raises(ValueError, match=words):
            read(file)
    assert any(re.search(words, fault.what) for fault in lorq.verify(file).faults)


def test_tensors_of_a_gguf_file_lie_in_it_and_not_over_each_other(copy):
    tensors = read_gguf_header(copy("model.gguf"))
    file, content = copy("model.gguf"), copy("model.gguf").read_bytes()
    second = struct.pack("<Q", tensors[1].begin - tensors[0].begin)
    at = content.index(tensors[1].name.encode()) + len(tensors[1].name) + 4 + 8 * len(tensors[1].shape) + 4
    assert content[at : at + 8] == second
    for place, words in (
        (0, r"must begin behind the tensor before it"), (2**40, r"ends at byte \d+, the file has"),
        (tensors[1].begin - tensors[0].begin + 1, r"must begin at a multiple of 32"),
    ):  # fmt: skip
        file.write_bytes(content[:at] + struct.pack("<Q", place) + content[at + 8 :])
        with pytest.raises(ValueError, match=words):
            read_gguf_header(file)


def test_a_gguf_file_without_tensors_is_told_and_its_checksum_tells(copy, capsys):
    file = copy("model.gguf")
    content = file.read_bytes()
    file.write_bytes(content[:8] + struct.pack("<Q", 0) + content[16:])
    assert main(["inspect", str(file)]) == 0
    assert any("its sha256 is" in fault.what for fault in lorq.verify(file).faults)


def test_a_header_that_names_a_tensor_twice_or_places_it_elsewhere_is_refused_by_every_reader(home, copy):
    for kind, name in (("folder", "ranks"), ("source", "gptq4act"), ("made", "packed")):
        place = copy(name)
        file = next(
            path for path in sorted(place.glob("*.safetensors")) if LAYER in path.read_bytes().decode("latin-1")
        )
        header, data = read_parts(file)
        entry = next(own for name, own in header.items() if name.startswith(LAYER))
        entry["data_offsets"] = [-1, 2**62]
        write_parts(file, header, data)
        refused = 0
        for _, reader in readers_of(home)[kind]:
            try:
                reader(place)
            except ValueError as error:
                assert "data_offsets" in str(error) and file.name in str(error)
                refused += 1
        assert refused >= 2


def test_where_a_tuning_was_is_read_as_it_was_written_or_refused(tmp_path):
    path, told = tmp_path / "kept.safetensors", {"step": 3, "best": 0.5}
    write_kept(path, told, {"a.weight": torch.arange(6.0).view(2, 3)})
    read, tensors = read_kept(path)
    assert read == told and torch.equal(tensors["a.weight"], torch.arange(6.0).view(2, 3))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"must have the checksum '.{12}', it has '.{12}'\); delete it"):
        read_kept(path)
    path.write_bytes(content.replace(b"sha256", b"sha255"))
    with pytest.raises(ValueError, match=r"must have the checksum 'none'"):
        read_kept(path)
    path.write_bytes(content[:-4])
    with pytest.raises(ValueError, match=r"truncated.*delete it, what it keeps is then made again"):
        read_kept(path)


def test_a_long_value_is_not_told_whole(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": "x" * 5000}))
    with pytest.raises(ValueError, match="quantization_config must be an object, got 'xxx") as told:
        read_quantization(tmp_path)
    assert len(str(told.value)) < 300 + len(str(tmp_path))
