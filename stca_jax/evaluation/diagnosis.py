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
from stca_jax.evaluation.evaluator import Row
from stca_jax.schema import Schema
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


def channels(state: TrainState, schema: Schema) -> dict[str, TrainState]:
    """The state with each channel's parameters set to zero.

    "attention" is what layers gather (o^i of E5), "count channel" the log-sum-exps and the window's
    size, "match channel" the exact-match statistics, "table of NAME" a feature's embeddings at
    every level that has it. Weights that read a channel are zero, which is exactly what zeros in
    the channel give.

    Args:
      state: Of a checkpoint of a `Ranker`.
      schema: What its model reads.
    """
    off: dict[str, TrainState] = {}

    def add(channel: str, rule: Callable[[str, Array], Array]) -> None:
        def changed(path: Any, value: Array) -> Array:
            return rule(jax.tree_util.keystr(path), value)

        dense = jax.tree_util.tree_map_with_path(changed, state.dense)
        pairs = zip(jax.tree.leaves(dense), jax.tree.leaves(state.dense), strict=True)
        if any(new is not old for new, old in pairs):
            off[channel] = dataclasses.replace(state, dense=dense)

    numbers = [name for name in schema.target if not schema.is_categorical(name)]
    embedded = sum(state.tables[n].shape[-1] for n in schema.target if n in state.tables)
    up = state.dense["target_fusion"]["ffn"]["up"]
    num_statistics = up.shape[0] - embedded - len(numbers)
    first, last = len(numbers), len(numbers) + num_statistics

    def without_attention(path: str, value: Array) -> Array:
        return jnp.zeros_like(value) if "w_output" in path else value

    def without_counts(path: str, value: Array) -> Array:
        if "count_weight" in path:
            return jnp.zeros_like(value)
        is_read = "token_maps" in path and "numbers" in path and "weight" in path
        return value.at[last:].set(0) if is_read and value.shape[0] > last else value

    def without_matches(path: str, value: Array) -> Array:
        if "target_fusion" in path and value.shape[:1] == up.shape[:1]:
            return value.at[-num_statistics:].set(0)
        is_read = "token_maps" in path and "numbers" in path and "weight" in path
        return value.at[first:last].set(0) if is_read else value

    add("attention", without_attention)
    add("count channel", without_counts)
    if num_statistics:
        add("match channel", without_matches)
    for name, rows in state.tables.items():
        tables = {**state.tables, name: jnp.zeros_like(rows)}
        off[f"table of {name}"] = dataclasses.replace(state, tables=tables)
    return off
