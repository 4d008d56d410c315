"""Logistic regression against scikit-learn."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from stca_jax.evaluation import metrics
from stca_jax.evaluation.references.logistic import fit_logistic


def random_classification(n=400, f=5, seed=0):
    rng = np.random.default_rng(seed)
    features = (rng.normal(size=(n, f)) * [1, 10, 0.1, 3, 1] + [0, 5, -1, 0, 7]).astype(np.float32)
    features[:, 4] = 7.3  # constant, as the log of a window that every history fills
    logit = features[:, 0] - 0.2 * features[:, 1] + 0.5
    return features, (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(np.int8)


@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0])
def test_logistic_regression_is_that_of_sklearn(c):
    features, label = random_classification()
    model = fit_logistic(features, label, c)
    scaler = StandardScaler().fit(features.astype(np.float64))
    oracle = LogisticRegression(C=c, tol=1e-12, max_iter=1000)
    oracle.fit(scaler.transform(features.astype(np.float64)), label)
    np.testing.assert_allclose(model.weight, oracle.coef_[0], rtol=1e-5, atol=1e-8)
    assert model.bias == pytest.approx(oracle.intercept_[0], rel=1e-5)
    np.testing.assert_allclose(
        model.logit(features),
        oracle.decision_function(scaler.transform(features.astype(np.float64))),
        rtol=1e-4,
        atol=1e-5,
    )


def test_logistic_regression_of_separable_labels_stays_finite():
    features = np.linspace(-1, 1, 50, dtype=np.float32)[:, None]
    model = fit_logistic(features, features[:, 0] > 0, c=1e4)
    assert np.isfinite(model.weight).all()
    assert metrics.auc(features[:, 0] > 0, model.logit(features)) == 1.0


def test_logistic_regression_refuses():
    features, label = random_classification()
    with pytest.raises(ValueError, match="both present"):
        fit_logistic(features, np.ones_like(label))
    features[3, 2] = np.nan
    with pytest.raises(ValueError, match="Feature 2 has NaN"):
        fit_logistic(features, label)
