"""Checkpoints written by four real processes and read by one, two and four: nothing changes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

DEVICES = 4  # of a job, however many processes it has
COMPILE_FAST = "--xla_backend_optimization_level=0"


def job(action: str, num_processes: int, workdir, dataset) -> dict:
    """Runs a job to its end; returns what its first process says."""
    worker = pathlib.Path(__file__).with_name("multiprocess_worker.py")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={DEVICES // num_processes} {COMPILE_FAST}"
    processes = [
        subprocess.Popen(
            [sys.executable, worker, action, *map(str, (num_processes, i, port)),
             workdir, dataset.directory],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(num_processes)
    ]  # fmt: skip
    try:
        said = [p.communicate(timeout=400) for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * num_processes, said
    return json.loads(said[0][0].splitlines()[-1])  # Gloo also prints


@pytest.mark.exhaustive
def test_state_and_following_batches_are_the_same_on_one_process_and_two(tmp_path, tiny_dataset):
    saved = job("save", 2, tmp_path / "two", tiny_dataset)
    assert job("restore", 1, tmp_path / "two", tiny_dataset) == saved
    assert job("save", 1, tmp_path / "one", tiny_dataset) == saved
    assert job("restore", 2, tmp_path / "one", tiny_dataset) == saved


@pytest.mark.exhaustive
def test_state_and_following_batches_are_the_same_on_any_number_of_processes(
    tmp_path, tiny_dataset
):
    saved = job("save", 4, tmp_path / "four", tiny_dataset)
    # Restoring, `sequence` has two devices; of four processes, two then share each half of a row.
    for num_processes in (1, 2):
        assert job("restore", num_processes, tmp_path / "four", tiny_dataset) == saved
    assert job("save", 1, tmp_path / "one", tiny_dataset) == saved
    assert job("restore", 4, tmp_path / "one", tiny_dataset) == saved
