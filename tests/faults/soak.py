"""Does a process that works long grow? Kill and resume a quantization again and again, then generate for a long time.

    python tests/faults/soak.py --cycles 50 --minutes 60

Each cycle quantizes a small random model in a process that is killed at a random time, and resumes it in this one,
which lives on; the bytes must be those of a run that nothing happened to. Then this process loads the model and lets it
generate, again and again, while ballast takes all memory up to a limit but for a few megabytes. What the process holds
is printed as it goes, and in the end as one line of JSON: memory, open files, threads, and files that are left.
"""

import argparse
import gc
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import torch  # noqa: E402
import transformers  # noqa: E402
from harness import Machine, contents  # noqa: E402
from helpers import tiny_folder  # noqa: E402

import lorq  # noqa: E402

METHOD = {"bits": 3, "group_size": 32, "budget": 0.5, "min_gain": 0.0, "epochs": 0, "rounding": "nearest"}
TEXT = "".join(f"Line {i}: {i * i} is the square of {i}, and {i * 7919 % 1000} is not.\n" for i in range(40))
MIB = 1 << 20


def held(folder: Path) -> dict[str, float]:
    """What this process holds, and what lies about in the folder where it works."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    left = [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
    return {
        "memory_mib": round(pages * resource.getpagesize() / MIB, 1),
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "temporary_files": len(left),
    }


def cycles(folder: Path, count: int, rng: random.Random) -> dict[str, object]:
    """So many of them; what was held after the fifth, when all is imported and warm, at most, and in the end."""
    source, place = tiny_folder(folder / "source", "llama", num_hidden_layers=4), folder / "place"
    place.mkdir()
    (folder / "text.txt").write_text(TEXT)
    calibration = {"calibration": str(folder / "text.txt"), "samples": 4, "seq_len": 64}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in (METHOD | calibration).items()]
    command = ["quantize", source, place / "out", "--method=flrq", "--overwrite", *flags]
    machine, found, kills, other = Machine(folder), [], 0, 0
    for _ in range(2):  # the second has nothing to import
        began = time.monotonic()
        assert machine.run(place, *command).code == 0
        seconds = time.monotonic() - began
    lorq.quantize(source, folder / "whole" / "out", lorq.FLRQ(**METHOD), **calibration)
    whole = contents(folder / "whole")
    while len(found) < count:
        injury = {"after": rng.uniform(0, seconds), "act": "SIGKILL"}
        kills += machine.run(place, *command, injury=injury).code == -signal.SIGKILL
        if not (place / "out" / "lorq_journal.jsonl").exists():
            continue  # before it began, or when it was done
        lorq.quantize(source, place / "out", lorq.FLRQ(**METHOD), **calibration, resume=True)
        other += contents(place) != whole
        found.append(held(folder))
        if len(found) % 5 == 0:
            print(f"cycle {len(found)}: {found[-1]}", flush=True)
    machine.close()
    return {"cycles": count, "kills": kills, "other_bytes": other, **_growth(found, min(4, count - 1))}


def generations(folder: Path, minutes: float, room: int) -> dict[str, object]:
    """Load and generate, with little memory to spare."""
    model, found, tokens, ballast = folder / "whole" / "out", [], 0, []
    end, told = time.monotonic() + 60 * minutes, 0.0
    while time.monotonic() < end:
        for _ in range(4):
            tokens += sum(1 for _ in lorq.generate(model, "Line 7: 49 is", tokens=32))
        if not ballast:  # all is warm
            limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + room
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            ballast = take(room - 64 * MIB)
        found.append(held(folder))
        if time.monotonic() - told > 60:
            told = time.monotonic()
            print(f"{tokens} pieces, {found[-1]}", flush=True)
    return {"minutes": minutes, "pieces": tokens, **_growth(found, min(4, len(found) - 1))}


def take(size: int) -> list[torch.Tensor]:
    """Memory that is used."""
    return [torch.ones(MIB * 16, dtype=torch.uint8) for _ in range(size // (16 * MIB))]


def _growth(found: list[dict[str, float]], warm: int) -> dict[str, object]:
    """First, largest and last of each figure, from the time when all is warm."""
    after = found[warm:]
    return {key: [after[0][key], max(one[key] for one in after), after[-1][key]] for key in after[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--room", type=int, default=256, help="MiB between what the warm process has and its limit")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="lorq-soak-") as place:
        folder = Path(place)
        print(json.dumps(cycles(folder, given.cycles, random.Random(given.seed))), flush=True)
        print(json.dumps(generations(folder, given.minutes, given.room * MIB)), flush=True)


if __name__ == "__main__":
    main()
