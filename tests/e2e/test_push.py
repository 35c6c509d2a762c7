"""lorq push: the model card tells the truth, and what is uploaded is what loads."""

import json
import re
import shlex
from email.message import Message

import huggingface_hub
import pytest
from gguf_models import gguf_folder
from helpers import folder_digests
from huggingface_hub import ModelCard

import lorq
from lorq.cards import command_of
from lorq.cli import main
from lorq.show import figures_line

GPTQ = lorq.GPTQ(bits=3, group_size=16, symmetric=True)
OPTIONS = {"samples": 2, "seq_len": 32, "exclude": ("o_proj", "layers.1.mlp"), "seed": 3}


@pytest.fixture
def folder(folder_of, text_file, tmp_path):
    lorq.quantize(folder_of("llama"), tmp_path / "q", GPTQ, calibration=str(text_file), **OPTIONS)
    return tmp_path / "q"


class Hub:
    """What `HfApi` would have done."""

    def __init__(self):
        self.calls, self.error = [], None

    def __call__(self, **who):
        return self

    def create_repo(self, repo, *, private, exist_ok):
        if self.error:
            raise self.error
        self.calls.append(("create", repo, private, exist_ok))
        return f"https://hub/{repo}"

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns):
        names = [p.relative_to(folder_path).as_posix() for p in sorted(folder_path.rglob("*")) if p.is_file()]
        kept = huggingface_hub.utils.filter_repo_objects(names, ignore_patterns=ignore_patterns)
        self.calls.append(("folder", repo_id, list(kept)))

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id):
        self.calls.append(("file", repo_id, path_in_repo, path_or_fileobj))


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", found)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    return found


def test_the_cards_command_makes_the_same_folder(folder, folder_of, text_file, tmp_path, monkeypatch):
    command = command_of(lorq.read_report(folder))
    assert "--bits 3" in command and "--exclude o_proj --exclude layers.1.mlp" in command and "--device" not in command
    words = [{"MODEL": str(folder_of("llama")), "OUT": str(tmp_path / "again")}.get(w, w) for w in shlex.split(command)]
    monkeypatch.chdir(text_file.parent)
    assert main(words[1:]) == 0
    assert folder_digests(tmp_path / "again") == folder_digests(folder)


def test_the_card_has_what_was_measured_and_the_originals_licence(folder, folder_of, text_file, capsys, hub):
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\ntags: [big]\n---\n# Original\nIts words.\n")
    found = lorq.evaluate(folder, reference=folder_of("llama"), text=text_file, window=32, windows=2)
    assert main(["push", str(folder), "org/small", "--dry-run", "--base-model", "org/large"]) == 0
    shown = capsys.readouterr().out
    card = ModelCard(shown)
    assert (card.data.license, card.data.language, card.data.base_model) == ("mit", ["en"], "org/large")
    assert card.data.base_model_relation == "quantized" and "big" not in card.data.tags and "lorq" in card.data.tags
    report = lorq.read_report(folder)
    assert f"{report.bits_per_weight:.3f} bits per weight in {len(report.layers)} layers" in shown
    assert f"| text text.txt | {figures_line(found.as_dict())} |" in shown and f"KL {found.kl_mean:.4f} ± " in shown
    assert 'from_pretrained("org/small")' in shown and "    vllm serve org/small\n" in shown
    assert "pypi.org" not in shown and "`pip install .` in a copy of its source" in shown
    assert shown.endswith("The card of the original:\n\n# Original\nIts words.\n")
    assert str(folder) not in shown and str(text_file.parent) not in shown
    assert hub.calls == []


def test_a_card_without_an_original_is_told_of(folder, capsys):
    for card, flags, told in (
        ("# Original\n", [], True),
        ("---\nbase_model: org/large\n---\n# Original\n", [], False),
        ("# Original\n", ["--base-model", "org/large"], False),
    ):
        (folder / "README.md").write_text(card)
        assert main(["push", str(folder), "org/small", "--dry-run", *flags]) == 0
        shown = capsys.readouterr()
        assert ("the card names no original" in shown.err and "--base-model ORG/NAME" in shown.err) == told
        assert "names no original" not in shown.out and ("\nbase_model: org/large\n" in shown.out) != told


def test_a_card_says_the_address_that_the_package_states(folder, monkeypatch):
    stated = Message()
    for line in ("Documentation, https://lorq.example/docs", "Repository, https://lorq.example/lorq"):
        stated["Project-URL"] = line
    monkeypatch.setattr("lorq.cards.metadata", {"lorq": stated}.__getitem__)
    card = lorq.push(folder, "org/small", dry_run=True).card
    assert "transformers, with lorq installed (`pip install 'lorq @ git+https://lorq.example/lorq'`):" in card
    assert "vLLM, with lorq installed (`pip install 'lorq[vllm] @ git+https://lorq.example/lorq'`):" in card
    assert "a copy of its source" not in card


