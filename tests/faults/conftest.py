"""What is injured, and where."""

import os
from pathlib import Path

import pytest
from cases import CASES, Models
from harness import Machine, Patient


@pytest.fixture(scope="session")
def machine(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    machine = Machine(tmp_path_factory.mktemp("machine"))
    yield machine
    machine.close()


@pytest.fixture(scope="session")
def models(machine, text_file, tmp_path_factory):
    def run(*command):
        outcome = machine.run(*command)
        assert outcome.code == 0, outcome.said

    return Models(tmp_path_factory.mktemp("models"), text_file, run)


@pytest.fixture(scope="session")
def known():
    """What the commands come to."""
    return {}


@pytest.fixture
def patient(machine, models, known, tmp_path):
    """A command of `cases`, in a place of its own."""

    def of(name) -> Patient:
        case, place = CASES[name], tmp_path / "place"
        place.mkdir()
        out = place / case.out
        places = {"OUT": out, "BESIDE": place / "beside"}
        words = [places.get(word, word) for word in models.filled(case.command)]
        return Patient(machine, place, Path(out), words, case.resume, known, name)

    return of
