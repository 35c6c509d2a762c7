"""GGUF files as sources: what they compute is what llama.cpp computes, and a damaged one is refused in one line."""

import json

import pytest
import torch
from gguf_models import gguf_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorq
from lorq.cli import main
from lorq.models.locate import resolve_model

pytest.importorskip("gguf")
METHOD = lorq.Nearest(bits=8, group_size=32, symmetric=True)
TOKENS = torch.arange(40)[None]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def exported(tmp_path):
    """A model's file, and the lorq folder that it was made of."""

    def of(name, **changes):
        gguf_folder(tmp_path / "plain", name, **changes)
        lorq.quantize(tmp_path / "plain", tmp_path / "q", METHOD)
        lorq.export(tmp_path / "q", tmp_path / "model.gguf", dtype="float32")
        return tmp_path / "model.gguf", tmp_path / "q"

    return of


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma3", {}), ("qwen2", {}), ("qwen3", {}), ("qwen3-moe", {}), ("qwen2-moe", {}), ("phi3", {}), ("llama", {}),
        ("mistral", {"head_dim": 32}),
    ],
)  # fmt: skip
def test_what_a_file_computes_is_what_its_model_did(name, changes, exported):
    file, folder = exported(name, vocab_size=272, **changes)
    decoded, expected = logits(resolve_model(file)), logits(folder)
    assert (decoded - expected).norm() < 0.01 * expected.norm()
    ours, theirs = (AutoTokenizer.from_pretrained(place) for place in (resolve_model(file), folder))
    text = "the thin thing, in the end\n"
    assert ours(text).input_ids == theirs(text).input_ids and max(ours.get_vocab().values()) < 272
    assert ours.eos_token_id == theirs.eos_token_id and ours.bos_token_id == theirs.bos_token_id
    assert ours.chat_template == theirs.chat_template


def test_a_files_model_is_quantized_by_texts_of_its_tokenizer(exported, tmp_path):
    file, _ = exported("qwen2")  # 264 tokens, of which the file has 262
    text = tmp_path / "text.txt"
    text.write_text("the thin thing, in the end\n" * 40)
    lorq.quantize(file, tmp_path / "out", lorq.GPTQ(bits=4, group_size=32), calibration=text, samples=2, seq_len=32)
    assert lorq.load(tmp_path / "out", device="cpu")(TOKENS).logits.isfinite().all()


def test_gemmas_attention_is_scaled_as_llama_cpp_scales_it(exported):
    file, _ = exported("gemma3", vocab_size=272, head_dim=64, query_pre_attn_scalar=64)
    assert json.loads((resolve_model(file) / "config.json").read_text())["query_pre_attn_scalar"] == 64


def test_a_weight_too_large_for_float16_is_decoded_in_float32(tmp_path):
    plain = gguf_folder(tmp_path / "plain", "llama", vocab_size=272)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    model.model.embed_tokens.weight.data[5] = 2e5
    model.save_pretrained(plain)
    lorq.quantize(plain, tmp_path / "q", METHOD)
    lorq.export(tmp_path / "q", tmp_path / "b.gguf", dtype="bfloat16")
    decoded = AutoModelForCausalLM.from_pretrained(resolve_model(tmp_path / "b.gguf"), dtype="auto")
    assert decoded.dtype == torch.float32 and torch.equal(
        decoded.model.embed_tokens.weight, model.model.embed_tokens.weight.float()
    )


def test_a_changed_file_of_lorqs_is_no_source_and_a_whole_one_verified(exported, tmp_path, capsys):
    file, _ = exported("llama", vocab_size=272)
    content = file.read_bytes()
    assert main(["verify", str(file)]) == 0
    assert "1 files match their checksums" in "".join(capsys.readouterr())
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(content[:-500] + bytes(500))
    words = r"changed.gguf must be as lorq wrote it, its sha256 is .{12}, its key lorq.sha256 says"
    for read in (lambda: lorq.quantize(changed, tmp_path / "out", METHOD), lambda: lorq.load(changed)):
        with pytest.raises(ValueError, match=words):
            read()
    assert main(["verify", str(changed)]) == 1
    assert (
        "--remove-metadata lorq.sha256" in (shown := capsys.readouterr().err)
        and "fault: changed.gguf: must be" in shown
    )
    changed.write_bytes(changed.read_bytes().replace(b"lorq.sha256", b"else.sha256"))  # as the remedy leaves it
    assert lorq.load(changed, device="cpu")(TOKENS).logits.isfinite().all()


def test_a_file_whose_tensors_are_not_its_metadatas_is_refused_in_one_line(exported, tmp_path):
    import struct

    file, _ = exported("llama", vocab_size=272)
    content = file.read_bytes()
    key = b"llama.feed_forward_length" + struct.pack("<I", 4)
    assert content.count(key + struct.pack("<I", 128)) == 1
    content = content.replace(key + struct.pack("<I", 128), key + struct.pack("<I", 96))
    (tmp_path / "wrong.gguf").write_bytes(content.replace(b"lorq.sha256", b"else.sha256"))
    with pytest.raises(ValueError, match=r"tensors have other shapes than its metadata says, as transformers") as error:
        lorq.load(tmp_path / "wrong.gguf")
    assert "\n" not in str(error.value) and "ignore_mismatched" not in str(error.value)
