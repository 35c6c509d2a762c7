"""lorq compensate: what others have quantized gets factors, in forms that others read."""

import json
import re
import shutil
from dataclasses import replace

import numpy
import pytest
import torch
from helpers import folder_digests, tiny_folder
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM

import lorq
from lorq.cli import main
from lorq.core.codes import IntGrid
from lorq.core.packing import pack
from lorq.storage.writer import CheckpointWriter

TOKENS = torch.arange(7, 39)[None]
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FULL = 64  # the smaller side of every layer, or more


def gptq_tensors(weight, bits, group=32):
    """A weight rounded to nearest, as GPTQ's first format has it."""
    grid = IntGrid(bits, group, symmetric=True)
    scale, zero = grid.fit(weight)
    codes = grid.encode(grid.grouped(weight), scale[..., None], zero[..., None]).flatten(1).to(torch.uint8)
    stored = (zero - 1).to(torch.uint8).T.contiguous()
    return {
        "qweight": pack(codes, bits).T.contiguous(), "qzeros": pack(stored, bits),
        "scales": scale.half().T.contiguous(), "g_idx": (torch.arange(weight.shape[1]) // group).int(),
    }  # fmt: skip


def quantized_as_gptq(
    original, folder, bits=3, change=lambda tensors: tensors, layers=LAYERS, of=lambda weight: weight
):
    """The model's folder with its linear layers in GPTQ's format.

    ``change`` is made before; ``of`` turns a weight as it is stored to (out, in).
    """
    shutil.copytree(original, folder)
    tensors = change(load_file(original / "model.safetensors"))
    for name in [name for name in tensors if name.split(".")[-2] in layers and name.endswith("weight")]:
        packed = gptq_tensors(of(tensors.pop(name).float()), bits)
        tensors |= {f"{name.removesuffix('weight')}{local}": tensor for local, tensor in packed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": 32,
        "checkpoint_format": "gptq",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("compensate") / "original", "llama")


@pytest.fixture(scope="module")
def quantized(original):
    return quantized_as_gptq(original, original.with_name("gptq"))


@pytest.fixture
def compensate(original, quantized, text_file, tmp_path):
    def call(out=tmp_path / "out", *, of=quantized, **settings):
        small = {"calibration": str(text_file), "samples": 4, "seq_len": 32, "token_weights": "equal"}
        return lorq.compensate(settings.pop("original", original), of, out, **small | settings)

    return call


def logits(folder, **changes):
    """A dense model's; some of its weights may be others."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(changes, strict=False)
    with torch.no_grad():
        return model(TOKENS).logits


def adapter_of(folder):
    """An adapter's product for each layer, as peft defines it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name in (key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key):
        a, b = tensors[f"{name}.lora_A.weight"].float(), tensors[f"{name}.lora_B.weight"].float()
        own = name.removeprefix("base_model.model.")
        rank = config["rank_pattern"].get(own, config["r"])
        assert len(a) == rank and own in config["target_modules"]
        found[own] = config["alpha_pattern"].get(own, config["lora_alpha"]) / rank * b @ a
    assert set(found) == set(config["target_modules"])
    return found


def decoded(folder):
    from lorq.models.quantized import QuantizedFiles, read_quantization

    files = QuantizedFiles.of(folder, read_quantization(folder))
    return {name.removesuffix(".weight"): files.tensor(name) for name in files.layers}


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_factors_of_full_rank_bring_the_original_back(original, quantized, compensate, tmp_path):
    report = compensate(rank=FULL)
    weights, factors = decoded(quantized), adapter_of(tmp_path / "out")
    assert len(weights) == 14 and weights.keys() == factors.keys()
    both = {f"{name}.weight": weights[name] + factors[name] for name in weights}
    plain = logits(original, **{f"{name}.weight": weight for name, weight in weights.items()})
    # Factors are in float16.
    assert relative(logits(original, **both), logits(original)) < 0.01 < 0.1 < relative(plain, logits(original))
    assert all(layer.error_after < 1e-3 * layer.error_before for layer in report.layers)
    assert not tmp_path.joinpath("out.unfinished").exists()


@pytest.mark.filterwarnings("ignore")
def test_peft_itself_loads_the_adapter_and_computes_the_sum(original, quantized, compensate, tmp_path):
    peft = pytest.importorskip("peft")
    compensate(budget="8%")
    weights, factors = decoded(quantized), adapter_of(tmp_path / "out")
    assert len({len(t) for t in load_file(tmp_path / "out/adapter_model.safetensors").values()}) > 3  # ranks differ
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    model.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()}, strict=False)
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "out")(TOKENS).logits
    both = {f"{name}.weight": weights[name] + factors.get(name, 0) for name in weights}
    assert relative(adapted, logits(original, **both)) < 1e-5
    assert peft.PeftConfig.from_pretrained(tmp_path / "out").base_model_name_or_path == str(quantized)


