"""Methods to compare, and a command in a process of its own."""

import subprocess
import sys
import time
from dataclasses import fields, replace
from typing import Any

from lorq.methods import FLRQ, GPTQ, METHODS, FLRQPaper, LoPRo, LoPRoPaper, Nearest

_ROTATIONS = {
    "none": LoPRo(rank=0, rotation="none"),
    "full": LoPRo(rank=0, rotation="full"),
    "partial": LoPRo(rank=0, rotation="partial", importance="log"),
}
_ROUNDINGS: dict[str, dict[str, Any]] = {
    "nearest": {"rounding": "nearest"}, "gptq": {"rounding": "gptq"}, "gptvq": {"codebook": "vector"},
}  # fmt: skip
# What `lorq bench quantize` compares: the methods, and variants of theirs.
PRESETS: dict[str, Any] = {
    "nearest": Nearest(),
    "gptq": GPTQ(),
    "gptq-paper": GPTQ(range_search="none", shrinkage=0.0),
    "flrq": FLRQ(),
    "flrq-paper": FLRQPaper(),
    "flrq-paper-8bit": FLRQPaper(factor_type="int8"),
    "flrq-thrifty": FLRQ(budget=0.1),
    "flrq-thorough": FLRQ(epochs=3),
    "lopro": LoPRo(rank=8),
    "lopro-paper": LoPRoPaper(rank=8),
    "lopro-vector": LoPRo(rank=8, codebook="vector"),
    # LoPRo's parts one by one, without a low-rank part: rotation, then rounding.
    **{
        f"{rotation}-{rounding}": replace(turned, **rounded)
        for rotation, turned in _ROTATIONS.items()
        for rounding, rounded in _ROUNDINGS.items()
    },
}


def flags(method: Any) -> list[str]:
    """The flags of `lorq quantize` that mean a method with its settings; those that are the default are left out.

    Example:
        >>> flags(GPTQ(range_search="none"))
        ['--method=gptq', '--range-search=none']
    """
    name = next(name for name, kind in METHODS.items() if kind is type(method))
    own = {field.name: getattr(method, field.name) for field in fields(method)}
    changed = {key: value for key, value in own.items() if value != getattr(type(method)(), key)}
    return [f"--method={name}", *(f"--{key.replace('_', '-')}={value}" for key, value in changed.items())]


# Runs its arguments as a lorq command, or only loads torch; the last line is the peak of its resident memory. Not
# getrusage: that counts what the parent had in memory when it forked.
_CHILD = """
import sys, torch
status = 0
if sys.argv[1:]:
    from lorq.cli import main
    status = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
sys.exit(status)
"""


def run(arguments: list[str]) -> tuple[float, int, str]:
    """Seconds, peak resident bytes and standard output of a lorq command in a process of its own."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _CHILD, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"lorq {' '.join(arguments[:6])} ... ended with status {done.returncode}")
    printed, _, peak = done.stdout.rstrip().rpartition("\n")
    return time.perf_counter() - start, int(peak) * 1024, printed
