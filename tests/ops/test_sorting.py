"""Sorting against NumPy's stable sort."""

import functools

import jax
import numpy as np
import pytest

from stca_jax.ops.sorting import distinct_ids, sort_ids


@pytest.mark.parametrize("size", [1, 2, 3, 1_000, 65_536, 65_537, 150_000])
@pytest.mark.parametrize("largest", [0, 9, 70_000, np.iinfo(np.int32).max])
def test_equals_a_stable_sort(size, largest):
    rng = np.random.default_rng(size)
    ids = rng.integers(0, largest, size, dtype=np.int32, endpoint=True)
    ids[-1] = largest
    found, position = jax.jit(sort_ids)(ids)
    expected = np.argsort(ids, kind="stable")
    np.testing.assert_array_equal(position, expected)
    np.testing.assert_array_equal(found, ids[expected])
    assert found.dtype == position.dtype == np.int32


def test_garbage_stays_a_permutation():
    ids = np.array([-1, 5, np.iinfo(np.int32).min, 5, -1], np.int32)
    found, position = sort_ids(ids)
    np.testing.assert_array_equal(position, [1, 3, 2, 0, 4])
    np.testing.assert_array_equal(found, ids[position])


@pytest.mark.parametrize(("size", "largest"), [(1, 5), (1_000, 9), (1_000, 10**6), (70_000, 99)])
def test_distinct_ids_equal_numpys(size, largest):
    ids = np.random.default_rng(size).integers(0, largest, size, dtype=np.int32)
    expected, inverse = np.unique(ids, return_inverse=True)
    found, places = jax.jit(
        functools.partial(distinct_ids, size=len(expected) + 3, fill_value=largest)
    )(ids)
    np.testing.assert_array_equal(found, [*expected, *[largest] * 3])
    np.testing.assert_array_equal(places, inverse)
