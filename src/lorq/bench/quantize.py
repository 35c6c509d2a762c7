"""Benchmark: quantization runs by method, each in a process of its own."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lorq.bench.timing import Result
from lorq.demo import demo_model
from lorq.evaluation import evaluate
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


def bench_quantize(
    model: str | None = None,
    *,
    bits: Iterable[int] = (3,),
    methods: Iterable[str] = ("nearest", "gptq", "flrq-paper", "flrq"),
    options: Iterable[str] = (),
    text: str = "python-docs",
    window: int = 512,
    windows: int = 8,
) -> Iterator[Result]:
    """Quantize a model in each of several ways, every run in a process of its own, and measure the results.

    Args:
        model: what `lorq quantize` takes; None for the demo's model.
        bits: widths to try.
        methods: names in `PRESETS`.
        options: further flags of `lorq quantize` for every run, such as ``--group-size 64``.
        text: evaluation text.
        window: its window length in tokens.
        windows: how many windows.

    Yields:
        For each run: method, bits, stored bits per weight, megabytes of weights, KL (mean and 99th percentile),
        perplexity, top-1 agreement, seconds of the whole process, and its peak memory beyond that of a Python
        process with torch loaded, in megabytes.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if a run fails; its own message went to standard error.
    """
    methods = list(methods)
    unknown = [name for name in methods if name not in PRESETS]
    if unknown:
        raise ValueError(f"methods must be among {', '.join(PRESETS)}, got {', '.join(unknown)}")
    source = str(demo_model()) if model is None else model
    _, idle, _ = _run([])
    with tempfile.TemporaryDirectory(prefix="lorq-bench-") as folder:
        for width in bits:
            for name in methods:
                out = Path(folder) / f"{name}-{width}"
                command = ["quantize", source, str(out), f"--bits={width}", *flags(PRESETS[name]), *options, "--json"]
                seconds, peak, printed = _run(command)
                report: dict[str, Any] = json.loads(printed)
                figures = evaluate(out, reference=source, text=text, window=window, windows=windows)
                yield {
                    "method": name,
                    "bits": width,
                    "bits_per_weight": report["bits_per_weight"],
                    "megabytes": report["bytes"] / 1e6,
                    "kl_mean": figures.kl_mean,
                    "kl_p99": figures.kl_p99,
                    "perplexity": figures.perplexity,
                    "top1": figures.top1,
                    "seconds": seconds,
                    "peak_megabytes": (peak - idle) / 1e6,
                }


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


def _run(arguments: list[str]) -> tuple[float, int, str]:
    """Seconds, peak resident bytes and standard output of a lorq command in a process of its own."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _CHILD, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"lorq {' '.join(arguments[:6])} ... ended with status {done.returncode}")
    printed, _, peak = done.stdout.rstrip().rpartition("\n")
    return time.perf_counter() - start, int(peak) * 1024, printed
