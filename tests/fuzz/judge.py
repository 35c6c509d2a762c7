"""What a reader may do with a damaged file, and whether it did: refuse in a sentence of lorq's, or read it right."""

import ast
import builtins
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mutate import damage
from readers import Reader
from seeds import copy_seed

from lorq.refusals import is_unexpected

SECONDS = 30  # of a processor, which may be busy with other things; ten times as long by the clock
# Above what is there when the work begins: the files have some hundred kilobytes.
ROOM = 768 << 20
SOURCE = Path(__file__).parents[2] / "src" / "lorq"


@dataclass(frozen=True)
class Case:
    """One damaged file."""

    kind: str
    seed: str
    number: int

    def rng(self) -> random.Random:
        return random.Random(f"{self.kind} {self.seed} {self.number}")


@dataclass(frozen=True)
class Failure:
    """What a reader did that it must not: ``what`` is the same for failures of one cause."""

    case: Case
    reader: str
    damage: str
    what: str
    trace: str = ""


class TooLong(BaseException):
    """A reader hangs."""


class Watch:
    """Sees which files are opened, once it is installed, while it is on."""

    def __init__(self) -> None:
        self.on, self.home, self.seen = False, Path(), []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(arguments[0], str | bytes):
            path, mode, flags = arguments
            given = os.path.normpath(os.path.join(os.getcwd(), os.fsdecode(path)))
            writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR)) or (
                isinstance(mode, str) and set(mode) & set("wxa+")
            )
            outside = str(self.home / "outside")
            if given.endswith("run.lorq.tmp"):
                return  # whether an output's place is in use: where its link leads, if it is one
            if given.startswith(outside) or given == "/etc/passwd":
                self.seen.append(f"opens {given.replace(str(self.home), '')}")
            elif writes and os.path.realpath(given).startswith(outside):
                self.seen.append("writes outside through a link")
        elif event == "pickle.find_class":
            self.seen.append(f"unpickles {arguments}")

    @contextmanager
    def watching(self, home: Path) -> Iterator[list[str]]:
        self.on, self.home, self.seen = True, home, []
        try:
            yield self.seen
        finally:
            self.on = False


@cache
def _raises(file: str) -> list[tuple[int, int]]:
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    return [(n.lineno, n.end_lineno or n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Raise)]


def fault_of(error: BaseException) -> str:
    """Why an error is no refusal of lorq's; nothing where it is one."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    place = f"{'/'.join(Path(last.filename).parts[-2:])}:{last.name}"
    own = [f for f in frames if str(f.filename).startswith(str(SOURCE))]
    ours = f" from {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    told = f"{type(error).__name__} in {place}{ours}"
    if isinstance(error, MemoryError) or "memory" in str(error).lower():
        return f"memory: {told}"
    if isinstance(error, Exception) and is_unexpected(error):
        return told
    if isinstance(error, OSError) and (error.filename or not str(last.filename).startswith(str(SOURCE))):
        return "" if error.filename else told
    if not str(last.filename).startswith(str(SOURCE)):
        return told
    if not any(first <= (last.lineno or 0) <= end for first, end in _raises(last.filename)):
        return told
    if any(len(line) > 4000 for line in str(error).splitlines()) or str(error).count("\n") > 3:
        return f"a message of {len(str(error))} characters: {told}"
    return ""


class Judge:
    """Damages copies of seeds, and asks every reader."""

    def __init__(self, home: Path, readers: Mapping[str, list[tuple[float, Reader]]]) -> None:
        self.home, self.readers, self.watch = home, readers, Watch()
        self.work = home / "work"
        self.whole: dict[tuple[str, str, str], Any] = {}
        self.asked = self.refused = 0

    def know(self, kind: str, seed: str) -> None:
        """What every reader makes of a seed that is whole."""
        for _, reader in self.readers[kind]:
            with self._place(seed) as place:
                try:
                    self.whole[kind, seed, reader.__name__] = reader(place)
                except Exception as error:
                    assert not fault_of(error), (kind, seed, reader.__name__, error)
                    self.whole[kind, seed, reader.__name__] = "refused"

    @contextmanager
    def _place(self, seed: str) -> Iterator[Path]:
        shutil.rmtree(self.work, ignore_errors=True)
        (self.work / "outside").mkdir(parents=True)
        shutil.copyfile(self.home / "dense" / "model.safetensors", self.work / "outside" / "model.safetensors")
        yield copy_seed(self.home / seed, self.work)

    def judge(self, case: Case) -> Iterator[Failure]:
        """Every reader's failure on one case."""
        for _, reader in self._chosen(case):
            with self._place(case.seed) as place:
                done = damage(place, case.rng())
                what, trace = self._ask(reader, place, case)
            if what:
                yield Failure(case, reader.__name__, done, what, trace)

    def _chosen(self, case: Case) -> list[tuple[float, Reader]]:
        rng = random.Random(case.number)
        return [pair for pair in self.readers[case.kind] if rng.random() < pair[0]]

    def _ask(self, reader: Reader, place: Path, case: Case) -> tuple[str, str]:
        vars(builtins).pop("HOSTILE", None)
        self.asked += 1
        result, what, trace, began = None, "", "", time.process_time()
        with self.watch.watching(self.work) as seen, _limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                result = reader(place)
            except TooLong:
                what = f"hangs, more than {SECONDS} seconds"
            except Exception as error:
                self.refused += 1
                result = "refused"
                if what := fault_of(error):
                    trace = "".join(traceback.format_exception(error))[-3000:]
        if hasattr(builtins, "HOSTILE"):
            what = "runs code of the folder"
        if seen and not what:
            what = seen[0]
        if not what and time.process_time() - began > SECONDS / 3:
            what = "slow, more than 10 seconds"
        if not what:
            what = self._wrong(reader, result, place, case)
        return what, trace

    def _wrong(self, reader: Reader, result: Any, place: Path, case: Case) -> str:
        """Whether something else was read than what was written, and no checksum tells."""
        whole = self.whole.get((case.kind, case.seed, reader.__name__))
        if (
            result in (None, "refused", whole)
            or not isinstance(result, str)
            or not sealed(self.home / case.seed, place)
        ):
            return ""
        import lorq

        try:
            return "" if lorq.verify(place).faults else "reads something else, and verify finds nothing"
        except Exception as error:
            return "" if not fault_of(error) else f"verify: {fault_of(error)}"


def sealed(seed: Path, place: Path) -> bool:
    """Whether it is files with a checksum that were changed, and no others."""
    if seed.is_file():
        return b"lorq.sha256" in place.read_bytes()[:4096]
    if not any((seed / name).is_file() for name in ("lorq_report.json", "lorq_export.json")):
        return False
    same = {path.relative_to(seed) for path in seed.rglob("*") if path.is_file() and not _same(path, place, seed)}
    # An older folder's index has none but of weights, and nobody seals the index itself.
    return bool(same) and not same & {Path("lorq.safetensors.index.json"), Path("lorq_export.json"), Path("README.md")}


def _same(path: Path, place: Path, seed: Path) -> bool:
    other = place / path.relative_to(seed)
    return other.is_file() and other.read_bytes() == path.read_bytes()


@contextmanager
def _limited() -> Iterator[None]:
    """For so long, with so much memory."""

    def stop(number: int, frame: Any) -> None:
        raise TooLong

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(10 * SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
