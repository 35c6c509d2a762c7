"""How a command is stopped from outside, and what is left of it then."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

# Commands that go on where they were.
_GOES_ON = dict.fromkeys(("quantize", "tune", "compensate"), "the same command with --resume goes on")
_GOES_ON["demo"] = "the same command goes on"


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM, by which schedulers and a machine that goes down stop a program, ends the work as Ctrl-C does.

    Not where another thread than the main one works, or the program around has a handler of its own.
    """
    own = threading.current_thread() is threading.main_thread()
    if not own or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Terminated


def kept(arguments: Sequence[str]) -> str:
    """What a command that was stopped keeps, and how to go on; nothing where it keeps nothing."""
    goes_on = _GOES_ON.get(arguments[0] if arguments else "", "")
    return f"; what is finished is kept, {goes_on}" if goes_on else ""
