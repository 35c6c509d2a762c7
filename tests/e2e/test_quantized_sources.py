"""Models that others have quantized as sources: dequantized, and said so."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorq
from lorq.cli import main
from lorq.core.packing import pack, unpack
from lorq.quality import bits_per_weight
from lorq.storage.folder import LorqFolder

TOKENS = torch.arange(7, 39)[None]
METHOD = lorq.Nearest(bits=4, group_size=16, symmetric=True)
NOTE = "14 of the model's weights were quantized before ({}), and dequantized"


@pytest.fixture(scope="module")
def quantized(folder_of, tmp_path_factory):
    """A folder of lorq's, which the sources are exported from; made once, not to be changed."""
    made = {}

    def of(family="llama"):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("source") / family
            lorq.quantize(folder_of(family), made[family], METHOD)
        return made[family]

    return of


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORQ_CACHE", str(tmp_path / "cache"))


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def dense_layers(model):
    return [module for name, module in model.named_modules() if name.endswith("_proj")]


@pytest.mark.parametrize("target", ["gptq", "compressed-tensors"])
def test_codes_on_the_same_grid_come_back(target, quantized, tmp_path):
    source, first = tmp_path / "source", quantized()
    lorq.export(first, source, to=target, dtype="float32")
    (source / "quantize_config.json").write_text("{}")
    lorq.quantize(source, tmp_path / "out", METHOD)
    report = lorq.read_report(tmp_path / "out")
    assert report.run["dequantized"] == NOTE.format(target) and report.notes["all layers"] == NOTE.format(target)
    again = LorqFolder.open(tmp_path / "out")
    for name, weight in LorqFolder.open(first).layers():
        torch.testing.assert_close(again.weight(name).dense(), weight.dense(), rtol=2e-3, atol=2e-3)
    assert not (tmp_path / "out/quantize_config.json").exists()  # which would tell others of codes that are not there
    assert "gptq" not in (tmp_path / "out/config.json").read_text()
    torch.testing.assert_close(logits(lorq.load(tmp_path / "out")), logits(lorq.load(first)), rtol=0.02, atol=0.02)


