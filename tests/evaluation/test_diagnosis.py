"""The parts of the diagnosis, against known answers."""

import numpy as np
import pytest

from stca_jax.evaluation import diagnosis


def test_a_logit_that_is_a_term_has_weight_one_there_and_none_elsewhere():
    lifts = np.random.default_rng(0).normal(size=(500, 3))
    rows = diagnosis.term_rows(lifts[:, 1] - 2.5, lifts, ("a", "b", "c"), (1.6, 0.4, 0.2))
    assert [row["term"] for row in rows] == ["a", "b", "c"]
    assert [row["truth"] for row in rows] == [1.6, 0.4, 0.2]
    np.testing.assert_allclose([row["model"] for row in rows], [0, 1, 0], atol=1e-12)


def test_calibration_is_of_each_power_of_four():
    events = np.array([1, 3, 4, 15, 16, 16])
    label = np.array([1.0, 0, 1, 0, 1, 0])
    rows = diagnosis.calibration_rows(label, np.array([3.0, -3, 0, 0, -1, 1]), events)
    assert [(row["events from"], row["targets"]) for row in rows] == [(1, 2), (4, 2), (16, 2)]
    assert [row["auc"] for row in rows] == [1.0, 0.5, 0.0]
    assert [row["calibration"] for row in rows] == pytest.approx([1, 1, 1])
