"""What README and docs state is run: Python, commands, the format's example and tables; links and data files hold."""

import csv
import importlib
import re
import shlex
from pathlib import Path

import house
import pytest
import torch
from helpers import tiny_folder

from lorq.cli import main
from lorq.core.packing import pack, unpack
from lorq.methods import METHODS
from lorq.runtime.packed import STORED
from lorq.storage.names import SENTINEL

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FORMAT = (ROOT / "docs" / "format.md").read_text()


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A small model at the path that the README uses, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORQ_CACHE", str(tmp_path / "cache"))
    return tiny_folder(tmp_path / "path" / "to" / "model", "llama", max_position_embeddings=1024)


def smaller(text: str) -> str:
    """The README's sizes, cut down for a test."""
    for big, small in (
        ("512", "32"),
        ("256", "32"),
        ("steps 100", "steps 2"),
        ("16", "2"),
        ("group_size=64", "group_size=32"),
        ("group-size 64", "group-size 32"),
    ):
        text = text.replace(big, small)
    return text


def test_the_readmes_python_runs_and_generates(model, capsys):
    block = re.search(r"```python\n(.*?)```", README, re.S)[1]
    exec(compile(smaller(block), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "Evaluation(perplexity=" in printed and "The capital of France is" in printed


def test_the_readmes_commands_run_in_their_order(model, capsys):
    commands = [line.strip() for line in README.splitlines() if line.startswith("    lorq ")]
    verbs = [shlex.split(command)[1] for command in commands]
    first, training = ["quantize", "evaluate", "inspect", "generate"], ["adapt", "evaluate", "merge", "adapt"]
    tuned = ["quantize", "tune", "compensate", "compensate"]
    assert verbs == [*first, "export", "quantize", "export", "quantize", "quantize", *tuned, "quantize", *training]
    for command in commands:
        assert main(shlex.split(smaller(command))[1:]) == 0, command


def test_the_first_code_of_the_readme_comes_by_line_20():
    assert README.splitlines().index("```python") < 20


def test_the_readme_lists_every_method():
    assert set(re.findall(r"^\| `([a-z]+(?:-[a-z]+)*)` \|", README.partition("\n## Methods\n")[2], re.M)) == set(
        METHODS
    )


def test_the_readmes_tree_is_the_house_in_its_order():
    listed = re.findall(r"(?:^  |  )(\w+)(?:/|\.py)(?=\s)", re.search(r"src/lorq/\n(.*?)```", README, re.S)[1], re.M)
    entries = {house.entry(file) for file in house.SOURCE.rglob("*.py")} - {*house.LAZY, *house.GROUND}
    assert set(listed) == entries
    order = list(house.ROOMS)
    rooms = [order.index(house.room(name)) for name in listed]
    assert rooms == sorted(rooms)


def test_the_formats_example_packs_to_its_bytes():
    example = dict(re.findall(r"^(codes|bytes|words): +(.*)$", FORMAT, re.M))
    codes = torch.tensor([[int(code) for code in example["codes"].split()]], dtype=torch.uint8)
    packed = pack(codes, 3)
    assert packed.tolist() == [[int(word) for word in example["words"].split()]]
    assert packed.numpy().astype("<i4").tobytes() == bytes.fromhex(example["bytes"])
    assert torch.equal(unpack(packed, 3, codes.shape[1]), codes)


def test_the_format_names_every_tensor_and_the_guard():
    assert set(re.findall(r"^\| `NAME\.(\w+)`", FORMAT, re.M)) == {*STORED, "bias"}
    assert SENTINEL in FORMAT


MEASURED = ROOT / "docs" / "measured"
SECTIONS = dict(re.findall(r"^## (\w+\.csv)\n(.*?)(?=^## |\Z)", (MEASURED / "README.md").read_text(), re.M | re.S))


def test_every_table_of_the_docs_is_described():
    assert sorted(SECTIONS) == sorted(path.name for path in MEASURED.glob("*.csv"))


@pytest.mark.parametrize("name", SECTIONS)
def test_a_table_of_the_docs_has_whole_rows_and_a_word_on_every_column(name):
    head, *rows = csv.reader((MEASURED / name).read_text().splitlines())
    assert set(head) <= set(re.findall(r"`([^`]+)`", SECTIONS[name])) and len(set(head)) == len(head)
    assert rows and all(len(row) == len(head) for row in rows)
    numbers = [cell for column in zip(*rows, strict=True) for cell in column if re.match(r"[-\d.]+$", cell)]
    assert len(numbers) > len(rows)


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")], ids=lambda path: path.name)
def test_what_a_page_links_to_is_there(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            assert (path.parent / target.split("#")[0]).exists(), target


def test_names_of_lorq_in_pages_and_scripts_exist():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.py")]
    # The log and the changelog tell of what was; a name in a page is a word of its own, no part of a file's name.
    text = "\n".join(p.read_text(encoding="utf-8") for p in pages if p.stem not in ("log", "CHANGELOG"))
    names = {tuple(found.split(".")) for found in re.findall(r"(?<![\w./-])lorq((?:\.[A-Za-z_]\w*)+)(?![\w/-])", text)}
    names |= {
        (*module.split("."), name.strip())
        for module, imported in re.findall(r"^from lorq\.?([\w.]*) import (.+)$", text, re.MULTILINE)
        for name in imported.split(",")
    }
    source = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "src").rglob("*.py"))
    names |= {tuple(found.split(".")) for found in re.findall(r"`lorq\.([\w.]+)`", source)}
    assert len(names) > 40
    for parts in names:
        value = importlib.import_module("lorq")
        for part in (part for part in parts if part and "safetensors" not in parts):
            if not hasattr(value, part):
                importlib.import_module(f"{value.__name__}.{part}")
            value = getattr(value, part)
