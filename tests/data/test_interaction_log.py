from __future__ import annotations

import collections
import csv
import decimal
import json
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
import uuid

import log_oracle
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from stca_jax.data import preparation
from stca_jax.data.interaction_log import source
from stca_jax.data.interaction_log.events import LogSource, read_events, read_side_table
from stca_jax.data.interaction_log.interaction_log_dataset_builder import make_builder
from stca_jax.data.interaction_log.log_config import Column, LogConfig, split_list
from stca_jax.errors import UserError
from stca_jax.input.dataset import RequestDataset
from stca_jax.schema import Schema

T0 = 1_700_000_000
TESTS = pathlib.Path(__file__).parent


def random_rows(num_rows=600, num_users=25, seed=0):
    """Impressions with ties in time, ids of requests that repeat between users, missing labels."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        labelled = rng.random() < 0.6
        rows.append({
            "user": rng.randrange(num_users) * 1_000_003 - 5,
            "item": rng.randrange(40) * 7,
            "time": T0 + rng.randrange(400) * 3_600,
            "click": rng.randrange(2) if labelled else None,
            "buy": rng.randrange(2) if labelled else None,
            "kind": rng.choice(["view", "cart", ""]),
            "price": rng.choice([1.0, 2.5, None, 10.0]),
        })  # fmt: skip
        rows[-1]["request"] = f"r{rows[-1]['time'] // 20_000}"
    return rows


def write(path, rows, **columns):
    table = pa.Table.from_pylist(rows)
    for name, values in columns.items():
        table = table.append_column(name, values)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        pa_csv.write_csv(table, path)
    else:
        pq.write_table(table, path, row_group_size=70)
    return str(path)


def config(*log, **options):
    names = {"user_id": "user", "item_id": "item", "timestamp": "time", "min_count": 1}
    return LogConfig(log=log, **(names | options))


def prepare(tmp_path, log_config, name="mine"):
    data_dir = tmp_path / "prepared"
    return preparation.prepare_builder(make_builder(name, log_config, data_dir), data_dir)


@pytest.fixture
def small_shards(monkeypatch):
    """Several shards, parts and blocks, though a log is small."""
    monkeypatch.setattr(source, "_EVENTS_PER_SHARD", 150)
    monkeypatch.setattr(source, "_ROWS_PER_PART", 100)
    monkeypatch.setattr(source, "_ROWS_PER_BLOCK", 30)


def test_labelled_events_are_targets_of_the_requests_they_name(tmp_path, small_shards):
    rows = random_rows()
    log = write(tmp_path / "log.parquet", rows)
    folder = prepare(tmp_path, config(log, request_id="request", labels=("click", "buy")))
    expected = log_oracle.expected_requests(
        rows, request_id="request", labels=("click", "buy"), starts=log_oracle.split_starts(folder)
    )
    assert log_oracle.prepared_requests(folder) == log_oracle.without_user(expected)
    assert len(list(folder.glob("*array_record*"))) == 4


def test_without_a_request_id_a_request_is_a_session(tmp_path):
    rows = random_rows()
    log = write(tmp_path / "log.parquet", rows)
    gap = 7_200
    folder = prepare(tmp_path, config(log, labels=("buy",), session_gap=gap))
    expected = log_oracle.expected_requests(
        rows, gap=gap, labels=("buy",), starts=log_oracle.split_starts(folder)
    )
    assert log_oracle.prepared_requests(folder) == log_oracle.without_user(expected)


def test_history_filter_keeps_targets(tmp_path):
    rows = random_rows()
    log = write(tmp_path / "log.parquet", rows)
    folder = prepare(tmp_path, config(log, labels=("click",), history_filter="click = 1"))
    expected = log_oracle.expected_requests(
        rows, labels=("click",), in_history=lambda row: row["click"] == 1
    )
    assert log_oracle.prepared_requests(folder) == log_oracle.without_user(expected)


def test_without_labels_next_items_stand_against_sampled_ones(tmp_path, small_shards):
    rows = random_rows()
    log = write(tmp_path / "log.parquet", rows)
    folder = prepare(
        tmp_path, config(log, history_filter="kind = 'view'", negatives_per_positive=2)
    )
    viewed = [r for r in rows if r["kind"] == "view"]
    # Only the columns that are read make rows equal.
    viewed = [{n: r[n] for n in ("user", "item", "time")} for r in viewed]
    positives, wanted, found = collections.Counter(), 0, 0
    for when, history, targets in log_oracle.prepared_requests(folder).elements():
        items = [item for item, _ in targets]
        assert len(set(items)) == len(items)
        bought = tuple(sorted((item,) for item, label in targets if label))
        sampled = {item for item, label in targets if not label}
        recent = {r["item"] for r in viewed if when - 7 * 86_400 <= r["time"] < when}
        assert sampled <= recent
        if len(recent) > 8 * len(bought):
            wanted, found = wanted + 2 * len(bought), found + len(sampled)
        positives[when, history, bought] += 1
    assert wanted == found > 300
    expected = log_oracle.without_user(log_oracle.expected_requests(viewed))
    assert positives == collections.Counter(
        {(t, h, tuple(sorted(set(bought)))): n for (t, h, bought), n in expected.items()}
    )


def test_features_are_fitted_on_training_events(tmp_path):
    rows = random_rows(num_rows=400)
    log = write(tmp_path / "log.parquet", rows)
    items = write(
        tmp_path / "items.csv",
        [{"item": i * 7, "colour": f"c{i % 3}", "weight": i / 2} for i in range(30)]
        + [{"item": 0, "colour": "second row of an item", "weight": 99}],
    )
    users = write(
        tmp_path / "users.parquet",
        [{"user": str(i * 1_000_003 - 5), "age": i % 4} for i in range(20)],
    )
    folder = prepare(
        tmp_path,
        config(
            log,
            labels=("click",),
            target_features=("place=kind",),
            history_features=("price", "cheap=price < 2"),
            items=(items,),
            item_features=("colour", "weight:numeric"),
            users=(users,),
            user_features=("age",),
            min_count=2,
            num_oov=3,
        ),
    )
    dataset = RequestDataset(folder)
    assert dataset.schema == Schema(
        history=("item", "colour", "weight", "place", "price", "cheap", "click"),
        target=("item", "colour", "weight", "place", "log_popularity"),
        request=("hour", "weekday", "age"),
        vocabularies=dataset.schema.vocabularies,
        tasks=("click",),
    )
    metadata, origin = dataset.metadata, dataset.metadata["time_origin"]
    columns = ("user", "item", "time", "click", "kind", "price")
    rows = [
        dict(zip(columns, v, strict=True)) for v in {tuple(r[n] for n in columns) for r in rows}
    ]
    train = [r for r in rows if r["time"] - origin < metadata["validation_start"]]
    count = collections.Counter(r["item"] for r in train)
    known = sorted(i for i in range(0, 280, 7) if count[i] >= 2)
    sizes = dataset.schema.vocabularies
    assert sizes["item"] == len(known) + 3
    assert sizes["place"] == 2 + 3
    assert sizes["colour"] == 3 + 3
    assert sizes["cheap"] == 2 + 3
    price = [r["price"] for r in train if r["price"] is not None]
    weights = [i / 2 for i in range(30) if count[i * 7]]
    item_id = {item: i for i, item in enumerate(known)}
    by_item = {}
    seen = 0
    for u in range(len(dataset)):
        record = dataset.record(u)
        for k, item in enumerate(record.history["item"]):
            by_item.setdefault(int(item), []).append(
                (record.history["colour"][k], record.history["weight"][k])
            )
        expected = (np.array([*price, np.mean(price)]) - np.mean(price)) / np.std(price)
        assert np.isin(record.history["price"].round(4), expected.astype(np.float32).round(4)).all()
        clock = (record.request_time + origin) // 3_600
        np.testing.assert_array_equal(record.request["hour"], clock % 24)
        np.testing.assert_array_equal(record.request["weekday"], (clock // 24 + 3) % 7)
        seen += len(record.event_time)
    assert seen == len(rows)
    for item in range(30):
        if item * 7 in item_id:
            ((colour, weight),) = set(by_item[item_id[item * 7]])
            assert colour == item % 3
            assert weight == pytest.approx(
                (item / 2 - np.mean(weights)) / np.std(weights), abs=1e-5
            )
    unknown = item_id[max(known)]  # items from 30 on are not in the table
    assert {c for c, _ in by_item[unknown]} == {3}
    popularity = {item_id[i]: np.log1p(count[i]) / 4 - 1 for i in known}
    record = dataset.record(0)
    for item, value in zip(record.target["item"], record.target["log_popularity"], strict=True):
        if item < len(known):
            assert value == pytest.approx(popularity[item], abs=1e-6)


def with_items(tmp_path, *files):
    """A log whose item table has these files."""
    for k, content in enumerate(files):
        (tmp_path / f"items-{k}.csv").write_bytes(b"item,colour\n" + content)
    items = tuple(str(tmp_path / f"items-{k}.csv") for k in range(len(files)))
    log = write(tmp_path / "log.csv", random_rows(20))
    return LogSource.open(config(log, items=items, item_features=("colour",)))


def test_of_rows_with_one_id_in_several_files_the_first_is_kept(tmp_path):
    opened = with_items(tmp_path, b"1,red\n2,green\n", b"2,late\n3,blue\n")
    table = read_side_table(opened, "items")
    assert table.rows["feature_colour"].to_pylist() == ["red", "green", "blue"]
    assert table.num_repeated == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"3,blue\n4,a,b\n", r"row 1 \(.*row has 3 columns, not 2: 4,a,b; mend or remove it"),
        (b"\xff,blue\n", r"row 0 \(.*text is not UTF-8: item: .xff; mend or remove it"),
    ],
)
def test_a_wrong_row_of_the_item_table_is_an_error(tmp_path, content, message):
    opened = with_items(tmp_path, b"1,red\n", content)
    with pytest.raises(UserError, match=rf"^items: .*items-1\.csv: {message}$"):
        read_side_table(opened, "items")


def test_the_fingerprint_is_of_the_files_as_they_were_at_first(tmp_path):
    opened = with_items(tmp_path, b"1,red\n")
    before = opened.fingerprint
    (tmp_path / "items-0.csv").write_bytes(b"item,colour\n1,another red\n")
    assert opened.fingerprint == before
    assert LogSource.open(opened.config).fingerprint != before


def test_files_and_order_of_rows_do_not_matter(tmp_path, small_shards):
    rows = random_rows()
    one = write(tmp_path / "one.parquet", rows)
    shuffled = [*rows, *rows[:50]]  # some of them twice
    random.Random(1).shuffle(shuffled)
    several = tmp_path / "several"
    for k in range(3):
        write(several / f"day={k}" / "part.parquet", shuffled[k::3])
    (several / "_SUCCESS").touch()
    first = prepare(tmp_path, config(one, labels=("click",)), "one")
    options = config(str(several), labels=("click",))
    second = prepare(tmp_path, options, "several")
    assert log_oracle.prepared_requests(first) == log_oracle.prepared_requests(second)
    # Of the same number of shards, files are equal to the byte.
    if len(log_oracle.digests(first)) == len(log_oracle.digests(second)):
        assert [*log_oracle.digests(first).values()] == [*log_oracle.digests(second).values()]
    profile = (second / "profile.txt").read_text()
    assert re.search(r"^rejected rows +0\nequal to another row +\d+$", profile, re.MULTILINE)


def test_csv_gives_what_parquet_gives(tmp_path):
    rows = random_rows()
    parquet = write(tmp_path / "log.parquet", rows)
    text = write(tmp_path / "log.csv", rows)
    a = prepare(tmp_path, config(parquet, labels=("click", "buy"), request_id="request"), "a")
    b = prepare(tmp_path, config(text, labels=("click", "buy"), request_id="request"), "b")
    as_text = collections.Counter()
    for (when, history, targets), count in log_oracle.prepared_requests(a).items():
        history = tuple(sorted((t, str(item)) for t, item in history))
        targets = tuple(sorted((str(item), *label) for item, *label in targets))
        as_text[when, history, targets] += count
    assert log_oracle.prepared_requests(b) == as_text


@pytest.mark.parametrize(
    ("unit", "values"),
    [
        ("s", lambda t: pa.array(t)),
        ("ms", lambda t: pa.array([x * 1_000 + 999 for x in t])),
        ("us", lambda t: pa.array([x * 1_000_000 + 1 for x in t])),
        ("double", lambda t: pa.array([x + 0.75 for x in t])),
        ("timestamp", lambda t: pa.array([x * 1_000 for x in t], pa.timestamp("ms", tz="UTC"))),
        ("text", lambda t: pa.array([time.strftime("%Y-%m-%dT%H:%M:%S+02:00", time.gmtime(x + 7200))
                                     for x in t])),
    ],
)  # fmt: skip
def test_units_of_time(tmp_path, unit, values):
    rows = random_rows(200)
    when = [r["time"] for r in rows]
    log = write(tmp_path / f"{unit}.parquet", rows, ts=values(when))
    folder = prepare(tmp_path, config(log, timestamp="ts", labels=("click",)))
    expected = log_oracle.expected_requests(rows, labels=("click",))
    found = log_oracle.prepared_requests(folder)
    assert {t for t, *_ in found} == {t for _, t, *_ in expected}


def test_splits_by_date_and_by_share(tmp_path):
    rows = [
        {"user": u, "item": u % 7, "time": T0 + 60 * i} for i, u in enumerate([*range(50)] * 20)
    ]
    log = write(tmp_path / "log.parquet", rows)
    folder = prepare(
        tmp_path,
        config(log, validation_start="0.5", test_start="2023-11-15 13:00"),
    )
    dataset = RequestDataset(folder)
    origin = dataset.metadata["time_origin"]
    assert dataset.metadata["test_start"] + origin == 1_700_053_200
    share = np.mean([r["time"] < dataset.metadata["validation_start"] + origin for r in rows])
    assert share == pytest.approx(0.5, abs=0.002)
    index = dataset.index
    test = index.request_time >= dataset.metadata["test_start"]
    np.testing.assert_array_equal(index.split == 2, test)
    assert test.any()


BAD = b"""user,item,time,click
1,a,1700000000,1
1,b,1700000100,0
2,a,1700000200,1
,a,1700000300,1
3,,1700000400,0
4,a,inf,1
4,a,yesterday,1
4,a,,1
4,a,-5,1
4,\xff\xfe,1700000600,1
4,a,1700000700
4,a,1700000800,1,1
1,a,1700000000,1
9223372036854775808,c,1700000900,0
9223372036854775809,c,1700001000,0
5,a,1700001100,0
"""


def test_rows_that_cannot_be_used_are_counted_and_kept_aside(tmp_path):
    log = tmp_path / "log.csv"
    log.write_bytes(BAD)
    folder = prepare(
        tmp_path,
        config(
            str(log), labels=("click",), validation_start="0.4", test_start="0.7", allow_odd=0.6
        ),
    )
    expected = {
        "user is missing or no id": 1,
        "item is missing or no id": 1,
        "time is not finite": 1,
        "time is neither a number nor a date": 1,
        "time is missing": 1,
        "time is outside 1970 to 2106": 1,
        "text is not UTF-8": 1,
        "row has 3 columns, not 4": 1,
        "row has 5 columns, not 4": 1,
        "equal to another row": 1,
    }
    notes = json.loads((folder / "metadata.json").read_text())["notes"]
    assert notes["rows_left_out"] == expected
    with open(folder.parent / "rejected_rows.csv") as file:
        rejected = {row["reason"]: row for row in csv.DictReader(file)}
    assert rejected.keys() == expected.keys() - {"equal to another row"}
    lines = BAD.decode("latin-1").splitlines()[1:]
    assert lines[int(rejected["time is not finite"]["row"])] == "4,a,inf,1"
    assert lines[int(rejected["row has 5 columns, not 4"]["row"])] == "4,a,1700000800,1,1"
    assert json.loads(rejected["time is missing"]["content"])["user"] == "4"
    assert len(RequestDataset(folder)) == 5  # 1, 2, 5 and the two large numbers, not made one
    assert re.search(r"users with one event +4\n", (folder / "profile.txt").read_text())


def test_ids_beyond_63_bits_and_ids_that_pandas_made_floats(tmp_path):
    rows = [{"item": i % 5, "time": T0 + 60 * i} for i in range(40)]
    big = write(tmp_path / "big.parquet", rows,
                user=pa.array([2**63 + i % 4 for i in range(40)], pa.uint64()))  # fmt: skip
    assert len(RequestDataset(prepare(tmp_path, config(big), "big"))) == 4
    users = [None if i == 7 else float(i % 4) for i in range(40)]
    floats = write(tmp_path / "float.parquet", rows, user=pa.array(users))
    folder = prepare(tmp_path, config(floats), "floats")
    assert len(RequestDataset(folder)) == 4
    notes = json.loads((folder / "metadata.json").read_text())["notes"]
    assert notes["rows_left_out"] == {"user is missing or no id": 1}


def test_columns_of_different_types_in_different_files(tmp_path):
    rows = [{"user": i % 4, "item": i % 5, "time": T0 + 60 * i} for i in range(40)]
    write(tmp_path / "log" / "a.parquet", rows[:20])
    write(tmp_path / "log" / "b.parquet", [r | {"item": str(r["item"])} for r in rows[20:]])
    (tmp_path / "log" / "c.parquet").touch()  # an empty file is skipped
    folder = prepare(tmp_path, config(str(tmp_path / "log")))
    assert sorted(log_oracle.feature_ids(folder, "item")) == ["0", "1", "2", "3", "4"]


DECIMALS = pa.array([decimal.Decimal(f"{i}.00") for i in range(20)])
LONG = pa.array([decimal.Decimal(f"{10**17 + i}.0") for i in range(20)])  # no floats hold them
WIDE_DECIMALS = DECIMALS.cast(pa.decimal256(50, 2))
UUIDS = [uuid.UUID(int=i + 2**127) for i in range(20)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (DECIMALS, list(range(20))),
        (LONG, [10**17 + i for i in range(20)]),
        (DECIMALS, pa.array(range(20), pa.uint64())),
        (DECIMALS, [float(i) for i in range(20)]),
        (DECIMALS, [str(i) for i in range(20)]),
        (DECIMALS, DECIMALS.cast(pa.decimal128(12, 4))),
        (WIDE_DECIMALS, list(range(20))),
        (pa.array(np.arange(20), pa.float16()), list(range(20))),
    ],
)
def test_equal_ids_of_different_types_are_one(tmp_path, first, second):
    rows = [{"user": i % 4, "time": T0 + 60 * i} for i in range(40)]
    write(tmp_path / "log" / "a.parquet", rows[:20], item=pa.array(first))
    write(tmp_path / "log" / "b.parquet", rows[20:], item=pa.array(second))
    opened = LogSource.open(config(str(tmp_path / "log")))
    items = collections.Counter(
        str(item)
        for part in opened.log.parts
        for events in read_events(opened, part)
        for item in events.table["item"].to_pylist()
    )
    assert items == {str(int(i)): 2 for i in pa.array(second).to_pylist()}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pa.array([u.bytes for u in UUIDS], pa.uuid()), [str(u) for u in UUIDS]),
        (pa.array([u.bytes for u in UUIDS], pa.binary(16)), [u.hex for u in UUIDS]),
        (pa.array([u.bytes for u in UUIDS], pa.binary(16)), list(range(20))),
    ],
)
def test_types_that_cannot_be_compared_are_refused(tmp_path, first, second):
    rows = [{"user": i % 4, "time": T0 + 60 * i} for i in range(40)]
    write(tmp_path / "log" / "a.parquet", rows[:20], item=first)
    write(tmp_path / "log" / "b.parquet", rows[20:], item=pa.array(second))
    with pytest.raises(UserError, match=r"'item' is a .* in one file and a .*b\.parquet"):
        LogSource.open(config(str(tmp_path / "log")))


def test_floats_that_are_no_ids_are_explained(tmp_path):
    rows = [{"user": i % 4 + 2.0**60, "item": i % 5, "time": T0 + 60 * i} for i in range(40)]
    with pytest.raises(UserError, match=r"40: user is missing or no id.*whole, and below 2\^53"):
        prepare(tmp_path, config(write(tmp_path / "log.parquet", rows)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"item_id": "itme"}, "no column 'itme'; did you mean .*'item'"),
        ({"labels": ("like=kind >= 4",)}, "like: .*explicit cast"),
        ({"labels": ("like=no_such + 1",)}, "no_such"),
        ({"history_filter": "kind ="}, "history_filter: .*syntax error"),
        ({"user_id": "price"}, "user"),
        ({"validation_start": "1.5"}, "validation_start is 1.5; give a share"),
        ({"validation_start": "soon"}, "validation_start is 'soon'"),
        ({"test_start": "2031-01-01"}, "no requests are left for test"),
    ],
)
def test_mistakes_in_the_description(tmp_path, options, message):
    log = write(tmp_path / "log.parquet", random_rows(50))
    if options == {"user_id": "price"}:  # prices are no ids, so that no user is left
        options = {"user_id": "half=price + 0.5"}
        message = "rows of the log .* cannot be used: .*half is missing or no id"
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, config(log, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log": ()}, "log is empty"),
        ({"time_unit": "minutes"}, "time_unit is 'minutes'"),
        ({"min_count": 0}, "min_count is 0"),
        ({"items": ("x.csv",)}, "items and item_features need each other"),
        ({"target_features": ("place",)}, "target_features need labels"),
        ({"request_id": "request"}, "request_id needs labels"),
        ({"history_features": ("hour",)}, "named twice.*: hour"),
        ({"labels": ("a", "a=b")}, "named twice.*: a"),
    ],
)
def test_descriptions_that_cannot_be_meant(options, message):
    with pytest.raises(UserError, match=message):
        LogConfig(**({"log": ("log.csv",)} | options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "there is no file or folder"),
        (lambda p: p.touch(), "every file is empty"),
        (lambda p: p.write_bytes(b"user,item,time\n"), "no row of the log can be used"),
        (lambda p: p.write_bytes(b"user,item,user,time\n1,2,3,4\n"), "2 columns called 'user'"),
        (lambda p: (p.mkdir(), write(p / "a.csv", random_rows(5)),
                    write(p / "b.parquet", random_rows(5))), "files are Parquet and CSV"),
        (lambda p: (p.mkdir(), (p / "a.parquet").write_bytes(b"PAR1 no")), "cannot be read"),
        (lambda p: (p.mkdir(), (p / "notes.md").touch()), "has no .parquet"),
    ],
)  # fmt: skip
def test_logs_that_cannot_be_read(tmp_path, make, message):
    path = tmp_path / "log.csv"
    make(path)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, config(str(path)))


def test_a_nested_column_is_named(tmp_path):
    log = write(tmp_path / "log.parquet", [{"user": 1, "item": [1, 2], "time": T0}])
    with pytest.raises(UserError, match="column 'item' is a list"):
        prepare(tmp_path, config(log))


# Prepares the log given as argument, in many small steps, each of which takes a while.
SCRIPT = """
import sys, time, pathlib
from stca_jax.data import preparation, running
from stca_jax.data.interaction_log import source, staging
from stca_jax.data.interaction_log.interaction_log_dataset_builder import make_builder
from stca_jax.data.interaction_log.log_config import LogConfig
from stca_jax.data.record_files import RecordFiles
source._EVENTS_PER_SHARD, source._ROWS_PER_PART, source._ROWS_PER_BLOCK = 150, 100, 30
for cls, name in ((staging.Staging, "read_part"), (staging.Staging, "sort_shard"),
                  (staging.Staging, "count_values"), (staging.Staging, "order_events"),
                  (RecordFiles, "write")):
    def slow(self, index, step=getattr(cls, name), name=name):
        step(self, index)
        print(name, index, file=sys.stderr, flush=True)
        time.sleep(float(sys.argv[3]))
    setattr(cls, name, slow)
