"""How benchmarks measure time."""

import time
from collections.abc import Callable
from typing import Any

import torch

Result = dict[str, float | int | str | None]


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds until a device has done its work."""
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
