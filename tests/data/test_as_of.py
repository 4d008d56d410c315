"""Features and negatives as of the request, recomputed from the raw rows one by one."""

from __future__ import annotations

import collections
import json
import math
import re

import log_oracle
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stca_jax.data.interaction_log.interaction_log_dataset_builder import make_builder
from stca_jax.data.interaction_log.log_config import LogConfig
from stca_jax.data.popularity import auc, count_targets
from stca_jax.data.preparation import prepare_builder
from stca_jax.errors import UserError
from stca_jax.evaluation import metrics
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.trends import parse_window

DAY = 86_400
T0 = 1_700_000_000 // DAY * DAY
WINDOWS = {"1d": DAY, "7d": 7 * DAY}


def make_rows(rng, size=1_200):
    """Impressions over 40 days; one label of two is missing now and then, items come and go."""
    time = np.sort(rng.integers(0, 40 * DAY, size)) // 600 * 600  # many share a second
    item = (rng.integers(0, 12, size) + time // (8 * DAY) * 5) % 30
    click = rng.integers(0, 2, size).tolist()
    buy = [None if k % 5 == 0 else int(rng.random() < 0.3) for k in range(size)]
    for k in range(0, size, 11):
        click[k] = None
    return [
        {"user": int(u), "item": int(i), "time": int(T0 + t), "click": c, "buy": b,
         "kind": str(rng.choice(["view", "open"]))}
        for u, i, t, c, b in zip(rng.integers(0, 9, size), item, time, click, buy, strict=True)
    ]  # fmt: skip


def write(folder, rows):
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "log.parquet")
    items = {"item": list(range(29)), "brand": [f"b{i % 4}" for i in range(29)]}
    pq.write_table(pa.table(items), folder / "items.parquet")
    return LogConfig(
        log=(str(folder / "log.parquet"),), user_id="user", item_id="item", timestamp="time",
        labels=("click", "buy"), history_features=("kind",), items=(str(folder / "items.parquet"),),
        item_features=("brand",), item_trends=("1d", "7d"), trends_of=("item", "brand"),
        user_trends=("1d",), min_count=1, validation_start="2023-12-12", test_start="2023-12-18",
    )  # fmt: skip


def build(folder, config):
    return RequestDataset(prepare_builder(make_builder("mine", config, folder / "d"), folder / "d"))


@pytest.fixture(scope="module")
def rows():
    unique = {tuple(r.items()): r for r in make_rows(np.random.default_rng(0))}
    return list(unique.values())


