"""lorq's command line as a process that can be injured: `python runner.py [MOUNT]` reads commands, a line each.

torch is imported once; every command then runs in a process of its own, forked, that is watched as `injuries` tells.
With MOUNT a small disk of its own is mounted there, which nobody but these processes sees.
"""

import concurrent.futures.thread
import json
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from importlib import import_module

# The command line that is injured, and what it imports when it works.
import lorq.cli
import lorq.pipeline.quantize
import lorq.tuning

sys.path.insert(0, os.path.dirname(__file__))
import injuries
import torch
import transformers.models.llama  # noqa: F401


def run(request):
    """In the child: one command, injured."""
    out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    log = os.open(os.devnull, os.O_WRONLY) if request.get("file_bytes") else log  # which may not grow either
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request.get("file_bytes"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
    if request.get("clock"):
        clock = time.time
        time.time = lambda: clock() - request["clock"]
    if request.get("read_only"):
        injuries.make_read_only(request["read_only"])
    injury = request.get("injury", {})
    injuries.Watch(request["place"], log, **injury).start()
    return lorq.cli.main(request["command"])


def main():
    torch.set_num_threads(1)
    if sys.argv[1:]:
        injuries.mount(sys.argv[1])
    print(os.getpid(), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        told, tell = os.pipe()
        child = os.fork()
        if not child:
            code = 70
            try:
                code = run(request)
            finally:
                concurrent.futures.thread._python_exit()  # as a process that ends by itself waits for its threads
                sys.stdout.flush(), sys.stderr.flush()
                with open(tell, "w") as file:
                    file.write("\n".join(sys.modules))
                os._exit(code)
        os.close(tell)
        print(child, flush=True)
        with open(told) as modules:
            import_all(modules.read().split())
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def import_all(modules):
    """What one child has imported the next ones find there: that takes most of a small command's time."""
    for name in modules:
        if name not in sys.modules:
            with suppress(Exception):
                import_module(name)


if __name__ == "__main__":
    main()
