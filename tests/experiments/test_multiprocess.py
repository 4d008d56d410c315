"""One run by four, two and one real processes: a signal, a kill, and the same losses."""

import json
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
from processes import run, start, wait_until

from stca_jax.training.checkpointing import Checkpointer

STEPS = 80
DEVICES = 4  # of the job, however many processes it has
OVERRIDES = {
    "training.max_steps": STEPS,
    "training.num_epochs": 50,
    "training.log_every_steps": 1,
    "checkpoint.every_steps": 20,
    "evaluation.validation_requests": 40,
    "model.sequence.width": 8,
    "model.sequence.num_layers": 1,
    "model.backbone.num_blocks": 1,
    "model.match_channel": "False",
    "model.embedding.replicated_rows": 32,  # divides the item table
}


def arguments(workdir, data_dir) -> list[str]:
    return [
        "--config=experiments/configs/tiny.py",
        f"--workdir={workdir}",
        f"--data_dir={data_dir}",
        *(f"--config.{name}={value}" for name, value in OVERRIDES.items()),
    ]


def start_job(num_processes: int, workdir, data_dir) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = xla_flags(DEVICES // num_processes)
    return [
        start(
            "experiments.train", *arguments(workdir, data_dir), f"--coordinator=localhost:{port}",
            f"--num_processes={num_processes}", f"--process_id={i}",
            JAX_PLATFORMS="cpu", XLA_FLAGS=flags,
        )
        for i in range(num_processes)
    ]  # fmt: skip


def outputs(job, timeout: float) -> list[str]:
    deadline = time.monotonic() + timeout
    try:
        return [p.communicate(timeout=deadline - time.monotonic())[0] for p in job]
    finally:
        for process in job:
            process.kill()


def losses(workdir) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data_dir):
    """The run of one process with all devices."""
    workdir = tmp_path_factory.mktemp("alone")
    status, output = run_alone(workdir, data_dir)
    assert status == 0, output
    return workdir


def run_alone(workdir, data_dir) -> tuple[int, str]:
    return run("experiments.train", *arguments(workdir, data_dir), XLA_FLAGS=xla_flags(DEVICES))


def xla_flags(devices: int) -> str:
    """Devices of one process, and compilation in half the time."""
    return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"


@pytest.mark.parametrize(
    "num_processes",
    [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.exhaustive)],
)
def test_run_survives_a_signal_a_kill_and_other_numbers_of_processes(
    alone, tmp_path, data_dir, num_processes
):
    job = start_job(num_processes, tmp_path, data_dir)
    wait_until(lambda: (tmp_path / "checkpoints" / "20").exists(), job[0], timeout=400)
    job[-1].send_signal(signal.SIGTERM)
    said = outputs(job, 60)
    assert [p.returncode for p in job] == [143] * num_processes, said
    stopped_at = Checkpointer(tmp_path).steps()[-1]
    assert 20 < stopped_at < STEPS
    assert all(f"stopped by SIGTERM at step {stopped_at}" in s for s in said)
    reports = ("restored", "validation auc")  # of one process
    assert not any(word in s for word in reports for s in said[1:])

    job = start_job(2, tmp_path, data_dir)
    later = stopped_at // 20 * 20 + 20
    wait_until(lambda: (tmp_path / "checkpoints" / str(later)).exists(), job[0], timeout=400)
    job[1].kill()
    killed = time.monotonic()
    said = outputs(job, 90)
    assert time.monotonic() - killed < 60
    assert job[0].returncode not in (0, 143), said
    assert "error" in said[0]

    status, output = run_alone(tmp_path, data_dir)
    assert status == 0, output

    expected, found = losses(alone), losses(tmp_path)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    found, expected = np.array(list(found.values())), np.array(list(expected.values()))
    np.testing.assert_allclose(found[:20], expected[:20], rtol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=2e-3)  # sums in another order drift apart


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator=localhost:1"], "belong together"),
        (["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"], "not in [0, 2)"),
        (["--distributed"], "cannot join the other processes"),
    ],
)
def test_incomplete_flags_are_one_clear_error(tmp_path, data_dir, flags, message):

    status, output = run("experiments.train", *arguments(tmp_path, data_dir), *flags)
    assert status == 1, output
    assert message in output
    assert "Traceback" not in output
