"""lorq verify: folders, exports and adapters that are whole have no faults, and those that are not have all of them."""

import json
import re
import shutil

import pytest
import torch
from gguf_models import gguf_folder
from safetensors.torch import load_file, save_file

import lorq
from lorq.cli import main
from lorq.storage.atomic import sha256_of

RANKS = lorq.FLRQ(bits=4, group_size=32, budget=2.0, min_gain=0.0, epochs=0, rounding="nearest", symmetric=True)
FIRST, LAYER = "lorq-00001-of-00002.safetensors", "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory, text_file):
    """A tiny model in several kinds of codes, and exports and adapters of them. Not to be changed."""
    home = tmp_path_factory.mktemp("verify")
    gguf_folder(home / "model", "llama")
    run = {"calibration": str(text_file), "samples": 2, "seq_len": 32}
    methods = {
        "q4_0": lorq.GPTQ(grid="q4_0"), "ranks": RANKS, "gptq": lorq.GPTQ(bits=4, group_size=32),
        "lords": lorq.LoRDS(bits=3, steps=2), "rotated": lorq.LoPRo(bits=3, group_size=32, importance="hessian"),
    }  # fmt: skip
    for name, method in methods.items():
        lorq.quantize(home / "model", home / name, method, **run)
    lorq.export(home / "q4_0", home / "model.gguf")
    lorq.export(home / "ranks", home / "packed", to="compressed-tensors", adapter=home / "lora")
    lorq.export(home / "ranks", home / "base.gguf", adapter=home / "lora.gguf")
    lorq.export(home / "gptq", home / "for-gptq", to="gptq")
    lorq.export(home / "q4_0", home / "dense", to="dense", dtype="bfloat16")
    model = lorq.load(home / "lords")
    lorq.adapt.train(model, str(text_file), steps=1, batch=1, seq_len=16)
    lorq.adapt.save_adapter(model, home / "adapter")
    return home


PLACES = {
    "q4_0": "a lorq folder", "ranks": "a lorq folder", "lords": "a lorq folder", "rotated": "a lorq folder",
    "packed": "an export", "for-gptq": "an export", "dense": "an export", "lora": "an adapter",
    "adapter": "an adapter of lorq", "model.gguf": "a file for llama.cpp", "lora.gguf": "a file for llama.cpp",
    "model": "a model of others",
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_what_is_whole_has_no_faults_and_no_tensor_is_left_out(name, made, capsys):
    done = lorq.verify(made / name)
    assert (done.kind, done.faults) == (PLACES[name], ())
    assert main(["verify", str(made / name), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(done.as_dict()))
    files = [made / name] if done.place.is_file() else sorted((made / name).glob("*.safetensors"))
    stored = [tensor for file in files if file.suffix == ".safetensors" for tensor in load_file(file)]
    assert done.tensors == len(stored) or (done.place.is_file() and done.tensors >= 20)
    named = {file.name for file in files}
    assert named <= {*done.sealed} or (name == "model" and named <= {*done.unsealed})


def put(folder, tensors, *, seal=True):
    """Replace some of the tensors of a folder's first block; with ``seal`` the checksum is that of the new file."""
    file = folder / FIRST
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})
    if seal:
        checksum = sha256_of(file)
        edit(folder / "lorq_report.json", lambda told: told["checksums"].update({FIRST: checksum}))


def stored(folder, local):
    return load_file(folder / FIRST)[f"{LAYER}.{local}"]


def nan_scale(folder):
    put(folder, {f"{LAYER}.weight_scale": stored(folder, "weight_scale").index_fill_(1, torch.tensor([0]), torch.nan)})


def infinite_factor(folder):
    put(folder, {f"{LAYER}.left_scale": torch.full_like(stored(folder, "left_scale"), torch.inf)})


def twice_in_order(folder):
    put(folder, {f"{LAYER}.permutation": stored(folder, "permutation").fill_(0)})


def other_shape(folder):
    put(folder, {f"{LAYER}.weight_scale": stored(folder, "weight_scale")[:-1].clone()})


def other_type(folder):
    put(folder, {f"{LAYER}.weight_packed": stored(folder, "weight_packed").long()})


