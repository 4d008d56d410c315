"""Compiled programs that the next process finds: a resumed run need not compile again."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import re

import jax

from stca_jax.files import cache_dir


def keep_programs() -> None:
    """Lets JAX keep, and find, what takes it a second or more to compile.

    The folder is that of the variable JAX_COMPILATION_CACHE_DIR (empty: none), else one in the
    user's cache.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # which JAX has read by itself
        folder = cache_dir() / "compilations" / _processor()
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _processor() -> str:
    """Names the instructions that a CPU program may use: a home directory serves many machines."""
    try:
        described = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        described = platform.processor()
    flags = re.search(r"^(?:flags|Features)\s*:.*$", described, re.MULTILINE)
    digest = hashlib.sha256((flags[0] if flags else described).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:8]}"
