"""Kinds of models beyond a stack of alike blocks: towers, hybrids, experts of other builds; and what is refused."""

import csv
import json
import warnings

import families
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import lorq
from lorq.cli import main
from lorq.models.experts import find_experts, split_experts

# One of each kind; the whole table is `families.py`.
KINDS = {
    "a vision tower": ("gemma3", "Gemma3ForConditionalGeneration"),
    "linear attention, and tensors that transformers joins": ("olmo_hybrid", "OlmoHybridForCausalLM"),
    "state spaces and experts without a gate": ("nemotron_h", "NemotronHForCausalLM"),
    "experts that are called with rows": ("llama4_text", "Llama4ForCausalLM"),
    "attention to an encoder that is not there": ("bart", "BartForCausalLM"),
    "blocks that share weights": ("zamba", "ZambaForCausalLM"),
}
REFUSED = {
    "jetmoe": r"87% of its blocks' weights are outside linear layers, such as .*input_linear.* in no form",
    "rwkv": r"RwkvForCausalLM is not supported: it changes its weights while it runs",
    "hrm_text": r"one list of decoder blocks \(HrmTextDecoderLayer\), found model\.L_module\.layers, model\.H_module",
}


@pytest.fixture(autouse=True)
def other_peoples_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_model_of_this_kind_goes_from_the_folder_to_the_answer(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("LORQ_CACHE", str(tmp_path / "cache"))
    assert families.look(*KINDS[kind], tmp_path) == ("works", "")
    kept = lorq.read_report(tmp_path / "GPTQ").kept
    check = {"gemma3": tower, "olmo_hybrid": hybrid, "bart": silent, "zamba": shared}.get(KINDS[kind][0])
    if check:
        check(tmp_path, kept)


def tower(work, kept):
    """The tower and the projector stay bit for bit; nothing but blocks of the text model is quantized."""
    stored = {}
    for file in (work / "GPTQ").glob("*.safetensors"):
        stored |= load_file(file)
    original = AutoModelForImageTextToText.from_pretrained(work / "m", dtype=torch.float32).state_dict()
    towers = {name for name in stored if "vision_tower" in name or "multi_modal_projector" in name}
    assert len(towers) > 20 and not any(name.endswith("weight_packed") for name in towers)
    assert all(torch.equal(stored[name], original[name]) for name in towers)
    layers = json.loads((work / "GPTQ" / "config.json").read_bytes())["quantization_config"]["layers"]
    assert len(layers) == 14 and all(name.startswith("model.language_model.layers.") for name in layers)
    assert not kept


def hybrid(work, kept):
    assert kept["model.layers.0.linear_attn.conv1d"] == "no linear layer (Conv1d): weight kept as stored"
    assert (
        kept["model.layers.0.linear_attn"] == "no linear layer (OlmoHybridGatedDeltaNet): A_log, dt_bias kept as stored"
    )


def silent(work, kept):
    assert len(kept) == 8 and all("encoder_attn" in name for name in kept)
    assert set(kept.values()) == {"is not called when the model runs on text alone, kept as it is"}


def shared(work, kept):
    both = [name.partition(".shared_transf.")[2] for name in kept if ".shared_transf." in name]
    assert both and sorted(both) == sorted(2 * list(dict.fromkeys(both)))


@pytest.mark.parametrize("kind", list(REFUSED))
def test_what_lorq_cannot_follow_is_refused_in_words(kind, tmp_path):
    name = dict(families.families())[kind]
    families.build(kind, name, tmp_path / "m")
    with pytest.raises(ValueError, match=REFUSED[kind]):
        lorq.quantize(tmp_path / "m", tmp_path / "out", lorq.Nearest(bits=4, group_size=-1), device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["nemotron_h", "llama4_text"])
def test_experts_of_other_builds_share_factors_and_become_their_class_again(kind, text_file, tmp_path):
    name = dict(families.families())[kind]
    families.build(kind, name, tmp_path / "m")
    method = lorq.TileQ(bits=4, group_size=16, rank=4)
    lorq.quantize(tmp_path / "m", tmp_path / "q", method, calibration=str(text_file), samples=4, seq_len=32)
    tokens = torch.arange(24)[None]
    packed, dense = (lorq.load(tmp_path / "q", device="cpu") for _ in range(2))
    dense = dense.dequantize()
    assert not find_experts(dense)
    expected, got = families.logits(dense, tokens), families.logits(packed, tokens)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())
    split_experts(dense)
    apart = families.logits(dense, tokens)
    torch.testing.assert_close(apart, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.fixture(scope="module")
def table():
    """Verdicts and reasons as the package carries them, by model type and class."""
    rows = csv.DictReader(families.TABLE.read_text(encoding="utf-8").splitlines())
    return {(row["model_type"], row["class"]): (row["verdict"], row["reason"]) for row in rows}


def test_the_command_prints_the_table_that_the_package_carries(table, capsys):
    assert list(table) == families.families()
    assert {verdict for verdict, _ in table.values()} == {families.WORKS, families.REFUSED, families.UNBUILT}
    assert all(reason for verdict, reason in table.values() if verdict != families.WORKS)
    assert main(["families", "gemma3"]) == 0
    shown = capsys.readouterr().out
    assert "Gemma3ForConditionalGeneration" in shown and "qwen" not in shown
    assert main(["families", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["model_type"], row["class"]) for row in rows] == list(table)
    assert main(["families", "nothing-like-it"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", families.families(), ids="-".join)
def test_the_table_still_holds(family, table):
    assert families.in_a_process(*family) == table[family]
