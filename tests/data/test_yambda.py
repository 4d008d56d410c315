"""Hand-picked events of a small Yambda log: sessions, replays, likes, artists, leaks."""

from __future__ import annotations

import collections
import statistics

import log_oracle
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stca_jax.data.preparation import prepare
from stca_jax.input.dataset import RequestDataset

# The columns of multi_event.parquet, in their order, and what the source's README says of them.
SCHEMA = pa.schema(
    [
        pa.field("uid", pa.uint32()),
        pa.field("timestamp", pa.uint32()),  # since the first event, in steps of 5 seconds
        pa.field("item_id", pa.uint32()),
        pa.field("is_organic", pa.uint8()),
        pa.field("played_ratio_pct", pa.uint16()),  # above 100 after a replay; null if no listen
        pa.field("track_length_seconds", pa.uint32()),  # likewise null; in steps of 5 seconds
        pa.field("event_type", pa.dictionary(pa.uint8(), pa.string())),
    ]
)
DAY = 86_400
ARTISTS = [(70, 500), (71, 500), (71, 501), (72, 502)]  # track 500 has two, track 503 none
START = 25_830_000  # in the day of validation
PICKED = [  # the first user's events after twenty ordinary days
    (100, START, 500, 1, 49, 180, "listen"),
    (100, START + 60, 501, 0, 50, 200, "listen"),
    (100, START + 60, 501, 0, None, None, "like"),
    (100, START + 60, 502, 1, 140, 240, "listen"),
    (100, START + 65, 500, 1, None, None, "dislike"),
    (100, START + 300, 503, 0, 100, 150, "listen"),
    (100, START + 300 + 2 * DAY, 500, 0, None, None, "undislike"),
    (100, START + 300 + 3 * DAY, 501, 1, 3, 200, "listen"),
]


def events(last_played=3):
    """Rows sorted by user and time, as published."""
    kinds = ("listen", "like", "dislike", "unlike", "undislike")
    rows = []
    for user in (100, 2_000_000_000):
        for day in range(20):
            for k, kind in enumerate(kinds):
                listened = (30, 180 + 5 * day) if kind == "listen" else (None, None)
                rows.append((user, day * DAY + 5 * k, 500 + k % 4, k % 2, *listened, kind))
            rows.append((user, day * DAY + 600, 500 + day % 4, 1, 95, 180, "listen"))
        if user == 100:
            rows += PICKED
            rows[-1] = (*rows[-1][:4], last_played, *rows[-1][5:])
    return rows


def prepare_files(root, name="50m", **changes) -> RequestDataset:
    rows = events(**changes)
    columns = zip(*rows, strict=True)
    arrays = [
        pa.array(c, t.value_type).dictionary_encode().cast(t)
        if pa.types.is_dictionary(t) else pa.array(c, t)
        for c, t in zip(columns, SCHEMA.types, strict=True)
    ]  # fmt: skip
    path = root / "flat" / "50m" / "multi_event.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(arrays, schema=SCHEMA), path)
    artist, item = (pa.array(c, pa.uint32()) for c in zip(*ARTISTS, strict=True))
    artists = pa.table({"artist_id": artist, "item_id": item})
    pq.write_table(artists, root / "artist_item_mapping.parquet")
    return RequestDataset(prepare(f"yambda/{name}", root / "prepared", manual_dir=root))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return prepare_files(tmp_path_factory.mktemp("yambda"))


def ids(dataset, name):
    return log_oracle.feature_ids(dataset.directory, name)


