"""What README, docs and examples state is run: Python, commands, the format's example; links and data files hold."""

import csv
import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import house
import pytest
import torch
from gguf_models import merging_tokenizer
from helpers import tiny_folder

import lorq
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
    folder = tiny_folder(tmp_path / "path" / "to" / "model", "llama", max_position_embeddings=1024, vocab_size=264)
    merging_tokenizer().save_pretrained(folder)  # llama.cpp reads none without merges
    return folder


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
    assert "Evaluation(perplexity=" in capsys.readouterr().out


# Pages whose indented lines are commands, with how many there are.
PAGES = {
    "README.md": 8, "docs/first-steps.md": 4, "docs/choosing.md": 1, "docs/budget.md": 1, "docs/training.md": 10,
    "docs/others.md": 3, "docs/methods.md": 2,
}  # fmt: skip


def commands_of(page):
    """Lines that are indented by four blanks and begin with ``lorq``; what a page only shows is in a ``text`` block."""
    return [line.strip() for line in (ROOT / page).read_text().splitlines() if line.startswith("    lorq ")]


@pytest.mark.parametrize("page", PAGES)
def test_a_pages_commands_run_in_their_order(page, model, capsys):
    commands = commands_of(page)
    assert len(commands) == PAGES[page]
    for command in commands:
        assert main(shlex.split(smaller(command))[1:]) == 0, command


def test_no_page_has_commands_that_are_not_run():
    guides = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")} - set(PAGES)
    told = {"docs/results.md", "docs/kernels.md", "docs/log.md"}  # the commands that made the numbers, on real models
    assert not {page for page in guides - told if commands_of(page)}


def test_the_first_code_of_the_readme_comes_by_line_20_and_it_is_short():
    lines = README.splitlines()
    assert lines.index("```python") < 20 and len(lines) <= 150


def test_the_page_of_methods_has_every_method_and_shows_what_it_explains():
    page = (ROOT / "docs" / "methods.md").read_text()
    assert set(re.findall(r"^\| `([a-z]+(?:-[a-z]+)*)` \|", page, re.M)) == set(METHODS)
    figures = re.findall(r"\]\(figures/(\w+)\.svg\)", page)
    assert {"nearest", "gptq", "flrq", "lopro", "lrq", "lords", "tileq"} <= set(figures)
    for figure in figures:
        assert ElementTree.parse(ROOT / "docs" / "figures" / f"{figure}.svg").getroot().tag.endswith("svg")


