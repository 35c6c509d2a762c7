"""`lorq merge --to groups`: a lords folder, trained or not, becomes one of integer codes; what that adds is told."""

from dataclasses import replace

import pytest
import torch
from helpers import BYTES, folder_digests

import lorq
from lorq.adapt import Groups
from lorq.cli import main
from lorq.core.codes import IntGrid, LevelFormat
from lorq.storage.folder import LorqFolder
from lorq.storage.names import MEASURED

METHOD = lorq.LoRDS(bits=4, group_size=32, rounding="nearest", weighting="none", steps=1)
WINDOW = torch.randint(BYTES, (2, 24), generator=torch.Generator().manual_seed(5))
GROUPS = Groups(bits=8, group_size=16)


@pytest.fixture(scope="module")
def plain(text_file):
    return {"calibration": str(text_file), "samples": 2, "seq_len": 16}


@pytest.fixture(scope="module")
def base(folder_of, plain, tmp_path_factory):
    out = tmp_path_factory.mktemp("regroup") / "base"
    lorq.quantize(folder_of("llama"), out, METHOD, **plain)
    return out


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    model, out = lorq.load(base), tmp_path_factory.mktemp("regroup") / "mine"
    for parameter in lorq.adapt.attach(model, rank=5):
        with torch.no_grad():
            parameter += 0.1 * parameter.std()
    lorq.adapt.save_adapter(model, out)
    return out


@torch.no_grad()
def logits(model):
    return model(WINDOW).logits


def added(before, after):
    """By layer and in all, the squared difference of two folders' weights over the squares of the first's."""
    pairs = [(name, weight.dense(), after.weight(name).dense()) for name, weight in before.layers()]
    errors = {name: (float((new - old).square().sum()), float(old.square().sum())) for name, old, new in pairs}
    whole = sum(error for error, _ in errors.values()) / sum(size for _, size in errors.values())
    return {name: error / size for name, (error, size) in errors.items()}, whole


def test_a_regrouped_folder_is_an_ordinary_one_that_tells_what_it_lost(base, tmp_path):
    report = lorq.adapt.to_groups(base, tmp_path / "out", settings=Groups(group_size=16))
    before, after = LorqFolder.open(base), LorqFolder.open(tmp_path / "out")
    assert {own.codes for own in after.formats.values()} == {IntGrid(4, 16)}
    assert report == lorq.read_report(tmp_path / "out")
    assert lorq.verify(tmp_path / "out").faults == ()
    each, whole = added(before, after)
    told = report.run["regrouped"]
    assert told["added"] == pytest.approx(each, rel=1e-4) and told["whole"] == pytest.approx(whole, rel=1e-4)
    assert 0 < whole < 0.02
    for layer in report.layers:
        assert layer.rank == 0 and f"an error of {each[layer.name]:.4f}" in layer.note
        assert layer.bytes == sum(tensor.nbytes for tensor in after.tensors(layer.name).values())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in base.iterdir()} - {MEASURED}
    lorq.adapt.to_groups(base, tmp_path / "again", settings=Groups(group_size=16))
    assert folder_digests(tmp_path / "again") == folder_digests(tmp_path / "out")


def test_with_an_adapter_it_is_the_merged_model_that_is_rounded(base, adapter, tmp_path):
    model = lorq.load(base)
    lorq.adapt.load_adapter(model, adapter)
    lorq.adapt.save(model, tmp_path / "merged")
    one = lorq.adapt.to_groups(base, tmp_path / "one", adapter=adapter, settings=GROUPS)
    two = lorq.adapt.to_groups(tmp_path / "merged", tmp_path / "two", settings=GROUPS)
    assert one.checksums == two.checksums and one.run["regrouped"]["adapter"] == "mine"
    before, after = logits(lorq.load(base)), logits(lorq.load(tmp_path / "one"))
    assert (after - logits(model)).norm() < 0.05 * (before - logits(model)).norm()


def test_levels_stay_levels_where_they_are_asked_for(base, tmp_path):
    lorq.adapt.to_groups(base, tmp_path / "levels", settings=Groups(grid="levels", group_size=16))
    formats = LorqFolder.open(tmp_path / "levels").formats.values()
    assert {own.codes for own in formats} == {LevelFormat(4, "normal-float", 16)}
    assert logits(lorq.load(tmp_path / "levels")).isfinite().all()


def test_layers_without_scales_of_low_rank_stay(folder_of, plain, tmp_path):
    lorq.quantize(folder_of("llama"), tmp_path / "base", METHOD, exclude=[".*up_proj"], **plain)
    lorq.adapt.to_groups(tmp_path / "base", tmp_path / "out", settings=GROUPS)
    before, after = LorqFolder.open(tmp_path / "base"), LorqFolder.open(tmp_path / "out")
    names = [name for name in before.reader.names if "up_proj" in name]
    assert names and all(torch.equal(before.reader.tensor(name), after.reader.tensor(name)) for name in names)


def test_groups_that_do_not_tile_are_refused_before_anything_is_written(base, tmp_path):
    with pytest.raises(
        ValueError, match=r"group_size must divide each layer's width, got 48 and .*down_proj of width 128"
    ):
        lorq.adapt.to_groups(base, tmp_path / "out", settings=Groups(group_size=48))
    assert not (tmp_path / "out").exists()


def test_another_model_s_adapter_and_models_without_such_scales_are_refused(folder_of, plain, base, adapter, tmp_path):
    lorq.quantize(folder_of("llama"), tmp_path / "gptq", lorq.Nearest(group_size=16), **plain)
    with pytest.raises(ValueError, match=r"only models quantized with lords .* packed layers, none of them with scale"):
        lorq.adapt.to_groups(tmp_path / "gptq", tmp_path / "out")
    other = replace(METHOD, bits=3)
    lorq.quantize(folder_of("llama"), tmp_path / "other", other, **plain)
    with pytest.raises(ValueError, match="is an adapter for the base"):
        lorq.adapt.to_groups(tmp_path / "other", tmp_path / "out", adapter=adapter, settings=GROUPS)
    with pytest.raises(FileExistsError):
        lorq.adapt.to_groups(base, base, settings=GROUPS)


def test_the_command_tells_each_layer_s_error_and_what_comes_next(base, adapter, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["merge", str(base), str(adapter), str(out), "--to=groups", "--bits=8", "--group-size=16"]) == 0
    printed = capsys.readouterr().out
    told = lorq.read_report(out).run["regrouped"]
    for name, error in told["added"].items():
        assert name in printed and f"{error:.4f}" in printed
    assert f"next: lorq evaluate {out} --reference ORIGINAL" in printed
    assert main(["merge", str(base), str(tmp_path / "alone"), "--to=groups", "--group-size=16"]) == 0
    assert lorq.read_report(tmp_path / "alone").run["regrouped"]["adapter"] is None


@pytest.mark.parametrize(
    "words, message",
    [
        (["OUT"], "OUT is missing; usage: lorq merge MODEL ADAPTER OUT, or lorq merge MODEL OUT --to groups"),
        (["ADAPTER", "OUT", "--bits=8"], "serve --to groups"),
        (["OUT", "--to=groups", "--bits=9"], "bits must be between 2 and 8, or -1 for each layer's own, got 9"),
    ],
)
def test_the_command_refuses_what_it_would_ignore(base, adapter, tmp_path, capsys, words, message):
    places = {"OUT": str(tmp_path / "out"), "ADAPTER": str(adapter)}
    assert main(["merge", str(base), *(places.get(word, word) for word in words)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
