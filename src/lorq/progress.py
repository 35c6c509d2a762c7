"""How long work tells how far it is."""

from collections.abc import Callable

# progress(stage, done, total): of a quantization "check weights", "write calibration text", "quantize" and "verify", in
# this order; "evaluate" and "train" of theirs.
Progress = Callable[[str, int, int], None]

CHECK = "check weights"
