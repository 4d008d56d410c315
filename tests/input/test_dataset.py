from __future__ import annotations

import concurrent.futures
import os
import pathlib
import pickle
import shutil

import numpy as np
import pytest
from small_dataset import SIZES, USERS, Builder

from stca_jax.input.dataset import DatasetError, RequestDataset
from stca_jax.input.records import UserRecord


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    builder = Builder(data_dir=tmp_path_factory.mktemp("prepared"))
    builder.download_and_prepare()
    return pathlib.Path(builder.data_path)


@pytest.fixture
def directory(prepared, tmp_path) -> pathlib.Path:
    """A copy to damage, not indexed yet."""
    return shutil.copytree(prepared, tmp_path / "copy", ignore=shutil.ignore_patterns("*.npz"))


def record_file(directory: pathlib.Path, k: int = 1) -> pathlib.Path:
    return sorted(directory.glob("*array_record*"))[k]


def assert_equal_records(found: UserRecord, expected: UserRecord) -> None:
    for name, value in vars(expected).items():
        if isinstance(value, dict):
            assert set(vars(found)[name]) == set(value)
            for feature, column in value.items():
                np.testing.assert_array_equal(vars(found)[name][feature], column)
        else:
            np.testing.assert_array_equal(vars(found)[name], value)


def overwrite(path: pathlib.Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_records_are_what_was_written(prepared):
    dataset = RequestDataset(prepared)
    assert len(dataset) == len(USERS)
    assert dict(dataset.schema.vocabularies) == SIZES
    assert dataset.metadata["time_origin"] == 1_000_000
    assert dataset.metadata["notes"] == {"why": "testing"}
    for i in np.random.default_rng(0).permutation(len(USERS)):
        assert_equal_records(dataset.record(int(i)), USERS[i])


def test_index_lists_every_request(prepared):
    index = RequestDataset(prepared).index
    expected = [
        (
            i,
            k,
            user.request_id[k],
            user.user_id,
            user.request_time[k],
            user.request_split[k],
            user.history_end[k],
            user.target_offset[k + 1] - user.target_offset[k],
        )
        for i, user in enumerate(USERS)
        for k in range(len(user.request_id))
    ]
    found = list(zip(*(v.tolist() for v in vars(index).values()), strict=True))
    assert found == expected
    assert len(index) == len(expected)


def test_index_by_split(prepared):
    index = RequestDataset(prepared).index
    parts = [index.of_split(s) for s in ("train", "validation", "test")]
    assert [np.unique(p.split).tolist() for p in parts] == [[0], [1], [2]]
    assert sum(map(len, parts)) == len(index)
    with pytest.raises(ValueError, match="no split 'eval'; the splits are train, validation, test"):
        index.of_split("eval")


def test_index_is_cached_and_survives_damage(directory, monkeypatch):
    first = RequestDataset(directory).index
    cache = directory / "request_index.npz"
    assert cache.exists()
    assert not list(directory.glob(".request_index*"))

    with monkeypatch.context() as patch:
        patch.delattr(RequestDataset, "_build_index")  # so that only the cache can serve
        cached = RequestDataset(directory).index
    np.testing.assert_equal(vars(cached), vars(first))

    for damage in (b"", cache.read_bytes()[:1_000], b"not a zip file"):
        cache.write_bytes(damage)
        np.testing.assert_equal(vars(RequestDataset(directory).index), vars(first))
        np.load(cache).close()  # whole again


def test_a_folder_that_cannot_be_written_is_no_obstacle(directory, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "replace", refuse)
    assert len(RequestDataset(directory).index) > 0
    assert not list(directory.glob("*request_index*"))
    assert not list(directory.glob(".request_index*"))


def test_pickled_and_threaded_readers_agree(prepared):
    dataset = RequestDataset(prepared)
    dataset.record(0)  # an open reader must not hinder pickling
    other = pickle.loads(pickle.dumps(dataset))
    order = np.random.default_rng(1).integers(0, len(USERS), 400).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for i, found in zip(order, pool.map(other.record, order), strict=True):
            assert_equal_records(found, USERS[i])


def test_tfds_reads_the_same_bytes(prepared):
    source = Builder(data_dir=prepared.parent.parent).as_data_source("users")
    assert len(source) == len(USERS)
    events = source[8]["events"]
    np.testing.assert_array_equal(events[0], USERS[8].event_time)
    np.testing.assert_array_equal(events[1], USERS[8].history["item"])
    np.testing.assert_array_equal(events[2].view(np.float32), USERS[8].history["price"])


def test_users_outside_the_dataset_are_refused(prepared):
    for i in (-1, len(USERS)):
        with pytest.raises(IndexError, match=f"no user {i}; the dataset has 20"):
            RequestDataset(prepared).record(i)


def test_no_dataset(tmp_path):
    with pytest.raises(DatasetError, match=f"{tmp_path}/nothing holds no prepared dataset"):
        RequestDataset(tmp_path / "nothing")


def test_damaged_metadata(directory):
    (directory / "metadata.json").write_text('{"schema": ')
    with pytest.raises(DatasetError, match=r"metadata\.json is damaged"):
        RequestDataset(directory)


@pytest.mark.parametrize("indexed", [False, True])
def test_missing_record_file(directory, indexed):
    if indexed:
        RequestDataset(directory)
    record_file(directory).unlink()
    with pytest.raises(DatasetError, match=f"{record_file(directory, 0).parent}.*1-of.* is miss"):
        RequestDataset(directory)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("size", [0, 1_000, -1])
def test_truncated_record_file(directory, indexed, size):
    if indexed:
        RequestDataset(directory)
    file = record_file(directory)
    whole = file.stat().st_size
    os.truncate(file, size % whole)
    with pytest.raises(DatasetError, match=f"{file} .* has {size % whole} bytes, not {whole}"):
        RequestDataset(directory)


@pytest.mark.parametrize("indexed", [False, True])
def test_changed_record_file(directory, indexed):
    if indexed:
        RequestDataset(directory)
    file = record_file(directory)
    overwrite(file, file.stat().st_size // 3, b"\xff" * 40)
    with pytest.raises(DatasetError, match=f"{file} .*content is not what was prepared"):
        RequestDataset(directory)


def test_touched_but_equal_record_file_is_accepted(directory):
    before = RequestDataset(directory).index
    os.utime(record_file(directory))
    np.testing.assert_equal(vars(RequestDataset(directory).index), vars(before))


def test_damage_after_opening_is_named(directory):
    dataset = RequestDataset(directory)
    file = record_file(directory)
    overwrite(file, 0, b"\xff" * (file.stat().st_size - 66_000))
    with pytest.raises(DatasetError, match=f"{file} is damaged"):
        pickle.loads(pickle.dumps(dataset)).record(9)
    assert_equal_records(dataset.record(0), USERS[0])


def test_fingerprint_names_the_changed_file(prepared, directory):
    dataset = RequestDataset(directory)
    saved = dataset.fingerprint
    assert saved == RequestDataset(prepared).fingerprint  # wherever the data lie
    dataset.check_fingerprint(saved)
    name = record_file(directory).name
    for other in (
        saved | {name: "0" * 64},
        {k: v for k, v in saved.items() if k != name},
    ):
        with pytest.raises(DatasetError, match=f"{name} is not the one this run began with"):
            dataset.check_fingerprint(other)
