"""How threads share the machine: set before torch is imported, which reads it once."""

import math
import os
from pathlib import Path

# What a container may use, by control groups of version 2 and 1: microseconds of processors in so many microseconds.
_LIMITS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))


def set_up(groups: Path = Path("/sys/fs/cgroup")) -> None:
    """Let threads that wait give way, and start no more of them than this process may run; what is set stays.

    A thread that waits for the others spins: libgomp's do so for some 15 ms, each time, though the one they wait for
    has no processor because of them, and work takes many times as long. After 3,000 turns, a tenth of a millisecond,
    they sleep; after 1,000 they would do so in work that has the machine to itself, and lose half as much again.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    allowed = _allowed(groups)
    if allowed and allowed < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(allowed))


def _allowed(groups: Path) -> int:
    """Processors that the control group may use, rounded up; 0 for no limit. torch counts the machine's."""
    for files in _LIMITS:
        try:
            quota, period = " ".join((groups / file).read_text() for file in files).split()
        except (OSError, ValueError):
            continue
        if quota.isdigit() and period.isdigit() and int(period):
            return math.ceil(int(quota) / int(period))
    return 0
