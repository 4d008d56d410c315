"""Evaluation as a user runs it, on a run that was trained as a user trains it."""

import csv
import json
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from processes import REPOSITORY, run, start, wait_until
from sklearn.metrics import roc_auc_score

from stca_jax.data.synthetic_interests import generator
from stca_jax.evaluation.best import read_best
from stca_jax.evaluation.evaluator import evaluate_split, metric_rows
from stca_jax.input.records import SPLITS
from stca_jax.training.checkpointing import Checkpointer
from stca_jax.workdir import load_workdir_config, restore_for_evaluation


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
    for name in ("counting", "logistic", "boosted", "truth", "stca"):
        assert len([line for line in output.splitlines() if line.startswith(f"| {name}")]) == 2
    where = f"results are in {workdir}/evaluation/test-12.csv and .jsonl"
    assert output.splitlines()[-1] == where
    with (workdir / "evaluation" / "test-12.csv").open() as file:
        table = list(csv.DictReader(file))
    lines = (workdir / "evaluation" / "test-12.jsonl").read_text().splitlines()
    assert [json.loads(line)["model"] for line in lines] == [row["model"] for row in table]
    assert {row["num_targets"] for row in table} == {table[0]["num_targets"]}  # the same targets


def test_truth_is_the_true_function_of_the_window(workdir, data_dir, tiny_dataset):
    assert evaluate(workdir, data_dir, "--lengths=16,300", "--step=6")[0] == 0
    lines = (workdir / "evaluation" / "test-6.jsonl").read_text().splitlines()
    truth = {row["length"]: row["auc"] for row in map(json.loads, lines) if row["model"] == "truth"}
    config = generator.GeneratorConfig(**tiny_dataset.metadata["notes"]["generator"])
    catalogue = generator.make_catalogue(config)
    for length, auc in truth.items():
        logits, labels = [], []
        for user in range(len(tiny_dataset)):
            record = tiny_dataset.record(user)
            is_test = record.request_split == SPLITS.index("test")
            targets = np.repeat(is_test, np.diff(record.target_offset))
            logits.append(generator.true_logit(record, catalogue, length)[targets])
            labels.append(record.label[targets, 0])
        expected = roc_auc_score(np.concatenate(labels), np.concatenate(logits))
        assert auc == pytest.approx(expected, abs=1e-5)  # float32 makes a few ties
    assert set(truth) == {16, 300}


