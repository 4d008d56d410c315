"""What of a log reaches the model is in the profile; where nothing does, preparing ends."""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from stca_jax.data import running
from stca_jax.data.interaction_log.events import LogSource
from stca_jax.data.interaction_log.log_config import LogConfig
from stca_jax.data.interaction_log.staging import Staging
from stca_jax.errors import UserError

T0 = 1_700_000_000


def stage(tmp_path, ids=None, price=None, **options):
    table = {"user": [k % 6 for k in range(100)], "item": [100 + k % 20 for k in range(100)],
             "time": [T0 + 3_600 * k for k in range(100)], "click": [k % 2 for k in range(100)],
             "price": price or [0.5] * 100}  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    if ids is not None:
        pq.write_table(pa.table({"item": ids, "cat": [0] * len(ids)}), tmp_path / "items.parquet")
        options |= {"items": (str(tmp_path / "items.parquet"),), "item_features": ("cat",)}
    names = {"user_id": "user", "item_id": "item", "timestamp": "time", "labels": ("click",)}
    names |= {"min_count": 1}
    log = LogConfig(log=(str(tmp_path / "log.parquet"),), **(names | options))
    return Staging(LogSource.open(log), tmp_path / "mine" / "staging", running.run_here)


@pytest.mark.parametrize(("texts", "numbers"), [
    (["$0.50", "1,234.00 USD", "-3.5", "4 kg"], [0.5, 1234, -3.5, 4]),
    (["0,5 €", "1.234,00", "-3,5", "1 000 000,25"], [0.5, 1234, -3.5, 1_000_000.25]),
    (["1,234", "12,345,678", "1", "12%"], [1234, 12_345_678, 1, 12]),
    (["3/5", "1", "12:30", "(7.5)", "2 of 3", "8 kg"], [None, 1, None, None, None, 8]),
    (["1e200", "-inf", "nan", "7", "8.5"], [None, None, None, 7, 8.5]),
])  # fmt: skip
def test_sql_that_is_offered_makes_numbers_of_texts(tmp_path, texts, numbers):
    many = [texts[k % len(texts)] for k in range(100)]
    with pytest.raises(UserError, match=r"price: \d+ of \d+ values .* are no numbers") as error:
        stage(tmp_path, price=many, history_features=("price:numeric",))
    option = pasted(str(error.value), "history_features")
    events = stage(tmp_path, price=many, history_features=(option,)).shard(0).events
    found = dict(zip(events["time"].to_pylist(), events["feature_price"].to_pylist(), strict=True))
    assert [found[T0 + 3_600 * k] for k in range(len(texts))] == numbers


def test_texts_that_no_rule_makes_numbers(tmp_path):
    many = [["low", "high"][k % 2] for k in range(100)]
    with pytest.raises(UserError, match=r"such as 'high', 'low'. Give SQL of your own: --history"):
        stage(tmp_path, price=many, history_features=("price:numeric",))


def test_missing_numbers_are_in_the_profile(tmp_path):
    prices = [k % 7 + 0.5 if k % 10 else None for k in range(100)]
    profile = stage(tmp_path, price=prices, history_features=("price:numeric",)).profile()
    assert "price: min 0.5, p50 3.5, p99 6.5, max 6.5, mean" in profile
    assert "missing in 10.1% and 9.5%, unreadable in 0.0% and 0.0%" in profile


def test_a_log_without_histories_warns(tmp_path):
    (warning,) = stage(tmp_path, history_filter="false").warnings
    assert "no request has a history" in warning


def test_no_item_with_an_id_of_its_own(tmp_path):
    with pytest.raises(UserError, match=r"item: none of 20 values occurs 5 times.*--min_count=1"):
        stage(tmp_path, min_count=5)
    assert "item: 20 of 20 values have ids of their own, in 100.0%" in stage(tmp_path).profile()


def test_ids_that_a_table_repeats_are_counted_and_many_are_an_error(tmp_path):
    profile = stage(tmp_path, [*range(100, 120), 100, 101]).profile()
    assert "; 2 of 22 rows (9.1%) repeat an id and are left out" in profile
    ids = [*range(100, 120), *range(100, 105)]  # as in a table of changes
    with pytest.raises(UserError, match=r"items: 5 of 25 rows \(20.0%\) repeat an id.*odd=0.20$"):
        stage(tmp_path, ids)
    assert (
        "20 of 20 items of the log are in the table"
        in stage(tmp_path, ids, allow_odd=0.2).profile()
    )


