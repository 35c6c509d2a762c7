"""Shape annotations checked, but not a hundred thousand times: a loop over columns would take most of a test's time."""

from functools import wraps

from beartype import beartype

CALLS = 20  # of every function, in every test
_seen: dict = {}


def check_first_calls(function):
    """What `--jaxtyping-packages` puts around every function of lorq: beartype, for the first calls of each test."""
    checked = beartype(function)

    @wraps(function)
    def run(*args, **named):
        seen = _seen[function] = _seen.get(function, 0) + 1
        return checked(*args, **named) if seen <= CALLS else None

    return run


def forget_calls():
    """A new test begins."""
    _seen.clear()
