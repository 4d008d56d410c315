"""Configs that cannot work are refused before anything is trained."""

import pytest

from stca_jax.evaluation.evaluator import EvaluationConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metric": "acu"}, "'acu', which is no metric; it must be one of auc, gauc_user"),
        ({"metric": "log_loss"}, "a smaller log_loss is better: set larger_is_better=false"),
        ({"min_history": -1}, "min_history is -1; it must be at least 0"),
        ({"max_requests": 0}, "max_requests is 0; it must be at least 1"),
        ({"validation_requests": 0}, "validation_requests is 0; it must be at least 1"),
        ({"validation_length": 0}, "validation_length is 0; it must be at least 1"),
        ({"lengths": ()}, "give at least one"),
        ({"lengths": (50, 0)}, "each at least 1"),
    ],
)
def test_evaluation_that_cannot_work_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**values)


def test_metrics_of_either_direction_can_choose_the_best():
    EvaluationConfig(metric="log_loss", larger_is_better=False)
    EvaluationConfig(metric="gauc_user")
