"""How long work tells how far it is."""

from collections.abc import Callable

# progress(stage, done, total); with ``done`` 0 a stage begins.
Progress = Callable[[str, int, int], None]

# The stages by name. Those of a quantization, in this order:
IMPORT = "load torch"
OPEN = "open the model"
CHECK = "check weights"
WRITE = "write calibration text"
WEIGH = "weigh calibration tokens"  # forward through all blocks and back
PREDICT = "predict harm"  # where a budget is to be met
PASS = "go through finished blocks"  # of a resumed run
QUANTIZE = "quantize"
TABLES = "quantize embeddings and head"
VERIFY = "verify"
# Those of the rest, after `IMPORT`.
READ = "read the model"
EVALUATE = "evaluate"
TRAIN = "train"
TUNE_BLOCKS = "tune blocks"
TUNE = "tune the model"
COMPENSATE = "compensate"
CHOOSE = "choose types"  # of a GGUF file's tensors
EXPORT = "export"


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