def test_what_is_pushed_loads_and_has_the_new_card(folder, hub, capsys):
    (folder / "README.md").write_text("# Original\n")
    assert main(["push", str(folder), "org/small", "--private"]) == 0
    assert "pushed to https://hub/org/small" in capsys.readouterr().out
    create, upload, card = hub.calls
    assert create == ("create", "org/small", True, True)
    assert set(upload[2]) == {p.name for p in folder.iterdir()} - {"README.md"} >= {"config.json", "lorq_report.json"}
    assert card[1:3] == ("org/small", "README.md") and b"not yet: `lorq evaluate OUT --reference MODEL`" in card[3]


def test_exports_have_cards_too(folder_of, tmp_path, hub):
    lorq.quantize(folder_of("llama"), tmp_path / "q", lorq.Nearest(bits=4, group_size=16, symmetric=True))
    lorq.export(tmp_path / "q", tmp_path / "served", to="compressed-tensors")
    card = lorq.push(tmp_path / "served", "org/served", dry_run=True).card
    assert "as compressed-tensors" in card and "    vllm serve org/served --dtype float16" in card
    assert f"{lorq.read_report(tmp_path / 'q').bits_per_weight:.3f} bits per weight where there are codes" in card
    assert 'from_pretrained("org/served")' in card and "lorq export OUT DEST --to compressed-tensors\n" in card


def sections(card):
    return {part.partition("\n")[0]: part for part in card.split("\n## ")}


@pytest.mark.parametrize(
    ("symmetric", "target", "lines"),
    [
        (True, "gptq", ["    vllm serve org/x --dtype float16", "`pip install optimum gptqmodel`"]),
        (False, "gptq", ["`pip install optimum gptqmodel`"]),
        (
            False,
            "compressed-tensors",
            ["    vllm serve org/x", '"org/x", quantization_config=CompressedTensorsConfig('],
        ),
        (True, "dense", ["    vllm serve org/x", 'from_pretrained("org/x")']),
    ],
)
def test_an_exports_card_says_who_reads_it(symmetric, target, lines, folder_of, tmp_path):
    folder_of_codes = lorq.Nearest(bits=4, group_size=32, symmetric=symmetric)
    lorq.quantize(gguf_folder(tmp_path / "m", "llama"), tmp_path / "q", folder_of_codes)
    lorq.export(tmp_path / "q", tmp_path / "x", to=target)
    loading = sections(lorq.push(tmp_path / "x", "org/x", dry_run=True).card)["How to load it"]
    assert all(line in loading for line in lines)
    assert ("vllm" in loading) == (target != "gptq" or symmetric), loading
    assert "lorq" not in loading


def test_a_files_card_says_what_is_in_it_and_other_files_are_refused(folder_of, text_file, tmp_path, hub):
    model = gguf_folder(tmp_path / "m", "llama")
    lorq.quantize(model, tmp_path / "q", lorq.Nearest(grid="q4_0"))
    found = lorq.evaluate(tmp_path / "q", reference=model, text=text_file, window=32, windows=2)
    file = tmp_path / "a file.gguf"
    lorq.export(tmp_path / "q", file, gguf=lorq.GgufOptions(embeddings="q8_0"))
    card = lorq.push(file, "org/m-gguf", base_model="org/m").card
    # 73,728 weights of 4.5 bits and 16,896 of 8.5
    assert "5.246 bits per weight where there are codes" in card and "(14 q4_0, 5 f32, 1 q8_0)" in card
    assert f"{figures_line(found.as_dict())} |" in card
    assert "    lorq export OUT model.gguf --embeddings q8_0" in card and "--grid q4_0" in card
    assert "rounding: 1 of 20 tensors are rounded" in card
    assert "    llama-cli -hf org/m-gguf -hff 'a file.gguf'" in card and "transformers" not in card
    assert [call[2] for call in hub.calls if call[0] == "file"] == ["a file.gguf", "README.md"]
    for name, content, words in (
        ("junk", b"GGUF", "the file is damaged"),
        ("cut", file.read_bytes()[:-40], "the file is damaged"),
        ("text", b"text", "must be a GGUF file, which begins with b'GGUF', it begins with b'text'"),
        ("other", file.read_bytes().replace(b"lorq.version", b"lorq.Version"), "was written by another program"),
    ):
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            lorq.push(tmp_path / f"{name}.gguf", "org/x", dry_run=True)


