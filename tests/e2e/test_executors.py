"""Layers solved elsewhere: the same bytes, whatever happens to the processes that solve them."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import folder_digests

import lorq
from lorq.pipeline import executors
from lorq.pipeline import quantize as stages
from lorq.pipeline.executors import Devices, SameProcess
from lorq.pipeline.parcels import IN_FLIGHT
from lorq.progress import QUANTIZE

GPTQ = lorq.GPTQ(bits=3, group_size=32)
CPU = torch.device("cpu")


@pytest.fixture
def run(text_file):
    return {"calibration": str(text_file), "samples": 4, "seq_len": 32}


@pytest.fixture(scope="module")
def devices():
    """One process beside this one, started at the first task."""
    with Devices([CPU], CPU) as made:
        yield made


# ---- several devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, method, options",
    [
        ("llama", GPTQ, {"head": 4}),
        ("llama", lorq.FLRQ(bits=3, group_size=32), {"stream": "corrected", "token_weights": "gradient"}),
        ("llama", lorq.GPTQ(grid="q4_1"), {}),
        ("mixtral", lorq.TileQ(bits=3, group_size=32, rank=2), {}),
        ("llama", lorq.LRQ(bits=3, group_size=32, steps=1), {}),
    ],
    ids=["layers and a table", "corrected", "blocks of GGUF", "experts", "a block, which stays here"],
)
def test_layers_solved_in_another_process_have_the_same_bytes(
    family, method, options, folder_of, run, devices, tmp_path
):
    lorq.quantize(folder_of(family), tmp_path / "here", method, **run, **options)
    lorq.quantize(folder_of(family), tmp_path / "there", method, **run, **options, executor=devices)
    assert folder_digests(tmp_path / "here") == folder_digests(tmp_path / "there")


def test_two_devices_have_the_same_bytes_though_a_process_is_killed(folder_of, run, tmp_path, monkeypatch):
    made, killed = [], []
    monkeypatch.setattr(executors, "Devices", lambda *given: made.append(Devices(*given)) or made[0])

    def kill(stage, done, total):
        if stage == QUANTIZE and done == 0 and not killed:
            for pool in made[0]._pools:
                killed.append(pool.submit(os.getpid).result())
            os.kill(killed[0], signal.SIGKILL)

    lorq.quantize(folder_of("llama"), tmp_path / "here", GPTQ, **run)
    lorq.quantize(folder_of("llama"), tmp_path / "there", GPTQ, **run, device="cpu,cpu", progress=kill)
    assert len(set(killed)) == 2 and made[0].parallel == 2
    assert folder_digests(tmp_path / "here") == folder_digests(tmp_path / "there")


def test_a_task_that_kills_its_processes_is_given_up(devices, monkeypatch):
    monkeypatch.setattr(executors, "TRIES", 2)
    with pytest.raises(ChildProcessError, match=r"solves layers on cpu has died 2 times over one task; .* --resume"):
        devices.submit(os._exit, 1).result()
    assert devices.submit(divmod, 7, 2).result() == (3, 1)


def test_an_error_comes_back_as_it_was_raised(devices):
    with pytest.raises(ZeroDivisionError, match="integer division or modulo by zero"):
        devices.submit(divmod, 7, 0).result()


def test_no_more_is_handed_over_than_can_soon_be_solved(devices):
    calls = [devices.submit(time.sleep, 0.3) for _ in range(IN_FLIGHT)]
    began = time.monotonic()
    calls.append(devices.submit(time.sleep, 0))
    assert time.monotonic() - began > 0.1 and calls[0].done()
    assert [call.result() for call in calls] == [None] * (IN_FLIGHT + 1)


def test_what_is_given_up_ends_at_once():
    devices = Devices([CPU, CPU], CPU)
    children = [Path("/proc", str(devices.submit(os.getpid).result())) for _ in range(2)]
    calls = [devices.submit(time.sleep, 600) for _ in range(3)]
    time.sleep(0.2)
    began = time.monotonic()
    devices.shutdown(wait=False, cancel_futures=True)
    for call in calls:
        with pytest.raises((ChildProcessError, CancelledError)):
            call.result(timeout=30)
    while any(child.exists() for child in children) and time.monotonic() - began < 30:
        time.sleep(0.05)
    assert time.monotonic() - began < 20


ALONE = """
import os, time, torch
from lorq.pipeline.executors import Devices
if __name__ == "__main__":
    print(Devices([torch.device("cpu")], torch.device("cpu")).submit(os.getpid).result(), flush=True)
    time.sleep(60)
