"""Labels that are no 0/1 end the preparation, with SQL that works when it is pasted."""

from __future__ import annotations

import re
import shlex

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


def log(path, labels, name="click", **columns):
    n = len(labels)
    table = {"user": [k % 6 for k in range(n)], "item": [k % 7 for k in range(n)],
             "time": [T0 + 3_600 * k for k in range(n)], name: labels}  # fmt: skip
    write = pa_csv.write_csv if path.suffix == ".csv" else pq.write_table
    write(pa.table(table | columns), path)
    return str(path)


def stage(tmp_path, file, **options):
    names = {"user_id": "user", "item_id": "item", "timestamp": "time", "min_count": 1}
    source = LogSource.open(LogConfig(log=(file,), **(names | options)))
    return Staging(source, tmp_path / "mine" / "staging", running.run_here)


def positives(staging):
    """Targets that are 0 and 1, of the whole log."""
    return staging.counts.classes.sum(0).tolist()


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1 + k % 5 for k in range(100)], [60, 40]),  # 4 and 5 of 1 to 5
        ([0.5 * (1 + k % 10) for k in range(100)], [70, 30]),  # 4.0, 4.5 and 5.0
        ([1 - 2 * (k % 4 > 0) for k in range(100)], [75, 25]),  # -1 and 1
        ([["no", "yes!", "yes!"][k % 3] for k in range(99)], [33, 66]),
        ([["it's", "not"][k % 4 > 0] for k in range(100)], [25, 75]),
        ([7 if k in (3, 60) else k % 2 for k in range(100)], [49, 49]),  # slips are missing
        ([k * 37 % 100 for k in range(100)], [75, 25]),  # a watch time
        ([None if k % 10 == 0 else 1 + k % 5 for k in range(100)], [50, 40]),
    ],
)
def test_other_values_end_with_sql_that_works(tmp_path, suffix, labels, expected):
    file = log(tmp_path / f"log{suffix}", labels)
    with pytest.raises(UserError, match=r"label click must be 0, 1.*its values are") as error:
        stage(tmp_path, file, labels=("click",))
    flag = re.search(r'--labels="([^"]*)"', str(error.value)).group(1)
    assert positives(stage(tmp_path, file, labels=(flag,))) == [expected]


def test_a_name_with_blanks(tmp_path):
    file = log(tmp_path / "log.csv", [1 + k % 5 for k in range(100)], name="my rating")
    with pytest.raises(UserError) as error:
        stage(tmp_path, file, labels=("my rating",))
    flag = shlex.split(str(error.value).split("are 1: ")[1])[0].removeprefix("--labels=")
    assert flag == 'my_rating="my rating"::DOUBLE >= 4'
    assert positives(stage(tmp_path, file, labels=(flag,))) == [[60, 40]]


def test_the_second_task_is_named(tmp_path):
    two = [k % 2 for k in range(100)]
    file = log(tmp_path / "log.parquet", two, stars=[1 + k % 5 for k in range(100)])
    with pytest.raises(UserError, match=r"label stars must .*'1' \(20\).*stars::DOUBLE >= 4"):
        stage(tmp_path, file, labels=("click", "stars"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1] * 100, "click is 1 in all 79 targets of train; .*leave --labels out"),
        ([0] * 100, "click is 0 in all 79 targets of train; .*SQL of what counts as 1"),
        ([None if k % 2 else 1 for k in range(100)], "click is 1 in all .*coalesce"),
        ([int(k > 90) for k in range(100)], "click is 0 in all 79 .*later --validation_start"),
    ],
)
def test_one_class_in_training_is_an_error(tmp_path, labels, message):
    file = log(tmp_path / "log.parquet", pa.array(labels, pa.int64()))
    with pytest.raises(UserError, match=message):
        stage(tmp_path, file, labels=("click",))


def test_one_class_later_is_a_warning(tmp_path):
    file = log(tmp_path / "log.parquet", [int(k > 88 or k % 2) for k in range(100)])
    profile = stage(tmp_path, file, labels=("click",)).profile()
    (warning,) = re.findall("^warning: .*", profile, re.MULTILINE)
    assert "label click is 1 in all 11 targets of test" in warning


def test_without_labels_one_item_gives_positives_only(tmp_path):
    file = log(tmp_path / "log.parquet", [1] * 100, item=[3] * 100)
    with pytest.raises(UserError, match="no labels, and 1 item in training"):
        stage(tmp_path, file)