def test_only_listens_are_targets_and_every_event_is_history(dataset):
    assert len(dataset) == 2
    record, item = dataset.record(0), {v: k for k, v in ids(dataset, "item").items()}
    log = [r for r in events() if r[0] == 100]
    expected = collections.Counter()
    sessions, last = [], -DAY
    for _, time, track, _, played, _, kind in log:
        if kind == "listen":
            if time - last > 600:
                sessions.append((time, []))
            sessions[-1][1].append((track, int(played >= 50)))
            last = time
    for time, targets in sessions:
        expected[time, sum(r[1] < time for r in log), tuple(sorted(targets))] += 1
    found = collections.Counter()
    for k, (time, end) in enumerate(zip(record.request_time, record.history_end, strict=True)):
        t = slice(*record.target_offset[k : k + 2])
        labels = record.label[t, 0].astype(int).tolist()
        shown = [item[i] for i in record.target["item"][t].tolist()]
        targets = zip(shown, labels, strict=True)
        found[int(time), int(end), tuple(sorted(targets))] += 1
    assert found == expected
    # Half is enough, a little less is not; nothing of a session is history of its listens.
    begin = len(log) - len(PICKED)
    assert found[START, begin, ((500, 0), (501, 1), (502, 1), (503, 1))] == 1
    assert record.request_split[-2:].tolist() == [1, 2]


def test_features_of_the_picked_events(dataset):
    record = dataset.record(0)
    last = slice(-len(PICKED), None)
    value = {
        n: {v: k for k, v in ids(dataset, n).items()} for n in ("item", "is_organic", "event_type")
    }
    columns = [record.event_time[last].tolist()]
    columns += [[value[n][i] for i in record.history[n][last].tolist()] for n in value]
    found = sorted(zip(*columns, record.history["listen"][last].tolist(), strict=True))
    expected = [
        (time, item, organic, kind, 2 if played is None else int(played >= 50))  # 2: unknown
        for _, time, item, organic, played, _, kind in PICKED
    ]
    assert found == sorted(expected)

    validation_start = dataset.metadata["validation_start"]
    for name, column in (("played_ratio_pct", 4), ("track_length_seconds", 5)):
        train = [r[column] for r in events() if r[1] < validation_start and r[column] is not None]
        mean, deviation = statistics.fmean(train), statistics.pstdev(train)
        scaled = {(r[1], r[2], r[6]): 0 if r[column] is None else (r[column] - mean) / deviation
                  for r in PICKED}  # fmt: skip
        kinds = [value["event_type"][i] for i in record.history["event_type"][last].tolist()]
        items = [value["item"][i] for i in record.history["item"][last].tolist()]
        keys = zip(record.event_time[last].tolist(), items, kinds, strict=True)
        np.testing.assert_allclose(
            record.history[name][last], [scaled[key] for key in keys], rtol=1e-5, atol=1e-6
        )


def test_a_track_has_its_first_artist(dataset):
    record, item = dataset.record(0), ids(dataset, "item")
    artist = {
        track: set(record.history["artist"][record.history["item"] == item[track]].tolist())
        for track in (500, 501, 502, 503)
    }
    assert all(len(found) == 1 for found in artist.values())
    assert len(set.union(*artist.values())) == 4  # 70, 71, 72, and none


def test_what_came_of_a_listen_is_no_feature_of_its_target(dataset, tmp_path):
    other = prepare_files(tmp_path, last_played=100)
    a, b = dataset.record(0), other.record(0)
    assert a.label[-1] != b.label[-1]
    assert dataset.schema.target == (
        "item", "artist", "is_organic", "track_length_seconds", "log_popularity",
    )  # fmt: skip
    for name in dataset.schema.target:
        np.testing.assert_array_equal(a.target[name], b.target[name], err_msg=name)
    for name in dataset.schema.history:
        np.testing.assert_array_equal(a.history[name][:-1], b.history[name][:-1], err_msg=name)


def test_every_listen_is_a_request_after_all_events_before_it(tmp_path):
    dataset = prepare_files(tmp_path, name="dlrm_v4_50m")
    record, item = dataset.record(0), {v: k for k, v in ids(dataset, "item").items()}
    log = [r for r in events() if r[0] == 100]
    expected = collections.Counter(
        (time, sum(r[1] < time for r in log), track, int(played >= 50))
        for _, time, track, _, played, _, kind in log
        if kind == "listen"
    )
    found = collections.Counter()
    for k, (time, end) in enumerate(zip(record.request_time, record.history_end, strict=True)):
        for t in range(*record.target_offset[k : k + 2]):
            track = item[record.target["item"][t]]
            found[int(time), int(end), track, int(record.label[t, 0])] += 1
    assert found == expected