@pytest.mark.parametrize("what", ["weights", "a tensor", "the checksum", "the mark", "an adapter", "a folder"])
def test_damaged_files_are_refused_by_a_dry_run_too(what, folder_of, text_file, tmp_path, hub, capsys):
    q, out, words = tmp_path / "q", tmp_path / "out", []
    if what == "an adapter":
        lorq.quantize(folder_of("llama"), q, lorq.FLRQ(bits=4, group_size=16, budget=2.0, min_gain=0.0, epochs=0),
                      calibration=str(text_file), samples=2, seq_len=32)  # fmt: skip
        lorq.export(q, tmp_path / "base", to="peft", adapter=out)
        words = ["--base-model", "org/m"]
    else:
        lorq.quantize(gguf_folder(tmp_path / "m", "llama"), q, lorq.Nearest(grid="q4_0"))
    if what in ("a tensor", "the checksum"):
        out = tmp_path / "out.gguf"
        lorq.export(q, out)
        content = out.read_bytes()
        at = len(content) - 1 if what == "a tensor" else content.index(b"lorq.sha256") + 30
    elif what == "a folder":
        out = q
    elif what != "an adapter":
        lorq.export(q, out, to="dense")
    push = ["push", str(out), "org/x", "--dry-run", *words]
    assert main(push) == 0
    if out.is_dir():
        (out / "README.md").write_text("# Mine\n")  # which is no damage
        assert main(push) == 0
        out = next(out.glob("*.safetensors")) if what != "the mark" else out / "lorq_export.json"
        content = out.read_bytes()
        at = len(content) - 1 if what != "the mark" else content.index(b"sha256 ") + 9
    out.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    capsys.readouterr()
    assert main(push) == 1
    printed = capsys.readouterr()
    assert re.search(r"(copy|export|download).* again", printed.err) and printed.err.count("\n") == 1
    assert hub.calls == []


def test_adapters_are_pushed_for_the_model_that_they_are_for(folder_of, text_file, tmp_path, hub):
    ranks = lorq.FLRQ(bits=4, group_size=16, budget=2.0, min_gain=0.0, epochs=0, rounding="nearest", symmetric=True)
    options = {"calibration": str(text_file), "samples": 2, "seq_len": 32}
    lorq.quantize(folder_of("llama"), tmp_path / "q", ranks, **options)
    lorq.export(tmp_path / "q", tmp_path / "base", to="compressed-tensors", adapter=tmp_path / "lora")
    assert "it is an adapter of its own" in lorq.push(tmp_path / "base", "org/base", dry_run=True).card
    with pytest.raises(ValueError, match=r"lora is an adapter, of use on one model alone; .* --base-model ORG/NAME"):
        lorq.push(tmp_path / "lora", "org/lora", dry_run=True)
    card = lorq.push(tmp_path / "lora", "org/lora", base_model="org/base").card
    most = max(layer.rank for layer in lorq.read_report(tmp_path / "q").layers)
    slot = next(rank for rank in (1, 8, 16, 32, 64) if rank >= most)  # of vLLM's
    flags = f"--enable-lora --max-lora-rank {slot} --lora-modules low-rank=org/lora"
    assert f"    vllm serve org/base --dtype float16 {flags}\n" in card
    assert 'PeftModel.from_pretrained(model, "org/lora")' in card and 'from_pretrained("org/base", q' in card
    uploaded = {call[2]: call[3] for call in hub.calls if call[0] == "file"}
    assert json.loads(uploaded["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert next(call[2] for call in hub.calls if call[0] == "folder") == [
        "adapter_model.safetensors",
        "lorq_export.json",
    ]
    lorq.export(tmp_path / "q", tmp_path / "plain", to="peft", adapter=tmp_path / "lora2")
    assert "it is an adapter of its own" in lorq.push(tmp_path / "plain", "org/plain", dry_run=True).card
    assert "with lorq installed" in lorq.push(tmp_path / "lora2", "org/l", base_model="org/plain", dry_run=True).card


def test_what_cannot_be_pushed_is_one_line(folder, hub, monkeypatch, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("")
    for words, line in (
        ([str(tmp_path / "notes.txt"), "org/name"], "OUT must be a lorq folder, an export's, or a .gguf file, got"),
        ([str(folder), "org/na me"], "repo must be a name on the hub, such as org/name, got 'org/na me'"),
        ([str(folder), "name"], "repo must be an organisation or user and a name, such as org/name, got 'name'"),
        ([str(folder), "org/name", "--base-model", "large"], "base_model must be an organisation or user"),
    ):
        assert main(["push", *words]) == 1
        assert line in capsys.readouterr().err
    hub.error = huggingface_hub.errors.OfflineModeIsEnabled("Cannot reach the hub: offline mode\nmore")
    with pytest.raises(OSError, match=r"could not be pushed to org/name: Cannot reach the hub: offline mode; the same"):
        lorq.push(folder, "org/name")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(
        PermissionError, match=r"pushing to org/name needs a token of the hub; `hf auth login` or HF_TO"
    ):
        lorq.push(folder, "org/name")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"format_version": 5', '"format_version": 99'))
    for words in (["push", str(folder), "org/name", "--dry-run"], ["report", str(folder)], ["inspect", str(folder)]):
        assert main(words) == 1
        assert "lorq format version 99, this lorq reads up to 5; take a newer one" in capsys.readouterr().err
    (folder / "config.json").write_text(config)
    shard = next(folder.glob("lorq-0*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    with pytest.raises(ValueError, match=re.escape(shard.name)):
        lorq.push(folder, "org/name")
    assert hub.calls == [] and json.loads((folder / "config.json").read_text())
