"""Every row once, whatever happens to the jobs and to the checkpoints; no model is involved."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from stca_jax.evaluation.best import Criterion, mark_best, read_best
from stca_jax.evaluation.checkpoint_watcher import CheckpointWatcher, RowLog, mark_best_checkpoint

COLUMNS = {"split": "validation"}
LENGTHS = (16, 64)


class Run:
    """A directory of "checkpoints", each a file with a number, and a watcher of it."""

    def __init__(self, workdir: pathlib.Path):
        self.directory = workdir / "checkpoints"
        self.directory.mkdir(exist_ok=True)
        self.path = workdir / "evaluation" / "checkpoints.jsonl"
        self.restored: list[int] = []

    def save(self, step: int, value: float) -> None:
        temporary = self.directory / f"{step}.tmp"
        temporary.mkdir()
        (temporary / "state").write_text(str(value))
        temporary.rename(self.directory / str(step))

    def delete(self, step: int) -> None:
        shutil.rmtree(self.directory / str(step))

    def restore(self, step: int) -> float:
        self.restored.append(step)
        return float((self.directory / str(step) / "state").read_text())

    def watcher(self, columns=COLUMNS, lengths=LENGTHS, **functions) -> CheckpointWatcher[float]:
        functions = {
            "steps": lambda: [int(p.name) for p in self.directory.iterdir() if p.name.isdigit()],
            "restore": self.restore,
            "score": lambda state, step, length: [{"value": state * length}],
        } | functions
        return CheckpointWatcher(self.directory, RowLog(self.path), lengths, columns, **functions)

    def watch(self, num_steps, timeout=30.0, **arguments) -> list[str]:
        return self.watcher(**arguments).run(
            num_steps=num_steps, timeout=timeout, poll_seconds=0.01
        )

    def values(self) -> list[tuple[int, int, float]]:
        rows = [json.loads(line) for line in self.path.read_text().splitlines()]
        return sorted((row["step"], row["length"], row["value"]) for row in rows)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_scores_each_checkpoint_once_at_every_length(run):
    run.save(10, 1.5)
    run.save(5, 0.5)
    assert run.watch(num_steps=10) == []
    expected = [(5, 16, 8.0), (5, 64, 32.0), (10, 16, 24.0), (10, 64, 96.0)]
    assert run.values() == expected
    assert run.restored == [5, 10]  # oldest first, each read once
    assert run.watch(num_steps=10) == []  # started again: nothing is left to do
    assert run.restored == [5, 10]
    assert run.values() == expected
    assert [p.name for p in run.path.with_suffix(".claims").iterdir()] == [".write"]


def test_waits_for_the_last_step(run):
    run.save(5, 1.0)
    late = threading.Timer(0.2, run.save, (10, 2.0))
    late.start()
    assert run.watch(num_steps=10) == []
    assert [step for step, *_ in run.values()] == [5, 5, 10, 10]


def test_ends_after_the_timeout(run):
    run.save(5, 1.0)
    assert run.watch(num_steps=10, timeout=0.0) == []
    assert len(run.values()) == 2


def test_other_selections_have_rows_of_their_own(run):
    run.save(5, 1.0)
    run.watch(num_steps=5)
    run.watch(num_steps=5, columns={"split": "test"})
    run.watch(num_steps=5, lengths=(64, 128))
    assert [length for _, length, _ in run.values()] == [16, 16, 64, 64, 128]


def test_failing_length_does_not_stop_the_others(run):
    run.save(5, 1.0)
    run.save(10, 2.0)

    def score(state, step, length):
        if (step, length) == (5, 16):
            raise MemoryError("out of memory\nallocating")
        return [{"value": state * length}]

    failures = run.watch(num_steps=10, score=score)
    assert failures == ["checkpoint 5 at length 16: MemoryError: out of memory"]
    assert [row[:2] for row in run.values()] == [(5, 64), (10, 16), (10, 64)]
    assert run.watch(num_steps=10) == []  # a later job tries again
    assert [row[:2] for row in run.values()] == [(5, 16), (5, 64), (10, 16), (10, 64)]


def test_deleted_while_it_is_read(run):
    run.save(5, 1.0)
    run.save(10, 2.0)

    def restore(step):
        if step == 5:
            run.delete(5)
        return run.restore(step)

    assert run.watch(num_steps=10, restore=restore) == []
    assert [row[:2] for row in run.values()] == [(10, 16), (10, 64)]


def test_deleted_after_it_was_read_is_scored(run):
    run.save(5, 1.0)

    def score(state, step, length):
        if length == 16:
            run.delete(5)
        return [{"value": state * length}]

    assert run.watch(num_steps=5, score=score) == []
    assert run.values() == [(5, 16, 16.0), (5, 64, 64.0)]


def test_replaced_while_it_is_read_is_read_again(run):
    """The first read sees the old file of a directory that is new when the read ends."""
    run.save(5, 1.0)

    def restore(step):
        state = run.restore(step)
        if len(run.restored) == 1:
            run.delete(step)
            run.save(step, 3.0)
        return state

    assert run.watch(num_steps=5, restore=restore) == []
    assert run.values() == [(5, 16, 48.0), (5, 64, 192.0)]


def test_damaged_checkpoint_is_reported_and_the_others_scored(run):
    run.save(5, 1.0)
    (run.directory / "5" / "state").write_text("damaged")
    run.save(10, 2.0)
    failures = run.watch(num_steps=10)
    assert len(failures) == 2
    assert all("could not convert string to float: 'damaged'" in line for line in failures)
    assert [row[:2] for row in run.values()] == [(10, 16), (10, 64)]


def test_claim_excludes_others_until_it_is_released(tmp_path):
    log, other = RowLog(tmp_path / "log.jsonl"), RowLog(tmp_path / "log.jsonl")
    with log.claim("5-16") as is_mine:
        assert is_mine
        with other.claim("5-16") as is_others:
            assert not is_others
        with other.claim("5-64") as is_others:
            assert is_others
    with other.claim("5-16") as is_others:
        assert is_others


def test_killed_holder_loses_its_claim(tmp_path):
    code = (
        "import sys, time; from stca_jax.evaluation.checkpoint_watcher import RowLog\n"
        "with RowLog(sys.argv[1]).claim('5-16') as mine: print(mine, flush=True); time.sleep(60)"
    )
    path = tmp_path / "log.jsonl"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "True\n"
        with RowLog(path).claim("5-16") as is_mine:
            assert not is_mine
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with RowLog(path).claim("5-16") as is_mine:
        assert is_mine


def test_waits_for_rows_that_another_job_is_at(run):
    run.save(5, 1.0)
    holding, released = threading.Event(), threading.Event()

    def slow(state, step, length):
        holding.set()
        released.wait()
        return [{"value": state * length}]

    first = threading.Thread(target=run.watch, args=(5,), kwargs={"score": slow})
    first.start()
    holding.wait()
    second = threading.Thread(target=run.watch, args=(5,))
    second.start()
    while not run.path.exists():  # the second job takes the other length …
        time.sleep(0.01)
    second.join(0.1)
    assert second.is_alive()  # … and waits for the first, which may yet die
    released.set()
    first.join()
    second.join()
    assert run.values() == [(5, 16, 16.0), (5, 64, 64.0)]


def test_many_jobs_together(run):
    steps = range(1, 21)
    jobs = [threading.Thread(target=run.watch, args=(20,)) for _ in range(4)]
    for job in jobs:
        job.start()
    for step in steps:
        run.save(step, float(step))
    for job in jobs:
        job.join()
    expected = [(step, length, float(step * length)) for step in steps for length in LENGTHS]
    assert run.values() == expected


AT_64 = Criterion("auc", "validation", 64, larger_is_better=True)


def rows_of(values, length=64):
    return [{"step": step, "length": length, "auc": value} for step, value in values.items()]


@pytest.mark.parametrize(("larger", "best"), [(True, 10), (False, 15)])
def test_marks_the_best_that_exists(run, larger, best):
    for step in (5, 10, 15):
        run.save(step, 0.0)
    rows = rows_of({5: 0.7, 10: 0.8, 15: 0.6, 20: 0.9, 25: 0.1}) + rows_of({5: 1.0}, length=16)
    workdir = run.directory.parent
    mark_best_checkpoint(workdir, rows, AT_64._replace(larger_is_better=larger))
    value = {10: 0.8, 15: 0.6}[best]
    assert read_best(workdir) == {
        "step": best,
        "value": value,
        "metric": "auc",
        "split": "validation",
        "length": 64,
        "min_history": 0,
        "max_requests": None,
        "max_targets": None,
        "last_step": 15,
    }


def test_marks_again_after_the_training_marked_by_its_own_metric(run):
    run.save(5, 0.0)
    run.save(10, 0.0)
    workdir = run.directory.parent
    mark_best(workdir, {10: 0.99}, AT_64._replace(length=16))
    rows = rows_of({5: 0.7, 10: 0.6})
    mark_best_checkpoint(workdir, rows, AT_64)
    assert read_best(workdir)["step"] == 5


def test_mean_over_tasks_decides_and_failed_metrics_do_not_count(run):
    for step in (5, 10, 15):
        run.save(step, 0.0)
    rows = rows_of({5: 0.7, 10: 0.8}) + rows_of({5: 0.7, 10: 0.5})
    rows += [{"step": 15, "length": 64, "auc": None}, {"step": 15, "length": 64}]
    workdir = run.directory.parent
    mark_best_checkpoint(workdir, rows, AT_64)
    assert read_best(workdir)["step"] == 5
