"""The rule by which the training and following jobs mark the best checkpoint."""

import json
import math

import pytest

from stca_jax.evaluation.best import Criterion, mark_best, marked_steps, read_best, score

AUC = Criterion("auc", "validation", 1_000, larger_is_better=True)


@pytest.fixture
def workdir(tmp_path):
    for step in (10, 20, 30, 40):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    return tmp_path


def test_best_is_neither_nan_nor_gone(workdir):
    assert mark_best(workdir, {10: 0.8}, AUC) == 10
    assert mark_best(workdir, {20: math.nan}, AUC) == 10
    assert mark_best(workdir, {20: None}, AUC) == 10
    assert mark_best(workdir, {20: 0.7}, AUC) == 10
    (workdir / "checkpoints" / "10").rmdir()
    assert mark_best(workdir, {20: 0.7}, AUC) == 20
    assert read_best(workdir)["value"] == 0.7


@pytest.mark.parametrize(("larger", "best"), [(True, 20), (False, 10)])
def test_direction_and_the_first_of_equal_ones(workdir, larger, best):
    for step, value in {10: 0.5, 20: 0.7, 30: 0.7, 40: 0.5}.items():
        mark_best(workdir, {step: value}, AUC._replace(larger_is_better=larger))
    assert read_best(workdir)["step"] == best


def test_values_of_different_lengths_requests_and_metrics_are_not_compared(workdir):
    others = [{"length": 50}, {"split": "test"}, {"metric": "gauc_user"}, {"min_history": 5},
              {"max_requests": 9}, {"max_targets": 9}]  # fmt: skip
    for other in others:
        mark_best(workdir, {10: 0.99}, AUC._replace(**other))
    assert mark_best(workdir, {20: 0.6}, AUC) == 20
    assert marked_steps(workdir) == {10, 20}
    best = {"step": 20, "value": 0.6, "metric": "auc", "split": "validation", "length": 1_000}
    assert read_best(workdir).items() >= best.items()


def test_a_job_that_follows_decides_until_it_is_interrupted(workdir):
    following = AUC._replace(length=10_000)
    mark_best(workdir, {10: 0.7}, AUC)
    mark_best(workdir, {10: 0.6}, following)
    assert read_best(workdir)["length"] == 10_000
    mark_best(workdir, {20: 0.6}, AUC)  # the job lags, or is no more
    assert (read_best(workdir)["length"], read_best(workdir)["step"]) == (1_000, 10)
    mark_best(workdir, {10: 0.6, 20: 0.65}, following)
    assert (read_best(workdir)["length"], read_best(workdir)["step"]) == (10_000, 20)
    assert marked_steps(workdir) == {10, 20}


def test_of_marks_of_one_length_and_step_the_largest_sample_counts(workdir):
    sample = AUC._replace(max_targets=30_000)
    for first, second in ((sample, AUC), (AUC, sample)):
        mark_best(workdir, {10: 0.6, 20: 0.7}, first)
        mark_best(workdir, {10: 0.8, 20: 0.7}, second)
        assert read_best(workdir)["max_targets"] is None
    mark_best(workdir, {30: 0.9}, sample)
    assert read_best(workdir)["step"] == 30


def test_a_mark_without_limits_of_requests_is_compared(workdir):
    mark_best(workdir, {10: 0.9}, AUC)
    marks = json.loads((workdir / "best.json").read_text())
    for name in ("min_history", "max_requests", "max_targets"):
        del marks[0][name]
    (workdir / "best.json").write_text(json.dumps(marks))
    assert mark_best(workdir, {20: 0.6}, AUC._replace(max_targets=9)) == 10


@pytest.mark.parametrize("metric", ["auc", "auc@64"])
def test_mark_of_the_first_version_is_read_and_replaced(workdir, metric):
    (workdir / "best.json").write_text(json.dumps({"step": 10, "metric": metric, "value": 0.9}))
    assert (read_best(workdir)["step"], read_best(workdir)["metric"]) == (10, "auc")
    mark_best(workdir, {20: 0.6}, AUC)
    assert read_best(workdir)["step"] == 20


def test_tasks_without_the_metric_do_not_count():
    rows = [{"auc": 0.6}, {"auc": math.nan}, {"auc": 0.8}, {"auc": None}, {"log_loss": 1.0}]
    assert score(rows, "auc") == pytest.approx(0.7)
    assert score(rows[1:2], "auc") is None
