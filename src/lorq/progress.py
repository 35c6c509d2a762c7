"""How long work tells how far it is."""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

# progress(stage, done, total); with ``done`` 0 a stage begins.
Progress = Callable[[str, int, int], None]

# The stages by name. Those of a quantization, in this order:
IMPORT = "load torch"
OPEN = "open the model"
CHECK = "check weights"
WRITE = "write calibration text"
# Weighing calibration tokens; each of its ways has steps of its own length.
WEIGH, WEIGH_END, WEIGH_BACK = (f"weigh calibration tokens, {way}" for way in ("forward", "at the end", "back"))
PREDICT = "predict harm"  # where a budget is to be met
TRY = "try a block and a layer"  # where it is to be told what a run takes
PASS = "go through finished blocks"  # of a resumed run
QUANTIZE = "quantize"
TABLES = "quantize embeddings and head"
VERIFY = "verify"
CHECKSUMS = "compare checksums"
# Those of the rest, after `IMPORT`.
READ = "read the model"
EVALUATE = "evaluate"
TRAIN = "train"
REGROUP = "round anew"
TUNE_BLOCKS = "tune blocks"
TUNE = "tune the model"
COMPENSATE = "compensate"
CHOOSE = "choose types"  # of a GGUF file's tensors
EXPORT = "export"

_Piece = TypeVar("_Piece")
# Of what is left, so much may be of kinds that no time is known of.
_UNKNOWN = 0.1


def duration(seconds: float) -> str:
    """In words, as exact as an estimate is.

    Example:
        >>> [duration(seconds) for seconds in (0.4, 59.0, 90.0, 5400.0, 2e5)]
        ['0 s', '59 s', '1.5 min', '1.5 h', '2.3 days']
    """
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"{seconds:.0f} s"


def no_progress(stage: str, done: int, total: int) -> None:
    """For who does not want to know."""


def paced(
    pieces: Sequence[_Piece], measure: Callable[[_Piece], tuple[Hashable, int]], progress: Progress, stage: str
) -> Iterator[_Piece]:
    """Pieces of work that take unlike long, telling how far they are by the time that each kind of them takes.

    ``progress`` is told of microseconds, those that went by and all as far as is known; and of nothing while too much
    of what is left is of kinds that no piece was done of.

    Args:
        measure: kind and size of a piece; those of a kind take as long as they are large.
    """
    progress(stage, 0, 1)
    left: Counter[Hashable] = Counter()
    for kind, size in map(measure, pieces):
        left[kind] += size
    done, seconds = Counter[Hashable](), Counter[Hashable]()
    spent = 0.0
    for piece in pieces:
        (kind, size), began = measure(piece), time.monotonic()
        yield piece
        took = time.monotonic() - began
        spent, seconds[kind] = spent + took, seconds[kind] + took  # type: ignore[assignment]
        done[kind] += size
        left[kind] -= size
        if 0 < left.total() and sum(left[k] for k in left if not done[k]) <= _UNKNOWN * left.total():
            still = sum(seconds[k] / done[k] * left[k] for k in left if done[k])
            progress(stage, round(1e6 * spent), max(round(1e6 * (spent + still)), round(1e6 * spent) + 1))
    progress(stage, max(1, round(1e6 * spent)), max(1, round(1e6 * spent)))
