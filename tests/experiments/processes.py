"""Runs the launchers as a user does: real processes, real signals."""

import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

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


def start_forked(module: str, *args: str, output: str | None = None) -> BaseProcess:
    """Like `start`, forked from a server that has imported the library, which takes seconds.

    What it prints goes to the file `output`, or where this process prints.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stca_jax.data.preparation", "stca_jax.trainer"])
    process = context.Process(target=_run_as_main, args=(module, *args), kwargs={"output": output})
    process.start()
    return process


def run(module: str, *args: str, timeout: float = 300, **env: str) -> tuple[int | None, str]:
    """Exit status and output of `python -m module`.

    Forked as by `start_forked`, but for an environment of its own, which takes a new process.
    """
    if env:
        started = start(module, *args, **env)
        try:
            output, _ = started.communicate(timeout=timeout)
        finally:
            started.kill()
        return started.returncode, output
    with tempfile.NamedTemporaryFile() as file:
        forked = start_forked(module, *args, output=file.name)
        forked.join(timeout)
        forked.kill()
        forked.join()
        return forked.exitcode, pathlib.Path(file.name).read_text()


def _run_as_main(module: str, *args: str, output: str | None) -> None:
    if output:
        file = os.open(output, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(file, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below some shells
    sys.argv = [module, *args]
    sys.orig_argv = ["python", "-m", module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


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
