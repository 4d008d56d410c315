"""Training as a user runs it: kills, restarts, and mistakes."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from processes import REPOSITORY, run, start, start_forked, wait_until

from stca_jax.config import apply_overrides
from stca_jax.experiments.configs import tiny
from stca_jax.training.checkpointing import Checkpointer
from stca_jax.workdir import restore_for_evaluation

STEPS = 24
OVERRIDES = {"training.max_steps": str(STEPS), "checkpoint.every_steps": "4"}


def arguments(workdir: pathlib.Path, data_dir: pathlib.Path, **overrides: str) -> list[str]:
    values = OVERRIDES | overrides
    return [
        "--config=experiments/configs/tiny.py",
        f"--workdir={workdir}",
        f"--data_dir={data_dir}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data_dir):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    status, output = run("experiments.train", *arguments(workdir, data_dir))
    assert status == 0, output
    assert output.splitlines()[-1] == f"checkpoints, metrics and config are in {workdir}"
    return workdir


def final_state(workdir, dataset):
    config = apply_overrides(tiny.get_config(), OVERRIDES)
    _, state = restore_for_evaluation(config, dataset, workdir, STEPS)
    return jax.tree.leaves(jax.device_get(state))


def metric_lines(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in line.items() if n != "time" and "second" not in n} for line in lines]


def assert_same_run(found, expected, dataset):
    for a, b in zip(final_state(found, dataset), final_state(expected, dataset), strict=True):
        np.testing.assert_array_equal(a, b)
    assert metric_lines(found) == metric_lines(expected)


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def is_writing(workdir: pathlib.Path, step: int) -> bool:
    return any((workdir / "checkpoints").glob(f"{step}.orbax-checkpoint-tmp*"))


def test_killed_run_goes_on_to_identical_parameters_and_metrics(
    uninterrupted, tmp_path, data_dir, tiny_dataset
):
    workdir = tmp_path / "run"
    started = start("experiments.train", *arguments(workdir, data_dir))
    wait_until(lambda: is_writing(workdir, 8), started)
    kill(started)  # inside a checkpoint write, or just after it
    started = start("experiments.train", *arguments(workdir, data_dir))
    wait_until(lambda: (workdir / "checkpoints" / "12").exists(), started)
    kill(started)  # between two checkpoints, or inside the next write
    status, output = run("experiments.train", *arguments(workdir, data_dir))
    assert status == 0, output
    assert_same_run(workdir, uninterrupted, tiny_dataset)


@pytest.mark.exhaustive
def test_storm_of_kills(uninterrupted, tmp_path, tiny_dataset):
    """30 random kills: while data are prepared, at start, restore, steps, validation and saves."""
    chance = random.Random(0)
    num_runs = num_kills = 0
    while num_kills < 30:
        run_dir = tmp_path / str(num_runs)
        process = start_forked("experiments.train", *arguments(run_dir / "run", run_dir / "data"))
        process.join(chance.uniform(0, 6))
        if process.exitcode is None:
            process.kill()
            process.join()
            num_kills += 1
        else:
            assert process.exitcode == 0
            assert_same_run(run_dir / "run", uninterrupted, tiny_dataset)
            num_runs += 1
    status, output = run("experiments.train", *arguments(run_dir / "run", run_dir / "data"))
    assert status == 0, output
    assert_same_run(run_dir / "run", uninterrupted, tiny_dataset)


def test_finished_run_says_so_and_does_nothing(uninterrupted, data_dir):
    before = metric_lines(uninterrupted)
    status, output = run("experiments.train", *arguments(uninterrupted, data_dir))
    assert status == 0
    assert f"is finished: {STEPS} of {STEPS} steps" in output
    assert metric_lines(uninterrupted) == before


def test_sigterm_saves_and_exits_with_143(tmp_path, data_dir, uninterrupted, tiny_dataset):
    process = start("experiments.train", *arguments(tmp_path, data_dir))
    wait_until(lambda: (tmp_path / "checkpoints" / "4").exists(), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "run the same command to go on" in output
    steps = Checkpointer(tmp_path).steps()
    assert run("experiments.train", *arguments(tmp_path, data_dir))[0] == 0
    assert max(steps) < STEPS
    for a, b in zip(
        final_state(tmp_path, tiny_dataset), final_state(uninterrupted, tiny_dataset), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_of_two_trainings_in_one_workdir_the_second_is_refused(tmp_path, data_dir):
    """Started at once, with other settings: one trains on, and nothing of it is overwritten."""
    rates = ("0.01", "0.00001")
    endless = {"training.max_steps": "100000", "training.num_epochs": "1000"}
    started = {
        rate: start(
            "experiments.train",
            *arguments(tmp_path, data_dir, **endless, **{"optimizer.learning_rate": rate}),
        )
        for rate in rates
    }
    deadline = time.monotonic() + 500
    while all(process.poll() is None for process in started.values()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ((lost, refused),) = [(r, p) for r, p in started.items() if p.poll() is not None]
    ((won, training),) = [(r, p) for r, p in started.items() if r != lost]
    output = refused.communicate()[0]
    assert refused.returncode == 1, output
    assert f"{tmp_path} is in use: process {training.pid} on " in output
    wait_until(lambda: (tmp_path / "checkpoints" / "4").exists(), training, timeout=300)
    training.send_signal(signal.SIGTERM)
    output = training.communicate(timeout=300)[0]
    assert training.returncode == 143, output
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["optimizer"]["learning_rate"] == float(won)
    assert not (tmp_path / "training.lock").exists()


# Hangs within a step, as a lost network file system or a collective would.
HANGING = """
import os, runpy, sys, time
from stca_jax import trainer
def hang(*args):
    os.write(1, b"within a step\\n")
    while True:
        time.sleep(1)
