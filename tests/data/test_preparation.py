from __future__ import annotations

import importlib
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import small_dataset

from stca_jax.data import preparation
from stca_jax.data.base import STAGING
from stca_jax.errors import UserError
from stca_jax.input.dataset import RequestDataset

TESTS = pathlib.Path(small_dataset.__file__).parent
# Prepares the small dataset, slowly, into the folder given as argument.
SCRIPT = """
import sys
from stca_jax.data import preparation
from small_dataset import Builder
Builder.seconds_per_user = float(sys.argv[2])
preparation.make_builder = lambda name, data_dir: Builder(data_dir=data_dir)
print(preparation.prepare("small", sys.argv[1]))
"""


def start(data_dir: pathlib.Path, seconds_per_user: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(data_dir), str(seconds_per_user)],
        env={"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "HOME": str(data_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed_preparation_is_not_taken_for_whole_and_leaves_no_trace(tmp_path):
    folder = tmp_path / "small" / "1.0.0"

    def second_file_begun() -> bool:
        return len(list(tmp_path.rglob("*array_record*"))) == 2

    process = start(tmp_path, seconds_per_user=0.2)
    wait_for(second_file_begun)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not folder.exists()
    assert list(folder.parent.glob("incomplete*"))

    again = start(tmp_path, seconds_per_user=0)
    assert again.communicate(timeout=60)[0].strip() == str(folder)
    assert len(RequestDataset(folder)) == len(small_dataset.USERS)
    assert not list(folder.parent.glob("incomplete*"))


def test_simultaneous_preparations_share_one_result(tmp_path):
    processes = [start(tmp_path, seconds_per_user=0.02) for _ in range(3)]
    outputs = [p.communicate(timeout=60) for p in processes]
    assert [p.returncode for p in processes] == [0, 0, 0], outputs
    folder = tmp_path / "small" / "1.0.0"
    assert {out.strip() for out, _ in outputs} == {str(folder)}
    assert len(RequestDataset(folder)) == len(small_dataset.USERS)


def test_a_prepared_dataset_is_returned_as_it_is(tmp_path, monkeypatch):
    make = lambda name, data_dir: small_dataset.Builder(data_dir=data_dir)  # noqa: E731
    monkeypatch.setattr(preparation, "make_builder", make)
    folder = preparation.prepare("small", tmp_path)
    monkeypatch.delattr(small_dataset.Builder, "user_data")
    assert preparation.prepare("small", tmp_path) == folder


def test_what_a_kill_left_beside_a_whole_dataset_is_removed(tmp_path):
    builder = small_dataset.Builder(data_dir=tmp_path)
    folder = preparation.prepare_builder(builder, tmp_path)
    staging = folder.parent / STAGING
    (staging / "records").mkdir(parents=True)
    assert preparation.prepare_builder(builder, tmp_path) == folder
    assert not staging.exists()


def test_only_a_package_of_the_extra_is_said_to_be_in_it(monkeypatch):
    def import_without(name):
        monkeypatch.setattr(
            importlib,
            "import_module",
            lambda _: (_ for _ in ()).throw(ModuleNotFoundError("not found", name=name)),
        )
        preparation.import_builder("movielens")

    with pytest.raises(UserError, match=r'movielens needs duckdb: pip install -e "\.\[logs\]"'):
        import_without("duckdb")
    with pytest.raises(ModuleNotFoundError):
        import_without("data.mistyped")


def test_known_names():
    assert {"complete_journey", "synthetic_interests"} <= set(preparation.dataset_names())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("complete_jorney", "no dataset is called 'complete_jorney'; .* complete_journey"),
        (
            "complete_journey/next_purchases",
            "no config of complete_journey is called 'next_purchases'; .* next_purchase",
        ),
        ("", "no dataset is called ''; did you mean complete_journey or "),
    ],
)
def test_unknown_names(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        preparation.prepare(name, tmp_path)
    assert not list(tmp_path.iterdir())
