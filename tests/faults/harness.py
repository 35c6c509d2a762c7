"""What tests of faults ask of the runner, and what must be so after a fault."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from lorq.storage.atomic import TEMPORARY
from lorq.storage.names import JOURNAL, MEASURED

RUNNER = Path(__file__).with_name("runner.py")


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code (negative for a signal), what it said, and the steps that it took."""

    code: int
    said: str
    steps: list[tuple[str, int]] = field(repr=False)

    @property
    def line(self) -> str:
        """What the user reads in the end."""
        return next((line for line in reversed(self.said.splitlines()) if line.startswith("lorq: ")), "")


class Machine:
    """A process in which commands are run, one after another, each in a child of it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        with (folder / "runner").open("w") as told:
            self.process = subprocess.Popen(
                [sys.executable, str(RUNNER), *arguments], env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
                text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=told,
            )  # fmt: skip
        self.number = int(self._answer())

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        assert line, (self.folder / "runner").read_text()
        return line

    def begin(self, place: Path, *command: object, **request: object) -> int:
        """Start a command; the number of its process."""
        request |= {"command": list(map(str, command)), "place": str(place)}
        request |= {"output": str(self.folder / "output"), "log": str(self.folder / "log")}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self._answer())

    def end(self) -> Outcome:
        """Wait for it."""
        code = int(self._answer())
        steps = [tuple(json.loads(line)) for line in (self.folder / "log").read_text().splitlines()]
        return Outcome(code, (self.folder / "output").read_text(), steps)

    def run(self, place: Path, *command: object, **request: object) -> Outcome:
        """A command whose changes to files below ``place`` are watched."""
        self.begin(place, *command, **request)
        return self.end()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def classes(steps: list[tuple[str, int]]) -> list[str]:
    """The first step of each kind: shards and files that are copied are alike."""
    found: dict[str, str] = {}
    for step, _ in steps:
        kind = re.sub(r"\d{5}", "N", step)
        kind = re.sub(r"\b(generation_config|tokenizer|tokenizer_config|special_tokens_map)\.json", "beside", kind)
        found.setdefault(kind, step)
    return list(found.values())


def contents(place: Path) -> dict[str, str]:
    """The checksum of every file in a place, whatever it was measured at."""
    files = sorted(path for path in place.rglob("*") if path.is_file())
    return {
        path.relative_to(place).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != MEASURED
    }


@dataclass
class Patient:
    """A command in a place of its own, as it is injured again and again."""

    machine: Machine
    place: Path
    out: Path
    command: list[object]
    resume: tuple[str, ...]
    known: dict[str, dict[str, str]] = field(default_factory=dict)  # by the command's name
    name: str = ""
    begun: bool = False

    @property
    def whole(self) -> dict[str, str]:
        """What the command must come to, seen once of a run that nothing happens to."""
        if self.name not in self.known:
            self.undisturbed()
        return self.known[self.name]

    def undisturbed(self) -> list[tuple[str, int]]:
        """Run it whole, in an empty place; the steps that it takes."""
        done = self.run()
        assert done.code == 0 and self.out.name in self.names(), done.said
        self.known[self.name] = contents(self.place)
        self.forget()
        return done.steps

    def run(self, **request: object) -> Outcome:
        more = self.resume if self.begun else ()
        self.begun = True
        return self.machine.run(self.place, *self.command, *more, **request)

    def names(self) -> list[str]:
        """Everything in the place."""
        return sorted(path.name for path in self.place.iterdir())

    def forget(self) -> None:
        """Begin anew in an empty place."""
        shutil.rmtree(self.place)
        self.place.mkdir()
        self.begun = False

    @property
    def is_whole(self) -> bool:
        return contents(self.place) == self.whole

    def looks_whole(self) -> bool:
        """Whether somebody who finds what is there takes it for a result."""
        marks = ("config.json", "lorq_adapter.json", "adapter_config.json", "lorq_export.json")
        finished = any((self.out / mark).exists() for mark in marks) and not (self.out / JOURNAL).exists()
        return self.out.is_file() or finished

    def injure(self, point: str, act: str) -> Outcome:
        """Injure it at a point, where it is; where it no longer comes there, from the beginning."""
        injury = {"point": [point, 1], "act": act}
        outcome = self.run(injury=injury)
        if (point, 1) not in outcome.steps:
            assert outcome.code == 0 or "already complete" in outcome.line or "must be" in outcome.line, outcome.said
            assert self.is_whole, (point, outcome.said)
            self.forget()
            outcome = self.run(injury=injury)
            assert (point, 1) in outcome.steps, outcome.said
        if outcome.code == 0:  # it could do without
            assert self.is_whole, (point, outcome.said)
            self.forget()
        elif self.looks_whole():
            own = {name: found for name, found in contents(self.place).items() if name.split("/")[0] == self.out.name}
            own = {name: found for name, found in own.items() if not name.endswith(TEMPORARY)}
            assert own == {name: found for name, found in self.whole.items() if name.split("/")[0] == self.out.name}
        return outcome

    def heal(self) -> None:
        """Go on to the end, and look at what has come out."""
        outcome = self.run()
        if outcome.code:
            assert self.is_whole, outcome.said
            assert re.search("already complete|it is there|it has", outcome.line), outcome.said
        assert contents(self.place) == self.whole
        self.forget()


def one_line(outcome: Outcome) -> str:
    """What a failed command says, which is a line of its own."""
    told = [line for line in outcome.said.splitlines() if line.startswith("lorq: ")]
    assert outcome.code == 1 and len(told) == 1, outcome.said
    assert not re.search("Traceback|a bug of lorq|Exception|Errno", outcome.said), outcome.said
    return told[0]
