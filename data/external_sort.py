"""Sorts more numbers than memory holds: block by block, on disk, then range by range of all."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import UInt64

NUMBERS_AT_ONCE = 1 << 23  # of a range, more or less: 0.2 GB of memory while they are sorted
_SAMPLES = 1 << 17  # of a range


def sort_numbers(
    blocks: Iterable[UInt64[np.ndarray, " _"]], size: int, folder: pathlib.Path
) -> Iterator[UInt64[np.ndarray, " _"]]:
    """Yields all numbers in ascending order, some at a time.

    Args:
      blocks: The numbers, as many at a time as fit into memory.
      size: How many there are.
      folder: For 8 bytes each; emptied first, and removed at the end.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    num_ranges = max(1, -(-size // NUMBERS_AT_ONCE))
    every = max(1, size // (_SAMPLES * num_ranges))
    files, samples = list[pathlib.Path](), list[np.ndarray]()
    for block in blocks:
        # Stable, which merges what is ascending already: events of users, blocks of a range.
        numbers = np.sort(block, kind="stable")
        files.append(folder / f"{len(files):05d}")
        numbers.tofile(files[-1])
        samples.append(numbers[::every].copy())
    sample = np.sort(np.concatenate(samples)) if samples else np.empty(0, np.uint64)
    starts = sample[np.arange(1, num_ranges) * len(sample) // num_ranges]
    begins = [_places(file, starts) for file in files]
    for k in range(num_ranges):
        pieces = [
            np.fromfile(file, np.uint64, begin[k + 1] - begin[k], offset=8 * begin[k])
            for file, begin in zip(files, begins, strict=True)
        ]
        yield np.sort(np.concatenate(pieces), kind="stable")
    shutil.rmtree(folder)


def _places(file: pathlib.Path, starts: np.ndarray) -> list[int]:
    """Where each range of a file's ascending numbers begins, and where the last one ends."""
    numbers = np.memmap(file, np.uint64, mode="r")
    return [0, *np.searchsorted(numbers, starts).tolist(), len(numbers)]
