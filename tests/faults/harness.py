"""What tests of faults ask of the runner, and what must be so after a fault."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

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
        self.process = subprocess.Popen(
            [sys.executable, str(RUNNER), *arguments], env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(folder / "runner").open("w"),
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
