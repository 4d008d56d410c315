"""Orders of events against plain sorting, in however many ranges and whatever number of tasks."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stca_jax.data import external_sort
from stca_jax.data.interaction_log import event_stream
from stca_jax.data.interaction_log.event_stream import EventStream
from stca_jax.input.mapped import MappedArray
from stca_jax.input.trends import Trends

ITEMS, BRANDS, SIZE = 37, 5, 3_000
T0 = 1_700_000_000


def make_stream(tmp_path, num_tasks, fields=("item", "brand")):
    """Events in two shards, as dictionaries of columns, and their orders."""
    rng = np.random.default_rng(num_tasks)
    time, item = T0 + rng.integers(0, 900, SIZE), rng.integers(0, ITEMS, SIZE)
    label = rng.integers(-1, 2, (SIZE, num_tasks))
    tasks = tuple(f"task{k}" for k in range(num_tasks))
    ids = np.array([f"id{k:03d}" for k in range(ITEMS)])
    shards = []
    for k, rows in enumerate((slice(0, 1_000), slice(1_000, None))):
        columns = {"time": time[rows], "item": ids[item[rows]]}
        for name, column in zip(tasks, label[rows].T, strict=True):
            columns[f"label_{name}"] = pa.array(column.astype(np.int8), mask=column < 0)
        shards.append(tmp_path / f"{k}.parquet")
        pq.write_table(pa.table(columns), shards[-1])
    stream = EventStream(tmp_path / "stream", fields, tasks, SIZE)
    stream.folder.mkdir()
    stream.write_by_time(shards, pa.array(ids))
    brand = rng.integers(0, BRANDS, ITEMS)
    values = {"item": np.arange(ITEMS), "brand": brand}
    for field in fields:
        stream.write_by_value(field, values[field])
    return stream, time, item, label, values


# With 20 tasks, labels are sorted in two goes.
@pytest.mark.parametrize("num_tasks", [0, 2, 20])
@pytest.mark.parametrize("at_once", [200, 1 << 23])
def test_orders(tmp_path, monkeypatch, num_tasks, at_once):
    monkeypatch.setattr(external_sort, "NUMBERS_AT_ONCE", at_once)
    monkeypatch.setattr(event_stream, "_ROWS", 700)
    stream, time, item, label, values = make_stream(tmp_path, num_tasks)
    order = np.lexsort((item, time))
    np.testing.assert_array_equal(stream.time, time[order])
    np.testing.assert_array_equal(stream.item, item[order])
    seconds, events, positive, known = stream.totals
    np.testing.assert_array_equal(seconds, np.unique(time))
    bounds = [*seconds, T0 + 10_000]
    np.testing.assert_array_equal(events, [(time < t).sum() for t in bounds])
    for k in range(num_tasks):
        for found, rows in ((positive[k], label[:, k] == 1), (known[k], label[:, k] >= 0)):
            np.testing.assert_array_equal(found, [(time[rows] < t).sum() for t in bounds])
    for field, of_item in values.items():
        value = of_item[item]
        of_field, key = stream.by_value(field), np.sort(value << 32 | time)
        np.testing.assert_array_equal(of_field.key, key)
        places = [*np.flatnonzero(np.diff(key, prepend=-1)), SIZE]
        bounds = [*np.unique(key), 2**62]
        for k in range(num_tasks):
            for found, rows in (
                (of_field.positive[k], label[:, k] == 1),
                (of_field.known[k], label[:, k] >= 0),
            ):
                own = (value << 32 | time)[rows]
                np.testing.assert_array_equal(found[places], [(own < b).sum() for b in bounds])
                assert set(np.diff(found)) <= {0, 1}
    assert not list(stream.folder.glob("**/temporary"))


def test_what_is_whole_is_not_written_again(tmp_path):
    stream, *_ = make_stream(tmp_path, 2)
    before = {p: p.stat().st_mtime_ns for p in stream.folder.glob("**/*") if p.is_file()}
    stream.write_by_time([tmp_path / "none"], pa.array([]))
    stream.write_by_value("item", np.empty(0, np.int64))
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_another_number_of_events_is_an_error(tmp_path):
    stream, *_ = make_stream(tmp_path, 1, fields=())
    other = EventStream(tmp_path / "other", (), stream.labels, SIZE + 1)
    other.folder.mkdir()
    items = pa.array([f"id{k:03d}" for k in range(ITEMS)])
    shards = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    with pytest.raises(ValueError, match=r"3000 events in order, 3001 in the log"):
        other.write_by_time(shards, items)
    with pytest.raises(ValueError, match="has an item that is none of the log"):
        other.write_by_time(shards, items[:-1])


def test_what_is_sent_to_workers_has_paths_of_the_files_in_it(tmp_path):
    stream, time, *_ = make_stream(tmp_path, 2)
    fields = {field: stream.by_value(field) for field in stream.fields}
    trends = Trends({"1h": 3_600}, stream.labels, 0, fields, *stream.totals)
    assert stream.time[0] == time.min()  # kept from now on
    targets = {"item": np.arange(-1, ITEMS), "brand": np.arange(-1, ITEMS) % BRANDS}
    expected = trends.encode(targets, np.full(ITEMS + 1, T0 + 700))
    pickled = pickle.dumps((stream, trends))
    assert len(pickled) < SIZE * np.dtype(np.int32).itemsize
    stream, trends = pickle.loads(pickled)
    of_item = trends.fields["item"]
    for array in (stream.time, trends.time, trends.events, of_item.key, *of_item.known):
        assert isinstance(array, MappedArray)
    found = trends.encode(targets, np.full(ITEMS + 1, T0 + 700))
    for name, column in expected.items():
        np.testing.assert_array_equal(found[name], column)
