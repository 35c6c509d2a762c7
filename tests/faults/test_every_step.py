"""Every command that writes, injured at its steps one after another: it goes on to the same bytes, or says why not."""

import re

import pytest
from cases import CASES
from harness import classes, one_line
from injuries import WRITES

STOPS = {"SIGKILL": (-9, ""), "SIGINT": (130, "lorq: interrupted"), "SIGTERM": (143, "lorq: stopped from outside")}
ERRORS = {
    "EIO": (r"Input/output error", "see that the disk works|make it writable"),
    "ENOSPC": (r"[Nn]o space left", "free some space|make it writable"),
    "EROFS": (r"Read-only file system", "make the place writable|make it writable"),
}
# What the default run tries; the rest is slow.
QUICK = {
    "SIGKILL": ("quantize", "merge to groups", "export gguf", "compensate"),
    "SIGINT": ("quantize",),
    "SIGTERM": ("export dense",),
    "EIO": ("quantize", "export gguf"),
    "ENOSPC": ("merge",),
    "EROFS": ("export dense",),
}


def rows(acts):
    """Every command with every act, those of `QUICK` in the default run."""
    return [
        pytest.param(name, act, marks=() if name in QUICK[act] else pytest.mark.slow) for name in CASES for act in acts
    ]


@pytest.mark.parametrize("name, act", rows(STOPS))
def test_a_command_that_is_stopped_at_any_step_goes_on(name, act, patient):
    injured, (code, line) = patient(name), STOPS[act]
    for point in classes(injured.undisturbed()):
        outcome = injured.injure(point, act)
        assert outcome.code == code and outcome.line.startswith(line), (point, outcome)
        if code > 0 and "--resume" in injured.resume:
            assert "--resume goes on" in outcome.line, (point, outcome)
    injured.heal()


@pytest.mark.parametrize("name, act", rows(ERRORS))
def test_a_step_that_fails_is_told_with_the_remedy_and_the_command_goes_on(name, act, patient):
    injured, (what, remedy) = patient(name), ERRORS[act]
    points = [point for point in classes(injured.undisturbed()) if point.split()[0] in WRITES]
    failed = 0
    for point in points:
        outcome = injured.injure(point, act)
        if outcome.code:
            line = one_line(outcome)
            assert re.search(what, line) and re.search(remedy, line) and "place" in line, (point, line)
            if "--resume" in line:
                assert "--resume" in injured.resume, (point, line)
            failed += 1
    assert failed > len(points) / 2
    injured.heal()
