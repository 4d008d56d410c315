"""Mapped files travel to other processes as paths, and what is not the whole file as numbers."""

import os
import pickle

import numpy as np
import pytest

from stca_jax.input.mapped import MappedArray, map_file, release


@pytest.fixture
def mapped(tmp_path):
    np.arange(100_000, dtype=np.uint32).tofile(tmp_path / "numbers")
    return map_file(tmp_path / "numbers", np.uint32)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_it_is_pickled_as_its_path_and_maps_the_same_numbers(mapped, protocol):
    pickled = pickle.dumps({"nested": [mapped]}, protocol)
    assert len(pickled) < 1_000
    (copied,) = pickle.loads(pickled)["nested"]
    assert isinstance(copied, MappedArray)
    assert os.fspath(copied.filename) == os.fspath(mapped.filename)
    assert copied.dtype == mapped.dtype
    np.testing.assert_array_equal(copied, mapped)


def test_a_path_that_is_relative_means_the_same_file_elsewhere(mapped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(map_file("numbers", np.uint32))
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(pickle.loads(pickled), mapped)


@pytest.mark.parametrize(
    "compute",
    [
        lambda a: a[10:20],
        lambda a: a[::2],
        lambda a: a[[3, 1]],
        lambda a: a + 1,
        lambda a: a.view(np.uint8)[:7],
        lambda a: a.astype(np.float32),
    ],
)
def test_parts_and_results_are_pickled_as_numbers(mapped, compute):
    found = compute(mapped)
    copied = pickle.loads(pickle.dumps(found))
    assert getattr(copied, "_mmap", None) is None
    assert copied.dtype == found.dtype
    np.testing.assert_array_equal(copied, found)


def test_views_of_the_whole_keep_type_and_shape(mapped):
    for found in (mapped.view(np.int64), mapped.reshape(100, 1_000), mapped[::-1]):
        copied = pickle.loads(pickle.dumps(found))
        assert copied.dtype == found.dtype
        np.testing.assert_array_equal(copied, found)


def test_released_pages_are_read_again(mapped):
    expected = np.array(mapped)
    release(mapped)
    np.testing.assert_array_equal(mapped, expected)
    release(expected)  # not mapped: nothing to let go of
    np.testing.assert_array_equal(mapped, expected)


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        map_file(tmp_path / "none", np.uint32)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty"):
        map_file(tmp_path / "empty", np.uint32)
