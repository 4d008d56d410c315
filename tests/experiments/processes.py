"""Runs the launchers as a user does: real processes, real signals."""

import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

REPOSITORY = pathlib.Path(__file__).parents[2]


def start(module: str, *args: str, **env: str) -> subprocess.Popen[str]:
    """Starts `python -m module`."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *args],
        cwd=REPOSITORY,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(module: str, *args: str, timeout: float = 300, **env: str) -> tuple[int, str]:
    """Exit status and output of `python -m module`."""
    process = start(module, *args, **env)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 120
) -> None:
    """Polls until the condition holds; fails if the process ends first."""
    deadline = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"the process ended first: {process.communicate()[0]}")
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"nothing happened in {timeout} s: {process.communicate()[0]}")
        time.sleep(0.002)
