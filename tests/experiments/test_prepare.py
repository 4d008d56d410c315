"""Preparing a log as a user does: profile, dry run, build, mistakes, training on it."""

import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import run

from stca_jax.input.dataset import RequestDataset

T0 = 1_700_000_000


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    rng = random.Random(0)
    rows = [
        {
            "uid": f"u{rng.randrange(60)}",
            "video": rng.randrange(50),
            "time_ms": (T0 + rng.randrange(30) * 86_400) * 1_000,
            "click": float(rng.random() < 0.3),
            "watched": rng.expovariate(1 / 20),
        }
        for _ in range(3_000)
    ]
    path = tmp_path_factory.mktemp("log") / "it's (a log, mine.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def prepare(data_dir, log, *extra):
    return run(
        "experiments.prepare",
        "--dataset=interaction_log",
        "--name=mine",
        f"--log={log}",
        f"--data_dir={data_dir}",
        "--user_id=uid",
        "--item_id=video",
        "--timestamp=time_ms",
        "--labels=click,long=watched > 18.5",
        "--history_features=watched",
        *extra,
    )


def test_profile_then_dataset_then_training(tmp_path, log):
    data_dir = tmp_path / "data"
    status, output = prepare(data_dir, log, "--dry_run")
    assert status == 0, output
    profile = dict(re.findall(r"^(\S.*?)  +(\S.*)$", output, re.MULTILINE))
    assert profile["files"] == "1, 3,000 rows"
    assert profile["users, items"] == "60, 50"
    assert profile["time"] == "2023-11-14 22:13 to 2023-12-13 22:13 UTC"
    assert profile["history features"] == "item, watched, click, long"
    assert "click 0.3" in profile["label rates"]
    assert "Nothing was built or kept" in output
    assert not data_dir.exists()

    status, output = prepare(data_dir, log)
    assert status == 0, output
    assert "60 users" in output
    assert "--config.dataset=interaction_log/mine" in output
    folder = f"{data_dir}/interaction_log/mine/1.0.0"
    assert output.splitlines()[-1] == f"The dataset is in {folder}"
    train = r"^  python -m stca_jax\.experiments\.train (.*) --workdir=DIR$"
    printed = re.search(train, output, re.MULTILINE)
    assert printed[1] == f"--config={folder}/train_config.py --data_dir={data_dir}"

    status, again = prepare(data_dir, log)
    assert status == 0, again
    status, output = prepare(data_dir, log, "--min_count=2")
    assert status == 1
    assert "min_count: 5 -> 2" in output
    assert "Traceback" not in output

    status, output = run(
        "experiments.train",
        *printed[1].split(),
        "--config.training.max_steps=2",
        f"--workdir={tmp_path / 'run'}",
    )
    assert status == 0, output
    assert "finished 2 steps" in output
    evaluate = r"^  python -m stca_jax\.experiments\.evaluate --workdir=\S+ (.*)$"
    assert re.search(evaluate, output, re.MULTILINE)[1] == f"--data_dir={data_dir}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=interaction_log", "--log=x"], "--name is None"),
        (["--dataset=interaction_log", "--name=a/b", "--log=x"], "--name is 'a/b'"),
        (["--dataset=interaction_log", "--name=a"], "log is empty"),
        (["--dataset=interaction_log", "--name=a", "--log="], "names an empty path"),
        (["--dataset=interaction_log", "--name=a", "--log=no_such_log"], "no_such_log"),
        (["--dataset=interaction_log", "--name=a", "--log=x", "--lables=y"], "labels"),
        (["--dataset=synthetic_interests/tiny", "--min_count=2"], "--min_count is of logs"),
        (["--dataset=movielens/20m", "--item_trends=7d"], "--name is None"),
        (["--dataset=synthetic_interests/tiny", "--dry_run"], "--dry_run is for logs"),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    status, output = run("experiments.prepare", f"--data_dir={tmp_path}", *arguments)
    assert status == 1
    assert message in output
    assert "Traceback" not in output


def test_training_on_an_unprepared_log_says_how_to_prepare_it(tmp_path):
    status, output = run(
        "experiments.train",
        "--config=experiments/configs/tiny.py",
        "--config.dataset=interaction_log/mine",
        f"--workdir={tmp_path / 'run'}",
        f"--data_dir={tmp_path}",
    )
    assert status == 1
    assert "python -m stca_jax.experiments.prepare --dataset=interaction_log --name=mine" in output


def test_a_published_log_with_trends_under_a_name_of_its_own(tmp_path):
    rng = random.Random(0)
    folder = tmp_path / "ml-20m"
    folder.mkdir()
    (folder / "movies.csv").write_text(
        "movieId,title,genres\n"
        + "".join(f"{i},Movie {i} (19{50 + i}),{['Drama', 'War'][i % 2]}\n" for i in range(9))
    )
    (folder / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n"
        + "".join(
            f"{rng.randrange(20)},{rng.randrange(9)},{rng.randrange(1, 6)}.0,{T0 + 3_600 * k}\n"
            for k in range(400)
        )
    )
    arguments = [
        "--dataset=movielens/20m", f"--data_dir={tmp_path}", "--name=movies",
        "--item_trends=7d,28d", "--trends_of=item,genre", "--user_trends=1d",
    ]  # fmt: skip
    status, output = run("experiments.prepare", *arguments)
    assert status == 1
    assert "--dataset=movielens/20m --manual_dir=FOLDER" in output
    status, output = run("experiments.prepare", *arguments, f"--manual_dir={tmp_path}")
    assert status == 0, output
    assert "--config.dataset=interaction_log/movies" in output
    schema = RequestDataset(tmp_path / "interaction_log" / "movies" / "1.0.0").schema
    assert {"item_trend_7d", "genre_rate_28d_like", "item_age"} <= set(schema.target)
    assert "user_events_1d" in schema.request
    assert schema.tasks == ("like",)  # as the builder says
