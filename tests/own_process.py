"""Calls functions of test files in processes whose JAX starts otherwise than this one's."""

from __future__ import annotations

import atexit
import concurrent.futures
import functools
import importlib
import multiprocessing
import os


def call(module: str, name: str, *arguments: str, kind: str = "", **environment: str) -> None:
    """Calls a function, and raises what it raises.

    Args:
      module: A test file's name; its folder is on the path once it is collected.
      name: Of the function.
      *arguments: Given to it.
      kind: Calls of one kind and environment share a process, which imports the library once.
      **environment: Of that process; the number of devices and the platforms are fixed by it.
    """
    values = tuple(sorted({"JAX_PLATFORMS": "cpu", **environment}.items()))
    _process(kind, values).submit(_call, module, name, *arguments).result(timeout=900)


@functools.cache
def _process(
    kind: str, environment: tuple[tuple[str, str], ...]
) -> concurrent.futures.ProcessPoolExecutor:
    del kind
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context)
    atexit.register(pool.shutdown)
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        pool.submit(os.getpid).result()  # starts it, with this environment
    finally:
        os.environ.clear()
        os.environ.update(before)
    return pool


def _call(module: str, name: str, *arguments: str) -> None:
    getattr(importlib.import_module(module), name)(*arguments)
