"""The folder features/ against the records: raw values encoded by it are what records hold."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_complete_journey import make_tables, write_tables

from stca_jax.data.interaction_log.interaction_log_dataset_builder import make_builder
from stca_jax.data.interaction_log.log_config import LogConfig
from stca_jax.data.preparation import prepare, prepare_builder
from stca_jax.errors import UserError
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.features import Features

DAY = 86_400
T0 = 1_700_000_000 // DAY * DAY


def make_log(rng, size=600):
    """Rows by time; words, numbers and items of the last quarter were never seen before."""
    late = np.arange(size) >= 3 * size // 4
    words = np.array(["view", "like", "NULL", "", "rare"])
    word = words[rng.choice(5, size, p=[0.6, 0.25, 0.05, 0.05, 0.05])]
    price = rng.lognormal(3, 2, size).round(2)
    return {
        "user": [f"u{u}" for u in rng.integers(0, 12, size)],
        "item": (rng.integers(0, 9, size) + 1_000 * late * rng.integers(0, 40, size)).tolist(),
        "time": (T0 + np.arange(size) * 3_700).tolist(),
        "word": [f"new {w}" if new else w or None for w, new in zip(word, late, strict=True)],
        "level": [None if k % 17 == 0 else int(rng.integers(0, 5 + 90 * late[k]))
                  for k in range(size)],
        "price": [None if k % 13 == 0 else float(p) for k, p in enumerate(price)],
        "click": rng.integers(0, 2, size).tolist(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def raw():
    return make_log(np.random.default_rng(0))


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    items = {"item": [*range(8), 77_777], "brand": [f"b{i % 3}" for i in range(9)],
             "size": [1.0, None, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]}  # fmt: skip
    users = {"user": ["u0", "u1", "u2", "stranger"], "plan": ["a", "b", None, "c"]}
    for name, table in {"log": raw, "items": items, "users": users}.items():
        pq.write_table(pa.table(table), folder / f"{name}.parquet")
    config = LogConfig(
        log=(str(folder / "log.parquet"),), user_id="user", item_id="item", timestamp="time",
        labels=("click",), history_features=("word", "level", "price"),
        items=(str(folder / "items.parquet"),), item_features=("brand", "size"),
        users=(str(folder / "users.parquet"),), user_features=("plan",), num_oov=5,
    )  # fmt: skip
    return prepare_builder(make_builder("mine", config, folder / "data"), folder / "data")


def test_raw_values_encode_as_in_the_records_those_never_seen_too(prepared, raw):
    dataset = RequestDataset(prepared)
    features, origin = dataset.features, dataset.metadata["time_origin"]
    assert features.facts["time_origin"] == origin
    unseen = 0
    for u in range(len(dataset)):
        record = dataset.record(u)
        rows = [k for k, user in enumerate(raw["user"]) if user == features.users.ids[u]]
        assert record.event_time.tolist() == [raw["time"][k] - origin for k in rows]
        for name in ("word", "level", "price", "click"):
            encoded = features.encode(name, [raw[name][k] for k in rows])
            np.testing.assert_array_equal(encoded, record.history[name])
        unseen += (record.history["word"] >= len(features.encoders["word"].known)).sum()
        items = features.item_features([raw["item"][k] for k in rows])
        for name, column in record.target.items():  # each row is a request of one target
            np.testing.assert_array_equal(items[name], column)
        request = features.user_features([features.users.ids[u]] * len(rows))
        request |= features.clock.encode(record.request_time.astype(np.int64) + origin)
        for name, column in record.request.items():
            np.testing.assert_array_equal(request[name], column)
    assert unseen > 50


def test_ids_that_no_file_has_are_spread_like_rare_ones(prepared):
    features = RequestDataset(prepared).features
    known = len(features.encoders["item"].known)
    new = list(range(10**6, 10**6 + 200))
    found = features.item_features(new)
    assert set(found["item"]) == set(range(known, known + 5))
    np.testing.assert_array_equal(found["item"], features.encode("item", new))
    assert set(found["log_popularity"]) == {np.float32(-1)}
    assert set(found["brand"]) == {features.encoders["brand"].missing_id}
    only_in_table = features.item_features([77_777, "77777"])
    assert only_in_table["brand"].tolist() == features.encode("brand", ["b2", "b2"]).tolist()
    assert features.user_features(["nobody"])["plan"] == features.encode("plan", [None])
    with pytest.raises(UserError, match="an id is missing"):
        features.item_features([None])
    with pytest.raises(UserError, match=r"no feature 'wrod', but .*word"):
        features.encode("wrod", ["x"])
    with pytest.raises(UserError, match="feature 'level': 'high' is no integer"):
        features.encode("level", ["high"])


def test_numpy_alone_reads_it(prepared):
    script = (
        "import sys; from stca_jax.input.features import Features;"
        f"f = Features.read({str(prepared / 'features')!r}); print(f.encode('word', ['like'])[0]);"
        "bad = {'jax', 'pyarrow', 'pandas', 'duckdb', 'tensorflow_datasets'} & set(sys.modules);"
        "assert not bad, bad"
    )
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    known = RequestDataset(prepared).features.encoders["word"].known.tolist()
    assert known[int(run.stdout)] == "like"


def test_definitions_say_where_features_come_from(prepared):
    definitions = RequestDataset(prepared).features.definitions
    assert definitions["word"] == {"from": "events", "column": "word"}
    assert definitions["brand"] == {"from": "items", "column": "brand"}
    assert definitions["hour"] == {"from": "clock"}


@pytest.mark.parametrize("name", ["features.json", "vocabularies.npz", "items.npz"])
def test_damage_is_named(prepared, tmp_path, name):
    for file in (prepared / "features").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=f"{name} is .*damaged"):
        Features.read(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=name):
        Features.read(tmp_path)


def test_formats_of_before_are_read_and_later_ones_named(prepared, tmp_path):
    for file in (prepared / "features").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    written = (tmp_path / "features.json").read_text()
    (tmp_path / "features.json").write_text(written.replace('"format": 2', '"format": 1'))
    assert Features.read(tmp_path).encode("word", ["like", "rare"]).tolist() == [0, 3]
    (tmp_path / "features.json").write_text(written.replace('"format": 2', '"format": 3'))
    with pytest.raises(UserError, match="has format 3, and this version reads 1 and 2: prepare"):
        Features.read(tmp_path)


def test_complete_journey_writes_it(tmp_path):
    tables = make_tables()
    manual = write_tables(tables, tmp_path / "source")
    folder = prepare("complete_journey", tmp_path / "data", manual_dir=manual)
    dataset = RequestDataset(folder)
    features, origin = dataset.features, dataset.metadata["time_origin"]
    t = tables["transactions"]
    unix = np.array(t["transaction_timestamp"], "datetime64[s]").astype(int)
    columns = ("household_id", "basket_id", "product_id", "quantity")
    lines = list(zip(unix.tolist(), *(t[n] for n in columns), strict=True))
    for u in range(len(dataset)):
        record = dataset.record(u)
        own = [r for r in lines if r[1] == features.users.ids[u]]
        own.sort(key=lambda r: (r[0], r[2], r[3]))
        items = features.item_features([r[3] for r in own])
        for name in dataset.schema.history:
            found = items[name] if name in items else features.encode(name, [r[4] for r in own])
            np.testing.assert_array_equal(found, record.history[name])
        clock = features.clock.encode(record.request_time.astype(np.int64) + origin)
        np.testing.assert_array_equal(clock["hour"], record.request["hour"])
    assert features.definitions["type"] == {"from": "products", "column": "product_type"}
    new = features.item_features([5])
    assert (
        new["category"]
        == features.encode("category", [None])
        == features.encode("category", ["unknown"])
    )


def test_generated_data_write_it(tmp_path):
    dataset = RequestDataset(prepare("synthetic_interests/tiny", tmp_path))
    features, record = dataset.features, dataset.record(3)
    found = features.item_features(record.history["item"])
    np.testing.assert_array_equal(found["category"], record.history["category"])
    with pytest.raises(UserError, match="is no id; give an integer from 0 to 319"):
        features.item_features([320])
