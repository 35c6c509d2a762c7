"""Devices and dtypes behind their names, torch's defaults for them, and how much memory there is."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch


@contextmanager
def own_defaults() -> Iterator[None]:
    """torch's default dtype and device as lorq means them, float32 and the CPU, whatever the caller has set them to.

    For the duration of a block, or of a function that it decorates; those of a caller who has changed nothing are not
    touched, as the default dtype is the whole process's.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if dtype != torch.float32:
        torch.set_default_dtype(torch.float32)
    try:
        with nullcontext() if device.type == "cpu" else torch.device("cpu"):
            yield
    finally:
        if dtype != torch.float32:
            torch.set_default_dtype(dtype)


def read_device(name: str | torch.device) -> torch.device:
    """The device behind a name; "auto" takes an accelerator if there is one.

    Raises:
        ValueError: if this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("meta tensors hold nothing")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device must be auto, cpu or an accelerator of this machine, got {str(name)!r} ({reason})"
        ) from None
    return device


def read_devices(names: str) -> list[torch.device]:
    """The devices behind names between commas; one, as `read_device` has it, or several of one type.

    Raises:
        ValueError: if this machine lacks one, or they are of several types: sums come out otherwise on another.

    Example:
        >>> read_devices("cpu,cpu")
        [device(type='cpu'), device(type='cpu')]
    """
    parts = [name.strip() for name in names.split(",")]
    if len(parts) > 1 and "" in parts:
        raise ValueError(f"several devices must be names between commas, one is empty in {names!r}; take a comma out")
    devices = [read_device(name) for name in parts]
    if len({device.type for device in devices}) > 1:
        raise ValueError(f"several devices must be of one type, got {names}; give those of one")
    return devices


def read_dtype(name: str | torch.dtype, *, auto: bool = True) -> torch.dtype:
    """The activation dtype behind one of three names, or a ValueError, which offers "auto" too if that is taken."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = known.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise ValueError(f"dtype must be {'auto, ' if auto else ''}{', '.join(known)}, got {name!r}")
    return dtype


def memory_now(told: Path = Path("/proc/self/status")) -> int:
    """Bytes of memory that this process has, mapped files that are in memory included; 0 where nobody tells."""
    return _told(told, "VmRSS")


def memory_peak(told: Path = Path("/proc/self/status")) -> int:
    """The most it has had since it began, or since `reset_peak`."""
    return _told(told, "VmHWM")


def reset_peak(count: Path = Path("/proc/self/clear_refs")) -> None:
    """Let the peak begin anew, where the system can."""
    try:
        count.write_text("5")
    except OSError:
        pass  # not Linux, or not allowed: the peak of the whole process it is


def _told(file: Path, key: str) -> int:
    try:
        return 1024 * int(re.findall(rf"^{key}:\s*(\d+) kB", file.read_text(), re.M)[0])
    except (OSError, IndexError):
        return 0


def available_bytes(told: Path = Path("/proc/meminfo")) -> int:
    """Memory that can be had: more than is free, since the system keeps files there that it can read again."""
    try:
        return 1024 * int(re.findall(r"^MemAvailable: *(\d+) kB", told.read_text(), re.M)[0])
    except (OSError, IndexError):  # not Linux
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
