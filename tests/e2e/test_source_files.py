"""Folders as people have them: what transformers loads of a folder is quantized, and what lorq cannot is named."""

import json
import re
import shutil
from collections import namedtuple

import numpy
import pytest
import torch
from helpers import tiny_folder
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorq
from lorq.progress import OPEN

NEAREST = lorq.Nearest(group_size=32)
TEXT = dict(calibration="python-docs-odd", samples=2, seq_len=32)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("source") / "llama", "llama", tie_word_embeddings=False)


@pytest.fixture
def source(original, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(original, tmp_path / "source")


@pytest.fixture(scope="module")
def expected(original, tmp_path_factory):
    """Checksums of the shards that the original gives."""
    return lorq.quantize(original, tmp_path_factory.mktemp("expected") / "out", NEAREST).checksums


def shard(folder, *, under="", listed=None, twice=()):
    """Replace model.safetensors by two shards and an index that lists ``listed`` besides what is there."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / under).mkdir(exist_ok=True)
    names = sorted(tensors)
    parts = {f"{under}a.safetensors": names[:9], f"{under}b.safetensors": [*names[9:], *twice]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, own in parts.items() for name in own} | (listed or {})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


def checksums(source, tmp_path):
    AutoModelForCausalLM.from_pretrained(source)  # what lorq takes is what transformers takes
    return lorq.quantize(source, tmp_path / "out", NEAREST).checksums


def test_an_index_may_list_what_nobody_needs(source, expected, tmp_path):
    shard(source, listed={"model.layers.0.self_attn.rotary_emb.inv_freq": "b.safetensors"})
    assert checksums(source, tmp_path) == expected


def test_an_index_may_name_the_other_shard(source, expected, tmp_path):
    shard(source, listed={"lm_head.weight": "b.safetensors"})
    assert checksums(source, tmp_path) == expected


def test_shards_may_lie_in_folders_below(source, expected, tmp_path):
    shard(source, under="weights/")
    assert checksums(source, tmp_path) == expected


def test_a_tensor_may_be_twice_the_same(source, expected, tmp_path):
    shard(source, twice=["lm_head.weight"])
    assert checksums(source, tmp_path) == expected


def test_a_tensor_that_differs_between_shards_is_named_and_nothing_called_damaged(source, tmp_path):
    shard(source, twice=["lm_head.weight"])
    tensors = load_file(source / "b.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, source / "b.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"1 tensors are in b.safetensors and otherwise in another shard: lm_head"
    ) as e:
        lorq.quantize(source, tmp_path / "out", NEAREST)
    assert "do not belong together" in str(e.value)
    assert not any(word in str(e.value) for word in ("damaged", "download"))


def test_a_tensor_that_is_needed_and_in_no_shard_is_named(source, tmp_path):
    shard(source)
    tensors = load_file(source / "b.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, source / "b.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors that LlamaForCausalLM needs, such as model.norm.weight"):
        lorq.quantize(source, tmp_path / "out", NEAREST)


@pytest.mark.parametrize("as_index", [False, True])
def test_the_weights_that_the_config_names_are_those_that_count(as_index, source, expected, tmp_path):
    if as_index:
        shard(source)
        named = (source / "model.safetensors.index.json").rename(source / "these.safetensors.index.json")
    else:
        named = (source / "model.safetensors").rename(source / "these.safetensors")
    other = tiny_folder(tmp_path / "other", "llama", tie_word_embeddings=False, seed=1)
    shutil.copy(other / "model.safetensors", source)
    config = json.loads((source / "config.json").read_text()) | {"transformers_weights": named.name}
    (source / "config.json").write_text(json.dumps(config))
    assert checksums(source, tmp_path) == expected


@pytest.mark.parametrize("named", ["../x.safetensors", "/x.safetensors", "x.bin", 7])
def test_the_config_names_weights_of_its_folder(named, source, tmp_path):
    config = json.loads((source / "config.json").read_text()) | {"transformers_weights": named}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"transformers_weights: must name a file in or below its folder .*, got"):
        lorq.quantize(source, tmp_path / "out", NEAREST)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64], ids=str)
def test_weights_of_a_rare_floating_type_are_quantized_as_what_they_stand_for(dtype, source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    rare = {name: t.to(dtype) if "proj" in name else t for name, t in tensors.items()}
    save_file(rare, source / "model.safetensors", metadata={"format": "pt"})
    lorq.quantize(source, tmp_path / "rare", NEAREST)
    save_file({name: t.float() for name, t in rare.items()}, source / "model.safetensors", metadata={"format": "pt"})
    lorq.quantize(source, tmp_path / "plain", NEAREST)
    tokens = torch.arange(20)[None]
    rare, plain = (lorq.load(tmp_path / name, device="cpu")(tokens).logits for name in ("rare", "plain"))
    assert torch.equal(rare, plain)


def test_a_float8_that_is_no_number_is_found_before_the_work(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.weight"][3, 5] = torch.nan
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"weights must be finite, NaN or infinite values are in {name} \(1 of 8192\)"
    ):
        lorq.quantize(source, tmp_path / "out", NEAREST, dry_run=True)


def test_float8_whose_scales_are_not_there_is_refused_by_name(source, tmp_path):
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": quantization}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"must have weights that fp8 has packed, as its config says; it has none"):
        lorq.quantize(source, tmp_path / "out", NEAREST)


def test_files_beside_the_weights_travel_to_the_end(source, tmp_path):
    """Code that loads the original loads the quantized model too, and what stays behind is said."""
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.OwnLM"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\nclass Own(LlamaConfig):\n    pass\n"
    )
    (source / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import Own\n\n"
        "class OwnLM(LlamaForCausalLM):\n    config_class = Own\n"
    )
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (source / "LICENSE").write_text("as you like")
    with (source / "rows.parquet").open("wb") as file:
        file.truncate(10**9)
    report = lorq.quantize(source, tmp_path / "out", lorq.LoRDS(bits=3, group_size=32, refine_steps=0), **TEXT)
    assert report.notes == {"rows.parquet": "not copied, 1000000000 bytes, more than 100000000"}
    assert lorq.read_report(tmp_path / "out").notes == report.notes
    lorq.adapt.save(lorq.load(tmp_path / "out", device="cpu"), tmp_path / "saved", base=tmp_path / "out")
    for folder in (tmp_path / "out", tmp_path / "saved"):
        assert (folder / "LICENSE").read_text() == "as you like" and not (folder / "rows.parquet").exists()
        assert AutoTokenizer.from_pretrained(folder).get_chat_template("tools") == "{{ messages }}"
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert type(loaded).__name__ == "OwnLM"


def test_code_that_is_missing_is_not_asked_for(source, tmp_path):
    config = json.loads((source / "config.json").read_text()) | {"auto_map": {"AutoConfig": "gone.Own"}}
    (source / "config.json").write_text(json.dumps(config))
    lorq.quantize(source, tmp_path / "out", NEAREST)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)


def test_a_folder_with_an_adapter_is_refused_with_the_remedy(source, tmp_path):
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"also has an adapter .* merge it into the weights first .* or remove"):
        lorq.quantize(source, tmp_path / "out", NEAREST)


def test_a_config_that_transformers_cannot_read_is_one_line(source, tmp_path):
    config = json.loads((source / "config.json").read_text()) | {"dtype": "torch.float16"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the config of .*source could not be read: .*torch.float16"):
        lorq.quantize(source, tmp_path / "out", NEAREST)


# Places


@pytest.fixture
def disk(monkeypatch):
    """Sets how many bytes are free."""
    usage = namedtuple("Usage", "total used free")
    return lambda free: monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**15, 0, free))


def refused(source, out, message, **options):
    stages = []
    with pytest.raises(OSError, match=message) as caught:
        lorq.quantize(source, out, progress=lambda stage, *_: stages.append(stage), **options)
    assert set(stages) <= {OPEN} and not out.exists(), "before any work, and nothing is left"
    return caught.value


def test_a_disk_without_room_is_said_before_the_work(original, disk, tmp_path):
    disk(10**6)
    assert refused(original, tmp_path / "out", r"out needs [0-9.]+ MB, 1.00 MB are free", method=NEAREST).errno == 28


def test_room_is_asked_for_hidden_states_and_files_beside_the_weights(source, disk, tmp_path):
    large = dict(calibration="python-docs", samples=100, seq_len=128, method=lorq.GPTQ(group_size=32))
    disk(4 * 10**6)
    found = str(refused(source, tmp_path / "out", "needs", **large, spill_bytes=0))
    needed = 1e6 * float(re.search(r"needs ([0-9.]+) MB", found)[1])
    assert needed > 4 * 100 * 128 * 64
    (source / "tokenizer.model").write_bytes(bytes(10**6))
    again = str(refused(source, tmp_path / "out", "needs", **large, spill_bytes=0))
    assert f"needs {needed / 1e6 + 1:.2f} MB" in again
    lorq.quantize(source, tmp_path / "out", **large | {"samples": 2}, dry_run=True)


def test_a_place_that_cannot_be_written_is_said_before_the_work(original, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    refused(
        original, tmp_path / "file" / "out", r"out cannot be written to \(Not a directory\); choose", method=NEAREST
    )


def test_a_second_run_into_a_folder_is_refused_before_the_work(original, tmp_path):
    out = tmp_path / "out"

    def second(stage, done, total):
        if (stage, done) in (("check weights", 1), ("quantize", 1)):
            for flags in ({}, {"overwrite": True}, {"resume": True}):
                with pytest.raises(FileExistsError, match="another run is writing"):
                    lorq.quantize(original, out, NEAREST, **flags)

    lorq.quantize(original, out, NEAREST, progress=second)
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]


def test_a_gguf_file_that_was_written_anew_is_decoded_anew(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("LORQ_CACHE", str(tmp_path / "cache"))

    def write(last):
        w = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "llama")
        w.add_context_length(64), w.add_embedding_length(32), w.add_block_count(1), w.add_feed_forward_length(32)
        w.add_head_count(2), w.add_head_count_kv(2), w.add_layer_norm_rms_eps(1e-5), w.add_vocab_size(258)
        w.add_rope_dimension_count(16), w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre("default")
        w.add_token_list([*sorted(ByteLevel.alphabet()), "<s>", "ab"]), w.add_token_merges(["a b"])
        w.add_token_types([1] * 256 + [3, 1]), w.add_bos_token_id(256), w.add_eos_token_id(256)
        shapes = {"token_embd": (258, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
        shapes |= {f"blk.0.{n}": (32, 32) for n in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.0.{n}": (32, 32) for n in ("ffn_gate", "ffn_up", "ffn_down")} | {"output": (258, 32)}
        for name, shape in shapes.items():
            w.add_tensor(f"{name}.weight", numpy.full(shape, last if name == "output" else 1.0, numpy.float32))
        w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
        return tmp_path / "model.gguf"

    for last in (0.25, -0.5):
        assert lorq.load(write(last), device="cpu").lm_head.weight[0, 0].item() == last
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "total used free")(10**9, 0, 1000))
    with pytest.raises(OSError, match=r"needs .*, 1000 bytes are free") as caught:
        lorq.load(write(0.75))
    assert "set LORQ_CACHE" in caught.value.__notes__[0]
