"""A Ray cluster as an executor: where tasks go, what is tried again and what is spilled is Ray's."""

import logging
import signal
import socket
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any

import torch

from lorq.core.stats import InputStats
from lorq.pipeline.parcels import IN_FLIGHT, TRIES, answered, call, own_versions, pack

# For a machine to answer at all.
_SECONDS = 10


class Cluster(Executor):
    """Solves on the nodes of a Ray cluster, each task on as many CPUs as this process has threads, or on a GPU where
    the model runs on one.

    What reads one input has one set of statistics: it goes to Ray's object store once. `submit` waits where twice as
    many tasks are under way as the cluster can solve at once.

    Args:
        address: "auto" for the cluster that this machine belongs to, or HOST:PORT, or "local" for one of this process.
        home: the device of this process, where answers come to.

    Attributes:
        parallel: tasks that can be solved at once.

    Raises:
        ImportError: without Ray.
        ValueError: if there is no such cluster, or none of its nodes can take a task.
    """

    def __init__(self, address: str, home: torch.device):
        self.home, (self._ray, self._own) = home, _joined(address)
        threads = torch.get_num_threads()
        self._need = {"num_gpus": 1} if home.type == "cuda" else {"num_cpus": threads}
        self.parallel = self._places(address, threads)
        self._call = self._ray.remote(max_retries=TRIES - 1, **self._need)(_call)
        self._threads = threads
        self._sent: dict[int, tuple[weakref.ref[InputStats], Any]] = {}
        self._room = threading.BoundedSemaphore(IN_FLIGHT * self.parallel)

    def _places(self, address: str, threads: int) -> int:
        name, each = ("GPU", 1) if self.home.type == "cuda" else ("CPU", threads)
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        places = sum(int(node.get(name, 0) // each) for node in nodes)
        if not places:
            most = max((node.get(name, 0) for node in nodes), default=0)
            raise ValueError(
                f"a node of the cluster {address} must have {each} {name} for a task, the largest of {len(nodes)} has "
                f"{most:.0f}; " + ("give --device cpu" if name == "GPU" else "set OMP_NUM_THREADS to fewer threads")
            )
        return places

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self._room.acquire()
        answer: Future[Any] = Future()
        answer.add_done_callback(lambda _: self._room.release())
        parcel, apart = pack((partial(function, **kwargs), args), (InputStats,))
        parts = [self._stored(stats) for stats in apart]
        sent = self._call.remote(parcel, self.home.type, self._threads, own_versions(), *parts)
        sent.future().add_done_callback(partial(self._answered, answer))
        return answer

    def _stored(self, stats: InputStats) -> Any:
        """Where statistics lie in the object store; while they live here, they stay there."""
        key = id(stats)
        if key not in self._sent:
            gone = weakref.ref(stats, lambda _: self._sent.pop(key, None))
            self._sent[key] = gone, self._ray.put(pack(stats)[0])
        return self._sent[key][1]

    def _answered(self, answer: Future[Any], sent: Future[bytes]) -> None:
        try:
            answer.set_result(answered(sent.result(), self.home))
        except self._ray.exceptions.RayError as error:
            told = " ".join(str(error).split())[:300]
            answer.set_exception(
                ChildProcessError(
                    f"the cluster has lost a task {TRIES} times ({told}); --resume goes on, here or there"
                )
            )
        except Exception as error:
            answer.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._sent.clear()
        if self._own:
            self._ray.shutdown()


def _call(parcel: bytes, device: str, threads: int, versions: tuple[str, ...], *parts: bytes) -> bytes:
    return call(parcel, parts, device, threads, versions)


def _joined(address: str) -> tuple[Any, bool]:
    """Ray, connected, and whether it was not before."""
    try:
        import ray
    except ImportError:
        raise ImportError("a cluster needs Ray: pip install 'lorq[cluster]'") from None
    if ray.is_initialized():
        return ray, False
    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    # Ray's handler ends the process with a stack of its own; only the main thread has one.
    ours = signal.getsignal(signal.SIGTERM)
    try:
        if address != "local":
            _reached(ray, address)
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **own)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise ValueError(
            f"cluster must be auto, local, or the HOST:PORT of a Ray cluster that runs, got {address!r} ({told}); "
            "`ray start --head` begins one"
        ) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)
    return ray, True


def _reached(ray: Any, address: str) -> None:
    """Refuse where nobody answers, with an OSError: Ray would try again for minutes."""
    if address == "auto":
        address = ray._private.services.canonicalize_bootstrap_address("auto") or ""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), _SECONDS).close()
