"""A logistic regression on a few features, fitted to the minimum."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float32, Float64, Shaped

_MAX_NEWTON_STEPS = 100
# Of the squared Newton decrement, about twice the gap to the minimum, relative to the objective.
_NEWTON_TOLERANCE = 1e-16


@dataclasses.dataclass(frozen=True)
class LogisticModel:
    """A fitted logistic regression on standardised features.

    Attributes:
      mean: float64 [f], subtracted from the features.
      scale: float64 [f], dividing them after.
      weight: float64 [f], of the standardised features.
      bias: the logit of average features.
    """

    mean: Float64[np.ndarray, " f"]
    scale: Float64[np.ndarray, " f"]
    weight: Float64[np.ndarray, " f"]
    bias: float

    def logit(self, features: Float32[np.ndarray, "n f"]) -> Float32[np.ndarray, " n"]:
        """Returns the log odds of a positive label for each row of features."""
        weight = self.weight / self.scale
        return (features @ weight + (self.bias - self.mean @ weight)).astype(np.float32)


def fit_logistic(
    features: Float32[np.ndarray, "n f"], label: Shaped[np.ndarray, " n"], c: float = 1.0
) -> LogisticModel:
    """Minimises c * (sum of log losses) + |weight|^2 / 2 by Newton's method.

    The objective is scikit-learn's, with its default c. The bias is not penalised.

    Args:
      features: [n, f] finite numbers.
      label: [n] of 0 or 1, both present.
      c: inverse strength of the penalty on the weights of standardised features.

    Returns:
      The fitted model.

    Raises:
      ValueError: if a feature is not finite or the labels do not have both classes.
    """
    label = np.asarray(label).astype(np.float64)
    if set(np.unique(label)) != {0.0, 1.0}:
        raise ValueError(f"Labels are {np.unique(label)[:5]}, expected 0 and 1, both present.")
    if not np.isfinite(features).all():
        column = np.flatnonzero(~np.isfinite(features).all(axis=0))[0]
        raise ValueError(f"Feature {column} has NaN or infinite values, expected finite ones.")

    mean = features.mean(axis=0, dtype=np.float64)
    scale = features.std(axis=0, dtype=np.float64)
    scale[np.ptp(features, axis=0) == 0] = 1.0  # a constant feature stays 0, as in scikit-learn
    standard = np.empty((len(features), len(mean) + 1))
    standard[:, :-1] = (features - mean) / scale
    standard[:, -1] = 1.0
    weight = _newton(standard, label, penalty=np.append(np.full(len(mean), 1 / c), 0.0))
    return LogisticModel(mean, scale, weight[:-1], float(weight[-1]))


def _newton(
    features: Float64[np.ndarray, "n f"],
    label: Float64[np.ndarray, " n"],
    penalty: Float64[np.ndarray, " f"],
) -> Float64[np.ndarray, " f"]:
    """Minimises the sum of log losses + sum(penalty * weight^2) / 2."""

    def objective(weight):
        logit = features @ weight
        loss = np.logaddexp(0.0, np.where(label > 0, -logit, logit)).sum()
        return loss + penalty @ weight**2 / 2

    weight = np.zeros(features.shape[1])
    value = objective(weight)
    for _ in range(_MAX_NEWTON_STEPS):
        logit = features @ weight
        probability = np.exp(-np.logaddexp(0.0, -logit))
        gradient = features.T @ (probability - label) + penalty * weight
        curvature = probability * (1 - probability)
        hessian = (features * curvature[:, None]).T @ features + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        if gradient @ step <= _NEWTON_TOLERANCE * value:
            return weight
        # Full steps may overshoot far from the minimum: halve until the objective falls.
        while (new_value := objective(weight - step)) > value:
            step /= 2
        weight, value = weight - step, new_value
    raise RuntimeError(
        f"No minimum after {_MAX_NEWTON_STEPS} Newton steps, expected about 10: the features "
        "separate the labels and the penalty is too weak to stop the weights; lower c."
    )
