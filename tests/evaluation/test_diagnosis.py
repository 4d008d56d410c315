"""The parts of the diagnosis, against known answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from strategies import SCHEMA
from tiny_ranker import CONFIGS

from stca_jax.batch import Request, from_requests
from stca_jax.evaluation import diagnosis
from stca_jax.models.ranker import Ranker
from stca_jax.training.averaging import AveragedState
from stca_jax.training.state import TrainState, merge_ranker, split_ranker


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


@functools.cache
def ranker_and_state(name):
    """A model with random parameters, another average of them, and its compiled logits."""
    ranker = Ranker(CONFIGS[name], SCHEMA, rngs=nnx.Rngs(0))
    graph, dense, tables = split_ranker(ranker)
    leaves, structure = jax.tree.flatten(dense)
    keys = jax.random.split(jax.random.key(1), 2 * len(leaves))

    def drawn(keys):
        pairs = zip(keys, leaves, strict=True)
        return jax.tree.unflatten(structure, [jax.random.normal(k, x.shape) for k, x in pairs])

    averaged = AveragedState(jnp.zeros(()), drawn(keys[len(leaves) :]), None)
    state = TrainState(jnp.zeros(()), drawn(keys[: len(leaves)]), tables, averaged, {})
    logits = jax.jit(lambda dense, tables, batch: merge_ranker(graph, dense, tables)(batch))

    def both(state, batch):
        parameters = state.dense, state.optimizer.average
        return [np.asarray(logits(p, state.tables, batch)) for p in parameters]

    return ranker, state, both


def batch_of(history, history_time, time=10**6):
    """One request on an invented history; the vocabularies are those of the strategies' schema."""
    ids = np.asarray(history)
    columns = {n: ids % SCHEMA.vocabularies.get(n, 2) for n in SCHEMA.history}
    columns |= {n: ids * 0.1 for n in SCHEMA.history if not SCHEMA.is_categorical(n)}
    targets = {n: np.array([0, 1]) for n in SCHEMA.target if SCHEMA.is_categorical(n)}
    targets |= {n: np.array([0.5, 1.0]) for n in SCHEMA.target if not SCHEMA.is_categorical(n)}
    features = {n: 0 if SCHEMA.is_categorical(n) else 0.5 for n in SCHEMA.request}
    request = Request(
        history=columns,
        history_time=np.asarray(history_time),
        time=time,
        targets=targets,
        features=features,
        labels=np.zeros((2, len(SCHEMA.tasks))),
    )
    return from_requests(SCHEMA, [request])


CHANNELS = ("attention", "count channel", "match channel")


def without(state, ranker, off):
    for channel in off:
        state = diagnosis.channels(state, ranker)[channel]
    return state


def difference(name, some, other, off):
    """Largest change of a logit from one history to the other, for both kinds of parameters."""
    ranker, state, logits = ranker_and_state(name)
    changed = without(state, ranker, off)
    pairs = zip(logits(changed, some), logits(changed, other), strict=True)
    return [np.abs(a[:, :2] - b[:, :2]).max() for a, b in pairs]


@pytest.mark.parametrize("name", ["shared", "exclusive"])  # matches go to the backbone, or to both
def test_three_channels_are_all_that_comes_from_the_history(name):
    """Without them two histories score alike; with any one of them they do not."""
    some = batch_of([0, 1, 2, 0], [10, 500_000, 900_000, 999_000])
    other = batch_of([0, 4, 5, 5, 0, 1, 1, 1], [10, 20, 30, 100, 200, 999_997, 999_998, 999_999])
    assert difference(name, some, other, CHANNELS) == [0, 0]
    for kept in CHANNELS:
        off = [c for c in CHANNELS if c != kept]
        assert min(difference(name, some, other, off)) > 1e-5


def test_soft_counts_are_what_tells_histories_without_a_match_apart():
    """Neither has an id of a target, so that exact counts are equal; one has more that is alike."""
    some, other = batch_of([2], [0]), batch_of([2, 5] * 50, range(100))
    others = "attention", "count channel"
    assert min(difference("shared", some, other, others)) > 1e-5
    assert difference("shared", some, other, (*others, "soft counts")) == [0, 0]


def test_a_table_that_is_off_holds_zeros_and_the_others_what_they_held():
    ranker, state, _ = ranker_and_state("shared")
    off = diagnosis.channels(state, ranker)
    assert off.keys() == {
        *CHANNELS,
        "soft counts",
        *(f"table of {name}" for name in SCHEMA.vocabularies),
    }
    tables = off["table of category"].tables
    assert not np.asarray(tables["category"]).any()
    np.testing.assert_array_equal(tables["item"], state.tables["item"])
