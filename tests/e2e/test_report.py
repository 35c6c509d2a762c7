"""`lorq report`: the page in a real browser, without a network, at the widths of a phone and a desk, light and dark."""

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers import tiny_folder

import lorq
from lorq.cli import main
from lorq.storage.measured import read_measured

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
METHOD = lorq.FLRQ(group_size=32, epochs=0, budget=1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, text_file):
    """Two lorq folders of one model, both evaluated; not to be changed."""
    home = tmp_path_factory.mktemp("report")
    source = tiny_folder(home / "model", "llama")
    for bits in (3, 5):
        out = home / f"{bits} bits <b>"
        options = {"calibration": str(text_file), "samples": 2, "seq_len": 16, "override": [f"q_proj:bits={bits}"]}
        lorq.quantize(source, out, METHOD, **options)
        lorq.evaluate(out, reference=source, text=text_file, window=16, windows=2)
    return [home / f"{bits} bits <b>" for bits in (3, 5)]


@pytest.fixture(scope="module")
def page(folders, tmp_path_factory):
    pytest.importorskip("vl_convert", reason="lorq report draws with vl-convert-python, which is not installed")
    return lorq.report(*folders, page=tmp_path_factory.mktemp("page") / "page.html")[0]


def test_quantize_and_evaluate_keep_what_the_report_shows(folders):
    measured = read_measured(folders[0])
    assert measured.seconds >= sum(measured.stages.values()) > 0
    (entry,) = measured.evaluations
    assert entry["reference"] == "model" and entry["kl_mean"] > 0 and entry["windows"] == 2
    assert "/" not in json.dumps(entry), "no paths of this machine"


def test_the_page_is_one_file_with_every_layer_and_escaped_names(folders, page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<b>") == 0 and text.count("<title>3 bits &lt;b&gt; · 5 bits &lt;b&gt;</title>") == 1
    assert all(text.count(f"<td>{layer.name}</td>") == 2 for layer in lorq.read_report(folders[0]).layers)
    assert "src=" not in text[: text.index("<script")] and "{{" not in text[: text.index("<script")]


def test_charts_are_written_as_pictures(folders, tmp_path, capsys):
    pytest.importorskip("vl_convert", reason="lorq report draws with vl-convert-python, which is not installed")
    assert main(["report", str(folders[0]), "--page", str(tmp_path / "p.html"), "--png", str(tmp_path / "png")]) == 0
    names = [Path(line.removeprefix("wrote ")) for line in capsys.readouterr().out.splitlines()]
    assert names[0] == tmp_path / "p.html" and len(names) == 8
    for name in names[1:]:
        raw = name.read_bytes()
        assert raw[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(raw[16:20]) > 1500 and len(raw) > 5000, name


def test_what_is_no_page_of_lorq_is_not_replaced(folders, tmp_path, page):
    mine = tmp_path / "mine.html"
    mine.write_text("years of work")
    with pytest.raises(FileExistsError, match=r"mine.html is there, and lorq report did not write it; choose"):
        lorq.report(folders[0], page=mine)
    with pytest.raises(FileExistsError, match=r"page must be a file, .* is a folder"):
        lorq.report(folders[0], page=tmp_path)
    config = folders[0] / "config.json"
    before = config.read_bytes()
    with pytest.raises(
        ValueError, match=r"page must be a name that ends in .html, got .*config.json; name it config.h"
    ):
        lorq.report(folders[0], page=config, overwrite=True)
    assert config.read_bytes() == before
    assert mine.read_text() == "years of work"


def test_pictures_that_are_there_are_replaced_when_asked(folders, tmp_path, capsys):
    pytest.importorskip("vl_convert", reason="lorq report draws with vl-convert-python, which is not installed")
    figures, page = tmp_path / "figures", tmp_path / "p.html"
    figures.mkdir()
    (figures / f"{folders[0].name}-bytes.png").write_bytes(b"mine")
    page.write_text("mine too")
    arguments = ["report", str(folders[0]), "--page", str(page), "--png", str(figures)]
    assert main(arguments) == 1
    assert (
        "p.html is there, and lorq report did not write it; choose another --page, or replace it with --overwrite"
        in (capsys.readouterr().err)
    )
    page.unlink()
    assert main(arguments) == 1
    assert f"{figures} must have none of the pictures, it has {folders[0].name}-bytes.png; choose" in (
        capsys.readouterr().err
    )
    assert not page.exists() and len(list(figures.iterdir())) == 1
    assert main([*arguments, "--overwrite"]) == 0
    assert (figures / f"{folders[0].name}-bytes.png").read_bytes()[:4] == b"\x89PNG"


def test_a_file_in_the_place_of_a_folder_is_told(folders, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for flags in (["--png", str(tmp_path / "notes.txt")], ["--page", str(tmp_path / "notes.txt/deep/p.html")]):
        flags = flags if "--page" in flags else ["--page", str(tmp_path / "p.html"), *flags]
        assert main(["report", str(folders[0]), *flags]) == 1
        assert f"{tmp_path / 'notes.txt'} is a file; choose another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_folders_of_one_name_have_pictures_of_their_own(folders, tmp_path):
    pytest.importorskip("vl_convert", reason="lorq report draws with vl-convert-python, which is not installed")
    other = tmp_path / folders[0].name
    shutil.copytree(folders[1], other)
    written = lorq.report(folders[0], other, page=tmp_path / "p.html", png=tmp_path / "png")
    assert len(set(written)) == len(written) == len(list((tmp_path / "png").iterdir())) + 1


def test_without_the_library_one_line_says_what_to_install(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("lorq.reporting.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package vl-convert-python.*pip install 'lorq\[report\]'"):
        lorq.report(folders[0], page=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    drive = pytest.importorskip("playwright.sync_api", reason="playwright, which drives Chromium, is not installed")
    with drive.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_all_charts_are_drawn_fit_the_width_and_can_be_read(browser, page, width, scheme, tmp_path):
    """Screenshots go into the folder in LORQ_SCREENSHOTS, if that is set."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    shown, wrong = context.new_page(), []
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    shown.on("request", lambda request: None if request.url.startswith("file:") else wrong.append(request.url))
    shown.goto(page.as_uri())
    shown.wait_for_selector("body[data-drawn]", timeout=120_000)
    charts = shown.locator(".chart")
    assert charts.count() == int(shown.locator("body").get_attribute("data-drawn")) == 15 and not wrong
    assert shown.evaluate("document.documentElement.scrollWidth") <= width, "nothing runs out of the page"
    for i in range(charts.count()):
        place, drawn = charts.nth(i).bounding_box(), charts.nth(i).locator("svg").bounding_box()
        assert drawn["width"] <= place["width"] + 1 and drawn["height"] > 40
    colours = "e => [getComputedStyle(e).fill, getComputedStyle(document.body).backgroundColor]"
    words, ground = shown.locator(".chart svg text").first.evaluate(colours)
    assert contrast(words, ground) > 7
    picture = Path(os.environ.get("LORQ_SCREENSHOTS", tmp_path)) / f"report-{width}-{scheme}.png"
    shown.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 20_000
    context.close()


def contrast(one, other):
    """Of two colours as browsers write them, by WCAG: 7 is what small text needs at its best level."""

    def luminance(colour):
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
