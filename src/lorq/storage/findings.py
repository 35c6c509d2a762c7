"""What a check of many files finds: it goes on after the first fault, and tells what was looked at and what was not."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from lorq.progress import CHECKSUMS, VERIFY, Progress, no_progress
from lorq.storage.atomic import sha256_of
from lorq.storage.companions import WEIGHTS
from lorq.storage.json_files import DAMAGED, read_json, some_of
from lorq.storage.safetensors_file import Header, read_header


@dataclass(frozen=True)
class Fault:
    """What is wrong.

    Attributes:
        where: the file, layer or tensor.
        what: the rule, and the value that breaks it.
    """

    where: str
    what: str


@dataclass
class Findings:
    """What is known so far.

    Attributes:
        progress: told of files and layers.
        sealed: files whose checksum is right.
        tensors: how many were looked at, each for dtype, shape and values.
        unsealed: files that no checksum is known of.
        notes: what could not be looked at, and why.
    """

    place: Path
    progress: Progress = no_progress
    faults: list[Fault] = field(default_factory=list)
    sealed: list[str] = field(default_factory=list)
    tensors: int = 0
    unsealed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, where: str, what: str) -> None:
        """Tell of a fault, once. The place that its error names before the rule is told already, the remedy once for
        all (`lorq.verifying.refuse_faults`)."""
        what = what.removesuffix(DAMAGED)
        for told in (self.place / where, self.place):
            what = what.removeprefix(f"{told}: ").removeprefix(f"{told} ")
        if (fault := Fault(where, what)) not in self.faults:
            self.faults.append(fault)

    @contextmanager
    def of(self, where: str) -> Iterator[None]:
        """What is refused in the block is a fault, after which the check goes on behind it."""
        try:
            yield
        except (ValueError, OSError, ArithmeticError, KeyError) as error:
            self.add(where, str(error))

    def each(self, names: Iterable[str], stage: str = VERIFY) -> Iterator[str]:
        """The same names, telling how far the work on them is."""
        names = list(names)
        self.progress(stage, 0, len(names))
        for done, name in enumerate(names, 1):
            yield name
            self.progress(stage, done, len(names))

    def compare_all(self, checksums: Mapping[str, str | None], holds: Mapping[str, str] | None = None) -> None:
        """`compare` of many files, by name."""
        for name in self.each(checksums, CHECKSUMS):
            self.compare(name, checksums[name], (holds or {}).get(name, ""))

    def compare(self, name: str, checksum: str | None, holds: str = "") -> None:
        """Hold a file against its sha256 (hex), if one is known; ``holds`` tells what suffers if they differ."""
        path = self.place / name
        if not path.is_file():
            self.add(name, "must be there, it is missing" + holds)
        elif checksum is None:
            self.unsealed.append(name)
        elif (found := sha256_of(path)) == checksum:
            self.sealed.append(name)
        else:
            self.add(name, f"must have the sha256 {checksum[:12]}, it has {found[:12]}" + holds)

    def headers(self, names: list[str]) -> dict[str, Header]:
        """The headers of weight files, of those that have good ones."""
        found = {}
        for name in names:
            with self.of(name):
                found[name] = read_header(self.place / name)
        return found

    def leave(self, looked_at: Iterable[str]) -> None:
        """Tell of weights beside those looked at, such as pickles, and of code: nothing reads them."""
        own = set(looked_at)
        if others := [p.name for p in self.place.iterdir() if p.name.endswith(WEIGHTS) and p.name not in own]:
            self.notes.append(f"not looked at, and not read by lorq: {some_of(others)}")
        if code := sorted(path.name for path in self.place.glob("*.py")):
            self.notes.append(f"code lies there, which lorq does not run: {some_of(code)}")
        with suppress(ValueError, OSError):  # which are faults of their own
            if "auto_map" in read_json(self.place / "config.json"):
                self.notes.append("config.json names code (auto_map), which lorq does not run")


def touching(names: set[str]) -> str:
    """Of a file: the layers or tensors that it holds."""
    return f"; it holds {some_of(names)}" if names else ""