def test_the_tree_in_contributing_is_the_house_in_its_order():
    tree = re.search(r"src/lorq/\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)[1]
    listed = re.findall(r"(?:^  |  )(\w+)(?:/|\.py)(?=\s)", tree, re.M)
    entries = {house.entry(file) for file in house.SOURCE.rglob("*.py")} - {*house.LAZY, *house.GROUND}
    assert set(listed) == entries
    order = list(house.ROOMS)
    rooms = [order.index(house.room(name)) for name in listed]
    assert rooms == sorted(rooms)


def test_the_picture_has_the_numbers_of_the_results():
    drawn = runpy.run_path(str(ROOT / "docs" / "figures" / "quality.py"))["points"]()
    found = {(point["method"], point["bits"], point["KL"]) for point in drawn}
    assert {("lorq, balanced", 3.05, 0.1511), ("gptq", 3.297, 0.490), ("nearest", 4.313, 0.349)} <= found
    assert len(drawn) == 13
    # A point's description in the picture has its numbers.
    picture = (ROOT / "docs" / "figures" / "quality.svg").read_text()
    for _, bits, kl in found:
        assert f"{bits:g}; " in picture and f"{kl:g}; " in picture, "python docs/figures/quality.py draws it anew"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built: a link to nothing, or a page without a place in the navigation, ends it."""
    pytest.importorskip("material", reason="the site is built by mkdocs-material (lorq[docs]), which is not installed")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_link_and_picture_of_the_site_leads_to_something(site):
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) >= len(list((ROOT / "docs").rglob("*.md")))
    for page, text in pages.items():
        for target in re.findall(r'(?:href|src)="?([^"\s>]+)', text):
            if "://" in target or target.startswith(("mailto:", "data:")):
                assert not re.search(r"\.(js|css|woff2?)$", target), f"{page}: {target} needs the network"
                continue
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            there = there / "index.html" if there.is_dir() else there
            assert there.exists(), f"{page}: {target}"
            if anchor and there in pages:
                assert f'id="{unquote(anchor)}"' in pages[there] or f"id={anchor}" in pages[there], f"{page}: {target}"


def test_the_reference_has_the_docstrings_of_all_public_functions(site):
    text = (site / "reference" / "index.html").read_text(encoding="utf-8")
    for name in ("quantize", "evaluate", "generate", "load", "tune", "compensate", "report", "preset", "read_report"):
        home = getattr(lorq, name)
        assert f'id="{home.__module__}.{name}"' in text, name
    for kind in {kind for kind in METHODS.values() if "Paper" not in kind.__name__}:
        assert f'id="{kind.__module__}.{kind.__name__}"' in text, kind


EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("script", sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "small_model"))
def test_an_example_runs(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LORQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 3
    assert f"({script}.py)" in (EXAMPLES / "README.md").read_text()


def test_the_notebook_runs_cell_by_cell(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LORQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    cells = json.loads((EXAMPLES / "first_steps.ipynb").read_text())["cells"]
    names: dict = {}
    for cell in cells:
        assert not cell.get("outputs"), "a notebook is kept without what it printed"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert "bits per weight" in capsys.readouterr().out and names["found"].kl_mean > 0


def test_the_formats_example_packs_to_its_bytes():
    example = dict(re.findall(r"^(codes|bytes|words): +(.*)$", FORMAT, re.M))
    codes = torch.tensor([[int(code) for code in example["codes"].split()]], dtype=torch.uint8)
    packed = pack(codes, 3)
    assert packed.tolist() == [[int(word) for word in example["words"].split()]]
    assert packed.numpy().astype("<i4").tobytes() == bytes.fromhex(example["bytes"])
    assert torch.equal(unpack(packed, 3, codes.shape[1]), codes)


def test_the_format_names_every_tensor_and_the_guard():
    assert set(re.findall(r"^\| `NAME\.(\w+)`", FORMAT, re.M)) == {*STORED, "bias", "weight_blocks"}
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


@pytest.mark.parametrize(
    "path", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")], ids=lambda path: path.name
)
def test_what_a_page_links_to_is_there(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            assert (path.parent / target.split("#")[0]).exists(), target


def test_names_of_lorq_in_pages_and_scripts_exist():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.py")]
    pages += [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")]
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


def test_the_licences_of_all_dependencies_are_listed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras: dict[str, set[str]] = {}
    for extra, needed in {"always": project["dependencies"], **project["optional-dependencies"]}.items():
        for name in needed:
            extras.setdefault(re.match(r"[\w.-]+", name)[0], set()).add(extra)
    listed = re.findall(r"^\| ([\w.-]+) \| ([`\w, ]+) \| \S.* \|$", (ROOT / "LICENCES.md").read_text(), re.M)
    assert {name: set(told.replace("`", "").split(", ")) for name, told in listed if name != "package"} == extras


def test_ci_installs_what_the_constraints_name():
    """By hash; torch comes from where a machine has its build."""
    pinned = {}
    for file in ("build.txt", "requirements.txt"):
        for line in (ROOT / ".ci" / file).read_text().splitlines()[1:]:
            name, version = re.fullmatch(r"([\w.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line).groups()
            pinned[re.sub(r"[-_.]+", "-", name)] = version
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if version and name != "torch":
            assert pinned[re.sub(r"[-_.]+", "-", name)] == version, f"{name}: run .ci/lock"
