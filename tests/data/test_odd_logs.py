"""Small logs, each with a fault of real ones: the records are right, or one error has a way out."""

from __future__ import annotations

import csv
import random
import re
import shlex

import log_oracle
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stca_jax.data import preparation, running
from stca_jax.data.interaction_log import source
from stca_jax.data.interaction_log.events import LogSource
from stca_jax.data.interaction_log.interaction_log_dataset_builder import make_builder
from stca_jax.data.interaction_log.log_config import LogConfig
from stca_jax.data.interaction_log.staging import Staging
from stca_jax.errors import UserError
from stca_jax.input.dataset import RequestDataset

T0 = 1_700_000_000


def rows(n=600, users=20, items=30, step=3_600):
    rng = random.Random(0)
    return [
        {"user_id": 1 + rng.randrange(users), "item_id": 100 + rng.randrange(items),
         "timestamp": T0 + k * step, "click": int(rng.random() < 0.4)}
        for k in range(n)
    ]  # fmt: skip


def write_csv(path, table):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    return str(path)


def prepare(tmp_path, log, **options):
    config = LogConfig(log=(str(log),), **({"labels": ("click",), "min_count": 1} | options))
    data_dir = tmp_path / "d"
    return preparation.prepare_builder(make_builder("case", config, data_dir), data_dir)


def stage(tmp_path, log, **options):
    config = LogConfig(log=(str(log),), **({"labels": ("click",), "min_count": 1} | options))
    return Staging(LogSource.open(config), tmp_path / "mine" / "staging", running.run_here)


def history(folder, feature):
    dataset = RequestDataset(folder)
    return np.concatenate([dataset.record(u).history[feature] for u in range(len(dataset))])


def test_a_request_id_used_again_for_weeks(tmp_path):
    table = [
        r | {"request_id": "s7" if r["user_id"] == 3 and k % 2 == 0 else str(k)}
        for k, r in enumerate(rows())
    ]
    folder = prepare(tmp_path, write_csv(tmp_path / "l.csv", table), request_id="request_id")
    as_read = [
        {"user": str(r["user_id"]), "item": str(r["item_id"]), "time": r["timestamp"],
         "click": r["click"], "request": r["request_id"]}
        for r in table
    ]  # fmt: skip
    expected = log_oracle.expected_requests(
        as_read, request_id="request", labels=("click",), starts=log_oracle.split_starts(folder)
    )
    assert log_oracle.prepared_requests(folder) == log_oracle.without_user(expected)
    profile = (folder / "profile.txt").read_text()
    assert int(re.search(r"requests cut +(\d+),", profile)[1]) > 10


def test_ratings_as_labels(tmp_path):
    table = [r | {"click": 1 + k % 5} for k, r in enumerate(rows())]
    log = write_csv(tmp_path / "l.csv", table)
    with pytest.raises(UserError, match=r"'1' \(120\).*click::DOUBLE >= 4") as error:
        prepare(tmp_path, log)
    sql = re.search(r'--labels="([^"]*)"', str(error.value))[1]
    dataset = RequestDataset(prepare(tmp_path, log, labels=(sql,)))
    labels = np.concatenate([dataset.record(u).label for u in range(len(dataset))])
    assert labels.sum() == 240


def test_a_large_mean(tmp_path):
    rng = np.random.default_rng(0)
    columns = {n: [r[n] for r in rows()] for n in rows()[0]}
    table = pa.table(columns | {"up": 1.7e12 + rng.standard_normal(600) * 1e6})
    pq.write_table(table, tmp_path / "l.parquet")
    up = history(prepare(tmp_path, tmp_path / "l.parquet", history_features=("up",)), "up")
    assert 2 < abs(up).max() < 6
    assert abs(up.std() - 1) < 0.05


def test_item_ids_that_pandas_made_floats(tmp_path):
    table = [r | {"item_id": f"{r['item_id']}.0"} for r in rows()]
    side = [{"item_id": k, "cat": k % 3} for k in range(100, 130)]
    options = {"items": (write_csv(tmp_path / "i.csv", side),), "item_features": ("cat",)}
    log = write_csv(tmp_path / "l.csv", table)
    with pytest.raises(UserError, match="0 of 30 items") as error:
        prepare(tmp_path, log, **options)
    sql = re.search(r'--item_id="([^"]*)"', str(error.value))[1]
    folder = prepare(tmp_path, log, item_id=sql, **options)
    assert RequestDataset(folder).schema.vocabularies["cat"] == 3 + 16
    of_item = {i: int(item) for item, i in log_oracle.feature_ids(folder, "item").items()}
    found = {
        (of_item[int(i)] % 3, int(c))
        for i, c in zip(history(folder, "item"), history(folder, "cat"), strict=True)
    }
    assert found == {(0, 0), (1, 1), (2, 2)}


