"""The fuzzer: every reader of lorq on files that are damaged by their structure.

    python tests/fuzz/fuzz.py --minutes 60              # figures at the end, failures as they are found
    python tests/fuzz/fuzz.py --cases 200               # so many, always the same
    python tests/fuzz/fuzz.py --case "folder ranks 17"  # one again, with its trace

A case is a kind, a seed of that kind and a number; the same case is the same damage. One process works, its parent sees
it crash and goes on behind the case.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from judge import Case, Failure, Judge  # noqa: E402
from readers import readers_of  # noqa: E402
from seeds import make_seeds  # noqa: E402

AT_ONCE = 400  # cases of a process


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--cases", type=int, default=0, help="so many; 0 is as many as there is time for")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", help="one case, with traces")
    parser.add_argument("--kinds", default="", help="of these kinds alone, with commas between them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="lorq-fuzz-") as home:
        os.environ["LORQ_CACHE"] = f"{home}/cache"
        seeds = make_seeds(Path(home))
        judge = Judge(Path(home), readers_of(Path(home)))
        if options.case:
            kind, seed, number = options.case.split()
            judge.know(kind, seed)
            failures = list(judge.judge(Case(kind, seed, int(number))))
            for failure in failures:
                print(f"{failure.reader}: {failure.what}\n  {failure.damage}\n{failure.trace}")
            return bool(failures)
        if options.kinds:
            seeds = {kind: names for kind, names in seeds.items() if kind in options.kinds.split(",")}
        end = options.first + options.cases if options.cases else sys.maxsize
        return run(judge, seeds, range(options.first, end), options.minutes)


def run(judge: Judge, seeds: dict[str, list[str]], numbers: range, minutes: float) -> int:
    """Cases of all seeds in turn, for so long at most."""
    for kind, names in seeds.items():
        for name in names:
            judge.know(kind, name)
    began, number, found = time.monotonic(), numbers.start, Counter[str]()
    print(f"seeds and what they hold: {sum(map(len, seeds.values()))}", flush=True)
    every = [(kind, name) for kind, names in seeds.items() for name in names]
    cases = asked = refused = crashes = 0
    while number < numbers.stop and time.monotonic() - began < 60 * minutes:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            own = range(number, min(number + AT_ONCE, numbers.stop))
            _work(judge, every, own, began + 60 * minutes, os.fdopen(writer, "w"))
        os.close(writer)
        with os.fdopen(reader) as lines:
            for line in lines:
                word, _, rest = line.rstrip("\n").partition(" ")
                if word == "case":
                    number, cases = int(rest), cases + 1
                elif word == "sums":
                    more = list(map(int, rest.split()))
                    asked, refused = asked + more[0], refused + more[1]
                else:
                    told = rest.replace("\\n", "\n")
                    what = told.partition("\n")[0]
                    found[what] += 1
                    if found[what] == 1:
                        print(told, flush=True)
        _, status = os.waitpid(child, 0)
        if status:
            crashes += 1
            kind, name = every[number % len(every)]
            print(f"crash: {kind} {name} {number} ends the process with status {status}", flush=True)
        number += 1
    minutes = (time.monotonic() - began) / 60
    print(
        f"{cases} cases in {minutes:.1f} minutes, {asked} readings, {refused} refused; {crashes} crashes, "
        f"{sum(found.values())} failures of {len(found)} kinds; cases {numbers.start} to {number - 1}"
    )
    for what, count in found.most_common():
        print(f"{count:6} {what}")
    return bool(found or crashes)


def _work(judge: Judge, every: list[tuple[str, str]], numbers: range, until: float, told) -> None:
    """Some hundred cases, and the end of this process: its memory is no longer its own after many."""
    status = 1
    try:
        for at in numbers:
            if time.monotonic() > until:
                break
            kind, seed = every[at % len(every)]
            print(f"case {at}", file=told, flush=True)
            for failure in judge.judge(Case(kind, seed, at)):
                print(f"fail {_words(failure)}", file=told, flush=True)
        print(f"sums {judge.asked} {judge.refused}", file=told, flush=True)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _words(failure: Failure) -> str:
    case = failure.case
    text = f"{failure.reader}: {failure.what}\n  {case.kind} {case.seed} {case.number}: {failure.damage!r:.300}\n"
    return (text + failure.trace[-1200:]).replace("\n", "\\n").encode("utf-8", "backslashreplace").decode()


if __name__ == "__main__":
    sys.exit(main())
