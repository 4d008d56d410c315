from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stca_jax.input import arrays

COUNTS = st.lists(st.integers(0, 5), max_size=12)


def flat(lists):
    return [value for values in lists for value in values]


@given(COUNTS)
def test_ragged_arrays_match_lists(counts):
    count = np.array(counts, np.int64)
    assert arrays.ragged_arange(count).tolist() == flat(range(n) for n in counts)
    first = 7 * np.arange(len(counts))
    expected = flat(range(7 * i, 7 * i + n) for i, n in enumerate(counts))
    assert arrays.ragged_ranges(first, count).tolist() == expected
    owner = np.repeat(np.arange(len(counts)), count)
    expected = [sum(counts[:i]) for i in range(len(counts) + 1)]
    assert arrays.offsets(owner, len(counts)).tolist() == expected


@given(st.lists(st.integers(0, 2), max_size=20))
def test_runs_match_lists(values):
    starts = [i for i, v in enumerate(values) if not i or v != values[i - 1]]
    run = np.array(values, np.int64)
    assert arrays.run_starts(run).tolist() == starts
    expected = [i - max(s for s in starts if s <= i) for i in range(len(values))]
    assert arrays.rank_in_run(run).tolist() == expected


def test_runs_of_several_columns():
    user, time = np.array([7, 7, 7, 9, 9]), np.array([1, 1, 4, 4, 4])
    assert arrays.run_starts(user, time).tolist() == [0, 2, 3]


@given(st.lists(st.lists(st.integers(-9, 9), min_size=1, max_size=4), max_size=8))
def test_sums_before_match_lists(runs):
    values, lengths = np.array(flat(runs), np.int64), np.array(list(map(len, runs)), np.int64)
    expected = flat((sum(run[:i]) for i in range(len(run))) for run in runs)
    assert arrays.sum_before(values, lengths).tolist() == expected
