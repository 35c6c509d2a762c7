"""lorq export: what other programs read stands for the same model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorq
from lorq.cli import main
from lorq.exports import TARGETS

TOKENS = torch.arange(7, 39)[None]


@pytest.fixture(scope="module")
def quantized(folder_of, tmp_path_factory):
    """A tiny model of a family, rounded to nearest; made once, not to be changed."""
    made = {}

    def of(family, method=lorq.Nearest(bits=4, group_size=16), **options):  # noqa: B008  # frozen
        key = (family, method, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("export") / family
            lorq.quantize(folder_of(family), made[key], method, **options)
        return made[key]

    return of


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss"])
def test_dense_folders_say_what_the_quantized_ones_do(family, quantized, folder_of, tmp_path):
    folder = quantized(family)
    done = lorq.export(folder, tmp_path / "dense", to="dense", dtype="float32")
    assert done.lost == {}
    torch.testing.assert_close(logits(dense(tmp_path / "dense")), logits(lorq.load(folder)), rtol=1e-4, atol=1e-4)
    # The same names, shapes and config as the original's, but for the type.
    original = load_file(folder_of(family) / "model.safetensors")
    ours = load_file(tmp_path / "dense" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in original.items()}
    configs = [json.loads((f / "config.json").read_text()) for f in (folder_of(family), tmp_path / "dense")]
    assert {key: configs[1].get(key) for key in configs[0]} == configs[0]
    assert {"quantization_config", "transformers_weights"}.isdisjoint(configs[1])
    tokens = [AutoTokenizer.from_pretrained(f)("abc").input_ids for f in (folder_of(family), tmp_path / "dense")]
    assert tokens[0] == tokens[1]


def test_rounding_to_a_type_is_measured(quantized, tmp_path):
    done = lorq.export(quantized("llama"), tmp_path / "half", to="dense", dtype="bfloat16")
    assert 5e-4 < float(done.lost["rounding"].split()[5]) < 4e-3  # half a step of 8 bits is at most 2^-9
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}


def test_many_tensors_go_to_several_files(quantized, tmp_path, monkeypatch):
    monkeypatch.setattr("lorq.exports.plain._MOST_BYTES", 100_000)
    lorq.export(quantized("llama"), tmp_path / "dense", to="dense", dtype="float32")
    index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2
    torch.testing.assert_close(logits(dense(tmp_path / "dense")), logits(lorq.load(quantized("llama"))))


def test_the_command_prints_what_was_written_and_lost(quantized, tmp_path, capsys):
    out = tmp_path / "dense"
    assert main(["export", str(quantized("llama")), str(out), "--to", "dense", "--dtype", "float16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"wrote {out}, {(out / 'model.safetensors').stat().st_size / 1e6:.1f} MB"
    assert lines[1].startswith("lost, rounding: float16 changes the weights by 0.0")
    assert main(["export", str(quantized("llama")), str(out), "--to", "dense"]) == 1
    assert f"{out} must be new, it is there" in capsys.readouterr().err
    assert main(["export", str(quantized("llama")), str(out), "--to", "dense", "--overwrite"]) == 0


@pytest.mark.parametrize("target", ["dense", "compressed-tensors", "gptq", "peft"])
def test_how_far_it_is_is_told_by_time(target, quantized, request, tmp_path):
    folder, adapter = quantized("llama", SYMMETRIC), None
    if target == "peft":
        folder, adapter = request.getfixturevalue("with_ranks"), tmp_path / "lora"
    told = []
    lorq.export(folder, tmp_path / "out", to=target, adapter=adapter, progress=lambda *step: told.append(step))
    assert told[:3] == [("load torch", 0, 1), ("load torch", 1, 1), ("export", 0, 1)]
    # By time: of three files, which are of two kinds, not all can be told of before the end.
    *between, (stage, done, total) = told[3:]
    assert stage == "export" and done == total and len(between) <= 1
    assert all(0 < earlier < known and earlier < done for _, earlier, known in between)


def test_a_file_that_was_edited_is_not_replaced(quantized, tmp_path, capsys):
    out = tmp_path / "dense"
    arguments = ["export", str(quantized("llama")), str(out), "--to", "dense", "--overwrite"]
    assert main(arguments) == 0
    (out / "config.json").write_text((out / "config.json").read_text().replace("silu", "gelu"))
    assert main(arguments) == 1
    assert f"{out} must be as lorq exported it to be replaced, config.json changed since" in capsys.readouterr().err


def test_targets_say_what_they_refuse(quantized, tmp_path):
    folder = quantized("llama")
    with pytest.raises(ValueError, match=r"--to dense has the low-rank part in its matrices, --adapter .*lora is none"):
        lorq.export(folder, tmp_path / "out", to="dense", adapter=tmp_path / "lora")
    for adapter in ("out", "out/lora"):
        with pytest.raises(FileExistsError, match="must be places of their own, none in another"):
            lorq.export(folder, tmp_path / "out", to="dense", adapter=tmp_path / adapter)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Models with a number past float16's largest, 65504: in a norm, a bias, the table of tokens, or the head."""
    from gguf_models import gguf_folder

    place, made = tmp_path_factory.mktemp("large"), {}

    def of(name):
        if name not in made:
            model = AutoModelForCausalLM.from_pretrained(
                gguf_folder(place / f"{name}-m", "qwen2"), dtype=torch.bfloat16
            )
            parameter = model.get_parameter(name)
            parameter.data.view(-1)[:32] = 1e5
            model.save_pretrained(place / f"{name}-m")
            method = lorq.Nearest(bits=8, group_size=32, symmetric=True)
            lorq.quantize(place / f"{name}-m", place / name, method, head=8 if "lm_head" in name else 0)
            made[name] = place / name
        return made[name]

    return of


