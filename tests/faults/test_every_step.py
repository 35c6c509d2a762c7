"""Every command that writes, injured at its steps one after another: it goes on to the same bytes, or says why not."""

import pytest
from cases import CASES
from harness import classes, one_line
from injuries import WRITES

STOPS = {"SIGKILL": (-9, ""), "SIGINT": (130, "lorq: interrupted"), "SIGTERM": (143, "lorq: stopped from outside")}
ERRORS = {"EIO": "Input/output error", "ENOSPC": "[Nn]o space left", "EROFS": "Read-only file system"}


@pytest.mark.parametrize("act", STOPS)
@pytest.mark.parametrize("name", CASES)
def test_a_command_that_is_stopped_at_any_step_goes_on(name, act, patient):
    injured, (code, line) = patient(name), STOPS[act]
    for point in classes(injured.undisturbed()):
        outcome = injured.injure(point, act)
        assert outcome.code == code and outcome.line.startswith(line), (point, outcome)
        if code > 0 and "--resume" in injured.resume:
            assert "--resume goes on" in outcome.line, (point, outcome)
    injured.heal()
