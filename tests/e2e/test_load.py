"""Loading is right or loud: no folder ever gives a model with wrong weights."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import BYTES
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
)

import lorq
from lorq.runtime.linear import QuantLinear
from lorq.storage.names import REPORT_NAME

LAYER = "model.layers.1.mlp.down_proj"
SHARD = "lorq-00002-of-00002.safetensors"
# Loads the folder, then again after `import lorq`; one line of JSON for each.
CHILD = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
os.environ["TRANSFORMERS_VERBOSITY"] = "critical"
import torch
from transformers import AutoModelForCausalLM
for attempt in range(2):
    answer = {}
    try:
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    except Exception as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    else:
        answer["packed"] = sum(type(module).__name__ == "QuantLinear" for module in model.modules())
        answer["logits"] = model(torch.arange(8)[None]).logits.double().abs().sum().item()
    print(json.dumps(answer | {"imported": "lorq.runtime.hf" in sys.modules}))
    import lorq
"""


@pytest.fixture(scope="module")
def whole(folder_of, text_file, tmp_path_factory):
    """A quantized folder with low-rank parts, not to be changed."""
    out = tmp_path_factory.mktemp("load") / "out"
    method = lorq.LoPRo(
        bits=3, group_size=32, rank=4, rotation="none", epochs=0, rounding="nearest",
        factor_type="float16", symmetric=False,
    )  # fmt: skip
    report = lorq.quantize(folder_of("llama"), out, method, calibration=str(text_file), samples=4, seq_len=32)
    assert next(layer.rank for layer in report.layers if layer.name == LAYER) > 1
    return out


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of the quantized folder to damage."""
    return shutil.copytree(whole, tmp_path / "copy")


def children(folder, **environment):
    """What a fresh process makes of the folder, before and after it imports lorq."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    command = [sys.executable, "-c", CHILD, str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
@torch.no_grad()
def right(whole):
    """What a process that loads the folder rightly answers."""
    logits = lorq.load(whole)(torch.arange(8)[None]).logits.double().abs().sum().item()
    return {"packed": 14, "logits": pytest.approx(logits, rel=1e-5), "imported": True}


def test_transformers_loads_the_folder_without_an_import_of_lorq(whole, right):
    assert children(whole) == [right, right]


def test_transformers_without_lorq_refuses_the_folder_and_says_what_to_do(whole, right):
    before, after = children(whole, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert not before["imported"]
    assert re.search(r"Error: .*this-folder-needs--pip-install-lorq--and--import-lorq", before["error"])
    # Importing lorq is enough where torch loads no extensions.
    assert after == right


# ---- damage -----------------------------------------------------------------------------------------------


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_quantization(**change):
    return lambda folder: edit_config(folder, lambda config: config["quantization_config"].update(change))


def edit_layers(change):
    return lambda folder: edit_config(folder, lambda config: change(config["quantization_config"]["layers"]))


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / SHARD)
        change(tensors)
        save_file(tensors, folder / SHARD, metadata={"format": "pt"})

    return edit


def cut(folder):
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:-100])


def swap_dtype(tensors, name, dtype):
    tensors[f"{LAYER}.{name}"] = tensors[f"{LAYER}.{name}"].to(dtype)


def key_twice(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.rstrip().removesuffix("}") + ', "model_type": "llama"}')


def other_report(folder):
    report = json.loads((folder / REPORT_NAME).read_text())
    report["layers"] = [layer for layer in report["layers"] if layer["name"] != LAYER]
    (folder / REPORT_NAME).write_text(json.dumps(report))


def rename_layer(layers):
    layers["model.layers.7.mlp.down_proj"] = layers.pop(LAYER)