def other_size(folder):
    put(folder, {f"{LAYER}.weight_shape": torch.tensor([-1, 2**62])})


def wrong_bits(folder):
    edit(folder / "lorq_report.json", lambda told: told["layers"][5].update(bits=7))


def nan_block(folder):
    blocks = stored(folder, "weight_blocks")
    blocks[3, :2] = torch.tensor([0, 0x7E], dtype=torch.uint8)  # the half-precision scale of a block is NaN
    put(folder, {f"{LAYER}.weight_blocks": blocks})


def flipped(folder):
    put(folder, {f"{LAYER}.weight_packed": stored(folder, "weight_packed") ^ 1}, seal=False)


def another_width(folder):
    edit(folder / "config.json", lambda config: config.update(intermediate_size=160))


def edit(file, change, *, seal=True):
    """Change a JSON file; with ``seal`` the index has the checksum of the new one."""
    told = json.loads(file.read_text())
    change(told)
    file.write_text(json.dumps(told))
    index = file.with_name("lorq.safetensors.index.json")
    if seal and file != index and index.is_file():
        edit(index, lambda told: told["metadata"]["checksums"].update({file.name: sha256_of(file)}))


def another_rotation(folder):
    edit(
        folder / "config.json",
        lambda c: c["quantization_config"]["layers"][LAYER].update(rotation_block=32),
        seal=False,
    )


def older(folder):
    """As folders were before their index had checksums."""
    edit(folder / "lorq.safetensors.index.json", lambda told: told["metadata"].pop("checksums"))


FAULTS = [
    ("rotated", nan_scale, LAYER, r"weight_scale must be finite, 128 of 256 values are NaN or infinite"),
    ("rotated", twice_in_order, LAYER, r"permutation must hold each of 0 .. 63 once"),
    ("ranks", infinite_factor, LAYER, r"left_scale must be finite"),
    ("ranks", other_shape, LAYER, r"weight_scale must be float16 of shape \(128, 2\), it is float16 of shape \(127, 2"),
    ("ranks", other_type, LAYER, r"weight_packed must be int32 of shape \(128, 8\), it is int64"),
    ("ranks", other_size, LAYER, r"weight_shape must be 1 to 2\^31 - 1, got \[-1, 46"),
    ("ranks", wrong_bits, "model.layers.0.mlp.up_proj", r"bits in lorq_report.json must be 4, .*, got 7"),
    ("q4_0", nan_block, LAYER, r"what the codes of rows 0 to 127 stand for must be finite, 32 of 8192"),
    ("ranks", flipped, FIRST, r"must have the sha256 .{12}, it has .{12}; it holds .*model.layers.0.mlp.down_proj"),
    ("rotated", another_rotation, "config.json", r"must have the sha256 .{12}, it has .{12}"),
    ("ranks", another_width, "config.json", r"the folder's tensors do not fit its config.*weight_packed is"),
]


@pytest.mark.parametrize(("name", "damage", "where", "words"), FAULTS, ids=[f"{c[0]}-{c[1].__name__}" for c in FAULTS])
def test_each_fault_is_told_with_its_layer_and_the_rule(name, damage, where, words, made, tmp_path, capsys):
    folder = shutil.copytree(made / name, tmp_path / name)
    damage(folder)
    found = lorq.verify(folder).faults
    (fault,) = [one for one in found if one.where == where]
    assert re.search(words, fault.what), fault
    # Where tensors have another size, so has the whole.
    assert len(found) == 1 or [one.what[:5] for one in found if one != fault] == ["bytes"]
    assert main(["verify", str(folder)]) == 1
    shown = capsys.readouterr()
    assert f"{where}: " in shown.out and f"{found[0].where}: " in shown.err.splitlines()[-1]


