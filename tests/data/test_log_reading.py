"""Logs as the world writes them: each is read right, or refused with a way out."""

from __future__ import annotations

import collections
import contextlib
import datetime
import decimal
import errno
import gzip
import json
import os
import re
import resource
import uuid

import log_oracle
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stca_jax.data import preparation
from stca_jax.data.interaction_log import source
from stca_jax.data.interaction_log.events import LogSource, read_events
from stca_jax.data.interaction_log.interaction_log_dataset_builder import make_builder
from stca_jax.data.interaction_log.log_config import LogConfig
from stca_jax.errors import UserError
from stca_jax.input.dataset import RequestDataset

T0 = 1_700_000_000
HOURS = [T0 + 3_600 * k for k in range(60)]


def config(*log, **options):
    names = {"user_id": "user", "item_id": "item", "timestamp": "time", "min_count": 1}
    return LogConfig(log=tuple(map(str, log)), **(names | options))


def columns(**replaced):
    table = {"user": [k % 6 for k in range(60)], "item": [k % 7 for k in range(60)], "time": HOURS}
    return table | replaced


def parquet(tmp_path, **replaced):
    file = tmp_path / "log.parquet"
    pq.write_table(pa.table(columns(**replaced)), file)
    return file


def text(tmp_path, name="log.csv", delimiter=",", encoding="utf-8", header=None, **replaced):
    table = columns(**replaced)
    lines = [header or delimiter.join(table)]
    lines += [delimiter.join(map(str, row)) for row in zip(*table.values(), strict=True)]
    (tmp_path / name).write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return tmp_path / name


def events(log_config):
    """The events of a log: (user, item, time in ns), and how many rows were left out and why."""
    opened = LogSource.open(log_config)
    found, reasons = [], collections.Counter()
    for part in opened.log.parts:
        for block in read_events(opened, part):
            table = block.table.select(["user", "item", "time"])
            found += [tuple(row.values()) for row in table.to_pylist()]
            reasons += block.reasons
    return found, reasons


def prepare(tmp_path, log_config, name="mine"):
    return preparation.prepare_builder(
        make_builder(name, log_config, tmp_path / "d"), tmp_path / "d"
    )


