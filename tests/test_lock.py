"""One training at a time: real processes that take, hold, lose and break the lock."""

import json
import os
import signal
import subprocess
import sys

import pytest

from stca_jax import lock
from stca_jax.errors import UserError
from stca_jax.lock import NAME, WorkdirLock

HOLD = """
import pathlib, sys
from stca_jax.lock import WorkdirLock
with WorkdirLock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(workdir):
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_one_of_several_processes_holds_it_and_a_killed_one_is_replaced_at_once(tmp_path):
    processes = [hold(tmp_path) for _ in range(3)]
    said = {process: process.stdout.readline() for process in processes}  # "" when it ended
    (holder,) = [process for process in processes if said[process] == "held\n"]
    for process in processes:
        if process is not holder:
            assert f"process {holder.pid} on" in process.communicate()[1]
    with pytest.raises(UserError, match=f"process {holder.pid} on .* trains into it since"):
        WorkdirLock(tmp_path).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with WorkdirLock(tmp_path) as mine:
        mine.check()
    assert list(tmp_path.iterdir()) == []


def write(workdir, **changes):
    with WorkdirLock(workdir):
        owner = json.loads((workdir / NAME).read_text())
    (workdir / NAME).write_text(json.dumps(owner | changes))
    return workdir / NAME


def test_a_later_process_of_the_same_id_is_not_the_owner(tmp_path):
    write(tmp_path, process_start="1")
    with WorkdirLock(tmp_path):
        pass


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 1.0)


@pytest.mark.parametrize("text", [None, "", "{", "[]"])
def test_silent_owner_elsewhere_and_a_file_never_finished_are_replaced(tmp_path, quick, text):
    path = write(tmp_path, host="elsewhere", id="another")
    if text is not None:
        path.write_text(text)
    with WorkdirLock(tmp_path) as mine:
        mine.check()


def test_owner_elsewhere_that_beats_is_left_alone_whatever_its_clock(tmp_path, quick, monkeypatch):
    path = write(tmp_path, host="elsewhere", id="another")
    beats = iter(range(1, 1_000))

    def sleep(_):
        os.utime(path, (next(beats), next(beats)))  # years ago

    monkeypatch.setattr(lock.time, "sleep", sleep)
    with pytest.raises(UserError, match="on elsewhere trains into it"):
        WorkdirLock(tmp_path).__enter__()
    assert json.loads(path.read_text())["id"] == "another"


def test_owner_whose_lock_was_taken_over_is_told_and_leaves_it(tmp_path):
    with WorkdirLock(tmp_path) as mine:
        owner = json.loads((tmp_path / NAME).read_text())
        (tmp_path / NAME).write_text(json.dumps(owner | {"id": "another"}))
        with pytest.raises(UserError, match="took over"):
            mine.check()
    assert (tmp_path / NAME).exists()
