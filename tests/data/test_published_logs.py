"""MovieLens, KuaiRand and Yambda, on small files exactly as they are published."""

from __future__ import annotations

import collections
import csv
import random

import log_oracle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stca_jax.data.preparation import prepare
from stca_jax.input.dataset import RequestDataset

LOG_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,"
    "long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,"
    "is_rand,tab"
)
VIDEO_HEADER = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,"
    "server_width,server_height,music_id,music_type,tag"
)
USER_HEADER = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,"
    "follow_user_num,follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,"
    "friend_user_num_range,register_days,register_days_range,"
    + ",".join(f"onehot_feat{k}" for k in range(18))
)


@pytest.fixture
def rng():
    return random.Random(0)


def movielens(folder, rng):
    """A quoted comma in a title, a title without a year, "(no genres listed)"."""
    folder.mkdir(parents=True)
    (folder / "movies.csv").write_text(
        "movieId,title,genres\n"
        "1,Toy Story (1995),Adventure|Animation|Children\n"
        '11,"American President, The (1995)",Comedy|Drama|Romance\n'
        "140956,Ready Player One,Action|Sci-Fi|Thriller\n"
        "171749,Death Note: Desu nôto (2006–2007),(no genres listed)\n"  # noqa: RUF001
    )
    rows = ["userId,movieId,rating,timestamp"]
    for user in range(1, 30):
        for movie in rng.sample([1, 11, 140956, 171749], 3):
            stars = rng.choice(["0.5", "3.0", "3.5", "4.0", "5.0"])
            rows.append(f"{user},{movie},{stars},{1_147_800_000 + rng.randrange(40) * 86_400}")
    (folder / "ratings.csv").write_text("\n".join(rows) + "\n")
    with open(folder / "ratings.csv") as file:
        return [
            {"user": r["userId"], "item": r["movieId"], "time": int(r["timestamp"]),
             "rating": r["rating"], "like": int(float(r["rating"]) >= 4)}
            for r in csv.DictReader(file)
        ]  # fmt: skip


def test_movielens(tmp_path, rng, monkeypatch):
    rows = movielens(tmp_path / "ml-25m", rng)
    folder = prepare("movielens/25m", tmp_path / "data", manual_dir=tmp_path)
    expected = log_oracle.expected_requests(rows, labels=("like",))
    assert log_oracle.prepared_requests(folder) == log_oracle.without_user(expected)
    years = pairs(folder, "item", "year")
    assert len({years[item] for item in ("1", "11")}) == 1  # both of 1995
    assert len(set(years.values())) == 2  # and two without a year in the title
    genre = pairs(folder, "item", "genre")
    assert len(set(genre.values())) == 4


def kuairand(folder, rng, size, parts):
    """Users' events in three logs; in the large one, each standard log is in two files."""
    folder.mkdir(parents=True)
    days = {"4_08_to_4_21": (1_649_376_000, 14), "4_22_to_5_08": (1_650_585_600, 17)}
    rows = []

    def write(name, start, num_days, is_rand, count):
        lines = [LOG_HEADER]
        for _ in range(count):
            row = {
                "user_id": rng.randrange(12), "video_id": rng.randrange(20), "date": 20220408,
                "hourmin": 1600,
                "time_ms": start * 1_000 + rng.randrange(num_days * 86_400_000),
                **{n: rng.randrange(2) for n in LOG_HEADER.split(",")[5:12]},
                "play_time_ms": rng.randrange(60_000), "duration_ms": rng.choice([0, 10_000]),
                "profile_stay_time": 0, "comment_stay_time": 0, "is_profile_enter": 0,
                "is_rand": is_rand, "tab": rng.randrange(3),
            }  # fmt: skip
            lines.append(",".join(map(str, row.values())))
            rows.append({"user": str(row["user_id"]), "item": str(row["video_id"]),
                         "time": row["time_ms"] // 1_000,
                         "click": None if is_rand else row["is_click"],
                         "long_view": None if is_rand else row["long_view"],
                         "like": None if is_rand else row["is_like"],
                         "played": row["play_time_ms"]})  # fmt: skip
        (folder / name).write_text("\n".join(lines) + "\n")

    for period, (start, num_days) in days.items():
        for suffix in ("_part1", "_part2") if parts else ("",):
            write(f"log_standard_{period}_{size}{suffix}.csv", start, num_days, 0, 400)
    write(f"log_random_4_22_to_5_08_{size}.csv", *days["4_22_to_5_08"], 1, 30)
    videos = [VIDEO_HEADER] + [
        f"{v},{v % 5},NORMAL,2022-04-01,LongImport,1.0,{'' if v == 3 else 1000.0 * v},720.0,1280.0,"
        f"{v % 4},9.0,{'' if v == 4 else chr(34) + f'{v % 6},65' + chr(34)}"
        for v in range(20)
    ]
    (folder / f"video_features_basic_{size}.csv").write_text("\n".join(videos) + "\n")
    users = [USER_HEADER] + [
        f"{u},full_active,0,0,{u % 2},5,\"(0,10]\",3,\"[1,10)\",1,\"[1,5)\",300,181-365"
        + ",1" * 17 + ","
        for u in range(12)
    ]  # fmt: skip
    (folder / f"user_features_{size}.csv").write_text("\n".join(users) + "\n")
    return rows


