"""Shape annotations checked, but not a hundred thousand times: a loop over columns would take most of a test's time."""

from functools import wraps

from beartype import beartype

CALLS = 20  # of every function, in every test
_test = [0]


def check_first_calls(function):
    """What `--jaxtyping-packages` puts around every function of lorq: beartype, for the first calls of each test."""
    checked, seen = beartype(function), [0, 0]  # in which test, how often; no dict, which torch.compile cannot follow

    @wraps(function)
    def run(*args, **named):
        if seen[0] != _test[0]:
            seen[:] = _test[0], 0
        seen[1] += 1
        return checked(*args, **named) if seen[1] <= CALLS else None

    return run


def forget_calls():
    """A new test begins."""
    _test[0] += 1