def with_tables(tmp_path, log_ids, table_ids, *, what="item", log_format="csv", **options):
    """A log of 100 events in which each id occurs, and a table of ids, as text of CSV or typed."""
    many = [log_ids[k % len(log_ids)] for k in range(100)]
    other = "user" if what == "item" else "item"
    table = {what: many, other: [k % 6 for k in range(100)], "click": [k % 2 for k in range(100)],
             "time": [T0 + 3_600 * k for k in range(100)]}  # fmt: skip
    write = pa_csv.write_csv if log_format == "csv" else pq.write_table
    write(pa.table(table), tmp_path / f"log.{log_format}")
    side = pa.table({what: table_ids, "cat": [f"c{k % 3}" for k in range(len(table_ids))]})
    side_format = "parquet" if isinstance(table_ids[0], float | int) else "csv"
    side_write = pq.write_table if side_format == "parquet" else pa_csv.write_csv
    side_write(side, tmp_path / f"side.{side_format}")
    names = {"user_id": "user", "item_id": "item", "timestamp": "time", "labels": ("click",),
             f"{what}s": (str(tmp_path / f"side.{side_format}"),), f"{what}_features": ("cat",),
             "min_count": 1}  # fmt: skip
    log = LogConfig(log=(str(tmp_path / f"log.{log_format}"),), **(names | options))
    return Staging(LogSource.open(log), tmp_path / "mine" / "staging", running.run_here)


def pasted(message, option):
    """The value of the option in the message, as a shell passes it on."""
    flag = re.search(rf"--{option}=(?:\"[^\"]*\"|'[^ ]*')", message).group()
    return subprocess.run(
        ["bash", "-c", f"printf %s {flag}"], capture_output=True, text=True, check=True
    ).stdout.removeprefix(f"--{option}=")


NUMBERS = list(range(100, 120))


@pytest.mark.parametrize(
    ("log_format", "log_ids", "table_ids"),
    [
        ("csv", [f"{k}.0" for k in NUMBERS], NUMBERS),
        ("csv", NUMBERS, [f"{k}.0" for k in NUMBERS]),
        ("csv", [f"{k}.0" if k % 2 else str(k) for k in NUMBERS], [f"{k:08d}" for k in NUMBERS]),
        ("csv", [f"00{k}" for k in NUMBERS], NUMBERS),
        ("csv", [f"{k}  " for k in NUMBERS], [str(k) for k in NUMBERS]),
        ("csv", [f"ab{k}" for k in NUMBERS], [f" AB{k} " for k in NUMBERS]),
        ("csv", [f"P{k}" for k in NUMBERS], NUMBERS),
        ("parquet", NUMBERS, [f"P{k}" for k in NUMBERS]),
        ("parquet", [f"item_{k:06d}" for k in NUMBERS], [float(k) for k in NUMBERS]),
        ("parquet", [float(k) for k in NUMBERS], [f"item-{k}" for k in NUMBERS]),
        ("parquet", [f"1,{k}" for k in NUMBERS], [1_000 + k for k in NUMBERS]),
        ("csv", [f"00-aa-{k}" for k in NUMBERS], [f"{{00AA{k}}}" for k in NUMBERS]),
        ("parquet", [f"v{k}-x" for k in NUMBERS], [f"{k}" for k in NUMBERS]),
    ],
)
def test_ids_that_only_look_different_end_with_sql_that_mends_them(
    tmp_path, log_format, log_ids, table_ids
):
    what = "user" if log_ids[0] in ("100.0", "00100") else "item"
    tables = {"what": what, "log_format": log_format}
    with pytest.raises(UserError, match=r"0 of 20 .* are in the table.*SQL can") as error:
        with_tables(tmp_path, log_ids, table_ids, **tables)
    assert "has none" not in str(error.value)
    option = {f"{what}_id": pasted(str(error.value), f"{what}_id")}
    staging = with_tables(tmp_path, log_ids, table_ids, **tables, **option)
    assert "20 of 20" in staging.profile()
    assert "cat: 3 of 3 values have ids of their own, in 100.0%" in staging.profile()
    assert not staging.warnings
    of_log = staging.counts.columns["item"]["value"] if what == "item" else staging.counts.users[0]
    assert len(of_log) == 20


def test_sql_is_mended_by_sql_and_names_with_blanks(tmp_path):
    sql = "item=item || '.0'"
    with pytest.raises(UserError) as error:
        with_tables(tmp_path, NUMBERS, [f"00{k}" for k in NUMBERS], item_id=sql)
    option = {"item_id": pasted(str(error.value), "item_id")}
    assert "(item || '.0')::VARCHAR" in option["item_id"]
    staging = with_tables(tmp_path, NUMBERS, [f"00{k}" for k in NUMBERS], **option)
    assert "20 of 20 items of the log are in the table (100.0%)" in staging.profile()


