"""Evaluation as a user runs it, on a run that was trained as a user trains it."""

import csv
import json

import pytest
from processes import run

from stca_jax.training.checkpointing import Checkpointer, read_best


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, data_dir):
    directory = tmp_path_factory.mktemp("run")
    status, output = run(
        "experiments.train",
        "--config=experiments/configs/tiny.py",
        f"--workdir={directory}",
        f"--data_dir={data_dir}",
        "--config.training.max_steps=12",
        "--config.checkpoint.every_steps=6",
    )
    assert status == 0, output
    return directory


def evaluate(workdir, data_dir, *arguments):
    return run("experiments.evaluate", f"--workdir={workdir}", f"--data_dir={data_dir}", *arguments)


def test_table_has_every_model_at_every_length(workdir, data_dir):
    status, output = evaluate(workdir, data_dir, "--lengths=16,300", "--step=last")
    assert status == 0, output
    for name in ("counting", "logistic", "stca"):
        assert len([line for line in output.splitlines() if line.startswith(f"| {name}")]) == 2
    with (workdir / "evaluation" / "test-12.csv").open() as file:
        table = list(csv.DictReader(file))
    lines = (workdir / "evaluation" / "test-12.jsonl").read_text().splitlines()
    assert [json.loads(line)["model"] for line in lines] == [row["model"] for row in table]
    assert {row["num_targets"] for row in table} == {table[0]["num_targets"]}  # the same targets


def test_step_names_a_checkpoint(workdir, data_dir):
    best = read_best(workdir)["step"]
    assert best in Checkpointer(workdir).steps()
    arguments = ["--lengths=16", "--split=validation", "--noreferences"]
    assert evaluate(workdir, data_dir, *arguments)[0] == 0
    assert (workdir / "evaluation" / f"validation-{best}.csv").exists()
    assert evaluate(workdir, data_dir, *arguments, "--step=6")[0] == 0
    assert (workdir / "evaluation" / "validation-6.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step=7"], r"--step=7: give best, last or one of [6, 12]"),
        (["--lengths=16,many"], "--lengths=16,many: give integers"),
        (["--lengths=0"], "each at least 1"),
        (["--min_history=100000"], "min_history=100000 or more"),
    ],
)
def test_mistake_is_one_clear_error(workdir, data_dir, arguments, message):
    status, output = evaluate(workdir, data_dir, *arguments)
    assert status == 1
    assert message in output
    assert "Traceback" not in output


def test_directory_without_a_run_is_refused(tmp_path, data_dir):
    status, output = evaluate(tmp_path, data_dir)
    assert status == 1
    assert "holds no run" in output