def test_no_item_is_frequent_enough(tmp_path):
    rng = random.Random(0)
    table = [r | {"item_id": rng.randrange(500)} for r in rows()]
    log = write_csv(tmp_path / "l.csv", table)
    with pytest.raises(UserError, match=r"\(min_count\), so that none .*Give --min_count=1"):
        prepare(tmp_path, log, min_count=12)
    assert re.search(r"  item: [\d,]+ of [\d,]+ values have", stage(tmp_path, log).profile())


def test_numbers_written_as_text(tmp_path):
    table = [r | {"the price": f"${k % 7}.50"} for k, r in enumerate(rows())]
    log = write_csv(tmp_path / "l.csv", table)
    with pytest.raises(UserError, match=r"the price: .* are no numbers") as error:
        prepare(tmp_path, log, history_features=("the price:numeric",))
    pasted = re.search(r": (--.*), or give", str(error.value))[1]
    (flag,) = shlex.split(pasted)
    assert flag.startswith("--history_features=the_price=")
    folder = prepare(tmp_path, log, history_features=(flag.removeprefix("--history_features="),))
    assert len(np.unique(history(folder, "the_price"))) == 7


@pytest.mark.parametrize("where", ["history", "item"])
def test_texts_of_thousands_of_characters_are_no_categories(tmp_path, where, monkeypatch):
    monkeypatch.setattr(source, "_BYTES_PER_BLOCK", 200_000)
    table = rows(200, users=5)
    side = [{"item_id": k, "story": f"{k} " * 8_000} for k in range(100, 130)]
    if where == "history":
        table = [r | {"story": "b" * (20_000 if k == 7 else 10)} for k, r in enumerate(table)]
    options = {f"{where}_features": ("story",)}
    if where == "item":
        options["items"] = (write_csv(tmp_path / "i.csv", side),)
    log = write_csv(tmp_path / "l.csv", table)
    with pytest.raises(UserError, match=r"row (7|0) .*more than 1,000 characters|more .*row 7 of") \
            as error:  # fmt: skip
        prepare(tmp_path, log, **options)
    sql = re.search(rf'--{where}_features="([^"]*)"', str(error.value))[1]
    folder = prepare(tmp_path, log, **(options | {f"{where}_features": (sql,)}))
    assert RequestDataset(folder).schema.vocabularies["story"] == 16 + (2 if where == "history"
                                                                        else 30)  # fmt: skip


@pytest.mark.parametrize("suffix", [".txt", ".dat", ".inter", ".TXT", ".csv.gz"])
def test_files_in_folders(tmp_path, suffix):
    import gzip

    folder = tmp_path / "log"
    folder.mkdir()
    for part in range(2):
        text = write_csv(folder / "part", rows()[300 * part : 300 * part + 300])
        content = (folder / "part").read_text()
        if suffix == ".inter":
            content = content.replace(",", "\t")
        data = gzip.compress(content.encode()) if suffix == ".csv.gz" else content.encode()
        (folder / f"{part}{suffix}").write_bytes(data)
        (folder / "part").unlink()
    (folder / "README.md").write_text(text)
    (folder / ".hidden.csv").write_text("no log")
    profile = stage(tmp_path, folder).profile()
    assert re.search(r"^files +2, 600 rows of 600 lines", profile, re.MULTILINE)
    assert re.search(r"^files not read +README.md$", profile, re.MULTILINE)
    # Beside tables they are notes.
    (folder / "a.csv").touch()
    write_csv(folder / "b.csv", rows())
    if suffix in (".txt", ".dat", ".TXT"):
        profile = stage(tmp_path, folder).profile()
        assert re.search(
            rf"^files not read +0{suffix}, 1{suffix}, README.md, a.csv$", profile, re.M
        )


@pytest.mark.parametrize("gap", [0, 10**9])
def test_requests_that_have_the_whole_catalogue_leave_no_negatives(tmp_path, gap):
    table = [
        {"user_id": u, "item_id": i, "timestamp": T0 + 86_400 * d + (i if gap else 0)}
        for u in range(4)
        for d in range(30)
        for i in range(3)
    ]
    log = write_csv(tmp_path / "l.csv", table)
    starts = {"validation_start": "2023-12-01", "test_start": "2023-12-08"}
    with pytest.raises(UserError, match=r"every request of training has all 3 items.*--labels"):
        stage(tmp_path, log, labels=(), session_gap=gap, **starts)
    stage(tmp_path, write_csv(tmp_path / "l.csv", table[1:]), labels=(), **starts)
