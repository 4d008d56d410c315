"""What is freed is kept: page faults of a process that takes and frees the same memory."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from stca_jax.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        np.ones(8 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if "keep" in sys.argv:
    keep_freed_memory()
faults()
print(faults())
"""


def faults_of(*arguments, **environment):
    ran = subprocess.run(
        [sys.executable, "-c", FAULTS, *arguments], env=os.environ | environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(ran.stdout)


@pytest.mark.skipif("glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="glibc's malloc")
def test_freed_memory_is_not_faulted_in_again():
    assert faults_of("keep") * 20 < faults_of()


@pytest.mark.skipif("glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="glibc's malloc")
def test_who_tunes_malloc_is_obeyed():
    """All of it is faulted in again: at least a fault for each huge page of 2 MiB."""
    tuned = {"MALLOC_MMAP_THRESHOLD_": "131072"}
    huge_pages = 8 * (8 * 8) // 2
    assert faults_of("keep", **tuned) > huge_pages / 2 > 2 * faults_of("keep")