trainer.device_batch = hang
sys.orig_argv = ["python", *sys.argv]
runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
"""


def test_a_second_ctrl_c_stops_at_once(tmp_path, data_dir):
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, *arguments(tmp_path, data_dir)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        lines = iter(process.stdout.readline, "")
        assert any(line.startswith("within a step") for line in lines)
        process.send_signal(signal.SIGINT)
        assert any("SIGINT: saving a checkpoint as soon as possible" in line for line in lines)
        assert process.poll() is None  # it waits for the step
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "interrupted: checkpoints, if there are any, are kept" in output
    assert "Traceback" not in output
    assert not (tmp_path / "training.lock").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--config.model.sequence.num_layer=3"], "num_layers"),
        (["--config.model.sequence.num_layers=many"], "many"),
        (["--config.dataset=complete_jorney"], "complete_journey"),
        (["--config.mesh.data=3"], "does not fit 1 devices"),
        (["--config.input.rows_per_batch=0"], "rows_per_batch must be at least 1"),
        (["--config.seed=1"], "seed: 0 -> 1"),
    ],
)
def test_mistake_is_one_clear_error(uninterrupted, data_dir, extra, message):
    status, output = run("experiments.train", *arguments(uninterrupted, data_dir), *extra)
    assert status == 1
    error = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(error) == 1, output
    assert message in output
    assert "Traceback" not in output


def test_full_disk_is_one_clear_error_and_nothing_is_lost(tmp_path, data_dir):
    """Needs a file system of its own, and so the right to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)],
                             capture_output=True, check=False)  # fmt: skip
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    try:
        workdir = disk / "run"
        status, output = run(
            "experiments.train", *arguments(workdir, data_dir, **{"checkpoint.keep_last": "50"})
        )
        assert status == 1
        assert "error: no space left on the disk" in output
        assert "Traceback" not in output
        kept = Checkpointer(workdir).steps()
        assert kept
        assert kept == list(range(4, 4 * len(kept) + 1, 4))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
