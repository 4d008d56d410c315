"""No builder leaves copies or temporary folders: after an error, a dry run, a kill, another try."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stca_jax.data import preparation, running
from stca_jax.data.interaction_log.events import LogSource
from stca_jax.data.interaction_log.interaction_log_dataset_builder import make_builder
from stca_jax.data.interaction_log.log_config import LogConfig
from stca_jax.data.interaction_log.staging import Staging
from stca_jax.errors import UserError

REPOSITORY = pathlib.Path(__file__).parents[2]
T0 = 1_700_000_000


def write_log(path, **replaced):
    table = {"user_id": [k % 6 for k in range(90)], "item_id": [k % 7 for k in range(90)],
             "timestamp": [T0 + 3_600 * k for k in range(90)]} | replaced  # fmt: skip
    pq.write_table(pa.table(table), path)
    return LogConfig(log=(str(path),), min_count=1)


def names_below(folder):
    """Everything but record files, whose names TFDS chooses."""
    found = (str(p.relative_to(folder)) for p in folder.rglob("*"))
    return sorted(n for n in found if ".array_record" not in n)


# A step that never ends, so that the kill comes within it.
KILLED = """
import os, pathlib, sys, time
from stca_jax.data import preparation
from stca_jax.data.record_files import RecordFiles
from stca_jax.data.interaction_log import staging
def hang(*args, **kwargs):
    os.write(1, b"in the step\\n")  # standard output is redirected while TFDS works
    time.sleep(600)
cls, name = {"write": (RecordFiles, "write"), "sort": (staging.Staging, "sort_shard")}[sys.argv[1]]
setattr(cls, name, hang)
data_dir = pathlib.Path(sys.argv[2])
if sys.argv[3:]:
    from stca_jax.data.interaction_log.interaction_log_dataset_builder import make_builder
    from stca_jax.data.interaction_log.log_config import LogConfig
    builder = make_builder("mine", LogConfig(log=(sys.argv[3],), min_count=1), data_dir)
else:
    builder = preparation.make_builder("synthetic_interests/tiny", data_dir)
preparation.prepare_builder(builder, data_dir)
"""


def kill_within(step, data_dir, *log):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, step, str(data_dir), *log],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert process.stdout.readline().strip() == "in the step"
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_of_a_killed_builder_nothing_is_left_after_the_next_try(tmp_path):
    kill_within("write", tmp_path / "d")
    assert any("incomplete" in name for name in names_below(tmp_path / "d"))
    folder = preparation.prepare("synthetic_interests/tiny", tmp_path / "d")
    preparation.prepare("synthetic_interests/tiny", tmp_path / "e")
    assert names_below(tmp_path / "d") == names_below(tmp_path / "e")
    assert {p.name for p in folder.parent.iterdir()} == {".lock", folder.name}


def test_of_a_killed_log_described_otherwise_nothing_is_left(tmp_path):
    config, data_dir = write_log(tmp_path / "l.parquet"), tmp_path / "d"
    kill_within("sort", data_dir, config.log[0])
    staging = data_dir / "interaction_log" / "mine" / "staging"
    (old,) = staging.iterdir()
    source = LogSource.open(LogConfig(log=config.log, min_count=2))
    Staging(source, staging, running.run_here)
    assert not old.exists()
    assert len(list(staging.iterdir())) == 1
    preparation.prepare_builder(make_builder("mine", config, data_dir), data_dir)
    left = {p.name for p in staging.parent.iterdir()}
    assert left == {".lock", "1.0.0", "rejected_rows.csv"}
    assert {p.name for p in data_dir.iterdir()} == {"interaction_log"}


@pytest.mark.parametrize(
    ("replaced", "left"),
    [
        ({"timestamp": [T0] * 90}, []),  # no validation
        ({"user_id": [None] * 30 + [k % 6 for k in range(60)]}, ["rejected_rows.csv"]),
    ],
)
def test_a_description_that_is_wrong_leaves_its_rejected_rows(tmp_path, replaced, left):
    config, data_dir = write_log(tmp_path / "l.parquet", **replaced), tmp_path / "d"
    with pytest.raises(UserError):
        preparation.prepare_builder(make_builder("mine", config, data_dir), data_dir)
    folder = data_dir / "interaction_log" / "mine"
    if left:
        assert sorted(p.name for p in folder.iterdir()) == [".lock", *left]
    else:
        assert not data_dir.exists()


BEAM = """
import pathlib, sys
from stca_jax.data import preparation, running
from stca_jax.data.interaction_log.interaction_log_dataset_builder import make_builder
from stca_jax.data.interaction_log.log_config import LogConfig
from stca_jax.errors import UserError
features = ("x=error('no «such» thing')",)
config = LogConfig(log=(sys.argv[1],), min_count=1, history_features=features)
data_dir = pathlib.Path(sys.argv[2])
for run in (running.run_here, running.beam_runner(["--runner=DirectRunner"])):
    builder = make_builder("mine", config, data_dir)
    builder.run = run
    try:
        preparation.prepare_builder(builder, data_dir)
    except UserError as error:
        print(error, flush=True)
try:
    running.beam_runner(["--runner=NoSuchRunner"])("Sorting", print, 2)
except UserError as error:
    print(error, flush=True)
"""


def test_errors_of_beam_read_like_those_of_this_process(tmp_path):
    config = write_log(tmp_path / "l.parquet")
    finished = subprocess.run(
        [sys.executable, "-c", BEAM, config.log[0], str(tmp_path / "d")],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    here, beam, unknown = finished.stdout.splitlines()
    assert "thing" in here
    assert beam == here
    assert unknown.startswith("Sorting: the Beam pipeline with --runner=NoSuchRunner failed: ")
