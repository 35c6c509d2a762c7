"""A cluster of two hosts with a network of their own between them.

The hosts are network namespaces of this machine: each has its own loopback, ports and address.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import pytest
from helpers import folder_digests, tiny_folder

import lorq

pytest.importorskip("ray", reason="a cluster needs Ray")
pytestmark = pytest.mark.slow

HEAD, OTHER = f"lorq-a-{os.getpid()}", f"lorq-b-{os.getpid()}"
HOSTS = {HEAD: "10.213.0.1", OTHER: "10.213.0.2"}
PORT = 6390
RUN = {"samples": 4, "seq_len": 32}
DRIVER = """
import json, sys
import lorq, torch
torch.set_num_threads(1)
source, out, address, run = sys.argv[1:]
lorq.quantize(source, out, lorq.FLRQ(bits=3, group_size=32), **json.loads(run), cluster=address)
"""


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


def on(host, *command, **options):
    """A process of this host."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    return subprocess.Popen(["ip", "netns", "exec", host, *map(str, command)], env=env, **options)


@contextmanager
def network():
    """Two hosts and a cable; skips where this process may not make any."""
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", "cable", "netns", HEAD, "type", "veth", "peer", "name", "cable", "netns", OTHER)
        for host, address in HOSTS.items():
            ip("-n", host, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", host, "link", "set", device, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True)
        pytest.skip(f"needs network namespaces: {getattr(error, 'stderr', '') or error}")
    try:
        yield
    finally:
        for host in HOSTS:
            for process in ip("netns", "pids", host).stdout.split():
                subprocess.run(["kill", "-9", process], capture_output=True)
            ip("netns", "delete", host)


@pytest.fixture
def hosts():
    """A head on one host and a node on the other, with a CPU each."""
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", "--num-cpus", "1"]
    with network(), TemporaryDirectory(prefix="lorq-", dir="/tmp") as place:  # sockets have short names
        for host, address in HOSTS.items():
            where = ["--address", f"{HOSTS[HEAD]}:{PORT}"]
            if host == HEAD:
                where = ["--head", "--port", PORT, "--include-dashboard", "false", "--temp-dir", place]
            started = on(
                host, *ray, *where, "--node-ip-address", address,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            out, _ = started.communicate(timeout=180)
            assert started.returncode == 0, out
        yield f"{HOSTS[HEAD]}:{PORT}"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    return tiny_folder(tmp_path_factory.mktemp("models") / "deep", "llama", num_hidden_layers=16, **sizes)


def test_two_hosts_give_the_same_bytes(hosts, source, text_file, tmp_path):
    run, out = {"calibration": str(text_file)} | RUN, tmp_path / "there"
    lorq.quantize(source, tmp_path / "here", lorq.FLRQ(bits=3, group_size=32), **run)
    with (tmp_path / "log").open("w") as log:
        driver = on(HEAD, sys.executable, "-c", DRIVER, source, out, hosts, json.dumps(run), stderr=log)
    assert driver.wait(timeout=600) == 0, (tmp_path / "log").read_text()[-2000:]
    assert folder_digests(out) == folder_digests(tmp_path / "here")
