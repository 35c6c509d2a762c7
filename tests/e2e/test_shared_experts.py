"""Experts that share factors: quantized, loaded, resumed, evaluated; and folders and settings that are refused."""

import json
import re
import shutil

import pytest
import torch
from helpers import BOS, BYTES, byte_tokenizer, folder_digests
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import lorq
from lorq.models.experts import find_experts, split_experts
from lorq.models.windows import Encoder, text_windows
from lorq.progress import OPEN
from lorq.runtime.experts import QuantExperts
from lorq.runtime.experts_at_once import declines_at_once, layers_of
from lorq.runtime.inspect import expert_lines
from lorq.runtime.linear import QuantLinear
from lorq.storage.folder import LorqFolder
from lorq.storage.report import read_report

SMALL = {"samples": 4, "seq_len": 32}
TOKENS = 4 * 32
SETTINGS = {"bits": 3, "group_size": 32, "rank": 4, "epochs": 0, "range_search": "none"}
# Each has something that the others lack.
KINDS = {
    "mixtral": ("mixtral", {"importance": "log"}),
    "qwen2-moe": ("qwen2-moe", {"factor_type": "e4m3", "rotation": "partial", "rank": 70}),
    "gpt-oss": ("gpt-oss", {"grid_rows": 1, "factor_type": "float16"}),
    "input scales": (
        "qwen2-moe",
        {
            "sharing": "expert", "metric": "activation", "exponent": 1.0, "grid_columns": 5, "importance": "log",
            "bits": 2, "codebook": "vector", "kmeans_iterations": 1,
        },
    ),
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(model):
    windows = torch.randint(BYTES, (2, 24), generator=torch.Generator().manual_seed(5))
    return model(input_ids=windows, use_cache=False).logits


def close(got, expected, tolerance=5e-5):
    assert_close(got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def packed_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.fixture(scope="module")
def quantize(text_file):
    def run(source, out, method=None, **options):
        method = method or lorq.TileQ(**SETTINGS)
        return lorq.quantize(source, out, method, **{"calibration": str(text_file)} | SMALL | options)

    return run


@pytest.fixture(scope="module")
def made(folder_of, quantize, tmp_path_factory):
    """A quantized folder of a kind, and its report; not to be changed."""
    done = {}

    def of(kind):
        if kind not in done:
            family, settings = KINDS[kind]
            out = tmp_path_factory.mktemp("tileq") / "out"
            report = quantize(folder_of(family), out, lorq.TileQ(**SETTINGS | settings))
            done[kind] = folder_of(family), out, report
        return done[kind]

    return of


def check_twin(source, out, names):
    """The loaded model computes what the original does with the weights that the packed layers say they have."""
    packed, twin = load(out), load(source)
    split_experts(twin)
    layers = packed_layers(packed)
    assert set(layers) == set(names)
    for name, layer in layers.items():
        twin.get_submodule(name).weight.data = layer.weight
    expected = logits_of(twin)
    close(logits_of(packed), expected)
    return packed, expected


def quant_experts(model):
    return [module for module in model.modules() if isinstance(module, QuantExperts)]


# ---- the whole way ----------------------------------------------------------------------------------------


@kinds
def test_a_loaded_model_computes_what_its_weights_say(kind, made):
    source, out, report = made(kind)
    packed, expected = check_twin(source, out, [layer.name for layer in report.layers])
    experts = quant_experts(packed)
    assert experts
    (said,) = expert_lines(LorqFolder.open(out))
    for module in experts:
        assert set(module.tiles) == set(PROJECTIONS)
        # What is said of the folder is what the modules do.
        why = declines_at_once(layers_of(module.plain), tuple(module.tiles), torch.ones(1, 1), torch.ones(0))
        shared = all(not tiles.format.input_scale for tiles in module.tiles.values())
        assert ("one call" in said) == (shared and why is None)
        module.forward = module.one_by_one
    close(logits_of(packed), expected)
    # Attention, shared experts and dense blocks have factors of their own.
    for name, layer in packed_layers(packed).items():
        shared = ".experts." in name
        assert (layer.shared is not None) == shared and layer.format.rank == (
            0 if shared else report_rank(report, name)
        )
    # Leaving the shared factors out is seen.
    for module in experts:
        for tiles in module.tiles.values():
            tiles.left.zero_()
    assert float((logits_of(packed) - expected).abs().max()) > 1e-2 * float(expected.abs().max())


def report_rank(report, name):
    return next(layer.rank for layer in report.layers if layer.name == name)


@pytest.mark.parametrize("kind", ["qwen2-moe", "gpt-oss"])
def test_a_dequantized_model_is_transformers_own_again(kind, made, tmp_path):
    source, out, _ = made(kind)
    model = load(out)
    expected = logits_of(model)
    model = model.dequantize()
    assert not find_experts(model) and not any(m.training for m in model.modules() if not isinstance(m, nn.Linear))
    assert {type(module) for module in model.modules()} == {type(module) for module in load(source).modules()}
    close(logits_of(model), expected)
    model.save_pretrained(tmp_path / "dense")
    close(logits_of(load(tmp_path / "dense")), expected)


def test_projections_left_out_of_all_experts_stay_as_they_are(folder_of, quantize, tmp_path):
    source, patterns = folder_of("mixtral"), (r"0\.mlp\.experts\.\d+\.up", r"1\.mlp\.experts\.\d+\.(gate|down)")
    report = quantize(source, tmp_path / "out", exclude=patterns)
    names = [layer.name for layer in report.layers]
    assert len(report.kept) == 12 and not any(re.search(p, name) for p in patterns for name in names)
    packed, _ = check_twin(source, tmp_path / "out", names)
    assert [set(m.tiles) for m in quant_experts(packed)] == [{"gate_proj", "down_proj"}, {"up_proj"}]


def test_a_projection_may_have_settings_of_its_own(folder_of, quantize, tmp_path):
    source = folder_of("mixtral")
    changes = ("up_proj:bits=5", "up_proj:grid_rows=4", "up_proj:block=16", "down_proj:rank=2")
    method = lorq.TileQ(**SETTINGS, importance="log")
    report = quantize(source, tmp_path / "out", method, override=changes)
    packed, _ = check_twin(source, tmp_path / "out", [layer.name for layer in report.layers])
    expected = {"gate_proj": (3, 4, (2, 2)), "up_proj": (5, 4, (4, 1)), "down_proj": (3, 2, (2, 2))}
    for module in quant_experts(packed):
        for expert in module.plain:
            for name, (bits, rank, grid) in expected.items():
                f = module.tiles[name].format
                assert (getattr(expert, name).format.bits, f.rank, (f.rows, f.columns)) == (bits, rank, grid)
    assert {(layer.bits, layer.rank) for layer in report.layers if "experts.2.up" in layer.name} == {(5, 4)}


def test_shared_factors_lower_the_error(made, quantize, tmp_path):
    source, _, report = made("mixtral")
    without = quantize(source, tmp_path / "out", lorq.LoPRo(**SETTINGS | {"rank": 0}))

    def mean_error(report):
        errors = [layer.error_after for layer in report.layers if ".experts." in layer.name]
        return sum(errors) / len(errors)

    assert mean_error(report) < 0.95 * mean_error(without)
    assert report.bits_per_weight > without.bits_per_weight


# ---- sizes and reports ------------------------------------------------------------------------------------


@kinds
def test_the_bits_per_weight_are_those_of_the_files(kind, made, quantize, text_file, tmp_path):
    source, out, report = made(kind)
    names = [layer.name + "." for layer in report.layers]
    stored = 0
    for shard in out.glob("lorq-*.safetensors"):
        for name, tensor in load_file(shard).items():
            if (name.startswith(tuple(names)) and not name.endswith(".bias")) or ".tiles." in name:
                stored += tensor.nbytes
    # A share of the factors is rounded up to bits for each expert, and the sum to bytes for each layer.
    counted = sum(layer.bytes for layer in report.layers)
    assert stored <= counted <= stored + 2 * len(report.layers)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    assert report.bits_per_weight == 8 * counted / weights
    evaluation = lorq.evaluate(out, text=str(text_file), window=32, windows=2)
    assert evaluation.bits_per_weight == report.bits_per_weight
    settings = SETTINGS | KINDS[kind][1]
    largest = quantize(source, tmp_path / "never", lorq.TileQ(**settings), dry_run=True)
    found = {layer.name: (layer.bits, layer.rank, layer.bytes) for layer in report.layers}
    assert {layer.name: (layer.bits, layer.rank, layer.bytes) for layer in largest.layers} == found
    assert not (tmp_path / "never").exists()


def test_experts_with_few_tokens_are_named_with_their_numbers(made, folder_of, quantize, text_file, tmp_path):
    _, out, report = made("qwen2-moe")
    notes = read_report(out).notes
    assert notes == report.notes and len(notes) == 5  # of the block that has experts
    counts = []
    for expert in range(5):
        note = notes[f"model.layers.1.mlp.experts.{expert}"]
        found = re.fullmatch(rf"(\d+) of {TOKENS} tokens routed here, statistics from all of them", note)
        counts.append(int(found[1]))
    experts, seen = load(folder_of("qwen2-moe")), []
    experts.model.layers[1].mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    assert report.run["calibration"] == text_file.name
    for window in text_windows(str(text_file), Encoder(byte_tokenizer(128), (BOS,), 257), **SMALL).tokens:
        experts(input_ids=window[None], use_cache=False)
    assert counts == torch.bincount(torch.cat(seen).flatten(), minlength=5).tolist()
    few = quantize(folder_of("qwen2-moe"), tmp_path / "out", expert_tokens=min(counts) + 1)
    assert set(few.notes) == {f"model.layers.1.mlp.experts.{counts.index(min(counts))}"}


# ---- the same bytes ---------------------------------------------------------------------------------------


class PowerCut(BaseException):
    pass


@pytest.mark.parametrize("stream", ["original", "quantized"])
def test_a_run_gives_the_same_bytes_again_and_after_an_interruption(stream, made, quantize, tmp_path):
    source, whole, _ = made("mixtral")
    method = lorq.TileQ(**SETTINGS | KINDS["mixtral"][1])
    if stream == "quantized":
        whole = tmp_path / "whole"
        quantize(source, whole, method, stream=stream)

    def stop(stage, done, total):
        if (stage, done) == ("quantize", 1):
            raise PowerCut

    with pytest.raises(PowerCut):
        quantize(source, tmp_path / "out", method, stream=stream, progress=stop)
    assert len(list((tmp_path / "out").glob("lorq-*.safetensors"))) == 2
    quantize(source, tmp_path / "out", method, stream=stream, resume=True)
    assert folder_digests(tmp_path / "out") == folder_digests(whole)


# ---- refused before any work ------------------------------------------------------------------------------

REFUSALS = {
    "no experts": (
        "llama", {}, {}, r"TileQ shares factors between experts, LlamaForCausalLM has none; use --method lopro",
    ),
    "a small grid": (
        "mixtral", {"grid_rows": 1, "grid_columns": 3}, {}, r"got 1 x 3 = 3 cells for 4 experts; raise grid_rows",
    ),
    "a small grid of one projection": (
        "mixtral", {"grid_rows": 2}, {"override": ("down_proj:grid_columns=1",)}, r"got 2 x 1 = 2 cells for 4 experts",
    ),
    "a block": (
        "mixtral", {"block": 64}, {},
        r"experts\.0\.down_proj.*: a rotation block must be .* block 64 for width 96 less 0; .* 4, 8, 16, 32",
    ),
    "codebook columns": (
        "mixtral", {"bits": 2, "codebook": "vector", "codebook_columns": 64}, {},
        r"for 8 of them:\n  model\.layers\.0\.mlp\.experts\.0\.down_proj.*: .*64 columns must divide .*\(64, 96\)",
    ),
    "a group size": ("qwen2-moe", {"group_size": 64}, {}, r"experts\.0\.down_proj.*: .*group_size 64 and width 32"),
    "some experts left out": (
        "mixtral", {}, {"exclude": (r"\.[13]\.up_proj",)},
        r"got 2 of 4 experts with 1 settings for up_proj of model\.layers\.0\.mlp\.experts; --exclude or",
    ),
    "an expert left out": (
        "qwen2-moe", {}, {"exclude": (r"experts\.4\.",)},
        r"got 4 of 5 experts with 1 settings for gate_proj of .*layers\.1",
    ),
    "some experts with other settings": (
        "mixtral", {}, {"override": (r"1\.mlp\.experts\.0\.down_proj:bits=4",)},
        r"got 4 of 4 experts with 2 settings for down_proj of model\.layers\.1\.mlp\.experts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_done_is_refused_before_any_work(case, folder_of, quantize, tmp_path):
    family, settings, options, message = REFUSALS[case]
    done = []
    with pytest.raises(ValueError, match=message) as caught:
        quantize(
            folder_of(family), tmp_path / "out", lorq.TileQ(**SETTINGS | settings),
            progress=lambda *step: done.append(step), **options,
        )  # fmt: skip
    assert done == [(OPEN, 0, 1)] and not (tmp_path / "out").exists()
    lines = str(caught.value).splitlines()
    # One line, or one for each reason between what is wrong and what to do.
    assert len(lines) == 1 or (len(lines) == 3 and lines[0].startswith("settings must fit the layers"))


# ---- folders that are damaged -----------------------------------------------------------------------------

SHARD = "lorq-00001-of-00002.safetensors"
EXPERTS = "model.layers.0.mlp.experts"
TILES = f"{EXPERTS}.tiles.up_proj"


def edit_config(change):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_tile(**values):
    return edit_config(lambda config: config["tiles"][TILES].update(values))


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / SHARD)
        change(tensors)
        save_file(tensors, folder / SHARD, metadata={"format": "pt"})

    return edit


def rename_tile(name):
    return edit_config(lambda config: config["tiles"].update({name: config["tiles"].pop(TILES)}))


def put_cell(row, column):
    return edit_tensors(lambda tensors: tensors[f"{TILES}.cells"][2].copy_(torch.tensor([row, column])))


def double_a_channel(tensors):
    order = tensors[f"{EXPERTS}.2.down_proj.permutation"]
    order[5] = order[7]


DAMAGES = {
    "a row out of the grid": (
        put_cell(2, 0), rf"{TILES}\.cells must lie in a grid of 2 x 2, got .* to \[2, 1\]; .*again",
    ),
    "a column out of the grid": (put_cell(0, 9), r"must lie in a grid of 2 x 2, got \[0, 0\] to \[1, 9\]"),
    "a cell below the grid": (put_cell(-1, 0), r"must lie in a grid of 2 x 2, got \[-1, 0\]"),
    "a doubled channel": (
        edit_tensors(double_a_channel), rf"{EXPERTS}\.2\.down_proj\.permutation must hold each of 0 \.\. 95 once",
    ),
    "a channel too large": (
        edit_tensors(lambda tensors: tensors[f"{EXPERTS}.1.up_proj.permutation"][0].fill_(64)),
        rf"{EXPERTS}\.1\.up_proj\.permutation must hold each of 0 \.\. 63 once",
    ),
    "an unknown key": (edit_tile(sigma=1), r"must have the keys .*'rank', 'rows'.*got one with sigma"),
    "a missing key": (edit_config(lambda config: config["tiles"][TILES].pop("rows")), r"must have the keys .*rows"),
    "rank 0": (edit_tile(rank=0), r"rank from 1 to .*'rank': 0"),
    "another rank": (edit_tile(rank=3), rf"{TILES}\.left is \(2, 96, 4\), not \(2, 96, 3\)"),
    "a rank in words": (edit_tile(rank="4"), r"rank must be .*int.*, got '4'"),
    "no rows": (edit_tile(rows=0), r"rows, columns, experts and rank from 1.*'rows': 0"),
    "more rows": (edit_tile(rows=3), rf"{TILES}\.right is \(2, 4, 64\), not \(3, 4, 64\)"),
    "another type of factors": (
        edit_tile(factor_type="e4m3"), rf"{TILES}\.left is torch.int8, not torch.float8_e4m3fn",
    ),
    "an unknown type of factors": (edit_tile(factor_type="e5m2"), r"factor_type float16, int8, e4m3, got .*e5m2"),
    "scales for inputs": (edit_tile(input_scale=True), rf"{TILES}\.input_scale is missing"),
    "another number of experts": (edit_tile(experts=5), rf"names {TILES} with 5 experts, which the model does not"),
    "tiles of a block that is not there": (
        rename_tile("model.layers.9.mlp.experts.tiles.up_proj"), r"names model\.layers\.9.* which the model does not",
    ),
    "tiles of a module without experts": (
        rename_tile("model.layers.0.self_attn.tiles.q_proj"), r"names .*self_attn\.tiles\.q_proj with 4 experts, which",
    ),
    "tiles of an unknown projection": (rename_tile(f"{EXPERTS}.tiles.side_proj"), r"names .*side_proj with 4 experts"),
    "tiles without a name": (rename_tile(""), r"names  with 4 experts, which the model does not have"),
    "tiles of one projection left out": (
        edit_config(lambda config: config["tiles"].pop(TILES)), rf"{TILES}\.\w+ has no place in the model",
    ),
    "no tiles": (
        edit_config(lambda config: config["tiles"].clear()), r"tiles\.\w+_proj\.\w+ has no place in the model",
    ),
    "a list of tiles": (edit_config(lambda config: config.update(tiles=[])), r"tiles must be a dict, got \[\]"),
    "no table of tiles": (edit_config(lambda config: config.pop("tiles")), r"tiles must be a dict, got None"),
    "a missing factor": (edit_tensors(lambda tensors: tensors.pop(f"{TILES}.left")), rf"{TILES}\.left is missing"),
    "missing cells": (edit_tensors(lambda tensors: tensors.pop(f"{TILES}.cells")), rf"{TILES}\.cells is missing"),
    "cells of another type": (
        edit_tensors(lambda tensors: tensors.update({f"{TILES}.cells": tensors[f"{TILES}.cells"].int()})),
        rf"{TILES}\.cells is torch.int32, not torch.int16",
    ),
    "an expert less": (
        edit_config(lambda config: config["layers"].pop(f"{EXPERTS}.3.up_proj")),
        r"must be packed, 3\.up_proj is a Linear; the config belongs to another model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(damage, made, tmp_path):
    change, message = DAMAGES[damage]
    folder = shutil.copytree(made("mixtral")[1], tmp_path / "copy")
    change(folder)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load(folder)


# ---- format version 1 -------------------------------------------------------------------------------------

V1_KEYS = ("bits", "group_size", "symmetric", "rank")


def as_version_1(config):
    config["format_version"] = 1
    del config["tiles"], config["inputs"]
    for name, layer in config["layers"].items():
        bits = {"int8": 8, "float16": 16}[layer["factor_type"]]
        config["layers"][name] = {key: layer[key] for key in V1_KEYS} | {"factor_bits": bits}


@pytest.mark.parametrize(
    "method",
    [
        lorq.FLRQ(bits=3, group_size=32, budget=0.5, min_gain=0.0, epochs=0, rounding="nearest", factor_type="int8"),
        lorq.FLRQ(bits=3, group_size=32, budget=0.5, min_gain=0.0, epochs=0, rounding="nearest", factor_type="float16"),
        lorq.GPTQ(bits=4, group_size=64, symmetric=True, range_search="none"),
    ],
    ids=["int8", "float16", "gptq"],
)
def test_a_folder_of_version_1_is_still_read(method, folder_of, quantize, tmp_path):
    out = tmp_path / "out"
    report = quantize(folder_of("llama"), out, method)
    assert (max(layer.rank for layer in report.layers) > 0) == isinstance(method, lorq.FLRQ)
    expected = logits_of(load(out))
    edit_config(as_version_1)(out)
    assert torch.equal(logits_of(load(out)), expected)
    # Words of version 2 are unknown to version 1.
    edit_config(lambda config: next(iter(config["layers"].values())).update(vector=1))(out)
    with pytest.raises(ValueError, match=r"must have the keys .* got one without .* with .*factor_bits"):
        load(out)
