"""Rows of predictions: each task has its own column."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from stca_jax.evaluation.evaluator import metric_rows
from stca_jax.training.train_step import Predictions


def test_each_task_is_scored_by_its_own_labels_and_logits():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, (60, 2)).astype(np.float32)
    logit = (rng.normal(size=(60, 2)) + np.array([2, -1]) * label).astype(np.float32)
    ids = np.arange(60) // 3
    fields = dict.fromkeys(Predictions._fields, np.ones(60, bool))
    fields |= {"logit": logit, "label": label, "user_id": ids, "request_id": ids}
    click, buy = metric_rows(Predictions(**fields), ("click", "buy"), model="stca")
    for k, row in enumerate((click, buy)):
        assert row["task"] == ("click", "buy")[k]
        assert row["auc"] == pytest.approx(roc_auc_score(label[:, k], logit[:, k]))
        assert row["num_positives"] == label[:, k].sum()