@pytest.fixture(scope="module")
def dataset(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trends")
    return build(folder, write(folder, rows))


def targets_of(dataset):
    """(user, time, {feature: value}) of every target, and of its request."""
    origin = dataset.metadata["time_origin"]
    users = dataset.features.users.ids.tolist()
    for u in range(len(dataset)):
        record = dataset.record(u)
        for k, time in enumerate(record.request_time.tolist()):
            request = {n: v[k].item() for n, v in record.request.items()}
            for t in range(*record.target_offset[k : k + 2]):
                target = {n: v[t].item() for n, v in record.target.items()}
                yield users[u], time + origin, target, request, record.label[t].tolist()


def expected_trends(rows, value_of, value, time):
    """By the formulas of the docs, from all rows."""
    before = [r for r in rows if r["time"] < time]
    own = [r for r in before if value_of(r["item"]) == value]
    kinds = len({value_of(r["item"]) for r in before})
    found = {"age": math.log1p((time - min(r["time"] for r in own)) / DAY) / 2 if own else -1}
    for name, seconds in WINDOWS.items():
        inside = [r for r in before if r["time"] >= time - seconds]
        count = [r for r in inside if value_of(r["item"]) == value]
        mean = len(inside) / max(kinds, 1)
        found[f"trend_{name}"] = (math.log1p(len(count)) - math.log1p(mean)) / 2
        for task in ("click", "buy"):
            known = [r[task] for r in inside if r[task] is not None]
            labels = [r[task] for r in count if r[task] is not None]
            average = (sum(known) + 1) / (len(known) + 2)
            smoothed = (sum(labels) + 20 * average) / (len(labels) + 20)
            found[f"rate_{name}_{task}"] = math.log(smoothed / average)
    return found


def test_trends_are_those_of_the_raw_table(dataset, rows):
    item = {k: v for v, k in log_oracle.feature_ids(dataset.directory, "item").items()}
    brand_ids = dataset.features.encoders["brand"]
    brand = {i: int(brand_ids.encode([f"b{i % 4}" if i < 29 else None])[0]) for i in range(30)}
    fields = {"item": lambda i: i, "brand": brand.get}
    found = list(targets_of(dataset))
    assert len(found) == sum(r["click"] is not None or r["buy"] is not None for r in rows)
    for user, time, target, request, _ in found[:: len(found) // 60]:
        for field, value_of in fields.items():
            value = value_of(item[target["item"]])
            for name, number in expected_trends(rows, value_of, value, time).items():
                assert target[f"{field}_{name}"] == pytest.approx(number, abs=1e-6)
        own = [r for r in rows if r["user"] == user and time - DAY <= r["time"] < time]
        assert request["user_events_1d"] == pytest.approx(math.log1p(len(own)) / 2, abs=1e-6)


def test_a_server_counts_on_from_the_end_of_the_log(dataset, rows):
    time = max(r["time"] for r in rows) + 3 * 3_600
    ids = [*range(30), 777]
    found = dataset.features.trend_features(ids, np.full(len(ids), time))
    assert found.keys() == {n for n in dataset.schema.target if n.startswith(("item_", "brand_"))}
    for k, i in enumerate(ids):
        for name, number in expected_trends(rows, lambda item: item, i, time).items():
            assert found[f"item_{name}"][k] == pytest.approx(number, abs=1e-6)


# In training they change what is fitted on training: vocabularies and log_popularity.
@pytest.mark.parametrize(
    ("day", "fitted"), [(36, ()), (18, ("item", "brand", "kind", "log_popularity"))]
)
def test_events_at_or_after_a_request_change_none_of_its_features(
    dataset, rows, tmp_path, day, fitted
):
    cut = T0 + day * DAY + 600 * 40
    rng = np.random.default_rng(5)
    changed = [
        r if r["time"] < cut else r | {"item": int(rng.integers(0, 30)), "click": 1, "buy": 0,
                                       "kind": "open"}
        for r in rows
    ]  # fmt: skip
    changed += [rows[k] | {"time": cut + 7 * k, "user": k % 9} for k in range(200)]
    other = build(tmp_path, write(tmp_path, changed))
    assert fitted or other.schema == dataset.schema
    origin, same = dataset.metadata["time_origin"], 0
    for u in range(len(dataset)):
        a, b = dataset.record(u), other.record(u)
        # Requests up to the second of the first change: what it holds itself has changed.
        requests = int((a.request_time + origin < cut).sum())
        events, targets = int((a.event_time + origin < cut).sum()), a.target_offset[requests]
        assert requests == (b.request_time + origin < cut).sum()
        for name in a.history.keys() - fitted:
            np.testing.assert_array_equal(a.history[name][:events], b.history[name][:events])
        for name in a.target.keys() - fitted:
            np.testing.assert_array_equal(a.target[name][:targets], b.target[name][:targets])
        for name in a.request:
            np.testing.assert_array_equal(a.request[name][:requests], b.request[name][:requests])
        same += requests
        at = [d.request_time + origin == cut for d in (a, b)]
        for k, j in zip(np.flatnonzero(at[0]), np.flatnonzero(at[1]), strict=False):
            assert a.history_end[k] == b.history_end[j] == events
    assert same > 25 * day


def test_a_missing_label_leaves_out_one_task(dataset, rows):
    labels = collections.Counter()
    for user, time, _, _, label in targets_of(dataset):
        labels[user, time, *(None if math.isnan(y) else int(y) for y in label)] += 1
    expected = collections.Counter(
        (r["user"], r["time"], r["click"], r["buy"])
        for r in rows
        if r["click"] is not None or r["buy"] is not None
    )
    assert labels == expected
    assert any(None in key for key in labels)
    assert (
        json.loads((dataset.directory / "metadata.json").read_text())["notes"]["rows_left_out"]
        == {}
    )


def test_a_late_label_is_a_second_event(rows, tmp_path):
    folder = tmp_path
    config = write(folder, rows)
    delay = {"label_delay": "2d"}
    late = build(folder, LogConfig(**{**vars(config), **delay}))
    origin = late.metadata["time_origin"]
    for u, user in enumerate(late.features.users.ids.tolist()):
        record = late.record(u)
        own = [r for r in rows if r["user"] == user]
        expected = [(r["time"], r["item"], 2, 2) for r in own]
        expected += [
            (
                r["time"] + 2 * DAY,
                r["item"],
                *(2 if r[t] is None else r[t] for t in ("click", "buy")),
            )
            for r in own
            if 1 in (r["click"], r["buy"])
        ]
        value = {k: v for v, k in log_oracle.feature_ids(late.directory, "item").items()}
        found = zip(
            (record.event_time.astype(int) + origin).tolist(),
            [value[i] for i in record.history["item"].tolist()],
            record.history["click"].tolist(), record.history["buy"].tolist(), strict=True,
        )  # fmt: skip
        assert sorted(found) == sorted(expected)
        for time, end in zip(record.request_time, record.history_end, strict=True):
            assert end == sum(t < time + origin for t, *_ in expected)
    for _, time, target, _, _ in list(targets_of(late))[::50]:
        known = [r["buy"] for r in rows if time - 9 * DAY <= r["time"] < time - 2 * DAY
                 and value[target["item"]] == r["item"] and r["buy"] is not None]  # fmt: skip
        window = [r["buy"] for r in rows if time - 9 * DAY <= r["time"] < time - 2 * DAY
                  and r["buy"] is not None]  # fmt: skip
        average = (sum(window) + 1) / (len(window) + 2)
        rate = math.log((sum(known) + 20 * average) / (len(known) + 20) / average)
        assert target["item_rate_7d_buy"] == pytest.approx(rate, abs=1e-6)


def drifting(rng, size=24_000, users=300):
    """Purchases whose items come into and go out of fashion; some appear late."""
    day = np.sort(rng.random(size)) * 120
    rank = (300 * rng.random(size) ** 2).astype(int)
    item = rank + 12 * (day // 5).astype(int)
    return {
        "user": rng.integers(0, users, size).tolist(),
        "item": item.tolist(),
        "time": (T0 + day * DAY).astype(int).tolist(),
    }


@pytest.fixture(scope="module")
def purchases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("purchases")
    table = drifting(np.random.default_rng(1))
    pq.write_table(pa.table(table), folder / "log.parquet")
    return folder, table


def prepare_purchases(purchases, tmp_path, **options):
    folder, table = purchases
    config = LogConfig(
        log=(str(folder / "log.parquet"),), user_id="user", item_id="item", min_count=1,
        **({"timestamp": "time"} | options),
    )  # fmt: skip
    return build(tmp_path, config), table


def negatives_of(dataset):
    """Split, popularity and label of all targets."""
    for u in range(len(dataset)):
        record = dataset.record(u)
        split = np.repeat(record.request_split, np.diff(record.target_offset))
        yield split, record.target["log_popularity"], record.label[:, 0]


@pytest.mark.parametrize(
    ("options", "lowest", "highest"),
    [
        ({}, 0.48, 0.52),
        ({"timestamp": "order"}, 0.48, 0.52),
        ({"negatives": "training"}, 0.0, 0.45),
        ({"negatives": "uniform"}, 0.2, 0.9),
    ],
    ids=str,
)
def test_popularity_alone_says_nothing_of_trailing_negatives(
    purchases, tmp_path, options, lowest, highest
):
    dataset, _ = prepare_purchases(purchases, tmp_path, **options)
    split, popularity, label = map(np.concatenate, zip(*negatives_of(dataset), strict=True))
    profile = (dataset.directory / "profile.txt").read_text()
    shown = re.search(r"AUC of popularity alone: train ([.\d]+), .*test ([.\d]+)", profile)
    for k, text in ((0, shown[1]), (2, shown[2])):
        exact = metrics.auc(label[split == k], popularity[split == k])
        assert float(text) == pytest.approx(exact, abs=6e-4)
    test = float(shown[2])
    assert lowest <= test <= highest
    new = popularity == -1  # items that training lacks
    share = [new[(split == 2) & (label == y)].mean() for y in (0, 1)]
    assert share[1] > 0.05
    assert (share[0] > 0.5 * share[1]) == (options.get("negatives") != "training")


def test_negatives_are_of_the_window_never_of_the_request_and_seeded(purchases, tmp_path):
    dataset, table = prepare_purchases(purchases, tmp_path)
    times = collections.defaultdict(list)
    bought = collections.defaultdict(set)
    for user, item, time in zip(table["user"], table["item"], table["time"], strict=True):
        times[item].append(time)
        bought[user, time].add(item)
    value = collections.defaultdict(set)  # new items share ids
    for item, encoded in log_oracle.feature_ids(dataset.directory, "item").items():
        value[encoded].add(item)
    origin = dataset.metadata["time_origin"]
    users = dataset.features.users.ids.tolist()
    wanted = drawn = 0
    for u in range(0, len(dataset), 20):
        record = dataset.record(u)
        for k, time in enumerate((record.request_time.astype(int) + origin).tolist()):
            rows = slice(*record.target_offset[k : k + 2])
            own = bought[users[u], time]
            for encoded, y in zip(record.target["item"][rows], record.label[rows, 0], strict=True):
                items = value[int(encoded)]
                if y:
                    assert items & own
                else:
                    assert items - own
                    assert any(time - 7 * DAY <= t < time for i in items for t in times[i])
            wanted, drawn = wanted + len(own), drawn + int((record.label[rows, 0] == 0).sum())
    assert drawn > 0.98 * wanted
    again, _ = prepare_purchases(purchases, tmp_path / "again", negatives="7d")
    other, _ = prepare_purchases(purchases, tmp_path / "other", seed=1)
    assert again.fingerprint == dataset.fingerprint != other.fingerprint


def test_auc_from_counts_is_that_of_scores():
    rng = np.random.default_rng(0)
    count, split = rng.integers(0, 9, 500), rng.integers(0, 3, 500)
    label = np.where(rng.random((500, 2)) < 0.1, np.nan, rng.integers(0, 2, (500, 2)))
    counts = count_targets(split, label, count)
    for s in range(3):
        for task in range(2):
            rows = (split == s) & ~np.isnan(label[:, task])
            expected = metrics.auc(label[rows, task], count[rows].astype(np.float32))
            assert auc(counts, split=s, task=task) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"item_trends": ("7 days",)}, "'7 days' is no span of time; write a number and"),
        (
            {"negatives": "popular"},
            "negatives is 'popular'; give a window such as 7d, or",
        ),
        ({"item_trends": ("7d",), "trends_of": ("brand",)}, "trends_of has 'brand'; give some of"),
        ({"label_delay": "7d"}, "label_delay needs labels"),
        ({"time_zone": "Mars"}, "time_zone is 'Mars'; give a name"),
        ({"item_trends": ("7d",), "labels": ("item_age",)}, "features are named twice"),
    ],
)
def test_options_that_cannot_be_meant(options, message):
    with pytest.raises(UserError, match=message):
        LogConfig(**({"log": ("log.csv",)} | options))


def test_spans_of_time():
    assert [parse_window(t) for t in ("90s", "5m", "12h", "7d", "4w")] == [
        90, 300, 43_200, 604_800, 2_419_200,
    ]  # fmt: skip
