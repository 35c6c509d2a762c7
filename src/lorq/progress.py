"""How long work tells how far it is."""

from collections.abc import Callable

# progress(stage, done, total): stages in order are "check weights", "write calibration text", "quantize", "verify".
Progress = Callable[[str, int, int], None]