def test_a_lorq_folder_has_the_same_codes_and_the_same_factors(original, quantized, compensate, tmp_path):
    compensate(rank=6)
    report = compensate(tmp_path / "lorq", rank=6, form="lorq")
    weights, factors = decoded(quantized), adapter_of(tmp_path / "out")
    folder = lorq.read_report(tmp_path / "lorq")
    assert folder.bytes == report.bytes and folder.bits_per_weight == report.bits_per_weight
    both = {f"{name}.weight": weights[name] + factors[name] for name in weights}
    with torch.no_grad():
        got = lorq.load(tmp_path / "lorq", device="cpu")(TOKENS).logits
    assert relative(got, logits(original, **both)) < 1e-5
    # 3 bits, a scale of 16 bits for 32 weights, 6 pairs of factors in float16; 16 bytes tell the shape.
    layer = next(layer for layer in report.layers if layer.name.endswith("q_proj"))
    assert layer.bytes == (64 * 64 * 3 + 64 * 64 // 32 * 16 + 6 * 128 * 16) // 8 + 16
    assert (layer.bits, layer.rank) == (3, 6) and 0 < layer.error_after < layer.error_before


def test_factors_of_a_lorq_folder_join_those_it_has_in_its_own_basis(original, compensate, text_file, tmp_path):
    small = {"calibration": str(text_file), "samples": 4, "seq_len": 32}
    method = lorq.LoPRo(bits=3, group_size=32, rank=4)  # rotated inputs, and 8-bit factors
    lorq.quantize(original, tmp_path / "lopro", method, **small)
    with pytest.raises(ValueError, match="these would be float16 beside int8 ones; take the other --factor-type"):
        compensate(of=tmp_path / "lopro", form="lorq", rank=4)
    compensate(of=tmp_path / "lopro", form="lorq", rank=FULL, factor_type="int8", resume=False, out=tmp_path / "more")
    with torch.no_grad():
        before, after = (
            relative(lorq.load(tmp_path / name, device="cpu")(TOKENS).logits, logits(original))
            for name in ("lopro", "more")
        )
    assert after < 0.1 * before


def test_scales_that_a_quantizer_moved_into_norms_and_other_layers_are_allowed_for(original, compensate, tmp_path):
    generator = torch.Generator().manual_seed(0)

    def scales(n):
        return torch.empty(n).uniform_(0.3, 3.0, generator=generator)

    def move(tensors):  # as AWQ does
        for i in range(2):
            at, s, t = f"model.layers.{i}.", scales(64), scales(128)
            tensors[f"{at}input_layernorm.weight"] /= s
            for name in ("q", "k", "v"):
                tensors[f"{at}self_attn.{name}_proj.weight"] *= s
            tensors[f"{at}mlp.up_proj.weight"] /= t[:, None]
            tensors[f"{at}mlp.down_proj.weight"] *= t
        return tensors

    moved = quantized_as_gptq(original, tmp_path / "awq", bits=4, change=move)
    report = compensate(of=moved, rank=FULL)
    assert {layer.name.rpartition(".")[2] for layer in report.layers if "allowed for" in layer.note} == {
        "q_proj", "k_proj", "v_proj", "up_proj", "down_proj",
    }  # fmt: skip
    weights, factors = decoded(moved), adapter_of(tmp_path / "out")
    norms = {name: t for name, t in load_file(moved / "model.safetensors").items() if "norm" in name}
    plain = logits(original, **norms, **{f"{name}.weight": weight for name, weight in weights.items()})
    both = logits(original, **norms, **{f"{name}.weight": weights[name] + factors[name] for name in weights})
    # What is left are the scales, which are only estimated from weights in 4 bits.
    assert relative(both, logits(original)) < 0.3 * relative(plain, logits(original))


def test_ranks_follow_the_budget_and_more_of_it_helps_more(original, quantized, compensate, tmp_path):
    spent, errors = [], []
    for budget in ("0.1", "0.4", "20%"):
        report = compensate(tmp_path / budget, budget=budget)
        weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
        spent.append(sum(16 * layer.rank * sum(layer.shape) for layer in report.layers) / weights)
        errors.append(sum(layer.error_after for layer in report.layers))
        assert 8 * report.bytes / weights == spent[-1]
    assert 0.05 < spent[0] <= 0.1 and 0.3 < spent[1] <= 0.4 < spent[2]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("settings", [{"budget": "20%"}, {"budget": "6", "max_rank": 3}, {"rank": 99}], ids=str)
def test_a_dry_run_tells_what_the_result_keeps_to(settings, compensate, tmp_path):
    told, made = compensate(dry_run=True, **settings), compensate(**settings)
    assert made.bytes <= told.bytes < 1.5 * made.bytes
    most = settings.get("max_rank", FULL)
    assert all(layer.rank <= min(most, *layer.shape) for layer in (*told.layers, *made.layers))


def test_the_gradient_tells_where_a_bit_gains_most(compensate, tmp_path):
    one = compensate(tmp_path / "equal", budget="0.4")
    other = compensate(tmp_path / "gradient", budget="0.4", token_weights="gradient")
    assert [layer.rank for layer in one.layers] != [layer.rank for layer in other.layers]


@pytest.mark.parametrize("family, tables", [("llama", {"head": 6}), ("mistral", {"head": 6, "embeddings": 5})])
def test_a_folder_with_quantized_tables_gets_factors_beside_them(family, tables, compensate, text_file, tmp_path):
    dense, folder = tiny_folder(tmp_path / "dense", family), tmp_path / "tables"
    small = {"table_group_size": 32, "calibration": str(text_file), "samples": 4, "seq_len": 32}
    lorq.quantize(dense, folder, lorq.GPTQ(bits=2, group_size=32), **tables, **small)
    report = compensate(original=dense, of=folder, rank=FULL)
    assert len(report.layers) == 14 and all(layer.error_after < layer.error_before for layer in report.layers)
    assert not any("embed" in name or "lm_head" in name for name in adapter_of(tmp_path / "out"))
    made = compensate(tmp_path / "lorq", original=dense, of=folder, rank=FULL, form="lorq", exclude="1.mlp.up_proj")
    before, after = ({layer.name: layer for layer in own.layers} for own in (lorq.read_report(folder), made))
    for name in (*({"embed_tokens", "lm_head"} & {n.rpartition(".")[2] for n in before}), "layers.1.mlp.up_proj"):
        name = next(own for own in before if own.endswith(name))
        note = "excluded by 1.mlp.up_proj" if "mlp" in name else "a table of tokens or a head"
        assert after.pop(name) == replace(before[name], note=f"no factors: {note}")
    assert len(after) == 13 and all(layer.rank > 0 for layer in after.values())
    config, then = (
        json.loads((f / "config.json").read_text())["quantization_config"] for f in (tmp_path / "lorq", folder)
    )
    assert config["embeddings"] == then["embeddings"] and config["embeddings"]
    # What is left is the error of the tables and of one layer.
    off = {name: relative(lorq_logits(name), logits(dense)) for name in (tmp_path / "lorq", folder)}
    assert off[tmp_path / "lorq"] < 0.4 * off[folder]


def lorq_logits(folder):
    with torch.no_grad():
        return lorq.load(folder, device="cpu")(TOKENS).logits


@pytest.fixture(scope="module")
def conv1d(tmp_path_factory):
    """GPT-2, whose layers keep their weights as (in, out), in lorq's codes and in GPTQ's."""
    place = tmp_path_factory.mktemp("conv1d")
    dense = tiny_folder(place / "dense", "gpt2")
    lorq.quantize(dense, place / "lorq", lorq.Nearest(bits=3, group_size=32))
    turned = quantized_as_gptq(dense, place / "gptq", layers=("c_attn", "c_proj", "c_fc"), of=lambda weight: weight.T)
    return dense, {"lorq": place / "lorq", "gptq": turned}


@pytest.mark.parametrize("source", ["lorq", "gptq"])
def test_layers_that_are_stored_the_other_way_round_get_factors(source, conv1d, compensate, tmp_path):
    dense, folders = conv1d
    report = compensate(original=dense, of=folders[source], rank=FULL, form="lorq")
    assert len(report.layers) == 8 and all(layer.error_after < 1e-3 * layer.error_before for layer in report.layers)
    off = relative(lorq_logits(tmp_path / "out"), logits(dense))
    assert off < 0.01 < 0.1 < relative(lorq_logits(folders["lorq"]), logits(dense))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dequantize", [False, True])
def test_an_adapter_for_them_is_loaded_by_peft_on_the_codes_and_on_the_dense_model(
    dequantize, conv1d, compensate, tmp_path
):
    peft = pytest.importorskip("peft")
    dense, folders = conv1d
    compensate(original=dense, of=folders["lorq"], rank=FULL)
    model = lorq.load(folders["lorq"], device="cpu")
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(model.dequantize() if dequantize else model, tmp_path / "out")
        if dequantize:
            adapted = adapted.merge_and_unload()
        assert relative(adapted(TOKENS).logits, logits(dense)) < 0.01


def test_others_codes_of_such_layers_are_dequantized_the_right_way_round(conv1d, tmp_path):
    dense, folders = conv1d
    lorq.quantize(folders["gptq"], tmp_path / "out", lorq.Nearest(bits=8, group_size=32))
    weights = load_file(dense / "model.safetensors")
    for name, weight in decoded(tmp_path / "out").items():
        assert relative(weight.T, weights[f"{name}.weight"]) < 0.3


def test_a_head_that_alone_is_quantized_is_no_longer_the_table(original, compensate, tmp_path):
    def with_head(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    folder = quantized_as_gptq(original, tmp_path / "gptq", 4, with_head, layers=(*LAYERS, "lm_head"))
    compensate(of=folder, rank=FULL, form="lorq")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    head = decoded(folder)["lm_head"]
    assert torch.equal(decoded(tmp_path / "out")["lm_head"], head)
    table = load_file(original / "model.safetensors")["model.embed_tokens.weight"]
    model = lorq.load(tmp_path / "out", device="cpu")
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert 0.05 < relative(lorq_logits(tmp_path / "out"), logits(original)) < 0.3


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(compensate, monkeypatch, tmp_path):
    compensate(tmp_path / "whole", budget="5%")
    write = CheckpointWriter.write_shard

    def until(self, name, *rest):
        if len(self.completed) == done:
            raise KeyboardInterrupt
        write(self, name, *rest)

    for done in (0, 1):  # noqa: B007, for `until`; what has finished nothing is in nobody's way
        monkeypatch.setattr(CheckpointWriter, "write_shard", until)
        with pytest.raises(KeyboardInterrupt):
            compensate(budget="5%")
        monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match=r"out\.unfinished has unfinished work; go on with --resume"):
        compensate(budget="5%")
    with pytest.raises(ValueError, match=r"samples \(folder: 4, now: 3\); resume with the same settings, or delete"):
        compensate(budget="5%", samples=3, resume=True)
    compensate(budget="5%", resume=True)
    assert folder_digests(tmp_path / "whole") == folder_digests(tmp_path / "out")


def test_what_is_no_original_is_refused_by_name(original, quantized, compensate, tmp_path):
    with pytest.raises(ValueError, match=r"embed_tokens.weight, which is not quantized, differs by 1\d\d\.\d%"):
        compensate(rank=4, original=tiny_folder(tmp_path / "other", "llama", seed=1))
    shutil.copytree(original, tmp_path / "tuned")
    tensors = load_file(tmp_path / "tuned/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].flip(1).contiguous()
    save_file(tensors, tmp_path / "tuned/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.up_proj differs by \d+% of its size where quantization makes"
    ):
        compensate(rank=4, original=tmp_path / "tuned")
    shutil.rmtree(tmp_path / "out.unfinished")  # the block before was finished
    wide = tiny_folder(tmp_path / "wide", "llama", intermediate_size=96)
    with pytest.raises(
        ValueError, match=r"6 tensors are of other shapes: .*down_proj.weight is \(64, 128\), not \(64, 96\)"
    ):
        compensate(rank=4, original=wide)
    with pytest.raises(ValueError, match=r"there is nothing to compensate"):
        compensate(rank=4, of=original)
    shutil.rmtree(tmp_path / "out.unfinished")


def test_formats_and_settings_that_do_not_fit_are_refused(original, quantized, compensate, tmp_path):
    def stated(name, **quantization):
        folder = shutil.copytree(quantized, tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = quantization
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    for folder, message in (
        (
            stated("hqq", quant_method="hqq"),
            "quantized as one of gptq, awq, compressed-tensors, bitsandbytes, fp8, modelopt, lorq, or",
        ),
        (
            stated("planar", quant_method="gptq", checkpoint_format="gptq_p"),
            "checkpoint_format gptq or gptq_v2, got gptq_p",
        ),
        (stated("gemv", quant_method="awq", bits=4, version="gemv"), "version gemm in 4 bits, got gemv in 4"),
        (stated("nf4", quant_method="bitsandbytes"), "must have weights that bitsandbytes has packed"),
    ):
        with pytest.raises(ValueError, match=message):
            compensate(of=folder, rank=4)
    for settings, message in (
        ({"rank": 4, "budget": "5%"}, "give a rank or a budget, got rank 4 and budget '5%'"),
        ({"budget": "much"}, "budget must be bits per weight, such as 0.2, or a share, such as 5%, got 'much'"),
        ({"rank": 4, "max_rank": 8}, "max_rank limits what a budget gives, got max_rank 8 and rank 4"),
        ({"factor_type": "int8"}, "factor_type 'int8' is for --form lorq"),
        ({"form": "gguf"}, r"needs QUANTIZED to be the \.gguf file"),
        ({"exclude": "nothing"}, "exclude must match a layer, these match none: nothing"),
        ({"form": "lorq", "of": original}, "--form lorq needs weights that are integer codes with groups"),
    ):
        with pytest.raises(ValueError, match=message):
            compensate(**settings)
    with pytest.raises(TypeError, match="unknown settings: ranks; known are rank, budget"):
        compensate(ranks=4)
    with pytest.raises(
        ValueError, match=r"budget '0.0001' must suffice for a pair of factors .* give more, and --resume"
    ):
        compensate(budget="0.0001")
    assert compensate(budget="5%", resume=True).layers


def test_the_command_prints_what_came_out(original, quantized, text_file, tmp_path, capsys):
    command = ["compensate", str(original), str(quantized), str(tmp_path / "out")]
    small = [f"--calibration={text_file}", "--samples=4", "--seq-len=32", "--rank=4", "--exclude=layers.0"]
    assert main([*command, *small, "--dry-run"]) == 0
    assert "at most" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert main([*command, *small]) == 0
    shown = capsys.readouterr().out
    assert "7 with factors, of 7" in shown and re.search(r"rank +│ 4 +│", shown)
    assert main([*command, *small]) == 1
    assert "must be a new folder, it is there and not empty" in capsys.readouterr().err


def write_gguf(path, quantize):
    """A small llama with random weights; ``quantize`` says how a block's matrices are stored."""
    gguf = pytest.importorskip("gguf")
    random = numpy.random.default_rng(0)
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_context_length(64), w.add_embedding_length(64), w.add_block_count(1), w.add_feed_forward_length(96)
    w.add_head_count(4), w.add_head_count_kv(2), w.add_layer_norm_rms_eps(1e-5), w.add_vocab_size(258)
    w.add_rope_dimension_count(16), w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre("default")
    w.add_token_list([*sorted(ByteLevel.alphabet()), "<s>", "ab"]), w.add_token_merges(["a b"])
    w.add_token_types([1] * 256 + [3, 1]), w.add_bos_token_id(256), w.add_eos_token_id(256)
    shapes = {"token_embd": (258, 64), "output_norm": (64,), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,)}
    shapes |= {"blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64)}
    shapes |= {"blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (96, 64), "blk.0.ffn_up": (96, 64)}
    shapes |= {"blk.0.ffn_down": (64, 96), "output": (258, 64)}
    for name, shape in shapes.items():
        values = random.normal(1 if len(shape) == 1 else 0, 0.2, shape).astype(numpy.float32)
        if quantize and name.startswith("blk.0") and len(shape) == 2:
            kind = gguf.GGMLQuantizationType[quantize]
            w.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
        else:
            w.add_tensor(f"{name}.weight", values)
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    return path


def test_a_gguf_source_of_quantized_weights_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("LORQ_CACHE", str(tmp_path / "cache"))
    notes = {}
    for kind in ("", "Q4_0"):
        source = write_gguf(tmp_path / f"m{kind}.gguf", kind)
        lorq.quantize(source, tmp_path / f"out{kind}", lorq.Nearest(group_size=32))
        notes[kind] = lorq.read_report(tmp_path / f"out{kind}").notes
        assert not (tmp_path / f"out{kind}/.decoded_from").exists()
    said = "the model's weights were quantized before (GGUF: Q4_0), and dequantized"
    assert notes == {"": {}, "Q4_0": {"all layers": said}}


def test_a_lora_file_for_llama_cpp_brings_the_rows_of_a_gguf_file_back(compensate, monkeypatch, tmp_path):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("LORQ_CACHE", str(tmp_path / "cache"))
    original, quantized = write_gguf(tmp_path / "f32.gguf", ""), write_gguf(tmp_path / "q4.gguf", "Q4_0")
    compensate(of=quantized, original=original, form="gguf", rank=FULL)
    reader = gguf.GGUFReader(tmp_path / "out/adapter.gguf")
    told = {key: reader.fields[key].contents() for key in reader.fields}
    assert (told["general.type"], told["adapter.type"], told["general.architecture"]) == ("adapter", "lora", "llama")
    assert told["adapter.lora.alpha"] == 0  # llama.cpp scales by alpha / rank, unless it is 0
    factors = {tensor.name: torch.tensor(tensor.data).float() for tensor in reader.tensors}
    assert len(factors) == 14
    dense = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(original).tensors}
    for tensor in gguf.GGUFReader(quantized).tensors:
        if f"{tensor.name}.lora_a" in factors:
            weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
            sum_ = weight + factors[f"{tensor.name}.lora_b"] @ factors[f"{tensor.name}.lora_a"]
            # Of q and k as of the others, whose rows transformers puts in another order.
            assert relative(sum_, dense[tensor.name]) < 0.02 < 0.05 < relative(weight, dense[tensor.name])
