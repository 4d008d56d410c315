"""Raw values in, the evaluation's logits out: trends, missing labels, values that no one knew."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import evaluated, export_run, make_run

from stca_jax.data.interaction_log.interaction_log_dataset_builder import make_builder
from stca_jax.data.interaction_log.log_config import LogConfig
from stca_jax.data.preparation import prepare_builder
from stca_jax.errors import UserError
from stca_jax.input.dataset import RequestDataset
from stca_jax.models.embedding import EmbeddingConfig
from stca_jax.models.ranker import RankerConfig
from stca_jax.models.stca import StcaConfig
from stca_jax.serving import Events, Scorer, ScoreRequest, ServingModel

DAY = 86_400
T0 = 1_700_000_000 // DAY * DAY
SHORT = 50  # events that one of the exports reads; users have about 130


def make_rows():
    """Impressions of 40 days, two labels, either missing now and then; items come and go."""
    rng = np.random.default_rng(5)
    time = np.sort(rng.integers(0, 40 * DAY, 1_200)) // 600 * 600
    rows = {}
    for k, t in enumerate(time.tolist()):
        item = int((rng.integers(0, 12) + t // (8 * DAY) * 5) % 30)
        row = {
            "user": f"u{rng.integers(0, 9)}",
            "item": f"item {item}",
            "time": T0 + t,
            "click": None if k % 11 == 0 else int(rng.random() < 0.5),
            "buy": None if k % 5 == 0 else int(rng.random() < 0.3),
            "kind": None if k % 7 == 0 else str(rng.choice(["view", "open", f"rare {k}"])),
            "price": None if k % 13 == 0 else float(np.round(rng.lognormal(3, 2), 2)),
        }
        rows[tuple(row.values())] = row
    return list(rows.values())


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    pq.write_table(pa.Table.from_pylist(rows), folder / "log.parquet")
    items = {
        "item": [f"item {i}" for i in range(25)],
        "brand": [None if i == 3 else f"b{i % 4}" for i in range(25)],
    }
    pq.write_table(pa.table(items), folder / "items.parquet")
    config = LogConfig(
        log=(str(folder / "log.parquet"),), user_id="user", item_id="item", timestamp="time",
        labels=("click", "buy"), history_features=("kind", "price"),
        items=(str(folder / "items.parquet"),), item_features=("brand",),
        item_trends=("1d", "7d"), trends_of=("item", "brand"), user_trends=("1d", "28d"),
        min_count=3, validation_start="2023-12-12", test_start="2023-12-18",
    )  # fmt: skip
    prepared = prepare_builder(make_builder("mine", config, folder / "data"), folder / "data")
    model = RankerConfig(
        sequence=StcaConfig(width=16, num_heads=2, skip_paths=True, recency_score=True),
        embedding=EmbeddingConfig(item_width=16, linear_path=True),
        match_time_scales_days=(1.0, 28.0),
    )
    return make_run(RequestDataset(prepared), folder / "run", model)


@pytest.fixture(scope="module")
def export(run, tmp_path_factory):
    return export_run(run, tmp_path_factory.mktemp("exports") / "export")


def events_of(rows):
    columns = {name: [row[name] for row in rows] for name in ("item", "kind", "price")}
    labels = {n: [2 if row[n] is None else row[n] for row in rows] for n in ("click", "buy")}
    return Events([row["time"] for row in rows], {**columns, **labels})


def test_raw_test_requests_score_as_evaluated(export, run, rows):
    expected = evaluated(run)
    scorer = Scorer(ServingModel.load(export))
    dataset, features = run.dataset, run.dataset.features
    origin, users = dataset.metadata["time_origin"], features.users.ids.tolist()
    worst = checked = 0
    for u in range(len(dataset)):
        record, user = dataset.record(u), users[u]
        known = 0  # of the user's rows
        own = [row for row in rows if row["user"] == user]
        for k, time in enumerate((record.request_time + origin).tolist()):
            new = [row for row in own[known:] if row["time"] < time]
            if new:
                scorer.append(user, events_of(new))
            known += len(new)
            if int(record.request_id[k]) not in expected:
                continue
            rows_of_target = range(*record.target_offset[k : k + 2])
            right = dict(zip(record.target["item"][rows_of_target].tolist(),
                             expected[int(record.request_id[k])], strict=True))  # fmt: skip
            place = dict(zip(right, rows_of_target, strict=True))
            shown = [row["item"] for row in own if row["time"] == time
                     if row["click"] is not None or row["buy"] is not None]  # fmt: skip
            ids = features.encode("item", shown).tolist()
            # The export knows trends from the end of the log on; these are as of the request.
            trends = {n: [record.target[n][place[i]] for i in ids] for n in features.trends.names}
            found = scorer.logits(ScoreRequest(user, {"item": shown, **trends}, {}, time))
            worst = max(worst, np.abs(found - np.stack([right[i] for i in ids])).max())
            checked += len(ids)
    assert checked > 100
    assert worst < 1e-5
    labels = np.concatenate([dataset.record(u).label for u in range(len(dataset))])
    assert np.isnan(labels).any()


def test_trends_are_counted_on_from_the_end_of_the_log(export, run, rows):
    scorer, features = Scorer(ServingModel.load(export)), run.dataset.features
    end = max(row["time"] for row in rows)
    now = end + 3 * 3_600
    scorer.append("u1", events_of([row for row in rows if row["user"] == "u1"]))
    items = [f"item {i}" for i in (*range(30), 777)]
    given = {n: v.tolist() for n, v in features.trend_features(items, np.full(31, now)).items()}
    left_out = scorer.logits(ScoreRequest("u1", {"item": items}, {}, now))
    np.testing.assert_allclose(
        left_out, scorer.logits(ScoreRequest("u1", {"item": items, **given}, {}, now)), atol=1e-6
    )
    other = {**given, "item_trend_7d": [x + 1 for x in given["item_trend_7d"]]}
    changed = scorer.logits(ScoreRequest("u1", {"item": items, **other}, {}, now))
    assert np.abs(changed - left_out).max() > 1e-3
    with pytest.raises(UserError, match=r"lack 'item_trend_1d', and time \d+ is not after the end"):
        scorer.logits(ScoreRequest("u1", {"item": items}, {}, end))


@pytest.mark.parametrize("kept", [True, False])
def test_the_users_own_trends_count_all_events(run, rows, tmp_path, kept):
    """Also those that the model does not read, and those of a moment in the past."""
    scorer = Scorer(ServingModel.load(export_run(run, tmp_path / "short", max_history=SHORT)))
    own = [row for row in rows if row["user"] == "u1"]
    assert len(own) > 2 * SHORT
    if kept:
        scorer.append("u1", events_of(own))
    end = max(row["time"] for row in rows)
    brand = run.dataset.features.trend_features(["item 3"], np.array([end + 1]))
    targets = {"item": ["item 3"], **{n: v.tolist() for n, v in brand.items()}}

    def logits(request, time):
        if kept:
            return scorer.logits(ScoreRequest("u1", targets, request, time))
        return scorer.score_once(events_of(own), targets, request, time, "u1")["click"]

    for time in (end + 600, end - 9 * DAY):
        right = {
            f"user_events_{days}d": math.log1p(
                sum(time - days * DAY <= row["time"] < time for row in own)
            ) / 2
            for days in (1, 28)
        }  # fmt: skip
        assert right["user_events_28d"] > math.log1p(SHORT) / 2
        found = logits({}, time)
        np.testing.assert_allclose(found, logits(right, time), atol=1e-6)
        wrong = {**right, "user_events_28d": math.log1p(SHORT) / 2}
        assert np.abs(logits(wrong, time) - found).max() > 1e-4