def seconds(found):
    return [t // 10**9 for *_, t in found]


@pytest.mark.parametrize(
    "values",
    [
        [int(f"{datetime.date(2024, 1 + k % 12, 1 + k % 28):%Y%m%d}") for k in range(60)],
        [45_000 + k / 24 for k in range(60)],
        [474_000 + k for k in range(60)],
        pa.array([3_600 * (k % 24) for k in range(60)], pa.time32("s")),
        pa.array(np.array(HOURS, np.float32)),
        pa.array([f"{np.float32(t + 777 * k):.0f}" for k, t in enumerate(HOURS)]),
        pa.array([t // 1_000 for t in HOURS], pa.timestamp("us")),
        [0] * 60,
    ],
    ids=["yyyymmdd", "excel", "hours", "time", "float32", "was float32", "pandas unit", "zeros"],
)  # fmt: skip
def test_times_that_would_be_of_1970_are_errors(tmp_path, values):
    with pytest.raises(UserError, match=r"--time|cannot be used"):
        prepare(tmp_path, config(parquet(tmp_path, time=values)))


@pytest.mark.parametrize(
    ("values", "sql", "expected"),
    [
        ([20240301] * 60, "try_strptime(t::VARCHAR, '%Y%m%d')", 1_709_251_200),
        ([45352.5] * 60, "TIMESTAMP '1899-12-30' + to_microseconds((86400000000 * t)::BIGINT)",
         1_709_294_400),
        (["03/01/2024 06:00"] * 60, "try_strptime(t, '%m/%d/%Y %H:%M')", 1_709_272_800),
        ([datetime.time(6)] * 60, "DATE '2024-03-01' + t", 1_709_272_800),
    ],
)  # fmt: skip
def test_sql_reads_any_time(tmp_path, values, sql, expected):
    log = parquet(tmp_path, t=values)
    found, reasons = events(config(log, timestamp=f"time={sql}"))
    assert set(seconds(found)) == {expected}
    assert not reasons


def test_sql_reads_ids(tmp_path):
    log = text(tmp_path, item=[f" P{k % 7}.0" for k in range(60)])
    options = {"item_id": "item=regexp_extract(item, '[0-9]+')::BIGINT", "user_id": "u='u' || user"}
    found, _ = events(config(log, **options))
    assert [row[:2] for row in found] == [(f"u{k % 6}", k % 7) for k in range(60)]


@pytest.mark.parametrize("kind", ["numbers", "text", "dates", "units"])
def test_a_second_kind_of_time_is_an_error(tmp_path, kind):
    times = [t * 1_000 if k >= 58 else t for k, t in enumerate(HOURS)]
    if kind == "dates":
        dates = (datetime.datetime.fromtimestamp(t, datetime.UTC) for t in HOURS[50:])
        times = [*map(str, HOURS[:50]), *(f"{date:%Y-%m-%d %H:%M:%S}" for date in dates)]
    if kind == "units":
        times = [t * 1_000 ** (k % 4 if k >= 50 else 0) for k, t in enumerate(HOURS)]
    make = parquet if kind in ("numbers", "units") else text
    log = make(tmp_path, time=times)
    with pytest.raises(UserError, match=r"several kinds.*row 5[018] of .*--time_unit") as error:
        prepare(tmp_path, config(log))
    offered = re.search(r'--timestamp="(.*)"$', str(error.value))
    assert offered is not None
    assert seconds(events(config(log, timestamp=offered[1]))[0]) == HOURS
    if kind == "numbers":
        found, reasons = events(config(log, time_unit="s"))
        assert len(found) == 58
        assert reasons == {"time is outside 1970 to 2106": 2}


@pytest.mark.parametrize("times", [
    pa.array([253_402_214_400, *HOURS[1:]], pa.timestamp("s")),
    pa.array([253_402_214_400_000, *(1_000 * t for t in HOURS[1:])], pa.timestamp("ms")),
    pa.array([2**62, *(1_000 * t for t in HOURS[1:])], pa.timestamp("ms")),
    pa.array([2_932_896, *(19_000 + k for k in range(59))], pa.date32()),
    pa.array(["9999-12-31", *(f"2023-11-{1 + k % 30:02d}" for k in range(59))]),
], ids=["9999 s", "9999 ms", "beyond", "9999 day", "9999 text"])  # fmt: skip
def test_dates_that_stand_for_never_are_rejected(tmp_path, times):
    _, reasons = events(config(parquet(tmp_path, time=times)))
    assert reasons == {"time is outside 1970 to 2106": 1}


@pytest.mark.parametrize("unit", [1, 10**3, 10**9])
def test_whole_hours_and_days_in_float64_are_not_rounded(tmp_path, unit):
    for step in (3_600, 86_400):
        times = [float((T0 // step + k) * step * unit) for k in range(60)]
        found, _ = events(config(text(tmp_path, time=times)))
        assert seconds(found) == [t // unit for t in map(int, times)]


@pytest.mark.parametrize("sql", [
    "lag(item) OVER (PARTITION BY user ORDER BY time)", "row_number() OVER ()", "count(*)",
    "(SELECT 1)", "item IN (SELECT 3)",
])  # fmt: skip
def test_sql_that_looks_at_other_rows_is_refused(tmp_path, sql):
    for options in ({"history_features": (f"x={sql}",)}, {"labels": (f"x={sql}",)},
                   {"item_id": f"x={sql}"}, {"history_filter": sql}):  # fmt: skip
        with pytest.raises(UserError, match="looks at other rows"):
            LogSource.open(config(parquet(tmp_path), **options))
    kept = 'x=CASE WHEN item IN (3, 4) THEN \'"class":"WINDOW"\' END'
    LogSource.open(config(parquet(tmp_path), history_features=(kept,)))


def test_zero_is_a_time_only_in_a_log_that_counts_from_it(tmp_path):
    _, reasons = events(config(parquet(tmp_path, time=[0, 0, *HOURS[2:]]), time_unit="s"))
    assert reasons == {"time is 0, which stands for a missing time": 2}
    log = parquet(tmp_path, time=list(range(60)))
    assert seconds(events(config(log, time_unit="s"))[0]) == list(range(60))


@pytest.mark.parametrize("unit", ["ms", "us", "ns", "float", "timestamp", "csv ns"])
def test_order_within_a_second_and_what_differs_there_are_kept(tmp_path, unit):
    per = {"ms": 10**3, "float": 10**3, "us": 10**6, "timestamp": 10**9}.get(unit, 10**9)
    items = [9, 5, 7, 9]
    ticks = [(T0 + 86_400 * d) * per + (k + 1) * per // 1_000 for d in range(20) for k in range(4)]
    values = [t / per for t in ticks] if unit == "float" else ticks
    if unit == "timestamp":
        values = pa.array(ticks, pa.timestamp("ns"))
    # The first user's items, and others' of which negatives can be sampled.
    item = [k + 10 * (d % 4 > 0) for d in range(20) for k in items]
    table = {"user": [d % 4 for d in range(20) for _ in items], "item": item, "time": values}
    log = (text if unit == "csv ns" else parquet)(tmp_path, **table)
    folder = prepare(tmp_path, config(log, time_unit="auto"))
    value = {k: int(v) for v, k in log_oracle.feature_ids(folder, "item").items()}
    record = RequestDataset(folder).record(0)
    assert [value[int(i)] for i in record.history["item"]] == items * 5


def test_a_row_too_far_away_in_time_is_named(tmp_path):
    dates = [datetime.datetime.fromtimestamp(t, datetime.UTC) for t in HOURS]
    dates[41] = dates[41].replace(year=2093)
    log = parquet(tmp_path, time=pa.array(dates, pa.timestamp("us")))
    with pytest.raises(UserError, match=rf"2093-\d+-\d+ .*\(row 41 of {log}\)"):
        prepare(tmp_path, config(log))


@pytest.mark.parametrize(
    ("name", "delimiter", "encoding", "options"),
    [
        ("log.tsv", "\t", "utf-8", {}),
        ("log.inter", "\t", "utf-8", {}),
        ("LOG.CSV", ",", "utf-8", {}),
        ("log.csv", ";", "utf-8", {}),
        ("log.txt", "|", "utf-8", {}),
        ("log.dat", "\t", "utf-8", {}),
        ("log", "~", "utf-8", {"delimiter": "~"}),
        ("log.csv", "\t", "utf-8", {"delimiter": "tab"}),
        ("log.csv", ",", "utf-8-sig", {}),
        ("log.csv", ",", "utf-16", {}),
        ("log.csv", ";", "utf-16-le", {}),
        ("log.csv", ",", "utf-16-be", {}),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_text_files(tmp_path, name, delimiter, encoding, options, packed):
    log = text(tmp_path, name, delimiter, encoding, user=[f"ü{k}" for k in range(60)])
    if packed:  # whatever the name says
        log.write_bytes(gzip.compress(log.read_bytes()))
    found, reasons = events(config(log, **options))
    assert found == [(f"ü{k}", str(k % 7), HOURS[k] * 10**9) for k in range(60)]
    assert not reasons


def test_parquet_under_another_name(tmp_path):
    log = parquet(tmp_path).rename(tmp_path / "log.csv")
    assert len(events(config(log))[0]) == 60


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04....", "ZIP"),
        (b"\x00\x01\x02\x00" * 50, "not text"),
        (b"user::item::time\n1::2::3\n", "'::', which is two"),
        (b"us\xe9r,item,time\n1,2,3\n", "header is not UTF-8"),
        # Two workers must collect the same tests, so no clock enters their names.
        (
            gzip.compress(b"user,item,time\n" + b"1,2,1700000000\n" * 9_999, mtime=0)[:-30],
            "cannot be read",
        ),
        (
            gzip.compress(b"user,item,time\n1,2,3\n", mtime=0)[:-12],
            r"log\.csv cannot be read: gzip",
        ),
    ],
)
def test_files_that_are_no_table(tmp_path, content, message):
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, config(tmp_path / "log.csv"))


def test_quote_marks_in_tsv_are_text_and_in_csv_swallowed_lines_are_counted(tmp_path):
    titles = [f"song {k}" for k in range(60)]
    titles[3], titles[50] = '"Heroes', 'ends"'
    assert len(events(config(text(tmp_path, "a.tsv", "\t", title=titles)))[0]) == 60
    with pytest.raises(UserError, match=r"60 lines gave 13 rows.*--quote=none"):
        prepare(tmp_path, config(text(tmp_path, "a.csv", title=titles)))
    log = config(text(tmp_path, "a.csv", title=titles), quote="none")
    assert len(events(log)[0]) == 60


@pytest.mark.parametrize("make", [text, parquet])
def test_null_words(tmp_path, make):
    words = ["NULL", "nan", "None", r"\N", "null", "  "]
    log = make(tmp_path, user=[words[k] if k < 6 else f"u{k}" for k in range(60)])
    assert events(config(log))[1] == {"user is missing or no id": 6}
    found, reasons = events(config(log, null_words=("u7",)))
    assert reasons == {"user is missing or no id": 2}  # it, and the blanks
    assert found[0][0] == "NULL"


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"user": [None] * 10 + [k % 5 for k in range(50)]}, "10 of 60 rows.*user is missing"),
        ({"user": [1] * 25 + list(range(35)), "item": list(range(60))}, "one user has 26 of 60"),
        ({"time": [T0 + 3_600 * (k // 12 * 12) for k in range(60)],
          "item": [k % 2 for k in range(60)]},
         r"30 of 60 rows \(50.0%\) are equal"),
    ],
)  # fmt: skip
def test_a_large_share_of_anything_odd_must_be_allowed(tmp_path, replaced, message):
    log = parquet(tmp_path, **replaced)
    with pytest.raises(UserError, match=message + ".*--allow_odd="):
        prepare(tmp_path, config(log))
    options = {"validation_start": "0.3", "test_start": "0.6", "allow_odd": 0.55}
    prepare(tmp_path, config(log, **options))


def test_names_that_differ_in_case_or_are_ours(tmp_path):
    log = parquet(
        tmp_path,
        **{"click": [k % 2 for k in range(60)], "Click": [k % 5 for k in range(60)],
           "__row__": [k % 3 for k in range(60)], "order": [k % 4 for k in range(60)],
           "a, \"b\" é": ["x"] * 60, "__ns__": [7] * 60},
    )  # fmt: skip
    names = ("Click", "__row__", "order", '"a, ""b"" é"', "sum=Click + click", "n=__ns__ + 1")
    folder = prepare(tmp_path, config(log, labels=("click",), history_features=names))

    def values(feature):
        return set(log_oracle.feature_ids(folder, feature))

    assert values("Click") == set(range(5))
    assert values("__row__") == set(range(3))
    assert values("order") == set(range(4))
    assert values('a, "b" é') == {"x"}
    assert values("sum") == {k % 2 + k % 5 for k in range(60)}
    assert values("n") == {8}
    with pytest.raises(UserError, match="CLICK is any of the columns click, Click"):
        LogSource.open(config(log, labels=("click",), history_features=("Click", "x=CLICK + 1")))


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    with pytest.raises(UserError, match="NAME="):
        config("log.csv", history_features=("a/b",))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([decimal.Decimal(k % 6) for k in range(60)], range(6)),
        (pa.array([decimal.Decimal(10**30 + k % 6) for k in range(60)], pa.decimal128(38, 0)),
         [str(10**30 + k) for k in range(6)]),
        ([decimal.Decimal(f"{k % 6}.00") for k in range(60)], range(6)),
        (pa.array([uuid.UUID(int=k % 6).bytes for k in range(60)], pa.uuid()),
         [str(uuid.UUID(int=k)) for k in range(6)]),
        (pa.array([uuid.UUID(int=k % 6).bytes for k in range(60)], pa.binary(16)),
         [uuid.UUID(int=k).hex for k in range(6)]),
    ],
)  # fmt: skip
def test_ids_of_other_types(tmp_path, ids, expected):
    found, reasons = events(config(parquet(tmp_path, user=ids)))
    assert [user for user, *_ in found[:6]] == list(expected)
    assert not reasons


def test_very_long_ids_are_rejected_in_small_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_BYTES_PER_BLOCK", 200_000)
    log = parquet(tmp_path, user=["x" * 20_000 + str(k) for k in range(60)])
    opened = LogSource.open(config(log))
    blocks = list(opened.log.blocks(opened.log.parts[0]))
    assert max(b.rows.num_rows for b in blocks) < 12
    with pytest.raises(UserError, match="user is longer than 1,000 characters"):
        prepare(tmp_path, config(log))


def test_no_usable_row_names_reasons_and_file(tmp_path):
    log = text(tmp_path, time=["11/14/2023 22:13"] * 60)
    with pytest.raises(UserError, match=r"60: time is neither a number nor a date "
                       rf"\(first: row 0 of {log}.*rejected_rows\.csv.*try_strptime"):  # fmt: skip
        prepare(tmp_path, config(log))


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    table = columns(user=[k % 59 for k in range(60)])
    log = parquet(tmp_path, **table)
    monkeypatch.setattr(source, "_EVENTS_PER_SHARD", 1)
    with free_files(16):
        folder = prepare(tmp_path, config(log, item_trends=("1d",)))
        dataset = RequestDataset(folder)
        assert len({dataset.record(u).user_id for u in range(len(dataset))}) == 59
    assert sum(f["records"] > 0 for f in dataset.metadata["record_files"].values()) > 30


@contextlib.contextmanager
def free_files(number):
    """Lets this process open so many more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = {int(name) for name in os.listdir("/proc/self/fd")}
    limit = next(n for n in range(soft) if n - sum(k < n for k in in_use) >= number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_hard_links_and_with_an_apostrophe_in_the_path(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    log = config(parquet(tmp_path))
    linked = prepare(tmp_path, log)
    monkeypatch.setattr(os, "link", refuse)
    moved = prepare(tmp_path / "it's [here]", log)
    files = [json.loads((f / "metadata.json").read_text())["record_files"] for f in (linked, moved)]
    assert files[0] == files[1]
    assert sorted(p.name for p in moved.parent.iterdir()) == [".lock", "1.0.0", "rejected_rows.csv"]


def test_what_fails_at_the_start_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="no column 'nobody'"):
        prepare(tmp_path, config(parquet(tmp_path), user_id="nobody"))
    assert not (tmp_path / "d").exists()


def test_a_home_folder_of_no_user_is_refused():
    with pytest.raises(UserError, match=r"log '~no-such-user/log\.csv': no such user"):
        LogSource.open(config("~no-such-user/log.csv"))


@pytest.mark.parametrize("address", ["gs://bucket/log.csv", "s3://b/log", "file:///tmp/log.csv"])
def test_addresses_are_refused(address):
    with pytest.raises(UserError, match="copy it to a local disk"):
        LogSource.open(config(address))
    with pytest.raises(UserError, match=r"data_dir .* is not a local path"):
        preparation.prepare("complete_journey", address)
