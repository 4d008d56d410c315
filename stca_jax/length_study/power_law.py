"""A power law of log loss in width and training length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stca_jax.evaluation.tables import Row
from stca_jax.experiment import ExperimentConfig
from stca_jax.length_study.points import Point


class PowerLaw(NamedTuple):
    """loss = scale * width ** width_exponent * length ** length_exponent, with standard errors.

    Attributes:
      scale: At width and length 1.
      width_exponent: Negative where larger models are better.
      width_error: Its standard error.
      length_exponent: Of the training length.
      length_error: Its standard error.
    """

    scale: float
    width_exponent: float
    width_error: float
    length_exponent: float
    length_error: float


def fit_power_law(
    width: Sequence[float], length: Sequence[float], loss: Sequence[float]
) -> PowerLaw:
    """Ordinary least squares of the logarithms.

    Args:
      width: Of each run.
      length: Training length of each run.
      loss: Positive.

    Raises:
      ValueError: fewer than four runs, or all of one width or length.
    """
    x = np.column_stack([np.ones(len(loss)), np.log(width), np.log(length)])
    if len(x) < 4 or np.linalg.matrix_rank(x) < 3:
        raise ValueError(f"{len(x)} runs do not determine a power law of width and length")
    y = np.log(loss)
    solution, *_ = np.linalg.lstsq(x, y, rcond=None)
    residual = y - x @ solution
    variance = residual @ residual / (len(x) - 3) * np.linalg.inv(x.T @ x)
    error = np.sqrt(np.diag(variance))
    return PowerLaw(
        float(np.exp(solution[0])),
        float(solution[1]),
        float(error[1]),
        float(solution[2]),
        float(error[2]),
    )


def capacity_law(
    points: Sequence[Point], rows: Sequence[Row], base: ExperimentConfig
) -> PowerLaw | None:
    """The power law of test log loss at full length; None before there are runs of three widths."""
    overrides = {p.name: p.overrides for p in points if "capacity" in p.parts}
    longest = max(base.evaluation.lengths)
    runs = [
        row
        for row in rows
        if row["point"] in overrides and row["split"] == "test" and row["length"] == longest
    ]
    name = "model.sequence.width"
    width = [overrides[r["point"]].get(name, base.model.sequence.width) for r in runs]
    if len(set(width)) < 3:
        return None
    length = [overrides[r["point"]]["input.length.length"] for r in runs]
    return fit_power_law(width, length, [r["log_loss"] for r in runs])