def test_it_goes_on_after_the_first_fault(made, tmp_path):
    folder = shutil.copytree(made / "ranks", tmp_path / "ranks")
    nan_scale(folder)
    (folder / "lorq-00002-of-00002.safetensors").write_bytes(b"short")
    edit(
        folder / "config.json",
        lambda c: c["quantization_config"]["layers"]["model.layers.0.mlp.gate_proj"].update(bits="four"),
    )
    (folder / "tokenizer_config.json").unlink()
    found = lorq.verify(folder).faults
    by: dict[str, str] = {}
    for fault in found:
        by[fault.where] = by.get(fault.where, "") + fault.what
    assert "header length must be" in by["lorq-00002-of-00002.safetensors"]
    assert "must have the sha256" in by["lorq-00002-of-00002.safetensors"]
    assert "weight_scale must be finite" in by[LAYER]
    assert "bits must be <class 'int'>, got 'four'" in by["config.json"] and "missing" in by["tokenizer_config.json"]
    assert lorq.verify(made / "ranks").faults == ()


def test_a_folder_of_before_has_no_checksums_but_of_its_weights(made, tmp_path):
    folder = shutil.copytree(made / "ranks", tmp_path / "ranks")
    older(folder)
    done = lorq.verify(folder)
    assert done.faults == () and {"config.json", "lorq_report.json", "tokenizer.json"} < set(done.unsealed)
    assert "lorq_report.json" in lorq.verify(made / "ranks").sealed


def test_exports_and_adapters_tell_the_tensor(made, tmp_path):
    packed = shutil.copytree(made / "for-gptq", tmp_path / "gptq")
    file = packed / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {f"{LAYER}.g_idx": tensors[f"{LAYER}.g_idx"] + 9}, file, metadata={"format": "pt"})
    by = {fault.where: fault.what for fault in lorq.verify(packed).faults}
    assert "must have the sha256" in by["model.safetensors"] and "g_idx" in " ".join(by.values())
    lora = shutil.copytree(made / "lora", tmp_path / "lora")
    edit(lora / "adapter_config.json", lambda config: config.update(r=99, rank_pattern={}))
    assert "must have the rank 99, as adapter_config.json says" in str(lorq.verify(lora).faults)
    own = shutil.copytree(made / "adapter", tmp_path / "adapter")
    name = next(iter(tensors := load_file(own / "lorq_adapter.safetensors")))
    save_file(tensors | {name: tensors[name] * torch.nan}, own / "lorq_adapter.safetensors")
    changed, fault = lorq.verify(own).faults
    assert changed.where == "lorq_adapter.safetensors" and "must have the sha256" in changed.what
    assert fault.where == name and "must be finite" in fault.what
    edit(own / "lorq_adapter.json", lambda config: config.update(sha256={"a": [1]}))
    assert "sha256 must be that of lorq_adapter.safetensors, got" in str(lorq.verify(own).faults[0])
    edit(own / "lorq_adapter.json", lambda config: config.pop("sha256"))
    (own / "lorq_adapter.safetensors").unlink()
    (gone,) = lorq.verify(own).faults
    assert gone.what == "must be there, it is missing"


def test_pickles_and_code_beside_a_folder_are_told_of_and_no_fault(made, tmp_path):
    folder = shutil.copytree(made / "ranks", tmp_path / "ranks")
    (folder / "pytorch_model.bin").write_bytes(b"no pickle that anybody reads")
    (folder / "stray.py").write_text("raise SystemExit")
    edit(folder / "config.json", lambda config: config.update(auto_map={"AutoModel": "code.Model"}))
    done = lorq.verify(folder)
    pickles, code, named = done.notes
    assert done.faults == () and pickles.endswith("not read by lorq: pytorch_model.bin")
    assert code == "code lies there, which lorq does not run: stray.py" and "auto_map" in named


def test_a_folder_with_faults_is_not_pushed(made, tmp_path):
    folder = shutil.copytree(made / "ranks", tmp_path / "ranks")
    flipped(folder)
    with pytest.raises(ValueError, match=r"has 1 fault: lorq-00001-of-00002.safetensors: must have the sha256"):
        lorq.push(folder, "org/name", dry_run=True)


def test_what_is_nothing_of_lorqs_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for place, words in (
        (tmp_path / "nothing", "there is no folder"),
        (tmp_path, "lorq did not write this folder"),
    ):
        assert main(["verify", str(place)]) == 1 and words in capsys.readouterr().err
    assert "must be a GGUF file" in lorq.verify(tmp_path / "notes.txt").faults[0].what
