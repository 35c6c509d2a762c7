"""A quantization to which something happens: at random times, to its disk, its files, its model, its clock."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import Machine, contents, one_line
from injuries import edit

SHARDS = [f"out/lorq-{number:05d}-of-00002.safetensors" for number in range(3)]


@pytest.fixture
def injured(patient):
    """A quantization of two blocks, and what it comes to."""
    run = patient("quantize")
    assert run.whole
    return run


def stop_before(run, point):
    assert run.run(injury={"point": [point, 1], "act": "SIGKILL"}).code == -signal.SIGKILL


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_kills_at_random_times_leave_the_same_bytes(kills, injured):
    rng, killed, seconds = random.Random(kills), 0, 0.1
    while killed < kills:
        outcome = injured.run(injury={"after": rng.uniform(0.0, seconds), "act": "SIGKILL"})
        if outcome.code == 0 or "already complete" in outcome.line:
            assert injured.is_whole
            injured.forget()
        else:
            assert outcome.code == -signal.SIGKILL, outcome.said
            killed, seconds = killed + 1, min(seconds + 0.1, 0.6)
    injured.heal()


@pytest.mark.parametrize("shard", range(3))
def test_a_shard_that_rots_is_found_and_made_again_with_all_after_it(shard, injured):
    stop_before(injured, "open out/lorq.safetensors.index.json.lorq.tmp")
    file = injured.place / SHARDS[shard]
    before, times = file.read_bytes(), file.stat()
    edit(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as no program does
    assert file.read_bytes() != before
    outcome = injured.run()
    made = [name for name, _ in outcome.steps if name.startswith("rename") and name.endswith(".safetensors")]
    assert outcome.code == 0 and made == [f"rename {name}" for name in SHARDS[shard:]]
    assert injured.is_whole


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(injured, tmp_path):
    flag = tmp_path / "paused"
    point = [f"rename {SHARDS[1]}", 1]
    command = [sys.executable, "-m", "lorq.cli", *map(str, injured.command)]
    injured.machine.begin(injured.place, *injured.command, injury={"point": point, "act": "pause", "victim": str(flag)})
    while not flag.exists():
        time.sleep(0.005)
    second = subprocess.run(command, capture_output=True, text=True)
    told = r"lorq: another run is writing \S+out: wait until it ends, stop it, or choose another folder\n"
    assert second.returncode == 1 and re.fullmatch(told, second.stderr), second.stderr
    flag.unlink()
    assert injured.machine.end().code == 0 and injured.is_whole


def test_a_clock_that_goes_back_changes_nothing(injured):
    year = 365 * 86400
    stop_before(injured, f"write out/writing.lorq.tmp/{Path(SHARDS[2]).name}")
    for path in (injured.place, *injured.place.rglob("*")):
        os.utime(path, (time.time() + year,) * 2)
    assert injured.run(clock=year).code == 0 and injured.is_whole


CHANGES = {"weights": "model.safetensors", "config": "config.json"}


@pytest.fixture
def own_model(injured, models, tmp_path):
    """The run, of a copy of the model that may be changed."""
    copy = shutil.copytree(models.source, tmp_path / "copy")
    injured.command[1] = copy
    return injured, copy


@pytest.mark.parametrize("point", [f"write out/writing.lorq.tmp/{Path(name).name}" for name in SHARDS])
def test_a_model_that_changes_during_a_run_is_noticed(point, own_model):
    run, copy = own_model
    before = (copy / "model.safetensors").read_bytes()
    times = (copy / "model.safetensors").stat()
    outcome = run.run(injury={"point": [point, 1], "act": "edit", "victim": str(copy / "model.safetensors")})
    assert re.search(
        r"copy must stay as it is while it is read, model.safetensors changed meanwhile or went; put it back as it "
        r"was, then continue with --resume; or begin again with --overwrite",
        one_line(outcome),
    )
    assert "fingerprint" not in outcome.line and not run.looks_whole()
    assert re.search(r"begun differently: model \(.*--overwrite|have changed; begin again with", one_line(run.run()))
    (copy / "model.safetensors").write_bytes(before)
    os.utime(copy / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run.run().code == 0 and run.is_whole


@pytest.mark.parametrize("name", CHANGES.values(), ids=CHANGES)
def test_a_model_that_changed_between_start_and_resume_is_refused(name, own_model):
    run, copy = own_model
    stop_before(run, f"rename {SHARDS[1]}")
    if name == "config.json":
        (copy / name).write_text((copy / name).read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    else:
        edit(copy / name)
    assert re.search(r"begun differently: model \(folder: .*, now: .*\); resume with the same", one_line(run.run()))


def test_a_model_that_goes_during_a_run_is_told(own_model):
    run, copy = own_model
    injury = {"point": [f"write out/writing.lorq.tmp/{Path(SHARDS[0]).name}", 1], "act": "remove"}
    line = one_line(run.run(injury=injury | {"victim": str(copy / "model.safetensors")}))
    assert "model.safetensors" in line and not run.looks_whole()


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A machine with a disk of 4 MB of its own."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "disk").mkdir()
    try:
        machine = Machine(folder, str(folder / "disk"))
    except AssertionError as error:
        pytest.skip(f"nothing may be mounted here: {error}")
    yield machine, folder / "disk"
    machine.close()


@pytest.mark.parametrize("point", [f"write out/writing.lorq.tmp/{Path(SHARDS[1]).name}", "open out/lorq_journal.jsonl",
                                   "open out/config.json.lorq.tmp"])  # fmt: skip
def test_a_disk_that_is_full_keeps_what_is_finished(point, small_disk, injured):
    machine, disk = small_disk
    seen = Path(f"/proc/{machine.number}/root{disk}")  # that disk, as we see it
    words = [disk / "out" if word == injured.out else word for word in injured.command]
    outcome = machine.run(disk, *words, injury={"point": [point, 1], "act": "fill"})
    assert re.search(r"no space left in \S+out: \S+ needs .*, 0 bytes are free; .*--resume", one_line(outcome))
    assert one_line(machine.run(disk, *words, "--resume"))  # it is full still
    (seen / "filler").unlink()
    assert machine.run(disk, *words, "--resume").code == 0
    assert contents(seen) == injured.whole
    shutil.rmtree(seen / "out")


def test_a_disk_that_can_not_be_written_to_is_refused_before_the_work(small_disk, injured):
    machine, disk = small_disk
    words = [disk / "below" / "out" if word == injured.out else word for word in injured.command]
    outcome = machine.run(disk, *words, read_only=str(disk))
    assert re.search(r"out cannot be written to \(Read-only file system\); choose another folder", one_line(outcome))
    assert "quantize: 0" not in outcome.said


@pytest.mark.parametrize("size", [4_000, 20_000, 60_000])
def test_files_that_may_not_grow_are_told_with_the_limit(size, injured):
    line = one_line(injured.run(file_bytes=size))
    assert re.search(r"out/\S+ could not be written \(File too large\); .*allow larger files \(ulimit -f\)", line)
    injured.heal()


def test_ctrl_c_on_the_installed_command_stops_it_with_the_line_that_goes_on(injured):
    """The whole way: a process of its own, a signal from outside."""
    command = [sys.executable, "-m", "lorq.cli", *map(str, injured.command)]
    for _ in range(5):  # a small model may be done before the signal comes
        with subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            text=True,
        ) as run:  # fmt: skip
            while not (injured.out / "lorq_journal.jsonl").exists() and run.poll() is None:
                time.sleep(0.001)
            run.send_signal(signal.SIGINT)
            said = run.communicate()[1]
        if run.returncode:
            break
        shutil.rmtree(injured.out)
    assert run.returncode == 130, said
    assert said.endswith("lorq: interrupted; what is finished is kept, the same command with --resume goes on\n")
    assert not list(injured.out.glob("*.lorq.tmp"))
    injured.begun = True
    injured.heal()
