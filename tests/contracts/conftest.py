"""What tests of kernels share."""

from importlib import import_module

import pytest

from lorq.kernels import cpu


@pytest.fixture(params=["portable", "avx2", "vnni", "vbmi"])
def module(request, monkeypatch):
    """The library of one instruction set, in use."""
    order = ["portable", "avx2", "vnni", "vbmi"]
    best = import_module("lorq.kernels._cpu_portable").best()
    if request.param not in order[: order.index(best) + 1]:
        pytest.skip(f"this processor's best is {best}")
    found = import_module(f"lorq.kernels._cpu_{request.param}")
    monkeypatch.setattr(cpu, "library", lambda: (found, request.param))
    return found
