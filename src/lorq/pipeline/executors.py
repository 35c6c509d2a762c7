"""Where tasks are solved: in this process, in one for each of several devices, or on a cluster."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from lorq.pipeline.parcels import IN_FLIGHT, TRIES, answered, call, own_versions, pack
from lorq.runtime.device import read_devices

# How a process ends that would begin the run again which began it.
UNGUARDED = 87


class SameProcess(Executor):
    """Runs at once what it is given; an error is raised by `submit` itself."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*args, **kwargs))
        return done


class Devices(Executor):
    """A process for each of some devices. What was given to one that dies is given to its successor.

    Answers are those of this process with as many threads, tensors on ``home``. `submit` waits where every process has
    one task to solve and one that waits.

    Attributes:
        parallel: tasks that are solved at once.
    """

    def __init__(self, devices: Sequence[torch.device], home: torch.device):
        self.devices, self.home, self.parallel = devices, home, len(devices)
        self._pools = [_pool() for _ in devices]
        self._waiting = [0 for _ in devices]
        self._lock, self._given_up = threading.Lock(), False
        self._room = threading.BoundedSemaphore(IN_FLIGHT * len(devices))

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self._room.acquire()
        answer: Future[Any] = Future()
        answer.add_done_callback(lambda _: self._room.release())
        self._send(pack((partial(function, **kwargs), args))[0], answer, TRIES)
        return answer

    def _send(self, parcel: bytes, answer: Future[Any], tries: int) -> None:
        with self._lock:
            lane = min(range(len(self._pools)), key=self._waiting.__getitem__)
            self._waiting[lane] += 1
            pool = self._pools[lane]
        try:
            sent = pool.submit(call, parcel, (), str(self.devices[lane]), torch.get_num_threads(), own_versions())
        except BrokenProcessPool as error:  # it died while it had nothing to do
            sent = Future()
            sent.set_exception(error)
        sent.add_done_callback(partial(self._answered, parcel, answer, tries - 1, lane, pool, _processes(pool)))

    def _answered(
        self, parcel: bytes, answer: Future[Any], tries: int, lane: int, pool: Executor,
        processes: Sequence[BaseProcess], sent: Future[bytes],
    ) -> None:  # fmt: skip
        with self._lock:
            self._waiting[lane] -= 1
            broken = isinstance(sent.exception(), BrokenProcessPool)
            for process in processes if broken else ():
                process.join(1)  # or its exit status is not there yet
            unguarded = broken and any(process.exitcode == UNGUARDED for process in processes)
            tries = 0 if self._given_up or unguarded else tries
            if tries and broken and self._pools[lane] is pool:
                self._pools[lane] = _pool()
        try:
            if broken and tries:
                return self._send(parcel, answer, tries)
            if unguarded:
                raise RuntimeError(
                    "a script that solves layers on several devices must begin its work under "
                    "`if __name__ == '__main__':`, it began again in each of their processes; put the call of lorq "
                    "under such a line"
                )
            if broken:
                raise ChildProcessError(
                    f"a process that solves layers on {self.devices[lane]} has died {TRIES} times over one task; the "
                    "system may have killed it for its memory: --resume with fewer devices"
                )
            answer.set_result(answered(sent.result(), self.home))
        except Exception as error:
            answer.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the processes end; without waiting, at once: nobody asks for what they are at."""
        with self._lock:
            self._given_up = not wait
        for pool in self._pools:
            processes = _processes(pool)
            pool.shutdown(wait, cancel_futures=cancel_futures)
            for process in processes if not wait else ():
                process.kill()


def _pool() -> ProcessPoolExecutor:
    # Neither torch's threads nor a device's context survive a fork.
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)


def _processes(pool: ProcessPoolExecutor) -> list[BaseProcess]:
    return list((pool._processes or {}).values())


def _begin() -> None:
    """In a process that solves: Ctrl-C is for the one that asks, and where that is gone, so is this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


@contextmanager
def open_executor(device: str, cluster: str) -> Iterator[Executor]:
    """Where a run's layers are solved; what is under way when it fails is given up.

    Args:
        device: one or several, see `read_devices`; a model runs on the first.
        cluster: the address of a Ray cluster; "" for none.
    """
    devices = read_devices(device)
    if cluster:
        from lorq.pipeline.cluster import Cluster

        executor: Executor = Cluster(cluster, devices[0])
    elif len(devices) > 1:
        executor = Devices(devices, devices[0])
    else:
        executor = SameProcess()
    try:
        yield executor
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    executor.shutdown()
