"""How benchmarks measure time, and memory in a process of its own."""

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

Result = dict[str, float | int | str | None]


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds until a device has done its work."""
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


# Runs what it is given; the last line is the peak of its resident memory. Not getrusage: that counts what the parent
# had in memory when it forked.
_CHILD = """
import sys
status = 0
{work}
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
sys.exit(status)
"""


def in_child(work: str, arguments: list[str], what: str) -> tuple[float, int, str]:
    """Seconds, peak resident bytes and standard output of Python code in a process of its own.

    Raises:
        RuntimeError: if it fails; ``what`` names it.
    """
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _CHILD.format(work=work), *arguments], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{what} ended with status {done.returncode}")
    printed, _, peak = done.stdout.rstrip().rpartition("\n")
    return time.perf_counter() - start, int(peak) * 1024, printed


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