@pytest.mark.parametrize("target", ["dense", "compressed-tensors", "gptq", "gguf"])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_numbers_too_large_for_a_type_are_refused(name, target, large, tmp_path):
    folder = large(name)
    if target == "gguf" and not name.endswith(("tokens.weight", "head.weight")):
        lorq.export(folder, tmp_path / "out", to=target, dtype="float16")  # norms and biases are float32 there
        return
    options = {"dtype": "float16"} if target != "gguf" else {"gguf": lorq.GgufOptions(embeddings="f16")}
    with pytest.raises(ArithmeticError, match=rf"{name} must fit f(loat)?16, its largest value is .*; (take|name)"):
        lorq.export(folder, tmp_path / "out", to=target, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"gguf": lorq.GgufOptions(type="f16", embeddings="f16")}])
def test_numbers_too_large_for_a_file_are_refused(options, large, tmp_path):
    with pytest.raises(ArithmeticError, match=r"model\.embed_tokens\.weight must fit f16, .*; name a wider type"):
        lorq.export(large("model.embed_tokens.weight"), tmp_path / "m.gguf", **options)


def test_factors_too_large_for_an_adapter_are_refused(with_ranks, tmp_path, monkeypatch):
    from lorq.core.low_rank import LowRank

    whole = LowRank.factors
    monkeypatch.setattr(LowRank, "factors", lambda self, *dtype: (whole(self, *dtype)[0] * 1e8, self.right.float()))
    with pytest.raises(ArithmeticError, match=r"_proj\.left must fit float16, its largest .*; take --to dense"):
        lorq.export(with_ranks, tmp_path / "out", to="peft", adapter=tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


LOW_RANK = lorq.LoPRo(
    bits=4, group_size=16, rank=3, rotation="none", epochs=0, rounding="nearest", factor_type="float16",
)  # fmt: skip
SYMMETRIC = lorq.Nearest(bits=4, group_size=32, symmetric=True)


@pytest.fixture(scope="module")
def with_ranks(quantized, text_file):
    return quantized("llama", LOW_RANK, calibration=str(text_file), samples=4, seq_len=32)


PEFTS = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # transformers', to peft


def merged(base, adapter):
    """The logits of a model with an adapter, as PEFT loads it."""
    peft = pytest.importorskip("peft")
    return logits(peft.PeftModel.from_pretrained(base, adapter).eval())


@pytest.mark.filterwarnings(PEFTS)
def test_the_low_rank_part_is_an_adapter_on_the_codes(with_ranks, tmp_path):
    done = lorq.export(with_ranks, tmp_path / "base", to="peft", adapter=tmp_path / "lora")
    base = lorq.load(tmp_path / "base")
    assert {layer.rank for layer in lorq.read_report(tmp_path / "base").layers} == {0}
    expected = logits(lorq.load(with_ranks))
    assert (logits(base) - expected).abs().max() > 0.1  # it matters
    torch.testing.assert_close(merged(base.dequantize(), tmp_path / "lora"), expected, rtol=1e-3, atol=1e-3)
    assert done.lost == {} and "--max-lora-rank" not in done.lines[0]


def test_a_low_rank_part_needs_a_place_and_a_rank_that_servers_take(with_ranks, quantized, tmp_path, monkeypatch):
    for target in ("compressed-tensors", "gptq"):
        with pytest.raises(ValueError, match=f"--to {target} holds codes, 14 layers have a low-rank part besides"):
            lorq.export(with_ranks, tmp_path / "out", to=target)
        with pytest.raises(ValueError, match=r"--adapter is for a low-rank part, the layers of .* have none"):
            lorq.export(quantized("llama"), tmp_path / "out", to=target, adapter=tmp_path / "lora")
    for adapter in (None, tmp_path / "lora"):
        with pytest.raises(ValueError, match=r"the layers of .* have none: it is a base for PEFT as it is"):
            lorq.export(quantized("llama"), tmp_path / "out", to="peft", adapter=adapter)
    with pytest.raises(ValueError, match="--to peft writes the low-rank part by itself, say where: --adapter DIR"):
        lorq.export(with_ranks, tmp_path / "out", to="peft")
    monkeypatch.setattr("lorq.exports.parts.SERVED_RANKS", (1,))
    with pytest.raises(ValueError, match=r"--adapter needs ranks up to 1, the most that servers take, .* has \d+"):
        lorq.export(with_ranks, tmp_path / "out", to="peft", adapter=tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3-moe"])
def test_compressed_tensors_are_read_by_transformers(family, quantized, tmp_path):
    pytest.importorskip("compressed_tensors", minversion="0.18")
    folder = quantized(family, SYMMETRIC)
    done = lorq.export(folder, tmp_path / "out", to="compressed-tensors", dtype="float32")
    assert done.lines[0] == f"vllm serve {tmp_path / 'out'} --dtype float16"
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    exact = 0.02 if family in ("mixtral", "qwen3-moe") else 1e-3  # experts are decoded in the scales' float16
    torch.testing.assert_close(logits(read), logits(lorq.load(folder)), rtol=exact, atol=exact)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_zero_points_are_read_by_transformers_as_dense_weights_alone(quantized, tmp_path):
    """When the first of these no longer fails, the printed line, the card's and docs/engines/vllm.md's may go."""
    pytest.importorskip("compressed_tensors", minversion="0.18")
    from transformers import CompressedTensorsConfig

    folder, out = quantized("llama"), tmp_path / "out"
    done = lorq.export(folder, out, to="compressed-tensors", dtype="float32")
    assert sum("quantization_config=CompressedTensorsConfig(dequantize=True)" in line for line in done.lines) == 1
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    dense = CompressedTensorsConfig(dequantize=True)  # decoded in the scales' float16
    read = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, quantization_config=dense)
    torch.testing.assert_close(logits(read), logits(lorq.load(folder)), rtol=0.05, atol=0.05)
    done = lorq.export(quantized("llama", SYMMETRIC), tmp_path / "symmetric", to="compressed-tensors")
    assert not any("CompressedTensorsConfig" in line for line in done.lines)


@pytest.mark.filterwarnings(PEFTS)
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_compressed_tensors_and_the_adapter_are_the_model(with_ranks, tmp_path):
    pytest.importorskip("compressed_tensors", minversion="0.18")
    from transformers import CompressedTensorsConfig

    done = lorq.export(
        with_ranks, tmp_path / "out", to="compressed-tensors", adapter=tmp_path / "lora", dtype="float32"
    )
    assert "--enable-lora --max-lora-rank 8 --lora-modules low-rank=" in done.lines[0]
    dense = CompressedTensorsConfig(dequantize=True)  # what PEFT needs; decoded in the scales' float16
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=dense)
    torch.testing.assert_close(merged(base, tmp_path / "lora"), logits(lorq.load(with_ranks)), rtol=0.02, atol=0.02)