def test_such_a_model_writes_its_own_text_is_a_reference_and_is_said_on_the_command_line(quantized, tmp_path, capsys):
    source = tmp_path / "source"
    lorq.export(quantized(), source, to="gptq", dtype="float32")
    model = lorq.load(source)
    torch.testing.assert_close(logits(model), logits(lorq.load(quantized())), rtol=1e-3, atol=1e-3)
    # A scale of 16 bits and a zero point of 4 for 16 columns, and 32 bits for each column's group.
    sizes = [layer.weight.shape for layer in dense_layers(model)]
    columns = sum(32 * in_ for _, in_ in sizes) / sum(out * in_ for out, in_ in sizes)
    assert bits_per_weight(model, source) == pytest.approx(4 + 20 / 16 + columns)
    flags = ["--method", "gptq", "--bits", "3", "--group-size", "16", "--samples", "2", "--seq-len", "16"]
    assert main(["quantize", str(source), str(tmp_path / "out"), *flags, "--exclude", "o_proj"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert f"note: all layers: {NOTE.format('gptq')}" in capsys.readouterr().out
    kept = load_file(tmp_path / "out/lorq-00001-of-00002.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    torch.testing.assert_close(kept, LorqFolder.open(quantized()).weight("model.layers.0.self_attn.o_proj").dense())


def test_experts_that_others_have_quantized_are_read_one_by_one(quantized, tmp_path):
    source = tmp_path / "source"
    lorq.export(quantized("mixtral"), source, to="compressed-tensors", dtype="float32")
    lorq.quantize(source, tmp_path / "out", METHOD)
    expected, found = (LorqFolder.open(folder) for folder in (quantized("mixtral"), tmp_path / "out"))
    name = next(name for name in expected.formats if name.endswith("experts.3.down_proj"))
    torch.testing.assert_close(found.weight(name).dense(), expected.weight(name).dense(), rtol=2e-3, atol=2e-3)


def float8_folder(plain, folder, block, **quantization):
    """A model with float8 projections, one scale for each block, as fp8 checkpoints have them; their values."""
    folder.mkdir()
    for file in plain.iterdir():
        if not file.name.startswith("model"):
            (folder / file.name).write_bytes(file.read_bytes())
    tensors, values = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        tensors[name] = tensor
        if "_proj" in name:
            rows, columns = (range(0, n, b) for n, b in zip(tensor.shape, block, strict=True))
            scale = torch.tensor(
                [[float(tensor[r : r + block[0], c : c + block[1]].abs().max()) / 448 for c in columns] for r in rows]
            )
            spread = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            spread = spread[: len(tensor), : tensor.shape[1]]
            own = (tensor / spread).to(torch.float8_e4m3fn)
            values[name] = own.float() * spread
            tensors |= {name: own, f"{name}_scale_inv": scale}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    told = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"} | quantization
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": told}
    (folder / "config.json").write_text(json.dumps(config))
    return values


def test_float8_is_read_with_the_scales_of_its_blocks(tmp_path):
    from helpers import save_folder, tiny_model

    plain = save_folder(tiny_model(num_hidden_layers=1), tmp_path / "plain")
    values = float8_folder(plain, tmp_path / "source", (8, 12))
    lorq.quantize(tmp_path / "source", tmp_path / "out", lorq.Nearest(bits=8, group_size=8))
    found = LorqFolder.open(tmp_path / "out")
    assert len(found.formats) == len(values) == 7
    for name, weight in found.layers():
        step = float(values[f"{name}.weight"].abs().max()) / 100
        torch.testing.assert_close(weight.dense(), values[f"{name}.weight"], rtol=0, atol=step)
    wrong = json.loads((tmp_path / "source/config.json").read_text())
    wrong["quantization_config"]["weight_block_size"] = [4, 12]
    (tmp_path / "source/config.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=r"weight_scale_inv must be one number, one a row, or one for each block"):
        lorq.quantize(tmp_path / "source", tmp_path / "out2", lorq.Nearest(bits=8, group_size=8))


def test_what_is_not_read_is_refused_by_name(folder_of, quantized, tmp_path):
    source = tmp_path / "source"
    lorq.export(quantized(), source, to="gptq")
    config = json.loads((source / "config.json").read_text())
    for told, words in (
        ({"quant_method": "eetq"}, r"quantized as one of gptq, awq, .*, its config says eetq; give a folder of its"),
        ({"quant_method": "fp8"}, r"must have weights that fp8 has packed, as its config says; it has none"),
        ({"quant_method": "lorq"}, r"already quantized \(lorq\); give the original model"),
    ):
        (source / "config.json").write_text(json.dumps(config | {"quantization_config": told}))
        with pytest.raises(ValueError, match=words):
            lorq.quantize(source, tmp_path / "out", METHOD, dry_run=True)


NAME, FIRST = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
CONTRADICTIONS = {
    "bits=8": rf"{NAME} must have \d+ words for \d+ codes of 8 bits, as quantization_config says, .* which are 4 bits",
    "bits=3": rf"{NAME} must have \d+ words for \d+ codes of 3 bits, as quantization_config says, .* which are 4 bits",
    'bits="4"': rf"bits must be 1 to 8, got '4' for {NAME}",
    "group_size=32": rf"{NAME} must have scales for \d groups of \d+ columns, since group_size .* is 32, it has",
    'dynamic={"+:.*q_proj": {"bits": 8}}': rf"{NAME} must have \d+ words for \d+ codes of 8 bits",
    'checkpoint_format="gptq_v2"': rf"{NAME} has the zero point 7 everywhere .* gptq_v2 .* 8, .* set .* to gptq, or",
}


def changed_config(source, **told):
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] |= told
    (source / "quantize_config.json").unlink(missing_ok=True)
    (source / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("told", CONTRADICTIONS)
def test_a_config_of_gptq_that_contradicts_its_tensors_is_refused(told, quantized, tmp_path):
    source = tmp_path / "source"
    lorq.export(quantized(), source, to="gptq")
    config, tensors = source / "config.json", load_file(source / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if "proj" not in name or name.startswith(NAME)}
    tensors |= {f"{NAME.replace('q_proj', f'{n}_proj')}.weight": torch.zeros(1) for n in "kvo"}  # never come to
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    changed_config(source, **eval(f"dict({told})"))
    with pytest.raises(ValueError, match=rf"{config}: .*{CONTRADICTIONS[told]}"):
        lorq.quantize(source, tmp_path / "out", METHOD, dry_run=True)


def shift_zero_points(tensors):
    """To the other format of GPTQ: stored less one, or as they are."""
    for name in [name for name in tensors if name.endswith("qzeros")]:
        tensors[name] = pack(unpack(tensors[name], 4, 8 * tensors[name].shape[1]) + 1, 4)
    return tensors


def changed_tensors(source, change):
    save_file(change(load_file(source / "model.safetensors")), source / "model.safetensors", metadata={"format": "pt"})


def test_the_format_of_zero_points_that_nobody_tells_is_told_by_symmetric_ones(quantized, tmp_path):
    source = tmp_path / "source"
    lorq.export(quantized(), source, to="gptq", dtype="float32")
    changed_config(source, checkpoint_format=None, sym=None)
    lorq.quantize(source, tmp_path / "plain", METHOD)
    changed_tensors(source, shift_zero_points)
    with pytest.raises(
        ValueError, match=r"has the zero point 9 everywhere as .* gptq stores it, and 8, .* set .* gptq_v2"
    ):
        lorq.quantize(source, tmp_path / "out", METHOD, dry_run=True)
    changed_config(source, format="gptq_v2")
    lorq.quantize(source, tmp_path / "out", METHOD)
    for name, weight in LorqFolder.open(tmp_path / "plain").layers():
        assert torch.equal(LorqFolder.open(tmp_path / "out").weight(name).dense(), weight.dense())


@pytest.mark.parametrize(
    ("again", "words"),
    [
        ({"bits": 8}, "bits of config.json's quantization_config is 4 and bits of {} is 8"),
        (
            {"checkpoint_format": "gptq_v2"},
            "checkpoint_format of .* is 'gptq' and checkpoint_format of {} is 'gptq_v2'",
        ),
        ({"format": "gptq_v2"}, "checkpoint_format of .* is 'gptq' and format of {} is 'gptq_v2'"),
        ({"sym": False}, "sym of .* is True and sym of {} is False"),
        ({"method": "awq"}, "quant_method of .* is 'gptq' and method of {} is 'awq'"),
        ({"desc_act": True}, "desc_act of .* is False and desc_act of {} is True"),
        ({"is_marlin_format": True}, "checkpoint_format gptq or gptq_v2, got marlin"),
    ],
    ids=str,
)
def test_two_configs_of_gptq_that_contradict_each_other_are_refused(again, words, quantized, tmp_path):
    source = tmp_path / "source"
    lorq.export(quantized(), source, to="gptq")
    same = {"bits": 4, "group_size": 16, "sym": True, "damp_percent": 0.1, "method": "GPTQ", "format": None}
    (source / "quantize_config.json").write_text(json.dumps(same))
    assert lorq.quantize(source, tmp_path / "out", METHOD, dry_run=True).layers
    (source / "quantize_config.json").write_text(json.dumps(same | again))
    with pytest.raises(ValueError, match=words.format(r"quantize_config\.json")):
        lorq.quantize(source, tmp_path / "out", METHOD, dry_run=True)


def scatter(tensors):
    return tensors | {f"{NAME}.g_idx": tensors[f"{NAME}.g_idx"].flip(0).contiguous()}


def wide_words(tensors):
    return tensors | {f"{NAME}.qweight": tensors[f"{NAME}.qweight"].long()}


@pytest.mark.parametrize(
    ("change", "told", "words"),
    [
        (
            None,
            {"sym": True},
            rf"{FIRST} must have the zero point 8 everywhere, as sym .*True, says, it has others in \d+",
        ),
        (None, {"dynamic": {"+:.*q_proj": {"sym": True}}}, rf"{NAME} must have the zero point 8 everywhere, as sym"),
        (scatter, {}, rf"{NAME} must have its groups side by side, as desc_act .*False, says, its g_idx has them"),
        (wide_words, {}, rf"{NAME}.qweight must be words of 32 bits, got torch.int64"),
        (None, {"rotation": "hadamard"}, "has rotation 'hadamard': its weights were turned"),
    ],
    ids=["sym", "sym of a layer", "desc_act", "pack_dtype", "rotation"],
)
def test_what_gptqs_config_says_of_codes_is_held_against_them(change, told, words, folder_of, tmp_path):
    source = tmp_path / "source"
    lorq.quantize(folder_of("llama"), tmp_path / "q", lorq.Nearest(bits=4, group_size=16))
    lorq.export(tmp_path / "q", source, to="gptq")
    assert lorq.quantize(source, tmp_path / "out", METHOD, dry_run=True).layers
    changed_tensors(source, change or dict)
    changed_config(source, **told)
    with pytest.raises(ValueError, match=words):
        lorq.quantize(source, tmp_path / "out", METHOD, dry_run=True)
    if change is scatter:
        changed_config(source, desc_act=True)
        assert lorq.quantize(source, tmp_path / "out", METHOD, dry_run=True).layers


def awq_folder(plain, folder, zero, **told):
    """A model's projections as AutoAWQ packs them, with zero points from ``zero(out, groups)``; their values."""

    def words(codes):  # eight neighbours go to the places 0, 4, 1, 5 ... of a word
        dealt = torch.empty_like(codes).unflatten(1, (-1, 8))
        dealt[..., [0, 4, 1, 5, 2, 6, 3, 7]] = codes.unflatten(1, (-1, 8))
        return pack(dealt.flatten(1), 4)

    shutil.copytree(plain, folder)
    tensors, values = load_file(plain / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj" in name]:
        weight = tensors.pop(name).float()
        points = zero(len(weight), weight.shape[1] // 16)
        scale = weight.unflatten(1, (-1, 16)).abs().amax(-1).half() / 7
        wide = [part.repeat_interleave(16, 1) for part in (points, scale.float())]
        codes = (weight / wide[1] + wide[0]).round().clamp(0, 15).to(torch.uint8)
        values[name] = (codes.float() - wide[0]) * wide[1]
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.qweight": words(codes.T.contiguous()), f"{module}.scales": scale.T.contiguous()}
        tensors[f"{module}.qzeros"] = words(points.to(torch.uint8).T.contiguous())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    own = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"} | told
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": own}
    (folder / "config.json").write_text(json.dumps(config))
    return values


def test_awqs_fields_are_held_against_each_other_and_the_tensors(folder_of, tmp_path, generator):
    def any_point(*shape):
        return torch.randint(5, 12, shape, generator=generator)

    def middle(*shape):
        return torch.full(shape, 8)

    values = awq_folder(folder_of("llama"), tmp_path / "any", any_point)
    lorq.quantize(tmp_path / "any", tmp_path / "out", lorq.Nearest(bits=8, group_size=16))
    for name, weight in LorqFolder.open(tmp_path / "out").layers():
        step = float(values[f"{name}.weight"].abs().max()) / 100
        torch.testing.assert_close(weight.dense(), values[f"{name}.weight"], rtol=0, atol=step)
    changed_config(tmp_path / "any", zero_point=False)
    with pytest.raises(
        ValueError, match=rf"{FIRST} must have the zero point 8 everywhere, as zero_point .*'false', says"
    ):
        lorq.quantize(tmp_path / "any", tmp_path / "out2", METHOD, dry_run=True)
    awq_folder(folder_of("llama"), tmp_path / "middle", middle, zero_point=False)
    assert lorq.quantize(tmp_path / "middle", tmp_path / "out2", METHOD, dry_run=True).layers
    same = {"zero_point": False, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}
    for again, words in (
        ({}, ""),
        ({"version": "GEMV"}, r"version of .* is 'gemm' and version of quant_config\.json is 'GEMV'"),
        ({"w_bit": 3}, r"bits of .* is 4 and w_bit of quant_config\.json is 3"),
        ({"zero_point": True}, r"zero_point of .* is False and zero_point of quant_config\.json is True"),
    ):
        (tmp_path / "middle" / "quant_config.json").write_text(json.dumps(same | again))
        if not words:
            assert lorq.quantize(tmp_path / "middle", tmp_path / "out2", METHOD, dry_run=True).layers
            continue
        with pytest.raises(ValueError, match=words):
            lorq.quantize(tmp_path / "middle", tmp_path / "out2", METHOD, dry_run=True)


@pytest.mark.parametrize(
    ("symmetric", "told", "words"),
    [
        (
            False,
            {"symmetric": True},
            rf"{FIRST} must have no zero points, since symmetric is true, its weight_zero_point",
        ),
        (True, {"symmetric": False}, rf"{FIRST} must have a weight_zero_point, since symmetric is false, it has none"),
        (True, {"actorder": "group"}, rf"{FIRST} must have a weight_g_idx, since its actorder is 'group', it has none"),
        (True, {"type": "float"}, rf"{FIRST} has integer codes, its type is 'float'"),
    ],
    ids=["symmetric", "not symmetric", "actorder", "type"],
)
def test_what_compressed_tensors_config_says_of_codes_is_held_against_them(symmetric, told, words, folder_of, tmp_path):
    source = tmp_path / "source"
    lorq.quantize(folder_of("llama"), tmp_path / "q", lorq.Nearest(bits=4, group_size=16, symmetric=symmetric))
    lorq.export(tmp_path / "q", source, to="compressed-tensors")
    assert lorq.quantize(source, tmp_path / "out", METHOD, dry_run=True).layers
    groups = json.loads((source / "config.json").read_text())["quantization_config"]["config_groups"]
    groups["group_0"]["weights"] |= told
    changed_config(source, config_groups=groups)
    with pytest.raises(ValueError, match=words):
        lorq.quantize(source, tmp_path / "out", METHOD, dry_run=True)


def test_weights_of_compressed_tensors_that_are_not_compressed_or_sparse_are_refused(quantized, tmp_path):
    source = tmp_path / "source"
    lorq.export(quantized(), source, to="compressed-tensors", dtype="float32")

    def with_zeros(tensors):  # as programs wrote them once
        names = [name for name in tensors if name.endswith("weight_scale")]
        return tensors | {
            name.replace("scale", "zero_point"): torch.zeros(tensors[name].shape, dtype=torch.int8) for name in names
        }

    lorq.quantize(source, tmp_path / "plain", METHOD)
    changed_tensors(source, with_zeros)
    lorq.quantize(source, tmp_path / "out", METHOD)
    for name, weight in LorqFolder.open(tmp_path / "plain").layers():
        assert torch.equal(LorqFolder.open(tmp_path / "out").weight(name).dense(), weight.dense())
    changed_config(source, sparsity_config={"format": "sparse-24-bitmask"})
    with pytest.raises(ValueError, match=r"format pack-quantized or .*, got sparse-24-bitmask"):
        lorq.quantize(source, tmp_path / "out2", METHOD, dry_run=True)
    changed_config(source, sparsity_config=None, quantization_status="frozen")

    def frozen(tensors):
        rest = {name: t for name, t in tensors.items() if not name.startswith(NAME) or name.endswith("weight_scale")}
        return rest | {f"{NAME}.weight": torch.ones(64, 64)}

    changed_tensors(source, frozen)
    with pytest.raises(
        ValueError, match=rf"{NAME}.weight is torch.float32 beside a scale; save it with save_compressed"
    ):
        lorq.quantize(source, tmp_path / "out2", METHOD, dry_run=True)


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (4, r"g_idx must name groups 0 to 3, got 4 for column 5"),
        (-1, r"g_idx must name groups 0 to 3, got -1 for column 5"),
        (0.0, r"g_idx must be 64 whole numbers, a column's group each, got \(64,\) of torch.float32"),
    ],
)
def test_a_group_that_is_not_there_is_refused_by_column(group, words, quantized, tmp_path):
    source = tmp_path / "source"
    lorq.export(quantized(), source, to="gptq")
    tensors = load_file(source / "model.safetensors")
    own = tensors[f"{NAME}.g_idx"] = tensors[f"{NAME}.g_idx"].to(torch.tensor(group).dtype)
    own[5] = group
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{source / 'model.safetensors'}: {NAME}.weight could not be read: {words}"):
        lorq.quantize(source, tmp_path / "out", METHOD)
    assert not (tmp_path / "out").exists()


def test_widths_that_only_the_config_tells_apart_are_read_by_it(tmp_path):
    """Sixteen codes of 3 bits and of 4 bits both take two words."""
    from helpers import save_folder, tiny_model

    plain = save_folder(tiny_model(num_hidden_layers=1), tmp_path / "plain")
    lorq.quantize(plain, tmp_path / "q", lorq.Nearest(bits=4, group_size=8, symmetric=True))
    lorq.export(tmp_path / "q", tmp_path / "source", to="compressed-tensors", dtype="float32")
    lorq.quantize(tmp_path / "source", tmp_path / "out", lorq.Nearest(bits=8, group_size=8))
    found, expected = (LorqFolder.open(tmp_path / name) for name in ("out", "q"))
    for name, weight in expected.layers():
        step = float(weight.dense().abs().max()) / 100
        torch.testing.assert_close(found.weight(name).dense(), weight.dense(), rtol=0, atol=step)
    groups = json.loads((tmp_path / "source/config.json").read_text())["quantization_config"]["config_groups"]
    groups["group_0"]["weights"]["num_bits"] = 2
    changed_config(tmp_path / "source", config_groups=groups)
    with pytest.raises(ValueError, match=r"must have 2 words for 24 codes of 2 bits, as quantization_config says, its"):
        lorq.quantize(tmp_path / "source", tmp_path / "out2", METHOD)
