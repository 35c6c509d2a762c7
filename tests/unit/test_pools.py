"""Threads: as many as the container may run, and patient ones."""

import os
import subprocess
import sys

import pytest

from lorq import pools


@pytest.fixture
def environment(monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    return monkeypatch


@pytest.mark.parametrize(
    "files, threads",
    [
        ({"cpu.max": "200000 100000\n"}, "2"), ({"cpu.max": "150000 100000\n"}, "2"),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "1600000 100000\n"}, None), ({}, None), ({"cpu.max": "what\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "3"),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ],
)  # fmt: skip
def test_no_more_threads_than_the_container_may_run(files, threads, environment, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    pools.set_up(tmp_path)
    assert os.environ.get("OMP_NUM_THREADS") == threads
    assert os.environ["GOMP_SPINCOUNT"] == "3000"


def test_what_the_user_has_set_stays(environment, tmp_path):
    (tmp_path / "cpu.max").write_text("100000 100000")
    environment.setenv("OMP_NUM_THREADS", "5")
    environment.setenv("OMP_WAIT_POLICY", "ACTIVE")
    pools.set_up(tmp_path)
    assert os.environ["OMP_NUM_THREADS"] == "5" and "GOMP_SPINCOUNT" not in os.environ


def test_it_is_set_before_torch_is_there():
    code = "import lorq, os, sys; assert 'torch' not in sys.modules; print(os.environ['GOMP_SPINCOUNT'])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "3000\n"
