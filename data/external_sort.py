"""Sorts more rows than memory holds: first into ranges of keys, on disk, then range by range."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import UInt64

Rows = tuple[UInt64[np.ndarray, " n"], UInt64[np.ndarray, " n"]]
"""Keys, and what goes with each of them."""

ROWS_AT_ONCE = 1 << 23  # of a range, more or less: 0.4 GB of memory while they are sorted
_SAMPLES = 1 << 17
_RECORD = np.dtype([("key", np.uint64), ("value", np.uint64)])


def sort_rows(
    blocks: Callable[[int], Iterable[Rows]], num_rows: int, folder: pathlib.Path
) -> Iterator[Rows]:
    """Yields all rows by key and then by value, some at a time.

    Args:
      blocks: Yields the rows, or every k-th of each block.
      num_rows: How many there are.
      folder: For 16 bytes a row; emptied first, and removed at the end.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    bounds = _bounds(blocks, num_rows)
    for key, value in blocks(1):
        bucket = np.searchsorted(bounds, key, side="right").astype(np.uint16)
        order = np.argsort(bucket, kind="stable")
        rows = np.empty(len(key), _RECORD)
        rows["key"], rows["value"], bucket = key[order], value[order], bucket[order]
        begins = np.flatnonzero(np.diff(bucket, prepend=-1))
        for begin, end in zip(begins, [*begins[1:], len(rows)], strict=True):
            # Opened anew each time: there may be more ranges than files that can be open.
            with open(folder / f"{bucket[begin]:05d}", "ab") as file:
                rows[begin:end].tofile(file)
    for path in sorted(folder.iterdir()):
        rows = np.fromfile(path, _RECORD)
        path.unlink()
        order = np.argsort(rows["value"], kind="stable")
        order = order[np.argsort(rows["key"][order], kind="stable")]
        yield rows["key"][order], rows["value"][order]
    folder.rmdir()


def _bounds(
    blocks: Callable[[int], Iterable[Rows]], num_rows: int
) -> UInt64[np.ndarray, " ranges-1"]:
    """Where ranges of about equally many rows begin, but for the first, from a sample of keys."""
    num_ranges = -(-num_rows // ROWS_AT_ONCE)
    if num_ranges <= 1:
        return np.zeros(0, np.uint64)
    every = max(1, num_rows // (_SAMPLES * num_ranges))
    sample = np.sort(np.concatenate([key for key, _ in blocks(every)]))
    return sample[np.arange(1, num_ranges) * len(sample) // num_ranges]
