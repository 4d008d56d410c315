"""What a model has learned: weights of known terms, calibration, and what each channel adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from stca_jax.evaluation import metrics
from stca_jax.evaluation.tables import Row
from stca_jax.models.ranker import Ranker
from stca_jax.models.stca import StcaConfig
from stca_jax.training.averaging import AveragedState
from stca_jax.training.state import TrainState


def term_rows(
    logit: Float[np.ndarray, " t"],
    lifts: Float[np.ndarray, "t terms"],
    names: Sequence[str],
    weights: Sequence[float],
) -> list[Row]:
    """Weights of the true terms, by least squares of a logit on them and a constant."""
    terms = np.column_stack([lifts, np.ones(len(lifts))])
    found = np.linalg.lstsq(terms, logit.astype(np.float64), rcond=None)[0]
    return [
        {"term": name, "truth": float(weight), "model": float(value)}
        for name, weight, value in zip(names, weights, found[:-1], strict=True)
    ]


def calibration_rows(
    label: Float[np.ndarray, " t"],
    logit: Float[np.ndarray, " t"],
    events: Int[np.ndarray, " t"],
) -> list[Row]:
    """Calibration and AUC of targets with histories of each power of four events."""
    octave = np.floor(np.log2(np.maximum(events, 1)) / 2).astype(int)
    rows: list[Row] = []
    for k in np.unique(octave):
        of = octave == k
        rows.append(
            {
                "events from": 4 ** int(k),
                "targets": int(of.sum()),
                "calibration": metrics.calibration(label[of], logit[of]),
                "auc": metrics.auc(label[of], logit[of]),
            }
        )
    return rows


def channels(state: TrainState, ranker: Ranker) -> dict[str, TrainState]:
    """The state with each channel switched off: weights that read or make it are zero.

    Which is exactly what zeros in the channel give. "attention" is what layers gather (o^i of E5),
    "count channel" the log-sum-exps and the window's size, "match channel" the statistics of
    matches, of which "soft counts" are a part, "table of NAME" a feature's embeddings at every
    level that has it.

    Args:
      state: Of a checkpoint.
      ranker: Its model; of the parameters, only shapes are looked at.
    """
    first = len(ranker.number_names)
    last = first + ranker.num_statistics
    channel = ranker.match_channel
    num_soft = len(channel.soft_fields) if channel else 0
    numbers = "token_maps/numbers/weight"

    def without_attention(path: str, value: Array) -> Array:
        return jnp.zeros_like(value) if "sequence" in path and "w_output" in path else value

    def without_counts(path: str, value: Array) -> Array:
        if path.endswith("count_weight"):
            return jnp.zeros_like(value)
        return value.at[last:].set(0) if path == numbers else value

    def without_soft_counts(path: str, value: Array) -> Array:
        return value.at[last - num_soft : last].set(0) if path == numbers else value

    def without_matches(path: str, value: Array) -> Array:
        if path == numbers:
            return value.at[first:last].set(0)
        is_input = path.startswith("target_fusion/ffn/") and not path.endswith("out")
        if is_input and channel and not channel.is_complete:
            return value.at[-channel.num_exact :].set(0)
        is_linear = path == "target_fusion/side/match statistics"
        return jnp.zeros_like(value) if is_linear else value

    off = {}
    if isinstance(ranker.config.sequence, StcaConfig):
        off["attention"] = _changed(state, without_attention)
    if ranker.config.sequence.num_counts:
        off["count channel"] = _changed(state, without_counts)
    if num_soft:
        off["soft counts"] = _changed(state, without_soft_counts)
    if ranker.num_statistics:
        off["match channel"] = _changed(state, without_matches)
    for name, rows in state.tables.items():
        tables = {**state.tables, name: jnp.zeros_like(rows)}
        off[f"table of {name}"] = dataclasses.replace(state, tables=tables)
    return off


def _changed(state: TrainState, rule: Callable[[str, Array], Array]) -> TrainState:
    """The state with other dense parameters, and another average of them if one is kept."""

    def changed(parameters: Any) -> Any:
        def of_leaf(path: Any, value: Array) -> Array:
            return rule(jax.tree_util.keystr(path, simple=True, separator="/"), value)

        return jax.tree_util.tree_map_with_path(of_leaf, parameters)

    optimizer = state.optimizer
    if isinstance(optimizer, AveragedState):
        optimizer = optimizer._replace(average=changed(optimizer.average))
    return dataclasses.replace(state, dense=changed(state.dense), optimizer=optimizer)
