"""Memory that a process frees, and takes again a moment later."""

from __future__ import annotations

import ctypes
import os

import jax

# Of glibc's malloc.h: what is given back to the system when freed, and what is taken at a time.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_MOST = 2**31 - 1


def keep_freed_memory() -> None:
    """Has glibc keep what this process frees, if it computes on a CPU.

    A step takes its temporary memory anew. By default glibc gives large pieces back to the system
    at once, which hands them out page by page, each with a fault: a fifth of the main job's step,
    see docs/performance.md. Where malloc is tuned by the environment, or is not glibc's, nothing
    changes.
    """
    tuned = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if tuned or jax.default_backend() != "cpu":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or no Linux
        return
    for parameter, value in (
        (_MMAP_THRESHOLD, _MOST),
        (_TRIM_THRESHOLD, _MOST),
        (_TOP_PAD, 64 << 20),
    ):
        mallopt(parameter, value)