"""


def test_processes_end_with_the_one_that_began_them(tmp_path):
    (tmp_path / "alone.py").write_text(ALONE)
    with subprocess.Popen([sys.executable, tmp_path / "alone.py"], stdout=subprocess.PIPE, text=True) as driver:
        child = Path("/proc", driver.stdout.readline().strip())
        assert child.exists()
        driver.kill()
    deadline = time.monotonic() + 20
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists()


def test_processes_that_solve_have_the_fast_kernels():
    code = "import sys, lorq.pipeline.tasks; print('lorq.kernels.cpu_rounding' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"


def test_a_script_without_a_guard_is_told_so_once(folder_of, run, tmp_path):
    places = f"{str(folder_of('llama'))!r}, {str(tmp_path / 'out')!r}"
    script = f"import lorq\nlorq.quantize({places}, lorq.Nearest(group_size=32), device='cpu,cpu')\n"
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1
    assert "must begin its work under `if __name__ == '__main__':`" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("names", ["cpu,,cpu", "cpu,", ","])
def test_an_empty_name_of_a_device_is_told_of(names, folder_of, run, tmp_path):
    with pytest.raises(ValueError, match=f"names between commas, one is empty in '{names}'; take a comma out"):
        lorq.quantize(folder_of("llama"), tmp_path / "out", GPTQ, **run, device=names)


def test_an_executor_and_devices_are_two_answers(folder_of, run, tmp_path):
    for where in ({"device": "cpu,cpu"}, {"cluster": "local"}):
        with pytest.raises(ValueError, match=r"by an executor or where device and cluster say, .* give one"):
            lorq.quantize(folder_of("llama"), tmp_path / "out", GPTQ, **run, **where, executor=SameProcess())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:9", "127.0.0.1:99999", "nowhere"])
def test_a_cluster_that_nobody_answers_for_is_refused_at_once(address, folder_of, run, tmp_path):
    pytest.importorskip("ray")
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=rf"HOST:PORT of a Ray cluster that runs, got '{address}' .*`ray start --head`"
    ):
        lorq.quantize(folder_of("llama"), tmp_path / "out", GPTQ, **run, cluster=address)
    assert time.monotonic() - began < 60


# ---- the next block is looked at meanwhile ----------------------------------------------------------------


class Later(SameProcess):
    """Solves in another thread, after a while."""

    parallel = 4

    def __init__(self):
        self.threads = ThreadPoolExecutor(2)

    def submit(self, function, *args) -> Future:
        return self.threads.submit(lambda: (time.sleep(0.05), function(*args))[1])


def _events(monkeypatch):
    events = []
    for name in ("begin_block", "end_block"):
        own = getattr(stages, name)

        def told(*args, own=own, name=name):
            events.append(name[:3])
            return own(*args)

        monkeypatch.setattr(stages, name, told)
    return events


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, ["beg", "beg", "end", "end"]),
        ({"stream": "corrected"}, ["beg", "end", "beg", "end"]),
        ({"activations": "token", "smoothing": 0.5}, ["beg", "end", "beg", "end"]),
        ({"memory_budget": "64GB"}, ["beg", "end", "beg", "end"]),
    ],
    ids=["original", "corrected", "smoothed", "a budget of memory"],
)
def test_blocks_are_looked_at_ahead_where_nothing_waits_for_the_last(
    options, expected, folder_of, run, tmp_path, monkeypatch
):
    lorq.quantize(folder_of("llama"), tmp_path / "here", GPTQ, **run, **options)
    events = _events(monkeypatch)
    lorq.quantize(folder_of("llama"), tmp_path / "there", GPTQ, **run, **options, executor=Later())
    assert events == expected
    assert folder_digests(tmp_path / "here") == folder_digests(tmp_path / "there")


def test_what_was_begun_ahead_is_begun_again_after_an_interruption(folder_of, run, tmp_path, monkeypatch):
    lorq.quantize(folder_of("llama"), tmp_path / "here", GPTQ, **run)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "end_block", stop)
        lorq.quantize(folder_of("llama"), tmp_path / "there", GPTQ, **run, executor=Later())
    lorq.quantize(folder_of("llama"), tmp_path / "there", GPTQ, **run, resume=True)
    assert folder_digests(tmp_path / "here") == folder_digests(tmp_path / "there")
