"""Every event of a small MovieLens log, against plain loops over its files."""

from __future__ import annotations

import collections
import csv
import random
import re

import log_oracle
import pytest

from stca_jax.data.preparation import prepare
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.records import SPLITS

MOVIES = (
    "movieId,title,genres",
    "1,Toy Story (1995),Adventure|Animation|Children|Comedy|Fantasy",
    '11,"American President, The (1995)",Comedy|Drama|Romance',
    '4857,"11\'09""01 - September 11 (2002) ",Drama',  # a doubled quote, a space at the end
    "7789,Le fantôme (I) (2002),Comedy|Drama|Romance",  # two pairs of brackets
    "176329,Nirvana: A Documentary,(no genres listed)",  # no year
)
FIRST, DAY = 1_112_486_027, 86_400


def write_files(folder, newline: str) -> None:
    """Whole and half stars, ratings of one second, sorted by user and movie as published."""
    rng = random.Random(0)
    lines = ["userId,movieId,rating,timestamp"]
    movies = [int(m.split(",")[0]) for m in MOVIES[1:]]
    for user in range(1, 41):
        time = FIRST + user * DAY
        for movie in sorted(rng.sample(movies, 4)):
            time += rng.choice([0, 1, DAY])
            lines.append(f"{user},{movie},{rng.choice(['0.5', '3.5', '4.0', '5.0'])},{time}")
    folder.mkdir(parents=True)
    for name, content in (("ratings.csv", lines), ("movies.csv", MOVIES)):
        (folder / name).write_bytes((newline.join(content) + newline).encode())


def read_files(folder):
    """Ratings by user, in order of time; year and genres by movie."""
    with open(folder / "movies.csv", encoding="utf-8", newline="") as file:
        movies = {r["movieId"]: (r["title"], r["genres"]) for r in csv.DictReader(file)}
    ratings = collections.defaultdict(list)
    with open(folder / "ratings.csv", encoding="utf-8", newline="") as file:
        for r in csv.DictReader(file):
            event = (int(r["timestamp"]), r["movieId"], r["rating"], int(float(r["rating"]) >= 4))
            ratings[r["userId"]].append(event)
    return {user: sorted(events) for user, events in ratings.items()}, movies


@pytest.fixture(params=["\n", "\r\n"], ids=["LF", "CRLF"])
def prepared(tmp_path, request):
    write_files(tmp_path / "ml-32m", request.param)
    folder = prepare("movielens/32m", tmp_path / "data", manual_dir=tmp_path)
    return RequestDataset(folder), read_files(tmp_path / "ml-32m")


def values(dataset, name, ids):
    """What ids stand for; every value of these logs is frequent enough for one of its own."""
    value = {k: v for v, k in log_oracle.feature_ids(dataset.directory, name).items()}
    return [value[i] for i in ids.tolist()]


def test_every_rating_is_an_event_with_its_features(prepared):
    dataset, (ratings, movies) = prepared
    origin = dataset.metadata["time_origin"]
    found = collections.Counter()
    of_movie = {}  # ids of genre, genres and year
    for u in range(len(dataset)):
        record = dataset.record(u)
        item = values(dataset, "item", record.history["item"])
        columns = ((record.event_time + origin).tolist(), item,
                   values(dataset, "rating", record.history["rating"]),
                   record.history["like"].tolist())  # fmt: skip
        found[tuple(sorted(zip(*columns, strict=True)))] += 1
        for level, shown in (
            (record.history, item),
            (record.target, values(dataset, "item", record.target["item"])),
        ):
            ids = zip(*(level[n].tolist() for n in ("genre", "genres", "year")), strict=True)
            for movie, triple in zip(shown, ids, strict=True):
                assert of_movie.setdefault(movie, triple) == triple
    assert found == collections.Counter(tuple(events) for events in ratings.values())

    year = {m: re.findall(r"\((\d{4})\)\s*$", title) for m, (title, _) in movies.items()}
    assert year == {"1": ["1995"], "11": ["1995"], "4857": ["2002"], "7789": ["2002"],
                    "176329": []}  # fmt: skip
    for a in movies:
        for b in movies:
            same = [x == y for x, y in zip(of_movie[a], of_movie[b], strict=True)]
            genres = movies[a][1], movies[b][1]
            assert same == [
                genres[0].split("|")[0] == genres[1].split("|")[0],
                genres[0] == genres[1],
                year[a] == year[b],
            ]


def test_requests_hold_the_ratings_of_a_second_and_what_came_strictly_before(prepared):
    dataset, (ratings, _) = prepared
    expected = collections.Counter()
    for events in ratings.values():
        for time in {t for t, *_ in events}:
            history = tuple(e for e in events if e[0] < time)
            targets = tuple((item, like) for t, item, _, like in events if t == time)
            expected[time, history, targets] += 1
    assert any(len(targets) > 1 for *_, targets in expected)
    origin, starts = dataset.metadata["time_origin"], [
        dataset.metadata[f"{split}_start"] for split in SPLITS[1:]
    ]  # fmt: skip
    found = collections.Counter()
    for u in range(len(dataset)):
        record = dataset.record(u)
        log = list(zip((record.event_time + origin).tolist(),
                       values(dataset, "item", record.history["item"]),
                       values(dataset, "rating", record.history["rating"]),
                       record.history["like"].tolist(), strict=True))  # fmt: skip
        for k, time in enumerate(record.request_time.tolist()):
            assert record.request_split[k] == sum(time >= start for start in starts)
            t = slice(*record.target_offset[k : k + 2])
            items = values(dataset, "item", record.target["item"][t])
            targets = zip(items, record.label[t, 0].astype(int).tolist(), strict=True)
            history = tuple(sorted(log[: record.history_end[k]]))
            found[time + origin, history, tuple(sorted(targets))] += 1
    assert found == collections.Counter(
        {(t, h, tuple(sorted(x))): n for (t, h, x), n in expected.items()}
    )


def test_a_rating_is_history_but_no_feature_of_its_target(prepared):
    schema = prepared[0].schema
    assert schema.tasks == ("like",)
    assert schema.target == ("item", "genre", "genres", "year", "log_popularity")
    assert {"rating", "like"} <= set(schema.history)
