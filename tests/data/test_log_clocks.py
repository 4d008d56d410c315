"""Logs in another zone, without a clock, with a clock that only SQL reads; heavy-tailed numbers."""

from __future__ import annotations

import datetime
import zoneinfo

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from stca_jax.data.interaction_log.encoders import fit_scale
from stca_jax.data.interaction_log.interaction_log_dataset_builder import make_builder
from stca_jax.data.interaction_log.log_config import Column, LogConfig
from stca_jax.data.interaction_log.moments import Moments
from stca_jax.data.preparation import prepare_builder
from stca_jax.errors import UserError
from stca_jax.input.dataset import RequestDataset

T0 = 1_710_000_000  # summer time begins in Paris within the log


def build(folder, table, **options):
    pq.write_table(pa.table(table), folder / "log.parquet")
    options = {"log": (str(folder / "log.parquet"),), "user_id": "user", "item_id": "item",
               "timestamp": "time", "labels": ("click",), "min_count": 1} | options  # fmt: skip
    builder = make_builder("mine", LogConfig(**options), folder / "data")
    return RequestDataset(prepare_builder(builder, folder / "data"))


def log_of(size=1_500):
    rng = np.random.default_rng(0)
    return {
        "user": rng.integers(0, 5, size).tolist(),
        "item": rng.integers(0, 9, size).tolist(),
        "time": (T0 + np.arange(size) * 4_500).tolist(),
        "click": (np.arange(size) % 2).tolist(),
        "amount": rng.lognormal(0, 2.5, size).tolist(),
    }


def test_hours_weekdays_and_splits_are_of_the_zone(tmp_path):
    start = {"validation_start": "2024-05-01", "test_start": "2024-05-15 12:00"}
    dataset = build(tmp_path, log_of(), time_zone="Europe/Paris", **start)
    origin, paris = dataset.metadata["time_origin"], zoneinfo.ZoneInfo("Europe/Paris")
    assert dataset.features.clock.zone == "Europe/Paris"
    for u in range(len(dataset)):
        record = dataset.record(u)
        for k, time in enumerate(record.request_time.tolist()):
            local = datetime.datetime.fromtimestamp(time + origin, paris)
            assert record.request["hour"][k] == local.hour
            assert record.request["weekday"][k] == local.weekday()
    begin = datetime.datetime(2024, 5, 1, tzinfo=paris).timestamp()
    assert dataset.metadata["validation_start"] + origin == begin


def test_a_log_without_a_clock_is_in_the_order_of_its_rows(tmp_path):
    table = log_of()
    dataset = build(tmp_path, {n: v for n, v in table.items() if n != "time"}, timestamp="order")
    assert "hour" not in dataset.schema.request
    ids = dataset.features.encoders["item"]
    for u in range(len(dataset)):
        record = dataset.record(u)
        user = dataset.features.users.ids[u]
        rows = [k for k, found in enumerate(table["user"]) if found == user]
        assert record.event_time.tolist() == rows
        expected = ids.encode(np.array([table["item"][k] for k in rows]))
        np.testing.assert_array_equal(record.history["item"], expected)
    assert "the order of rows" in (dataset.directory / "profile.txt").read_text()


def test_files_without_a_clock_follow_each_other(tmp_path):
    table = {n: v for n, v in log_of().items() if n != "time"}
    (tmp_path / "log").mkdir()
    for k, part in enumerate((slice(0, 550), slice(550, 1_500))):
        rows = pa.table({n: v[part] for n, v in table.items()})
        pq.write_table(rows, tmp_path / "log" / f"{k}.parquet")
        (tmp_path / "csv").mkdir(exist_ok=True)
        pyarrow.csv.write_csv(rows, tmp_path / "csv" / f"{k}.csv")
    parts = build(tmp_path, table, log=(str(tmp_path / "log"),), timestamp="order")
    (tmp_path / "whole").mkdir()
    whole = build(tmp_path / "whole", table, timestamp="order")
    assert list(parts.fingerprint.values()) == list(whole.fingerprint.values())
    (tmp_path / "text").mkdir()
    with pytest.raises(UserError, match="timestamp=order needs the whole log in one text file"):
        build(tmp_path / "text", table, log=(str(tmp_path / "csv"),), timestamp="order")


def test_sql_reads_ids_and_times_without_a_name(tmp_path):
    table = log_of()
    days = [datetime.datetime.fromtimestamp(t, datetime.UTC) for t in table["time"]]
    table["day"] = [d.strftime("%d|%m|%Y %H:%M:%S") for d in days]
    table["code"] = [f"item-{i}" for i in table["item"]]
    dataset = build(
        tmp_path, table, timestamp="strptime(day, '%d|%m|%Y %H:%M:%S')",
        item_id="replace(code, 'item-', '')::BIGINT", user_id="upper(concat('u', \"user\"))",
    )  # fmt: skip
    origin = dataset.metadata["time_origin"]
    times = np.sort(np.concatenate([dataset.record(u).event_time for u in range(len(dataset))]))
    assert (times + origin).tolist() == table["time"]
    assert dataset.features.items.ids.tolist() == list(range(9))
    assert dataset.features.users.ids.tolist() == [f"U{k}" for k in range(5)]


@pytest.mark.parametrize(("kind", "transform"), [("numeric", "log"), ("linear", "linear")])
def test_heavy_tails_are_scaled_by_their_logarithm(tmp_path, kind, transform):
    table = log_of(2_000)
    dataset = build(tmp_path, table, history_features=(f"amount:{kind}",))
    scale = dataset.features.encoders["amount"]
    assert scale.transform == transform
    amount = np.array(table["amount"])
    train = amount[: int(0.8 * len(amount))]
    profile = (dataset.directory / "profile.txt").read_text()
    (line,) = (x for x in profile.splitlines() if x.startswith("  amount"))
    shown = dict(part.split() for part in line.split(": ", 1)[1].split(", ")[:4])
    for name, share in (("min", 0), ("p50", 0.5), ("p99", 0.99), ("max", 1)):
        assert float(shown[name]) == pytest.approx(np.quantile(train, share), rel=0.05)
    moved = amount
    if transform == "log":
        moved = np.log1p(amount / np.median(train))
        # Some of the events use the range of a deviation: linearly 90 % share a tenth of one.
        spread = np.diff(np.quantile(scale.encode(amount), [0.05, 0.95]))
        assert spread > 2
    fitted = moved[: len(train)]
    expected = (moved - fitted.mean()) / fitted.std()
    np.testing.assert_allclose(scale.encode(amount), expected, atol=0.05 * np.abs(expected).max())


def test_what_has_no_heavy_tail_is_scaled_linearly():
    rng = np.random.default_rng(0)
    for values in (rng.normal(5, 2, 9_000), rng.random(9_000), rng.exponential(1, 9_000)):
        assert fit_scale(Moments.of(pa.array(values))).transform == "linear"
    assert fit_scale(Moments.of(pa.array(values)), "log").transform == "log"
    assert Column.parse("price:log").kind == "log"
    assert Column.parse("p=a::DOUBLE:linear") == Column("p", "a::DOUBLE", True, "linear")