@pytest.mark.parametrize(
    ("log_ids", "table_ids"),
    [
        (["a", "b", "c"], ["x", "y", "z"]),  # nothing in common
        (["A1", "B1", "A2", "B2"], [1, 2, 3]),  # two would be one
    ],
)
def test_ids_that_no_rule_mends_say_so(tmp_path, log_ids, table_ids):
    with pytest.raises(UserError, match=r'--item_id="item=SQL", or another table, or leave --it'):
        with_tables(tmp_path, log_ids, table_ids)


def test_a_table_with_some_of_the_items(tmp_path):
    profile = stage(tmp_path, list(range(100, 105))).profile()
    assert "warning: 5 of 20 items of the log are in the table (25.0%)" in profile
    assert "Give SQL of your own" in profile


def test_a_table_that_a_rule_would_complete_is_a_warning_with_the_rule(tmp_path):
    log_ids = [f"{k}.0" if k % 10 == 0 else str(k) for k in NUMBERS]
    staging = with_tables(tmp_path, log_ids, NUMBERS)
    (warning,) = staging.warnings
    assert "18 of 20 items" in warning
    assert "100.0%" in warning
    option = {"item_id": pasted(warning, "item_id")}
    assert not with_tables(tmp_path, log_ids, NUMBERS, **option).warnings


def test_shares_of_training_and_later_events_against_pandas(tmp_path):
    """Ids of their own, out of vocabulary and missing, of log and side features, by hand."""
    rng = np.random.default_rng(0)
    n = 400
    item = rng.zipf(1.3, n) % 60
    kind = np.where(np.arange(n) > 330, "new", np.array(["a", "b", "c"])[rng.integers(0, 3, n)])
    kind = [None if k % 9 == 0 else v for k, v in enumerate(kind)]
    table = {"user": rng.integers(0, 9, n), "item": item, "click": np.arange(n) % 2, "kind": kind,
             "time": [T0 + 3_600 * k for k in range(n)]}  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    side = {
        "item": list(range(0, 60, 2)),
        "cat": [None if k % 7 == 0 else k % 4 for k in range(30)],
    }
    pq.write_table(pa.table(side), tmp_path / "items.parquet")
    pq.write_table(pa.table({"user": [1, 2, 3], "age": [3, 4, 4]}), tmp_path / "users.parquet")
    log = LogConfig(
        log=(str(tmp_path / "log.parquet"),), user_id="user", item_id="item", timestamp="time",
        labels=("click",), target_features=("kind",), items=(str(tmp_path / "items.parquet"),),
        item_features=("cat",), users=(str(tmp_path / "users.parquet"),), user_features=("age",),
        min_count=5,
    )  # fmt: skip
    staging = Staging(LogSource.open(log), tmp_path / "mine" / "staging", running.run_here)
    profile = staging.profile()
    is_train = np.array(table["time"]) < staging.times[0]
    category = dict(zip(side["item"], side["cat"], strict=True))
    age = {1: 3, 2: 4, 3: 4}
    columns = {
        "item": (item.tolist(), 5),
        "kind": (kind, 5),
        "cat": ([category.get(int(i)) for i in item], 5),
        "age": ([age.get(int(u)) for u in table["user"]], 1),
    }
    for name, (values, min_count) in columns.items():
        train = [v for v, t in zip(values, is_train, strict=True) if t]
        own = {v for v in train if v is not None and train.count(v) >= min_count}
        shares = []
        for of_split in (train, [v for v, t in zip(values, is_train, strict=True) if not t]):
            size = len(of_split)
            missing = sum(v is None for v in of_split)
            has_own = sum(v in own for v in of_split)
            shares.append([has_own / size, (size - missing - has_own) / size, missing / size])
        (a, b, c), (x, y, z) = shares
        distinct = len({v for v in values if v is not None})
        assert (
            f"  {name}: {len(own)} of {distinct} values have ids of their own, in {a:.1%} of "
            f"training events and {x:.1%} of later ones; out of vocabulary in {b:.1%} and {y:.1%}; "
            f"missing in {c:.1%} and {z:.1%}"
        ) in profile
    in_table = [u in age for u in table["user"].tolist()]
    assert (
        f"table of users: 3 of 9 users of the log are in the table (33.3%), in "
        f"{np.mean(np.array(in_table)[is_train]):.1%} of training events"
    ) in profile