REFUSED = {
    "rotated": (lorq.LoPRo(bits=4, rank=0, group_size=16), r"is rotated by \d+; it can be exported --to dense"),
    "levels": (lorq.Nearest(grid="normal-float", group_size=16), "model.layers.0.mlp.down_proj has levels; it can be"),
    "streams": (lorq.FLRQ(codebook="trellis", budget=0.0, epochs=0), "has trellis; it can be exported --to dense"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_codes_that_a_target_does_not_hold_are_refused(kind, quantized, text_file, tmp_path):
    method, words = REFUSED[kind]
    folder = quantized("llama", method, calibration=str(text_file), samples=4, seq_len=32)
    for target in ("compressed-tensors", "gptq"):
        with pytest.raises(ValueError, match=words):
            lorq.export(folder, tmp_path / "out", to=target)


def test_layers_and_experts_that_a_target_has_no_place_for_are_refused(quantized, text_file, tmp_path):
    with pytest.raises(ValueError, match=r"holds linear layers, transformer\.h\.0\..* is a Conv1D"):
        lorq.export(quantized("gpt2"), tmp_path / "out", to="compressed-tensors")
    moe = quantized("qwen3-moe", LOW_RANK, calibration=str(text_file), samples=4, seq_len=32)
    with pytest.raises(ValueError, match=r"no adapter of single experts, .*experts\.0\..* has a low-rank part"):
        lorq.export(moe, tmp_path / "out", to="compressed-tensors", adapter=tmp_path / "lora")


def test_gptq_refuses_widths_and_sizes_that_its_readers_do_not_know(quantized, tmp_path):
    with pytest.raises(
        ValueError, match=r"holds codes of 2, 3, 4 and 8 bits, .*down_proj has 5; .* compressed-tensors"
    ):
        lorq.export(quantized("llama", lorq.Nearest(bits=5, group_size=16)), tmp_path / "out", to="gptq")


def test_every_target_is_told_in_the_help():
    own = lorq.export.__doc__.split("        to: ")[1].split("        dtype:")[0]
    assert all(name in own for name in TARGETS)
