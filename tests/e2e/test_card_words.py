"""What cards, inspect and export say of models with factors: what errors hold with, and how both parts are loaded."""

import pytest
from gguf_models import gguf_folder
from huggingface_hub import ModelCard

import lorq
from lorq.cli import main

SMALL = {"samples": 2, "seq_len": 32}


@pytest.fixture(scope="module")
def both(tmp_path_factory, text_file):
    """A tiny model by gptq in 3 bits, with factors beside; its exports, and what these printed. Not to be changed."""
    home, options = tmp_path_factory.mktemp("words"), {"calibration": str(text_file), **SMALL}
    gguf_folder(home / "model", "llama")
    lorq.quantize(home / "model", home / "codes", lorq.GPTQ(bits=3, group_size=32), **options)
    lorq.compensate(
        home / "model", home / "codes", home / "better", form="lorq", rank=4, factor_type="int8",
        token_weights="equal", **options,
    )  # fmt: skip
    lines = {}
    for target in ("compressed-tensors", "gptq", "peft"):
        done = lorq.export(home / "better", home / target, to=target, adapter=home / f"{target}-lora")
        lines[target] = done.lines
    lorq.export(home / "better", home / "base.gguf", adapter=home / "lora.gguf")
    return home, lines


@pytest.fixture
def made(both):
    return both[0]


@pytest.fixture
def printed(both):
    return both[1]


def card(place, base=""):
    return lorq.push(place, "org/x", base_model=base, dry_run=True).card


def shown(place, capsys):
    """What inspect prints, without the lines of its tables."""
    capsys.readouterr()
    assert main(["inspect", str(place)]) == 0
    return "\n".join(" ".join(line.strip("│ ").split()) for line in capsys.readouterr().out.splitlines())


def errors(made):
    report = lorq.read_report(made / "better")
    return f"{report.mean_error():.4f}", f"{report.mean_error('before'):.4f}"


def test_errors_before_are_those_without_factors(made, capsys):
    after, before = errors(made)
    text = shown(made / "better", capsys)
    assert f"mean output error │ {after} (without factors: {before})" in text and "rounding to nearest" not in text
    assert "\nrank │ 4\n" in text and "asked for" in text and "candidates" not in text
    words = f"The layers' outputs are off by {after} of their squared norm; by {before} without factors."
    assert words in card(made / "better")
    assert words.replace("norm;", "norm, with its adapter;") in card(made / "gptq")
    text = shown(made / "gptq", capsys)
    assert f"{after} (without factors: {before}), of the folder OUT, whose low-rank part is in the adapter" in text


def test_how_the_codes_were_made_is_told_before_the_factors(made):
    for place, base in (("better", ""), ("compressed-tensors", ""), ("peft", ""), ("lora.gguf", "org/codes")):
        told = card(made / place, base)
        first = told.index("    lorq quantize ORIGINAL QUANTIZED --method gptq --bits 3 --group-size 32 ")
        assert first < told.index("    lorq compensate ORIGINAL QUANTIZED OUT --form lorq --rank 4 "), place


@pytest.mark.parametrize(
    ("place", "lines"),
    [
        (
            "compressed-tensors",
            [
                "    vllm serve org/x --dtype float16 --enable-lora --max-lora-rank 8 ",
                " --lora-modules low-rank=ADAPTER\n",
                "vLLM runs 3 bits on CUDA devices with the package humming-kernels alone.",
                'model = PeftModel.from_pretrained(model, "ADAPTER")',
            ],
        ),
        (
            "gptq",
            [
                "vLLM's reader of gptq takes symmetric codes of 4 and 8 bits alone; --to compressed-tensors serves",
                'model = PeftModel.from_pretrained(model, "ADAPTER")',
            ],
        ),
        ("peft", ["PEFT, with lorq installed", 'model = PeftModel.from_pretrained(model, "ADAPTER")']),
        ("base.gguf", ["    llama-cli -hf org/x -hff base.gguf --lora ADAPTER.gguf\n"]),
    ],
)
def test_codes_alone_say_where_their_adapter_is_and_how_both_are_loaded(place, lines, made):
    told = card(made / place)
    assert "it is an adapter of its own, ADAPTER" in told and "ORG/NAME --base-model org/x`)" in told
    assert "Of the lorq folder OUT that this and its adapter were made of" in told
    assert "This itself was not measured." in told and ", with its adapter; by " in told
    loading = told.split("## How to load it")[1]
    assert all(line in loading for line in lines), loading
    assert ("vllm serve" in loading) == (place == "compressed-tensors")


def test_an_adapter_for_llama_cpp_says_how_it_was_made(made, capsys):
    text = shown(made / "lora.gguf", capsys)
    assert "made by │ lorq quantize ORIGINAL QUANTIZED --method gptq" in text and "error │ " in text
    assert "lorq export OUT model.gguf --adapter ADAPTER.gguf" in text and "\nrank │ 4\n" in text
    with pytest.raises(ValueError, match="which is the pushed codes and not the original: --base-model ORG/NAME"):
        card(made / "lora.gguf")
    told = card(made / "lora.gguf", "org/codes")
    head = ModelCard(told).data
    assert head.base_model_relation == "adapter" and {"gguf", "lora"} < set(head.tags)
    assert "rank 4 in 14 layers" in told and "## How it was made" in told


def test_an_export_prints_how_its_two_parts_are_loaded(made, printed):
    codes, adapter = str(made / "gptq"), str(made / "gptq-lora")
    assert printed["gptq"][0] == (
        f"peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({codes!r}), {adapter!r})"
    )
    assert printed["peft"][0].startswith("peft.PeftModel.from_pretrained(lorq.load(")
    assert not any("ask vLLM" in line for line in (*printed["gptq"], *printed["peft"]))
    assert printed["compressed-tensors"][1] == (
        "ask vLLM for the model low-rank; its slots take rank 8, the layers have 4"
    )


def test_codes_beside_an_adapter_have_one_note_for_all_layers(made, capsys):
    report, text = lorq.read_report(made / "peft"), shown(made / "peft", capsys)
    note = "the low-rank part is an adapter beside this folder, and the errors are those with it"
    assert report.notes == {"all layers": note} and {layer.note for layer in report.layers} == {""}
    assert text.count("note: ") == 1 and "), with its adapter" in text