DAMAGES = {
    "a truncated shard": (cut, r"truncated|too large|not fully covered|[Ii]ncomplete"),
    "a shard of zeros": (lambda folder: (folder / SHARD).write_bytes(bytes(64)), r"lorq-00002|header|damaged"),
    "an empty shard": (lambda folder: (folder / SHARD).write_bytes(b""), r"lorq-00002|header|truncated"),
    "a missing shard": (lambda folder: (folder / SHARD).unlink(), "lorq-00002-of-00002|not found|does not"),
    "a missing index": (lambda folder: (folder / "lorq.safetensors.index.json").unlink(), "lorq.safetensors.index"),
    "a missing packed tensor": (
        edit_tensors(lambda tensors: tensors.pop(f"{LAYER}.weight_packed")), rf"{LAYER}.weight_packed is missing",
    ),
    "a missing factor": (edit_tensors(lambda tensors: tensors.pop(f"{LAYER}.left")), rf"{LAYER}.left is missing"),
    "a missing norm": (
        edit_tensors(lambda tensors: tensors.pop("model.layers.1.input_layernorm.weight")),
        r"model.layers.1.input_layernorm.weight is missing",
    ),
    "a tensor too many": (
        edit_tensors(lambda tensors: tensors.update({f"{LAYER}.weight": torch.zeros(64, 128)})),
        rf"{LAYER}.weight has no place in the model",
    ),
    "codes of another type": (
        edit_tensors(lambda tensors: swap_dtype(tensors, "weight_packed", torch.int64)),
        rf"{LAYER}.weight_packed is torch.int64, not torch.int32",
    ),
    "scales of another type": (
        edit_tensors(lambda tensors: swap_dtype(tensors, "weight_scale", torch.float32)),
        rf"{LAYER}.weight_scale is torch.float32, not torch.float16",
    ),
    "factors of another type": (
        edit_tensors(lambda tensors: swap_dtype(tensors, "left", torch.int8)),
        rf"{LAYER}.left is torch.int8, not torch.float16",
    ),
    "a wrong stored shape": (
        edit_tensors(lambda tensors: tensors[f"{LAYER}.weight_shape"].copy_(torch.tensor([64, 96]))),
        r"weight_shape.*96|96.*128",
    ),
    "an unknown layer": (edit_layers(rename_layer), r"model.layers.7.mlp.down_proj, which is not in the model"),
    "a layer that is no linear layer": (
        edit_layers(lambda layers: layers.update({"model.norm": layers[LAYER]})),
        r"model.norm, which is no linear layer",
    ),
    "a layer left out": (edit_layers(lambda layers: layers.pop(LAYER)), rf"{LAYER}.weight is missing"),
    "another rank": (
        edit_layers(lambda layers: layers[LAYER].update(rank=1)), rf"{LAYER}.left is \(64, \d+\), not \(64, 1\)",
    ),
    "no rank": (edit_layers(lambda layers: layers[LAYER].update(rank=0)), rf"{LAYER}.left has no place"),
    "a negative rank": (edit_layers(lambda layers: layers[LAYER].update(rank=-1)), r"rank >= 0.*'rank': -1"),
    "a rank beyond all numbers": (
        edit_layers(lambda layers: layers[LAYER].update(rank=10**30)), rf"{LAYER}.* below 2\^31, got rank 10+$",
    ),
    "a key twice": (key_twice, r"config.json: not valid JSON \(the key 'model_type' appears twice\)"),
    "a damaged report": (lambda folder: (folder / REPORT_NAME).write_text("{"), rf"{REPORT_NAME}: not valid JSON"),
    "another's report": (other_report, rf"{REPORT_NAME}: its layers must be those of config.json; {LAYER} is in one"),
    "a rank in words": (edit_layers(lambda layers: layers[LAYER].update(rank="4")), r"rank must be.*int.*, got '4'"),
    "other bits": (
        edit_layers(lambda layers: layers[LAYER].update(bits=4)),
        rf"{LAYER}.weight_packed is \(64, 12\), not \(64, 16\)",
    ),
    "9 bits": (edit_layers(lambda layers: layers[LAYER].update(bits=9)), r"bits 1..8.*'bits': 9"),
    "another group size": (
        edit_layers(lambda layers: layers[LAYER].update(group_size=64)),
        rf"{LAYER}.weight_scale is \(64, 4\), not \(64, 2\)",
    ),
    "a group size that does not divide": (
        edit_layers(lambda layers: layers[LAYER].update(group_size=48)),
        rf"{LAYER}: .* got group_size 48 and width 128",
    ),
    "a symmetric layer": (
        edit_layers(lambda layers: layers[LAYER].update(symmetric=True)), rf"{LAYER}.weight_zero_point has no place",
    ),
    "8-bit factors": (
        edit_layers(lambda layers: layers[LAYER].update(factor_type="int8")), rf"{LAYER}.left_scale is missing",
    ),
    "a key missing for a layer": (
        edit_layers(lambda layers: layers[LAYER].pop("symmetric")), rf"{LAYER}.* must have the keys.*symmetric",
    ),
    "a key too many for a layer": (
        edit_layers(lambda layers: layers[LAYER].update(basis="hadamard")), rf"{LAYER}.* must have the keys.*basis",
    ),
    "a newer format": (edit_quantization(format_version=6), r"format version 6, this lorq reads up to 5; take a newer"),
    "a format of 0": (edit_quantization(format_version=0), r"format_version.* got 0"),
    "a format in words": (edit_quantization(format_version="1"), r"format_version.* got '1'"),
    "an unknown key": (edit_quantization(rotation="hadamard"), r"unknown keys in quantization_config: rotation"),
    "no inputs": (edit_quantization(inputs=None), r"quantization_config.inputs must be a list, got None"),
    "an input of one layer": (edit_quantization(inputs=[[LAYER]]), rf"2 and more names.* got \['{LAYER}'\]"),
    "an input that is none": (edit_quantization(inputs=[7]), r"2 and more names.* got 7"),
    "an input of no layer": (edit_quantization(inputs=[[LAYER, "norm"]]), r"names of layers.* 'norm'\]"),
    "a layer with two inputs": (
        edit_quantization(inputs=[[LAYER, LAYER.replace("down", "up")], [LAYER, LAYER.replace("down", "gate")]]),
        rf"each name once in all, got \['{LAYER}', '.*up_proj'\]",
    ),
    "an input in pieces": (edit_quantization(inputs=[[LAYER, ["norm"]]]), r"names of layers.* \['norm'\]\]"),
    "no table of layers": (edit_quantization(layers=None), r"quantization_config.layers must be a dict, got None"),
    "an empty table of layers": (edit_quantization(layers={}), r"(is missing|no place|names of layers)"),
    "another depth": (
        lambda folder: edit_config(folder, lambda config: config.update(num_hidden_layers=1)),
        r"model.layers.1.*not in the model",
    ),
    "another width": (
        lambda folder: edit_config(folder, lambda config: config.update(intermediate_size=160)),
        r"is \(\d+, \d+\), not \(\d+, \d+\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_folder_is_refused(damage, folder):
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(Exception, match=f"(?s){message}") as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    # Not an accident inside a library, such as a KeyError or an AttributeError.
    assert isinstance(caught.value, ValueError | OSError) or "afetensor" in type(caught.value).__name__


def test_a_tied_head_does_not_hide_a_missing_embedding(folder):
    first = folder / "lorq-00000-of-00002.safetensors"
    tensors = load_file(first)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, first, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is missing"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("damage", ["a flipped bit in the codes", "a report without a layer"])
def test_what_loading_cannot_see_the_checksums_and_the_report_show(damage, folder):
    if damage.startswith("a flipped"):
        edit_tensors(lambda tensors: tensors[f"{LAYER}.weight_packed"].__ixor__(1))(folder)
        (fault,) = lorq.verify(folder).faults
        assert fault.where == SHARD and "must have the sha256" in fault.what and LAYER in fault.what
    else:
        report = json.loads((folder / "lorq_report.json").read_text())
        del report["layers"][0]["bits"]
        (folder / "lorq_report.json").write_text(json.dumps(report))
        with pytest.raises(ValueError, match=r"lorq_report.json: .* bits must be a whole number of 64 bits, got None"):
            lorq.read_report(folder)


def test_pickled_weights_beside_the_folder_are_not_read(folder):
    torch.save({"model.norm.weight": torch.full((64,), 9.0)}, folder / "pytorch_model.bin")
    model = lorq.load(folder)
    assert model.model.norm.weight.max() < 5
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14


# ---- a loaded model ---------------------------------------------------------------------------------------


def groups_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["inputs"]


@torch.no_grad()
def test_layers_that_read_one_input_are_named_and_work_together(whole, folder):
    names = [("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))]
    expected = [[f"model.layers.{i}.{part}.{name}" for name in own] for i in range(2) for part, own in names]
    assert groups_of(whole) == expected

    def as_version_3(config):
        config["quantization_config"]["format_version"] = 3
        del config["quantization_config"]["inputs"]

    edit_config(folder, as_version_3)
    model, old = lorq.load(whole), lorq.load(folder)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    for group in expected:
        assert len({layers.pop(name).together[0] for name in group}) == 1
    assert len(layers) == 4 and all(layer.together is None for layer in layers.values())
    assert all(module.together is None for module in old.modules() if isinstance(module, QuantLinear))
    windows = torch.arange(3)[None]
    torch.testing.assert_close(model(windows).logits, old(windows).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family, first", [("gpt2", None), ("mixtral", ("q_proj", "k_proj", "v_proj"))])
def test_inputs_are_named_where_nothing_looks_at_them_and_without_those_of_experts(family, first, folder_of, tmp_path):
    lorq.quantize(folder_of(family), tmp_path / "out", lorq.METHODS["nearest"](group_size=32))
    expected = [[f"model.layers.{i}.self_attn.{name}" for name in first] for i in range(2)] if first else []
    assert groups_of(tmp_path / "out") == expected


def test_a_loaded_model_is_not_saved_without_its_guard(whole, tmp_path):
    model = lorq.load(whole)
    with pytest.raises(ValueError, match=r"lorq.*is not saved again"):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "options",
    [
        dict(device_map="cpu"), dict(dtype="auto"), dict(attn_implementation="eager"), dict(use_safetensors=True),
        dict(low_cpu_mem_usage=True), dict(output_loading_info=True), dict(trust_remote_code=False),
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
@torch.no_grad()
def test_the_usual_options_of_transformers_change_nothing(options, whole, right):
    model = AutoModelForCausalLM.from_pretrained(whole, **options)
    if isinstance(model, tuple):
        model, information = model
        assert not any(information.values())
    assert model(torch.arange(8)[None]).logits.double().abs().sum().item() == right["logits"]


@torch.no_grad()
def test_the_model_class_and_a_config_of_ones_own_load_the_folder_too(whole, right):
    from transformers import AutoConfig, LlamaForCausalLM

    for model in (
        LlamaForCausalLM.from_pretrained(whole),
        AutoModelForCausalLM.from_pretrained(whole, config=AutoConfig.from_pretrained(whole)),
        copy.deepcopy(lorq.load(whole)),
    ):
        assert model(torch.arange(8)[None]).logits.double().abs().sum().item() == right["logits"]


@torch.no_grad()
def test_a_dequantized_model_has_dense_layers_and_the_same_logits(whole, tmp_path):
    model, windows = lorq.load(whole), torch.randint(BYTES, (2, 16), generator=torch.Generator().manual_seed(0))
    expected = model(windows).logits
    dense = model.dequantize()
    layers = [module for module in dense.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 15 and not any(isinstance(module, QuantLinear) for module in dense.modules())
    torch.testing.assert_close(dense(windows).logits, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(again(windows).logits, dense(windows).logits)


def test_the_bare_model_without_a_head_is_the_whole_models(whole):
    # AutoModel has other parameter names: "layers.0..." where the table says "model.layers.0...".
    tokens = torch.arange(12)[None]
    expected = lorq.load(whole, device="cpu")(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
    bare = AutoModel.from_pretrained(whole, dtype=torch.float32)
    assert torch.equal(bare(input_ids=tokens).last_hidden_state, expected)


def test_a_head_of_another_kind_is_new_and_the_rest_the_folders(whole):
    own = AutoModelForSequenceClassification.from_pretrained(whole, num_labels=3, dtype=torch.float32)
    assert own.score.weight.shape[0] == 3
    expected, got = lorq.load(whole, device="cpu").model.state_dict(), own.model.state_dict()
    assert expected.keys() == got.keys() and all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_class_of_another_build_is_refused_in_words(whole):
    with pytest.raises(ValueError, match=r"holds a LlamaForCausalLM and cannot be loaded as OPTForCausalLM"):
        OPTForCausalLM.from_pretrained(whole, config=_opt_config(whole))


def _opt_config(whole):
    config = OPTConfig(hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_attention_heads=4, num_hidden_layers=2)
    own = AutoConfig.from_pretrained(whole)
    config.quantization_config, config.architectures = own.quantization_config, own.architectures
    return config


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (dict(device="nowhere"), r"device must be .*'nowhere'"),
        (dict(device="meta"), r"device must be .*'meta'"),
        (dict(device="cuda:99"), r"device must be .*'cuda:99'"),
        (dict(dtype="float8"), r"dtype must be auto, float32, bfloat16, float16, got 'float8'"),
        (dict(dtype="int8"), r"dtype must be auto, float32, bfloat16, float16, got 'int8'"),
    ],
    ids=str,
)
def test_a_device_or_type_that_is_not_there_is_refused(where, message, whole):
    with pytest.raises(ValueError, match=message):
        lorq.load(whole, **where)


def test_threads_that_load_one_folder_each_get_the_whole_model(folder_of, tmp_path):
    lorq.quantize(folder_of("llama"), tmp_path / "out", lorq.Nearest(group_size=32))
    tokens = torch.arange(1, 9)[None]
    with ThreadPoolExecutor(4) as pool:
        for folder in (tmp_path / "out", folder_of("llama")):
            expected = lorq.load(folder)(tokens).logits
            for loaded in [*pool.map(lambda _, folder=folder: lorq.load(folder), range(8))]:
                assert torch.equal(loaded(tokens).logits, expected)


@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
def test_all_files_have_the_rights_of_new_files(folder_of, tmp_path):
    before = os.umask(0o022)
    try:
        lorq.quantize(folder_of("llama"), tmp_path / "out", lorq.Nearest(group_size=32))
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o644}
