"""A finished folder, opened: what it holds is what was solved, and what is no lorq folder is refused."""

import json
import shutil

import pytest
import torch
from helpers import same_codes

import lorq
from lorq.storage.folder import LorqFolder
from lorq.storage.names import JOURNAL


@pytest.fixture(scope="module")
def written(folder_of, text_file, tmp_path_factory):
    """Folders of a dense model and of a mixture of experts that share factors, by family."""
    made = {}
    for family, method in (("llama", lorq.FLRQ(group_size=32)), ("mixtral", lorq.TileQ(group_size=32, rank=4))):
        made[family] = tmp_path_factory.mktemp(family) / "out"
        lorq.quantize(folder_of(family), made[family], method, calibration=str(text_file), samples=4, seq_len=32)
    return made


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_every_layer_is_what_the_loaded_model_has(family, written):
    folder, model = LorqFolder.open(written[family]), lorq.load(written[family], device="cpu")
    seen = []
    for name, weight in folder.layers():
        layer = model.get_submodule(name)
        assert same_codes(weight.codes, layer.value().codes) and weight.format == folder.formats[name] == layer.format
        assert torch.equal(weight.dense(), layer.value().dense())
        seen.append(name)
    assert seen == [layer.name for layer in folder.report.layers]
    assert {layer.name: layer.rank for layer in folder.report.layers} == {n: folder.weight(n).rank for n in seen}
    assert folder.config["quantization_config"]["method"] == folder.report.method


def test_a_layer_that_is_not_there_is_a_key_error(written):
    with pytest.raises(KeyError, match="lm_head"):
        LorqFolder.open(written["llama"]).weight("lm_head")


def test_folders_that_are_not_lorqs_or_not_finished_are_refused(written, folder_of, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lorq did not write this folder.*`lorq quantize .*llama OUT`"):
        LorqFolder.open(folder_of("llama"))
    (tmp_path / "notes").mkdir()
    with pytest.raises(FileNotFoundError, match="lorq did not write this folder; name one that `lorq quantize` wrote"):
        LorqFolder.open(tmp_path / "notes")
    shutil.copytree(written["llama"], tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "awq"}})
    )
    with pytest.raises(ValueError, match=r"quant_method must be 'lorq'"):
        LorqFolder.open(tmp_path / "copy")
    del config["quantization_config"]["layers"]["model.layers.1.self_attn.o_proj"]
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"must be those of config.json; model.layers.1.self_attn.o_proj is in one"):
        LorqFolder.open(tmp_path / "copy")
    (tmp_path / "copy" / JOURNAL).write_text("")
    with pytest.raises(FileNotFoundError, match=r"unfinished run .*--resume"):
        LorqFolder.open(tmp_path / "copy")
