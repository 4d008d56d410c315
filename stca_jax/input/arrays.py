"""Ragged arrays: lists of lists as one flat array, divided by counts, offsets or equal values.

    values    a a a b c c       runs of equal values
    starts    0     3 4         where each begins
    count     3     1 2         how many each has
    offsets   0     3 4   6     starts, then the end
    rank      0 1 2 0 0 1       place within the run

Each function takes the form that its callers have.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


def run_starts(*columns: np.ndarray) -> Int[np.ndarray, " runs"]:
    """Where each run of equal rows of the columns begins, e.g. of (user, time): the requests."""
    changes = np.zeros(len(columns[0]), bool)
    changes[:1] = True
    for column in columns:
        changes[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(changes)


def rank_in_run(run: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """0, 1, 2 … within each run of equal values."""
    return ragged_arange(np.diff(run_starts(run), append=len(run)))


def ragged_arange(count: Int[np.ndarray, " n"]) -> Int[np.ndarray, " total"]:
    """0 … count[0]-1, 0 … count[1]-1, and so on, in one array."""
    return np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)


def ragged_ranges(
    first: Int[np.ndarray, " n"], count: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " total"]:
    """first[0] … first[0]+count[0]-1, first[1] …, and so on, in one array."""
    return np.repeat(first, count) + ragged_arange(count)


def offsets(owner: Int[np.ndarray, " n"], num_owners: int) -> Int[np.ndarray, " owners+1"]:
    """Where the items of each owner begin, when `owner` is ascending in `[0, num_owners)`."""
    return np.searchsorted(owner, np.arange(num_owners + 1), side="left")


def sum_before(
    values: Int[np.ndarray, " n"], run_lengths: Int[np.ndarray, " runs"]
) -> Int[np.ndarray, " n"]:
    """Within each run of consecutive values, the sum of those before each."""
    before = np.append(0, np.cumsum(values))
    first = np.cumsum(run_lengths) - run_lengths
    return before[:-1] - np.repeat(before[first], run_lengths)
