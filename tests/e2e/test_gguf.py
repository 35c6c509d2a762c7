"""lorq export OUT model.gguf, read back by the gguf package and by transformers; lorq quantize MODEL model.gguf."""

import re

import pytest
import torch
from gguf import GGUFReader, dequantize
from gguf_models import gguf_folder
from transformers import AutoModelForCausalLM

import lorq
from lorq import GgufOptions
from lorq.cli import main
from lorq.storage.folder import LorqFolder

TOKENS = torch.arange(7, 39)[None]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A tiny model in codes of a method; made once, not to be changed."""
    made = {}

    def of(name, method=lorq.Nearest(bits=4, group_size=32), **options):  # noqa: B008  # frozen
        if (name, method) not in made:
            place = tmp_path_factory.mktemp("gguf")
            made[name, method] = place / "quantized"
            lorq.quantize(gguf_folder(place / "model", name), made[name, method], method, **options)
        return made[name, method]

    return of


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # of others it does not read all that the file says
def test_what_transformers_reads_of_the_file_says_what_the_folder_does(name, quantized, tmp_path):
    folder = quantized(name)
    done = lorq.export(folder, tmp_path / "model.gguf", dtype="float32")
    assert "rounding" not in done.lost
    there = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(there), logits(lorq.load(folder)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_codes_are_the_files_bytes(name, quantized, tmp_path):
    folder = LorqFolder.open(quantized(name, lorq.Nearest(bits=3, group_size=32)))
    lorq.export(folder.path, tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    layers = ["mlp.down_proj"] if name == "llama" else [f"mlp.experts.{number}.down_proj" for number in range(4)]
    own = tensors[f"blk.1.{'ffn_down' if name == 'llama' else 'ffn_down_exps'}.weight"]
    assert own.tensor_type.name == "Q4_0"
    read = torch.from_numpy(dequantize(own.data, own.tensor_type)).reshape(len(layers), 64, 128)
    for values, layer in zip(read, layers, strict=True):
        assert torch.equal(values, folder.weight(f"model.layers.1.{layer}").dense())
    query = tensors["blk.0.attn_q.weight"]
    there = torch.from_numpy(dequantize(query.data, query.tensor_type))
    weight = folder.weight("model.layers.0.self_attn.q_proj").dense()
    halves = there.view(4, 8, 2, 64).transpose(1, 2).reshape(64, 64)  # heads of 16 rows, two halves by turns
    assert torch.equal(halves, weight)


@pytest.mark.parametrize("type_", ["q4_0", "q4_k", "tq1_0"])
def test_codes_of_a_type_are_copied(type_, tmp_path):
    dense = gguf_folder(tmp_path / "dense", "llama", hidden_size=256, intermediate_size=256, head_dim=64)
    lorq.quantize(dense, tmp_path / "out", lorq.Nearest(grid=type_), embeddings="q6_k")
    done = lorq.export(tmp_path / "out", tmp_path / "model.gguf")
    assert "rounding" not in done.lost
    folder = LorqFolder.open(tmp_path / "out")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert tensors["token_embd.weight"].tensor_type.name == "Q6_K" and "output.weight" not in tensors
    for own, layer in (("token_embd", "embed_tokens"), ("blk.1.ffn_up", "layers.1.mlp.up_proj")):
        stored = folder.tensors(f"model.{layer}")["weight_blocks"]
        assert torch.equal(torch.from_numpy(tensors[f"{own}.weight"].data.copy()), stored)


def test_the_file_says_what_the_model_is(quantized, tmp_path):
    lorq.export(quantized("llama3-rope"), tmp_path / "model.gguf", gguf=GgufOptions(type="q8_0", embeddings="q4_1"))
    reader = GGUFReader(tmp_path / "model.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32, "llama.rope.freq_base": 10000.0, "llama.context_length": 256,
        "general.file_type": 7, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.eos_token_id": 257, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {key: said[key] for key in expected} == expected
    assert said["tokenizer.ggml.merges"] == ["t h", "th e", "Ġ the", "i n"]
    assert said["tokenizer.chat_template"].startswith("{% for message")
    assert len(said["tokenizer.ggml.tokens"]) == 264 and said["tokenizer.ggml.tokens"][-1] == "[PAD263]"
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == types["output.weight"] == "Q4_1"
    assert types["blk.0.attn_q.weight"] == "Q8_0" and types["rope_freqs.weight"] == types["output_norm.weight"] == "F32"


def test_the_low_rank_part_is_an_adapter_or_folded_away(quantized, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the thing in the other thing " * 40)
    folder = quantized("mixtral", lorq.FLRQ(bits=3, group_size=32), calibration=str(text), samples=2, seq_len=32)
    out, adapter = tmp_path / "model.gguf", tmp_path / "low-rank.gguf"
    arguments = ["export", str(folder), str(out)]
    assert main(arguments) == 1
    assert "a word for the low-rank part that model.layers.0" in capsys.readouterr().err
    assert main([*arguments, "--adapter", str(adapter)]) == 0
    opened = LorqFolder.open(folder)
    files = [{t.name: t for t in GGUFReader(path).tensors} for path in (out, adapter)]
    assert GGUFReader(adapter).fields["adapter.lora.alpha"].contents() == 0  # so that ranks may differ
    name, codes = "blk.1.ffn_up_exps.weight", files[0]["blk.1.ffn_up_exps.weight"]
    left, right = (torch.from_numpy(files[1][f"{name}.{part}"].data.copy()) for part in ("lora_b", "lora_a"))
    whole = torch.from_numpy(dequantize(codes.data, codes.tensor_type)).view(4, 128, 64) + left @ right
    for number, weight in enumerate(whole):
        expected = opened.weight(f"model.layers.1.mlp.experts.{number}.up_proj").dense()
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    assert main([*arguments, "--overwrite", "--fold"]) == 1
    assert "with a low-rank part of" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--fold", "--type", "q8_0"]) == 0
    printed = capsys.readouterr().out
    assert "tensors are rounded, which changes them by 0.00" in printed
    folded = {t.name: t for t in GGUFReader(out).tensors}[name]
    values = torch.from_numpy(dequantize(folded.data, folded.tensor_type)).view(4, 128, 64)
    torch.testing.assert_close(values[3], expected, rtol=0, atol=float(expected.abs().max()) / 200)


def text_of(tmp_path):
    (tmp_path / "text.txt").write_text("the thing in the other thing " * 40)
    return ["--calibration", str(tmp_path / "text.txt"), "--samples", "2", "--seq-len", "32"]


def test_one_command_makes_the_file_and_leaves_nothing_else(tmp_path, capsys):
    dense, out = gguf_folder(tmp_path / "dense", "llama"), tmp_path / "model.gguf"
    options = text_of(tmp_path)
    assert main(["quantize", str(dense), str(out), *options]) == 0
    printed = capsys.readouterr()
    assert "for llama.cpp: --method gptq --token-weights gradient" in printed.err
    why = "q4_k needs widths that are multiples of 256, which 14 of 14 layers have not, model.layers.0.self_attn.q_proj"
    assert f"type iq4_nl: {why} has 64; --grid names another" in printed.err
    assert "tensors: 14 iq4_nl, 6 f32" in printed.out and f"next: lorq inspect {out}\n" in printed.out
    assert f"│ file              │ {out}"[:40] in printed.out
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "text.txt", "model.gguf"}
    # The same as in two steps.
    settings = {"token_weights": "gradient", "calibration": options[1], "samples": 2, "seq_len": 32}
    lorq.quantize(dense, tmp_path / "out", lorq.GPTQ(grid="iq4_nl"), **settings)
    lorq.export(tmp_path / "out", tmp_path / "again.gguf")
    ours, theirs = ({t.name: t.data for t in GGUFReader(tmp_path / n).tensors} for n in ("model.gguf", "again.gguf"))
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    assert main(["quantize", str(dense), str(out), *options]) == 1
    assert f"{out} must be new, it is there" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["nearest", "gptq", "flrq --budget 0"])
def test_a_method_alone_gets_the_type_that_widths_allow(method, tmp_path, capsys):
    wide, out = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}, tmp_path / "model.gguf"
    dense = gguf_folder(tmp_path / "dense", "llama", **wide)
    arguments = ["quantize", str(dense), str(out), "--method", *method.split(), *text_of(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "type q4_k: all widths are multiples of 256; --grid names another" in printed.err
    assert "14 q4_k" in printed.out
    # What is said of some layers does not decide for the others, and what is said of all does.
    assert main([*arguments, "--overwrite", "--override", "down_proj:grid=q8_0"]) == 0
    printed = capsys.readouterr()
    assert "12 q4_k, 6 f32, 2 q8_0" in printed.out and "type q4_k" in printed.err
    assert main([*arguments, "--overwrite", "--grid", "q5_0"]) == 0
    printed = capsys.readouterr()
    assert "14 q5_0" in printed.out and "names another" not in printed.err


def test_a_run_that_ends_early_goes_on(tmp_path, capsys, monkeypatch):
    dense, out = gguf_folder(tmp_path / "dense", "qwen2"), tmp_path / "model.gguf"
    arguments = ["quantize", str(dense), str(out), "--grid", "iq4_nl", *text_of(tmp_path)]

    def fails(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lorq.exports.gguf_plan.Plan.rows", fails)
        assert main(arguments) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
    assert not out.exists() and (tmp_path / "model.gguf.unfinished" / "config.json").is_file()
    monkeypatch.setattr("lorq.pipeline.quantize.quantize", fails)  # it is done
    assert main([*arguments, "--resume"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "text.txt", "model.gguf"}
    assert "14 iq4_nl" in capsys.readouterr().out


def test_a_run_that_ended_when_it_had_its_file_goes_on_too(tmp_path, monkeypatch, capsys):
    dense, out = gguf_folder(tmp_path / "dense", "qwen2"), tmp_path / "model.gguf"
    arguments = ["quantize", str(dense), str(out), "--method", "nearest", "--grid", "q8_0"]

    def fails(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lorq.storage.writer.remove_made", fails)
        assert main(arguments) == 130
    before = out.read_bytes()
    assert (tmp_path / "model.gguf.unfinished").is_dir()
    assert main([*arguments[:-1], "q4_0", "--resume"]) == 1  # another run's
    assert "was made differently" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert "14 q8_0" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "model.gguf"} and out.read_bytes() == before


@pytest.mark.parametrize("how", ["itself", "by a link", "in the folder that is removed"])
def test_a_file_is_not_made_over_its_own_source(how, quantized, tmp_path, capsys):
    source = tmp_path / "model.gguf"
    out = {"itself": source, "by a link": tmp_path / "link.gguf"}.get(how, tmp_path / "own.gguf")
    if how == "by a link":
        out.symlink_to(source)
    if how.startswith("in"):
        (tmp_path / "own.gguf.unfinished").mkdir()
        source = tmp_path / "own.gguf.unfinished" / "model.gguf"
    lorq.export(quantized("qwen2"), source)
    before = source.read_bytes()
    for flag in ("--overwrite", "--resume"):
        assert main(["quantize", str(source), str(out), "--method", "nearest", "--grid", "q4_0", flag]) == 1
        assert "must not be the model's own, the run would replace or remove" in capsys.readouterr().err
        assert main(["export", str(source), str(out), "--overwrite"]) == 1
    assert source.read_bytes() == before


def test_what_is_not_lorqs_beside_the_file_stays(tmp_path, capsys, caplog):
    dense, out = gguf_folder(tmp_path / "dense", "qwen2"), tmp_path / "model.gguf"
    plain, store = tmp_path / "model.gguf.unfinished", tmp_path / "store"
    arguments = ["quantize", str(dense), str(out), "--method", "nearest", "--grid", "q8_0"]
    store.mkdir()
    plain.symlink_to(store)
    assert main(arguments) == 1
    assert f"{plain} must be no link, the run works there" in capsys.readouterr().err
    assert plain.is_symlink() and not list(store.iterdir())
    plain.unlink()
    lorq.quantize(dense, plain, lorq.Nearest(grid="q8_0"))
    (plain / "mine.txt").write_text("mine")
    assert main([*arguments, "--overwrite"]) == 0
    assert f"{plain} stays, it has mine.txt, which lorq did not write" in caplog.text
    assert [path.name for path in plain.iterdir()] == ["mine.txt"] and out.is_file()


REFUSED = {
    "--bits 3": "a type of GGUF has its own bits and groups, got --bits 3 for a .gguf file; leave it away, and name",
    "--grid q5_0 --group-size 64": "got --group-size 64 for q5_0",
    "--method flrq --bits 4": "got --bits 4 for a .gguf file",
    "--method nearest --grid normal-float": "needs one of GGUF's grids, --grid q4_0, q4_1, .*, got normal-float",
    "--preset fast": "presets have trellis codes, which no .gguf file holds, got --preset fast",
    "--method lopro": "knows GGUF's types, gptq, nearest, or flrq with --budget 0, got LoPRo; take one of them, or",
    "--method lords": "or flrq with --budget 0, got LoRDS; take",
    "--method flrq-paper": "or flrq with --budget 0, got FLRQPaper; take",
    "--method flrq": "has no low-rank part, got budget",
    "--method flrq --grid q4_0": "has no low-rank part, got budget",
    "--grid q4_k": "columns, which must divide the width",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_the_file_cannot_hold_is_refused_before_the_work(arguments, tmp_path, capsys):
    dense = gguf_folder(tmp_path / "dense", "llama")
    assert main(["quantize", str(dense), str(tmp_path / "model.gguf"), *arguments.split(), *text_of(tmp_path)]) == 1
    assert re.search(REFUSED[arguments], capsys.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "text.txt"}


MISTAKES = {
    "--type q9": 'Invalid value "q9" for --type',
    "--type q6_k": "blocks of q6_k must tile a row of model.layers.0.mlp.down_proj.weight, which has 128 columns",
    "--embeddings q4_k": "a row of model.embed_tokens.weight, which has 64 columns; take another --embeddings, or say",
    "--adapter {low_rank}": "has no low-rank part; leave --adapter and --fold out",
    "--fold": "has no low-rank part; leave --adapter and --fold out",
    "--type q6_k --fallback q5_k": "has 128 columns (neither do those of --fallback q5_k); take another --type, or say",
    "--tokenizer-pre lama-bpe": "got 'lama-bpe'; did you mean llama-bpe or",
    "--tokenizer-pre xyz": "got 'xyz'; it has default, llama3,",
    "--to dense --type q8_0": "are for --to gguf, got them for dense",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_input_is_refused_and_nothing_is_left(mistake, quantized, tmp_path, capsys):
    arguments = mistake.format(low_rank=tmp_path / "low-rank.gguf").split()
    assert main(["export", str(quantized("llama")), str(tmp_path / "model.gguf"), *arguments]) == 1
    assert MISTAKES[mistake] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_widths_that_a_type_does_not_divide_take_the_fallback_that_is_named(quantized, tmp_path):
    done = lorq.export(quantized("llama"), tmp_path / "model.gguf", gguf=GgufOptions(type="q6_k", fallback="q8_0"))
    assert done.lines[0] == "tensors: 14 q8_0, 6 f32"


READ_IN_PART = {
    "mixtral": "it lacks model.layers.0.mlp",
    "llama-biases": "has biases, which transformers does not read",
    "llama3-rope": r"has the scaling of its positions \(rope\)",
    "llama-linear": r"has the scaling of its positions \(rope\)",
    "llama-yarn": r"has the scaling of its positions \(rope\)",
}


@pytest.mark.parametrize("name", READ_IN_PART)
def test_a_file_of_which_transformers_leaves_out_a_part_is_no_source(name, quantized, tmp_path):
    lorq.export(quantized(name), tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=READ_IN_PART[name]):
        lorq.quantize(tmp_path / "model.gguf", tmp_path / "out", lorq.Nearest(bits=4, group_size=32))
    assert not (tmp_path / "out").exists()


UNLIKE = {
    "types": (
        {"override": (r"experts\.0\.down_proj:grid=q4_1",)},
        r"experts\.0\.down_proj is q4_1, .* is q4_0; name the",
    ),
    "excluded": ({"exclude": (r"experts\.1\.",)}, r"experts\.0\.\w+ is q4_0, .*experts\.1\.\w+ is not quantized; name"),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_experts_of_several_types_are_not_rounded_unasked(kind, tmp_path):
    options, words = UNLIKE[kind]
    lorq.quantize(gguf_folder(tmp_path / "m", "mixtral"), tmp_path / "q", lorq.Nearest(grid="q4_0"), **options)
    with pytest.raises(ValueError, match=words):
        lorq.export(tmp_path / "q", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
    done = lorq.export(tmp_path / "q", tmp_path / "model.gguf", gguf=GgufOptions(type="q8_0"))
    assert "q4_0" not in done.lines[0] and "rounding" in done.lost


def test_only_a_gguf_file_is_replaced(quantized, tmp_path):
    for name in ("notes.txt", "model.gguf"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(FileExistsError, match="must be a GGUF file of lorq's to be replaced by one, it is no GGUF"):
            lorq.export(quantized("llama"), tmp_path / name, to="gguf", overwrite=True)
        assert (tmp_path / name).read_text() == "mine"
    lorq.export(quantized("llama"), tmp_path / "own.gguf")
    lorq.export(quantized("llama"), tmp_path / "own.gguf", overwrite=True)


def test_a_file_that_was_edited_is_not_replaced(quantized, tmp_path, capsys):
    out = tmp_path / "model.gguf"
    arguments = ["export", str(quantized("llama")), str(out), "--overwrite"]
    assert main(arguments) == main(arguments) == 0
    rope = GGUFReader(out, "r+").fields["llama.rope.freq_base"].parts[-1]
    rope[0] = 5e5
    rope.base.flush()
    before = out.read_bytes()
    assert main(arguments) == 1
    assert f"{out} must be as lorq wrote it to be replaced, its content is not" in capsys.readouterr().err
    assert main(["quantize", str(quantized("llama").parent / "model"), *arguments[2:]]) == 1
    assert f"{out} must be as lorq wrote it to be replaced, its content is not" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_how_far_a_file_is_is_told_tensor_by_tensor(quantized, tmp_path):
    told = []
    lorq.export(quantized("llama"), tmp_path / "model.gguf", progress=lambda *step: told.append(step))
    stages = {stage: [done for own, done, total in told if own == stage] for stage, _, _ in told}
    steps = stages.pop("export")  # in microseconds of this machine's work, done and guessed
    assert stages == {"load torch": [0, 1], "choose types": [*range(21)]}
    assert 10 < len(steps) <= 21 and steps == sorted(steps) and steps[0] == 0
    _, done, total = next(step for step in reversed(told) if step[0] == "export")
    assert done == total


def test_activations_in_eight_bits_are_told_to_be_lost(quantized, tmp_path):
    folder = quantized("llama", lorq.Nearest(grid="q4_0"), activations="token")
    assert lorq.export(folder, tmp_path / "model.gguf").lost["activations"].startswith("14 layers")
