"""The net: folders and help texts stay as they are, to the last byte. See folders.py, which also records them anew."""

import json

import folders
import pytest


@pytest.fixture(scope="module")
def made():
    return folders.run()


@pytest.fixture(scope="module")
def recorded(made):
    recorded = json.loads(folders.DIGESTS.read_text())
    # Nothing lorq does can make other versions, or a processor that sums otherwise, give the same bytes.
    if made["made with"] != recorded["made with"]:
        pytest.skip(f"the digests were made with {recorded['made with']}, here is {made['made with']}")
    return recorded["folders"]


def test_every_case_has_digests_and_every_digest_a_case():
    assert set(json.loads(folders.DIGESTS.read_text())["folders"]) == set(folders.CASES)


@pytest.mark.parametrize("case", folders.CASES)
def test_the_folder_has_the_bytes_that_it_had(case, made, recorded):
    assert made["folders"][case] == recorded[case]


def test_every_command_prints_the_help_that_it_printed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert folders.help_text() == folders.HELP.read_text()