@pytest.mark.parametrize(("size", "parts"), [("1k", False), ("27k", True), ("pure", False)])
def test_kuairand(tmp_path, rng, size, parts):
    name = {"1k": "KuaiRand-1K", "27k": "KuaiRand-27K", "pure": "KuaiRand-Pure"}[size]
    rows = kuairand(tmp_path / name / "data", rng, size, parts)
    folder = prepare(f"kuairand/{size}", tmp_path / "data", manual_dir=tmp_path)
    expected = log_oracle.expected_requests(rows, labels=("click", "long_view", "like"))
    assert log_oracle.prepared_requests(folder) == log_oracle.without_user(expected)
    dataset = RequestDataset(folder)
    assert dataset.schema.tasks == ("click", "long_view", "like")
    origin = dataset.metadata["time_origin"]
    assert dataset.metadata["validation_start"] + origin == 1_650_556_800  # 22 April in Beijing
    authors = pairs(folder, "item", "author")
    assert len({authors[str(v)] for v in (1, 6, 11, 16)}) == 1
    tags = pairs(folder, "item", "tag")
    assert tags["1"] == tags["7"] != tags["2"]
    assert tags["4"] not in {tags[v] for v in tags if v != "4"}  # missing
    durations = pairs(folder, "item", "duration")
    assert durations["3"] == 0  # missing: the mean
    assert len({v: durations[str(v)] for v in range(5, 20)}) == 15


def test_yambda(tmp_path, rng):
    rows = []
    for _ in range(1_500):
        day = rng.choice([(0, 25_800_000, 5), (25_830_000, 26_000_000, 5)])
        kind = rng.choice(["listen", "listen", "like", "unlike", "dislike", "undislike"])
        played = rng.randrange(0, 110, 5) if kind == "listen" else None
        rows.append({
            "uid": rng.randrange(100, 110), "timestamp": rng.randrange(*day),
            "item_id": rng.randrange(500, 530), "is_organic": rng.randrange(2),
            "played_ratio_pct": played,
            "track_length_seconds": 180 if kind == "listen" else None, "event_type": kind,
        })  # fmt: skip
    path = tmp_path / "flat" / "50m" / "multi_event.parquet"
    path.parent.mkdir(parents=True)
    columns = {n: [r[n] for r in rows] for n in rows[0]}
    schema = {
        "uid": pa.uint32(), "timestamp": pa.uint32(), "item_id": pa.uint32(),
        "is_organic": pa.uint8(), "played_ratio_pct": pa.uint16(),
        "track_length_seconds": pa.uint32(),
    }  # fmt: skip
    arrays = {n: pa.array(columns[n], t) for n, t in schema.items()}
    arrays["event_type"] = pa.array(columns["event_type"]).dictionary_encode()
    pq.write_table(pa.table(arrays), path)
    artists = pa.table({
        "artist_id": pa.array([7, 8, *[i // 10 for i in range(501, 530)]], pa.uint32()),
        "item_id": pa.array([500, 500, *range(501, 530)], pa.uint32()),  # 500 is of two artists
    })  # fmt: skip
    pq.write_table(artists, tmp_path / "artist_item_mapping.parquet")
    folder = prepare("yambda/50m", tmp_path / "data", manual_dir=tmp_path)
    expected = log_oracle.expected_requests(
        [
            {"user": r["uid"], "item": r["item_id"], "time": r["timestamp"],
             "listen": None if r["played_ratio_pct"] is None else int(r["played_ratio_pct"] >= 50),
             **r}
            for r in rows
        ],
        labels=("listen",),
        gap=600,
    )  # fmt: skip
    assert log_oracle.prepared_requests(folder) == log_oracle.without_user(expected)
    artist = pairs(folder, "item", "artist")
    assert artist[501] == artist[509] != artist[511]


def pairs(folder, key, feature):
    """Value of the item -> encoded value of one of its features, which must be one."""
    dataset = RequestDataset(folder)
    value = {k: v for v, k in log_oracle.feature_ids(folder, key).items()}
    found = collections.defaultdict(set)
    for u in range(len(dataset)):
        record = dataset.record(u)
        columns = zip(record.history[key], record.history[feature], strict=True)
        for item, encoded in columns:
            found[value[int(item)]].add(encoded.item())
    assert all(len(encoded) == 1 for encoded in found.values())
    return {item: encoded.pop() for item, encoded in found.items()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("movielens/32m", "lacks ratings.csv, movies.csv. Download .*ml-32m.zip"),
        ("kuairand/27k", r"lacks log_standard_4_08_to_4_21_27k_part1.csv, .*zenodo.org"),
        ("yambda/5b", "lacks flat/5b/multi_event.parquet, .*huggingface"),
    ],
)
def test_missing_files_are_named(tmp_path, name, message):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "archive.zip").touch()
    with pytest.raises(FileNotFoundError, match=message):
        prepare(name, tmp_path / "data", manual_dir=tmp_path / "other")
    command = f"python -m stca_jax.experiments.prepare --dataset={name} --manual_dir=FOLDER"
    with pytest.raises(FileNotFoundError, match=command):
        prepare(name, tmp_path / "data")