def test_other_settings_keep_their_rows(workdir, data_dir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(copy / "evaluation", ignore_errors=True)
    arguments = ["--step=6", "--split=validation"]
    assert evaluate(copy, data_dir, *arguments, "--noreferences", "--lengths=16")[0] == 0
    assert evaluate(copy, data_dir, *arguments, "--noreferences", "--lengths=64")[0] == 0
    filtered = ["--min_history=200", "--noreferences", "--lengths=64"]
    assert evaluate(copy, data_dir, *arguments, *filtered)[0] == 0
    rows = read_rows(copy / "evaluation" / "validation-6.jsonl")
    assert [(r["length"], r["min_history"]) for r in rows] == [(16, 0), (64, 0), (64, 200)]
    assert rows[2]["num_requests"] < rows[1]["num_requests"]  # the filter filters


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def as_texts(rows):
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


def test_watching_adds_each_row_once_and_marks_the_best(workdir, data_dir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "run")
    path = copy / "evaluation" / "checkpoints.jsonl"
    status, output = evaluate(copy, data_dir, "--watch", "--lengths=16,300")
    assert status == 0, output
    assert output.splitlines()[-1] == f"rows of all checkpoints are in {path}"
    rows = read_rows(path)
    scored = [row for row in rows if row["model"] == "stca"]
    assert [(r["step"], r["length"]) for r in scored] == [(6, 16), (6, 300), (12, 16), (12, 300)]
    others = sorted((r["model"], r["length"]) for r in rows if r["model"] != "stca")
    assert others == [
        (n, k) for n in ("boosted", "counting", "logistic", "truth") for k in (16, 300)
    ]

    at_longest = {row["step"]: row["auc"] for row in scored if row["length"] == 300}
    best = max(at_longest, key=at_longest.__getitem__)
    assert read_best(copy) == {
        "step": best,
        "value": at_longest[best],
        "metric": "auc",
        "split": "validation",
        "length": 300,
        "min_history": 0,
        "max_requests": None,
        "max_targets": None,
        "last_step": 12,
    }

    arguments = ["--lengths=16,300", "--split=validation", "--step=12"]
    assert evaluate(copy, data_dir, *arguments)[0] == 0
    offline = read_rows(copy / "evaluation" / "validation-12.jsonl")
    online = [row for row in rows if row.get("step") in (None, 12)]
    assert as_texts(offline) == as_texts(online)

    assert evaluate(copy, data_dir, "--watch", "--lengths=16,300")[0] == 0
    assert read_rows(path) == rows


# References that fail, as those did that had no positive to be fitted on.
FAILING = """
import runpy, sys
from stca_jax.experiments import reference_rows
def fail(*args):
    raise ZeroDivisionError("of a test")
reference_rows.reference_rows = fail
sys.orig_argv = ["python", *sys.argv]
runpy.run_module("experiments.evaluate", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("extra", ["--split=test", "--watch"])
def test_a_reference_that_fails_does_not_keep_the_model_from_being_scored(
    workdir, data_dir, tmp_path, extra
):
    copy = shutil.copytree(workdir, tmp_path / "run")
    arguments = [f"--workdir={copy}", f"--data_dir={data_dir}", "--lengths=16", extra]
    finished = subprocess.run(
        [sys.executable, "-c", FAILING, *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 1, finished.stderr
    assert "\n| stca " in finished.stdout
    assert "not scored:\n  references: " in finished.stdout
    assert "of a test" in finished.stdout


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
    status, output = evaluate(tmp_path, data_dir, "--watch", "--timeout=0")
    assert status == 1
    assert "config.json in 0 seconds" in output


LENGTHS = (16, 64, 256)
STEPS = range(8, 65, 8)


def start_watching(workdir, data_dir, log):
    arguments = [f"--workdir={workdir}", f"--data_dir={data_dir}", "--watch", "--noreferences"]
    arguments.append(f"--lengths={','.join(map(str, LENGTHS))}")
    with log.open("a") as file:  # not a pipe: nobody reads while the job runs
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.evaluate", *arguments],
            cwd=REPOSITORY,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def offline_rows(workdir, dataset, step):
    """What an evaluation of this one checkpoint computes, without any of the watching."""
    config = load_workdir_config(workdir)
    program, state = restore_for_evaluation(config, dataset, workdir, step)
    return [
        row
        for length in LENGTHS
        for row in metric_rows(
            evaluate_split(
                program,
                state,
                dataset,
                config.input,
                split="validation",
                length=length,
                min_history=config.evaluation.min_history,
                max_requests=config.evaluation.max_requests,
            ),
            dataset.schema.tasks,
            step=step,
            length=length,
        )
    ]


@pytest.mark.slow
def test_killed_restarted_and_shared_jobs_score_every_row_once(tmp_path, data_dir, tiny_dataset):
    """Two jobs beside a training, killed at random; a checkpoint is deleted under them."""
    workdir, log, kept = tmp_path / "run", tmp_path / "log", tmp_path / "kept"
    chance = random.Random(0)
    training = start(
        "experiments.train",
        "--config=experiments/configs/tiny.py",
        f"--workdir={workdir}",
        f"--data_dir={data_dir}",
        f"--config.training.max_steps={STEPS[-1]}",
        f"--config.checkpoint.every_steps={STEPS.step}",
        "--config.checkpoint.keep_last=100",
    )
    jobs = [start_watching(workdir, data_dir, log) for _ in range(2)]
    try:
        checkpoints, deleted = workdir / "checkpoints", STEPS[2]
        wait_until((checkpoints / str(deleted)).exists, training)
        shutil.copytree(checkpoints / str(deleted), kept / "checkpoints" / str(deleted))
        shutil.copy(workdir / "config.json", kept)
        for kill in range(4):
            time.sleep(chance.uniform(0.5, 9))
            jobs[kill % 2].kill()
            jobs[kill % 2].wait()
            jobs[kill % 2] = start_watching(workdir, data_dir, log)
            if kill == 1:
                shutil.rmtree(checkpoints / str(deleted))
        assert training.wait(120) == 0
        assert [job.wait(120) for job in jobs] == [0, 0], log.read_text()[-3000:]
    finally:
        for process in (training, *jobs):
            process.kill()

    rows = read_rows(workdir / "evaluation" / "checkpoints.jsonl")
    found = {(row["step"], row["length"]): row for row in rows}
    assert len(found) == len(rows)
    wanted = {(step, length) for step in STEPS for length in LENGTHS}
    assert wanted - found.keys() <= {(deleted, length) for length in LENGTHS}
    for step in STEPS:
        directory = kept if step == deleted else workdir
        for row in offline_rows(directory, tiny_dataset, step):
            if (step, row["length"]) in found:
                # The jobs' programs are compiled otherwise than this process's: see conftest.py.
                close = {k: pytest.approx(v, rel=1e-4) if v == v else v for k, v in row.items()}
                assert close.items() <= found[step, row["length"]].items()
    # A job of its own that nothing disturbs finds the same to the last bit.
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(workdir, undisturbed, ignore=shutil.ignore_patterns("evaluation", "best.json"))
    if not (undisturbed / "checkpoints" / str(deleted)).exists():
        shutil.copytree(kept / "checkpoints", undisturbed / "checkpoints", dirs_exist_ok=True)
    assert start_watching(undisturbed, data_dir, log).wait(300) == 0, log.read_text()[-3000:]
    expected = read_rows(undisturbed / "evaluation" / "checkpoints.jsonl")
    assert {(row["step"], row["length"]) for row in expected} == wanted
    for row in expected:
        assert found.get((row["step"], row["length"]), row) == row

    existing = {s: found[s, LENGTHS[-1]]["auc"] for s in STEPS if s != deleted}
    assert read_best(workdir)["step"] == max(existing, key=existing.__getitem__)
    assert not list((workdir / "evaluation" / "checkpoints.claims").glob("validation-*"))
