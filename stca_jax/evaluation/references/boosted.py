"""Gradient-boosted trees, the model of tables that is hard to beat; needs LightGBM."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Shaped

HOW_TO_INSTALL = 'gradient-boosted trees need LightGBM: pip install -e ".[references]"'
_MIN_TARGETS_IN_LEAF = 100
_PATIENCE = 25  # rounds without a better held-out loss
_HELD_OUT = 0.1  # of the users


@dataclasses.dataclass(frozen=True)
class BoostingOptions:
    """Size of the trees and of the steps.

    Attributes:
      learning_rate: Weight of each tree.
      num_leaves: Of a tree.
      max_rounds: Most trees; users held out end it earlier.
    """

    learning_rate: float = 0.2
    num_leaves: int = 31
    max_rounds: int = 200


class BoostedTrees:
    """A fitted model."""

    def __init__(self, text: str):
        import lightgbm

        self.text = text
        self._booster = lightgbm.Booster(model_str=text)

    @property
    def num_trees(self) -> int:
        """How many trees there are."""
        return self._booster.num_trees()

    def logit(self, features: Float32[np.ndarray, "n f"]) -> Float32[np.ndarray, " n"]:
        """The log odds of a positive label for each row of features."""
        return np.asarray(self._booster.predict(features, raw_score=True), np.float32)


def is_installed() -> bool:
    """Whether there is LightGBM."""
    return importlib.util.find_spec("lightgbm") is not None


def version() -> str:
    """LightGBM's version."""
    import lightgbm

    return lightgbm.__version__


def fit_boosted(
    features: Float32[np.ndarray, "n f"],
    label: Shaped[np.ndarray, " n"],
    user: Shaped[np.ndarray, " n"],
    is_categorical: Bool[np.ndarray, " f"],
    options: BoostingOptions = BoostingOptions(),
) -> BoostedTrees:
    """Fits trees, as many as users that are held out tell.

    Args:
      features: [n, f] numbers; ids where `is_categorical`.
      label: [n] of 0 or 1, both present.
      user: [n] integers; a tenth of the users is held out.
      is_categorical: Which features are ids.
      options: Size of the trees and of the steps.

    Returns:
      The fitted model, equal for equal arguments whatever the number of threads.

    Raises:
      ValueError: if the labels do not have both classes.
    """
    import lightgbm

    if set(np.unique(label)) != {0, 1}:
        raise ValueError(f"Labels are {np.unique(label)[:5]}, expected 0 and 1, both present.")
    users = np.unique(user)
    chosen = np.random.default_rng(0).permutation(users)[: round(_HELD_OUT * len(users))]
    held_out = np.isin(user, chosen)
    stops = all(len(np.unique(part)) == 2 for part in (label[held_out], label[~held_out]))
    if not stops:
        held_out[:] = False
    parameters: dict[str, Any] = {
        "objective": "binary",
        "learning_rate": options.learning_rate,
        "num_leaves": options.num_leaves,
        "min_data_in_leaf": _MIN_TARGETS_IN_LEAF,
        "feature_fraction": 0.8,
        "bagging_fraction": 0.8,
        "bagging_freq": 1,
        "lambda_l2": 1.0,
        "cat_smooth": 50,
        "deterministic": True,
        "force_row_wise": True,
        "seed": 0,
        "verbose": -1,
    }
    data = lightgbm.Dataset(
        features[~held_out],
        label[~held_out],
        categorical_feature=np.flatnonzero(is_categorical).tolist(),
    )
    valid: list[Any] = []
    callbacks: list[Callable[..., Any]] = []
    if stops:
        valid = [data.create_valid(features[held_out], label[held_out])]
        callbacks = [lightgbm.early_stopping(_PATIENCE, verbose=False)]
    booster = lightgbm.train(
        parameters, data, options.max_rounds, valid_sets=valid, callbacks=callbacks
    )
    return BoostedTrees(booster.model_to_string(num_iteration=booster.best_iteration))
