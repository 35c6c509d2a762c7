"""A Ray cluster of several nodes on this machine: the same bytes, whatever is killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import folder_digests, tiny_folder

import lorq

pytest.importorskip("ray", reason="a cluster needs Ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

FLRQ = lorq.FLRQ(bits=3, group_size=32)
BLOCKS, KILLS = 12, 20


@pytest.fixture
def run(text_file):
    return {"calibration": str(text_file), "samples": 4, "seq_len": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    return tiny_folder(tmp_path_factory.mktemp("models") / "deep", "llama", num_hidden_layers=BLOCKS, **sizes)


@pytest.fixture(scope="module")
def nodes():
    """A head that solves nothing and two nodes with a CPU each; this process has joined."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_cluster_gives_the_same_bytes(nodes, source, run, tmp_path):
    lorq.quantize(source, tmp_path / "here", FLRQ, **run, head=4)
    lorq.quantize(source, tmp_path / "there", FLRQ, **run, head=4, cluster=nodes.address)
    assert folder_digests(tmp_path / "here") == folder_digests(tmp_path / "there")


def test_experts_are_solved_there_too(nodes, folder_of, run, tmp_path):
    method = lorq.TileQ(bits=3, group_size=32, rank=2)
    lorq.quantize(folder_of("mixtral"), tmp_path / "here", method, **run)
    lorq.quantize(folder_of("mixtral"), tmp_path / "there", method, **run, cluster=nodes.address)
    assert folder_digests(tmp_path / "here") == folder_digests(tmp_path / "there")


def test_statistics_that_layers_share_travel_once(nodes, folder_of, run, tmp_path, monkeypatch):
    import ray

    put, stored = ray.put, []
    monkeypatch.setattr(ray, "put", lambda value: stored.append(len(value)) or put(value))
    lorq.quantize(folder_of("llama"), tmp_path / "out", FLRQ, **run, cluster=nodes.address)
    blocks = json.loads((folder_of("llama") / "config.json").read_text())["num_hidden_layers"]
    assert len(stored) == 4 * blocks  # of q, k and v; o; gate and up; down


def _solvers():
    """Processes of Ray that solve, or wait to."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            # Not agents: with one of its agents a node dies, and this process with its own.
            if (entry / "cmdline").read_bytes().startswith((b"ray::_call", b"ray::IDLE")):
                yield int(entry.name)
        except OSError:
            pass  # gone meanwhile


def _kill(nodes, chance):
    """Kill a process that solves, or a node with its raylet, for which another comes."""
    if chance.random() < 0.5 and (solvers := sorted(_solvers())):
        os.kill(chance.choice(solvers), signal.SIGKILL)
        return "worker"
    nodes.remove_node(chance.choice(sorted(nodes.worker_nodes, key=id)), allow_graceful=False)
    nodes.add_node(num_cpus=1, wait=False)
    return "raylet"


def test_twenty_kills_of_workers_and_raylets_change_no_byte(nodes, source, run, tmp_path):
    lorq.quantize(source, tmp_path / "here", FLRQ, **run)
    expected, chance, killed = folder_digests(tmp_path / "here"), random.Random(0), []
    for name in ("first", "warm"):  # the first waits for processes to begin
        began = time.monotonic()
        lorq.quantize(source, tmp_path / name, FLRQ, **run, cluster=nodes.address)
    seconds = time.monotonic() - began
    for number in range(KILLS):
        due = time.monotonic() + chance.uniform(0, seconds)

        def kill(*_, due=due, number=number):
            if len(killed) == number and time.monotonic() > due:
                killed.append(_kill(nodes, chance))

        lorq.quantize(source, tmp_path / f"{number}", FLRQ, **run, cluster=nodes.address, progress=kill)
        print(number, killed[number:], f"{time.monotonic() - began:.0f} s", flush=True)
        assert folder_digests(tmp_path / f"{number}") == expected
        killed[number:] = killed[number:] or ["too late"]
    assert killed.count("worker") + killed.count("raylet") > KILLS / 2 and {"worker", "raylet"} <= set(killed)


DRIVER = """
import json, sys
import lorq, torch
torch.set_num_threads(1)
source, out, address, run = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
lorq.quantize(source, out, lorq.FLRQ(bits=3, group_size=32), **run, cluster=address)
"""


def test_a_killed_driver_is_resumed_on_the_cluster_or_here(nodes, source, run, tmp_path):
    lorq.quantize(source, tmp_path / "here", FLRQ, **run)
    for name, where in (("there", {"cluster": nodes.address}), ("without", {})):
        out = tmp_path / name
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, source, out, nodes.address, json.dumps(run)], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while len(list(out.glob("lorq-*.safetensors"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        driver.kill()
        assert driver.wait() == -signal.SIGKILL
        assert 4 <= len(list(out.glob("lorq-*.safetensors"))) <= BLOCKS and not (out / "config.json").exists()
        lorq.quantize(source, out, FLRQ, **run, **where, resume=True)
        assert folder_digests(out) == folder_digests(tmp_path / "here")


def test_a_cluster_that_cannot_take_a_task_is_refused(nodes, source, run, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    with pytest.raises(ValueError, match=r"must have 64 CPU for a task, the largest of 3 has 1; set OMP_NUM_THREADS"):
        lorq.quantize(source, tmp_path / "out", FLRQ, **run, cluster=nodes.address)
    assert not (tmp_path / "out" / "config.json").exists()
