"""Methods to compare, and a command in a process of its own."""

from dataclasses import replace
from typing import Any

from lorq.bench.timing import in_child
from lorq.methods import FLRQ, GPTQ, FLRQPaper, LoPRo, LoPRoPaper, Nearest
from lorq.pipeline.options import method_name

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
    changed = {key: value for key, value in vars(method).items() if value != getattr(type(method)(), key)}
    name = method_name(method)
    return [f"--method={name}", *(f"--{key.replace('_', '-')}={value}" for key, value in changed.items())]


# Runs its arguments as a lorq command, or only loads torch.
_WORK = """
import torch
if sys.argv[1:]:
    from lorq.cli import main
    status = main(sys.argv[1:])
"""


def run(arguments: list[str]) -> tuple[float, int, str]:
    """Seconds, peak resident bytes and standard output of a lorq command in a process of its own."""
    return in_child(_WORK, arguments, f"lorq {' '.join(arguments[:6])} ...")
