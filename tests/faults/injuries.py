"""Injuries to one process, from inside it: what it does to the files of one place is seen step by step, and at one of
these steps it is killed, stopped, or the step fails. lorq has no part in it: it is not told.

A step is a call that changes the place's files, as Python's audit events and three wrapped functions tell of it:
``"rename out/lorq-00001-of-00002.safetensors"``. The names of steps repeat; a point is a name and how often it came.
"""

import ctypes
import errno
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

# Steps that can fail by themselves; of `sigkill` every step is one.
WRITES = ("open", "write", "fsync", "rename", "mkdir", "truncate")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """What a process does to the files below ``place``, and what is done to it at the point it is given."""

    def __init__(self, place, log, *, point=None, act="", after=0.0, victim=""):
        self.place, self.log, self.point, self.act = os.path.realpath(place), log, point, act
        self.victim = victim  # the file that "edit" changes, "remove" removes, "pause" makes and waits for to go
        self.count: dict[str, int] = {}
        self.busy = threading.local()
        if after:
            threading.Thread(target=self._later, args=(after,), daemon=True).start()

    def start(self):
        import safetensors.torch

        for module, name, step in ((os, "fsync", "fsync"), (safetensors.torch, "serialize_file", "write")):
            self._wrap(module, name, step)
        sys.addaudithook(self._hear)

    def _wrap(self, module, name, step):
        function = getattr(module, name)

        def wrapped(*args, **kwargs):
            place = args[0] if name == "fsync" else args[1]  # a file's number, or its name
            place = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else place
            act = self._at(step, place)
            if act == "half":
                function(*args, **kwargs)
                os.truncate(place, os.path.getsize(place) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            if isinstance(act, OSError) and step == "write":
                raise safetensors_error(act)
            if isinstance(act, OSError):
                raise act
            return function(*args, **kwargs)

        setattr(module, name, wrapped)

    def _hear(self, event, args):
        if getattr(self.busy, "now", False):
            return
        if event == "open" and isinstance(args[2], int) and args[2] & _WRITING:
            what = self._at("open", args[0])
        elif event == "os.rename":
            what = self._at("rename", args[1])
        elif event in ("os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            what = self._at(event.removeprefix("os."), args[0])
        else:
            return
        if isinstance(what, OSError):
            raise what

    def _at(self, step, path):
        """Count a step; at the point do what is to be done, or return it to be raised or done by who asked."""
        if isinstance(path, int):
            return None
        path = os.path.join(os.getcwd(), os.fsdecode(path))
        if not path.startswith(self.place + os.sep):
            return None
        self.busy.now = True
        try:
            name = f"{step} {os.path.relpath(path, self.place)}"
            self.count[name] = self.count.get(name, 0) + 1
            os.write(self.log, f"{json.dumps([name, self.count[name]])}\n".encode())
            if self.point != [name, self.count[name]]:
                return None
            return self._do(path)
        finally:
            self.busy.now = False

    def _do(self, path):
        if self.act.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.act))
            time.sleep(0.02)  # the main thread hears of it
        elif self.act == "fill":
            fill(Path(self.place))
        elif self.act == "half":
            return "half"
        elif self.act == "remove":
            os.remove(self.victim)
        elif self.act == "pause":
            Path(self.victim).write_text("here")
            while Path(self.victim).exists():
                time.sleep(0.005)
        elif self.act in ("EIO", "ENOSPC", "EROFS", "EACCES"):
            number = getattr(errno, self.act)
            return OSError(number, os.strerror(number), path)
        elif self.act == "edit":
            edit(Path(self.victim))
        return None

    def _later(self, seconds):
        time.sleep(seconds)
        os.kill(os.getpid(), getattr(signal, self.act))


def safetensors_error(error):
    """As the Rust of safetensors tells of an error of the system."""
    from safetensors import SafetensorError

    return SafetensorError(f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})")


def fill(place):
    """Leave no byte of the disk that a place is on."""
    with suppress(OSError), open(place / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))


def edit(file):
    """Turn one bit near the middle of a file, as a program or a person might."""
    with open(file, "rb+") as opened:
        opened.seek(os.path.getsize(file) // 2)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))


def mount(place, kilobytes=4096):
    """Put a small disk there that this process and its children alone see; an OSError where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private = 0x20000, 0x10000000, 0x44000
    group, user = os.getegid(), os.geteuid()
    if libc.unshare(new_mounts) and libc.unshare(new_mounts | new_user):
        raise OSError(ctypes.get_errno(), "no mounts of one's own")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with suppress(OSError):  # root has them already
            Path(f"/proc/self/{name}").write_text(text)
    libc.mount(b"none", b"/", None, private, None)  # what is mounted here is seen nowhere else
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, f"size={kilobytes}k".encode()):
        raise OSError(ctypes.get_errno(), "no disk of one's own")


def make_read_only(place):
    """In this process's own view of the disks."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.unshare(0x20000)
    if libc.mount(b"none", os.fsencode(place), None, 0x20 | 0x1, None):  # again, to be read only
        raise OSError(ctypes.get_errno(), "no disk to be read only")