config = LogConfig(log=(sys.argv[1],), user_id="user", item_id="item", timestamp="time",
                   labels=("click",), item_trends=("1h", "7d"), min_count=1)
data_dir = pathlib.Path(sys.argv[2])
builder = make_builder("mine", config, data_dir)
if sys.argv[4:]:
    builder.run = running.beam_runner(sys.argv[4:])
preparation.prepare_builder(builder, data_dir)
print("whole", file=sys.stderr)
"""


def start(log, data_dir, seconds, *beam_options):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, log, str(data_dir), str(seconds), *beam_options],
        stderr=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(TESTS.parent.parent), "HOME": str(data_dir)},
    )


def test_a_killed_preparation_goes_on(tmp_path, small_shards):
    log = write(tmp_path / "log.parquet", random_rows())
    expected = prepare(tmp_path, config(log, labels=("click",), item_trends=("1h", "7d")))

    folder = tmp_path / "killed" / "interaction_log" / "mine"
    written = {}
    for step in ("read_part 2", "sort_shard 1", "count_values 0", "order_events 0", "write 1"):
        process = start(log, tmp_path / "killed", 0.1)
        for line in process.stderr:
            if line.strip() == step:
                process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / "1.0.0").exists()
        done = [
            p for p in folder.glob("staging/**/*") if p.suffix in (".json", ".sorted", ".counts")
        ]
        finished = {p: p.stat().st_mtime_ns for p in done}
        assert finished.items() >= written.items()  # nothing was done twice
        written = finished
    process = start(log, tmp_path / "killed", 0)
    assert process.communicate()[1].splitlines()[-1] == "whole"
    assert log_oracle.digests(folder / "1.0.0") == log_oracle.digests(expected)
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "1.0.0", "rejected_rows.csv"]


def test_beam_writes_the_same_records(tmp_path, small_shards):
    log = write(tmp_path / "log.parquet", random_rows())
    here = prepare(tmp_path, config(log, labels=("click",), item_trends=("1h", "7d")))
    # In a process of its own, since Beam leaves threads behind.
    process = start(log, tmp_path / "beam", 0, "--runner=DirectRunner")
    assert process.communicate()[1].splitlines()[-1] == "whole"
    beam = tmp_path / "beam" / "interaction_log" / "mine" / "1.0.0"
    assert log_oracle.digests(here) == log_oracle.digests(beam)
    files = ("features.json", "vocabularies.npz", "items.npz", "users.npz", "trends.npz")
    for name in ("profile.txt", *(f"features/{name}" for name in files)):
        assert (here / name).read_bytes() == (beam / name).read_bytes()


def test_columns():
    assert Column.parse("a b") == Column("a b", "a b", False, "")
    assert Column.parse("watch:numeric") == Column("watch", "watch", False, "numeric")
    assert Column.parse("x=a::DOUBLE > 4") == Column("x", "a::DOUBLE > 4", True, "")
    assert Column.parse("x=a / 2:categorical") == Column("x", "a / 2", True, "categorical")
    assert Column.parse("p=price::numeric") == Column("p", "price::numeric", True, "")
    assert Column.parse("p=a::text:categorical") == Column("p", "a::text", True, "categorical")
    assert Column.parse('"a,b:numeric"') == Column("a,b:numeric", "a,b:numeric", False, "")
    assert Column.parse('"say ""x""":numeric') == Column('say "x"', 'say "x"', False, "numeric")
    assert split_list("a, b=f(c, 'd,e'), g") == ["a", "b=f(c, 'd,e')", "g"]
    assert split_list("""a, "the user's, id" """) == ["a", '"the user\'s, id"']
    with pytest.raises(UserError, match="has a ' that is not closed"):
        split_list("user's,b")
