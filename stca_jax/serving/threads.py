"""How many threads of a CPU a process that scores computes with."""

import os

THREADS = "PJRT_NPROC"


def compute_with_one_thread() -> None:
    """With one, unless the environment variable PJRT_NPROC says otherwise.

    A score is many small steps, one after the other: with two threads, 1,000 candidates take half
    again the CPU time and are not answered sooner; see docs/serving.md. To be called before JAX
    looks for devices.
    """
    os.environ.setdefault(THREADS, "1")
