"""The loss without labels: its value, which pairs it draws, and that no label enters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from strategies import SCHEMA, SHARED_LAYOUT, make_batch
from tiny_ranker import CONFIGS

from stca_jax.training.contrastive import ContrastiveLoss, users_of_tokens
from stca_jax.training.loss import LossInputs
from stca_jax.training.optimizer import OptimizerConfig
from stca_jax.training.sharding import MESH_AXES, device_batch
from stca_jax.training.train_step import Program, TrainingConfig

MESH = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), MESH_AXES)
LOSS = ContrastiveLoss(pairs_per_row=64, reach=3)
# Of SHARED_LAYOUT: tokens of a user's window have one number.
USERS = np.zeros((3, 24), int)
USERS[0, :17], USERS[0, 18:] = 1, 2
USERS[1, 4:11] = 1
USERS[2] = 1


def labelled_batch(seed=0):
    batch = make_batch(SHARED_LAYOUT, seed, shared=True)
    unlabelled = np.random.default_rng(seed).random(batch.history_time.shape) < 0.7
    return batch.replace(history_unlabelled=unlabelled)


def program(batch, *, divided=False):
    model = CONFIGS["shared"]
    if divided:
        model = dataclasses.replace(
            model, embedding=dataclasses.replace(model.embedding, replicated_rows=0)
        )
    training = TrainingConfig(auxiliary_losses=(LOSS,))
    optimizer = OptimizerConfig(warmup_steps=0, table_learning_rate=0.1)
    return Program(model, SCHEMA, optimizer, training, MESH, batch, num_steps=100, seed=0)


def value(batch, key):
    ranker = program(batch).new_ranker()
    inputs = LossInputs(ranker, batch, None, {}, key)
    return ranker, float(LOSS(inputs, LOSS.total_weight(batch)))


def test_users_are_told_apart():
    np.testing.assert_array_equal(users_of_tokens(labelled_batch()), USERS)


def test_pairs_are_of_one_user_near_each_other_and_without_labels():
    batch = labelled_batch()
    found = LOSS._draw(batch, jax.random.key(1))
    first, second, used = (np.asarray(x) for x in (found.first, found.second, found.used))
    row = np.arange(3)[:, None]
    distance = second - first
    assert set(distance[used]) == {1, 2, 3}
    for places in (first, second):
        assert batch.history_unlabelled[row, places][used].all()
        assert (USERS[row, places] == USERS[row, first])[used].all()
    assert (USERS[row, first] > 0)[used].all()
    allowed = {
        (r, a, b)
        for r in range(3) for a in range(24) for b in range(a + 1, min(a + 4, 24))
        if USERS[r, a] == USERS[r, b] > 0 and batch.history_unlabelled[r, [a, b]].all()
    }  # fmt: skip
    drawn = {(r, first[r, p], second[r, p]) for r, p in np.argwhere(used)}
    assert drawn <= allowed
    assert len(drawn) > len(allowed) / 2


def test_value_is_that_of_a_loop_over_pairs():
    batch, key = labelled_batch(), jax.random.key(2)
    ranker, found = value(batch, key)
    pairs = jax.tree.map(np.asarray, LOSS._draw(batch, key))
    names = [n for n in SCHEMA.history if SCHEMA.is_categorical(n)]
    total = 0.0
    for name in names:
        table = np.asarray(ranker.embedding.tables[name].rows[...], np.float64)
        table /= np.linalg.norm(table, axis=1, keepdims=True)
        for r in range(3):
            ids = batch.history[name][r]
            a, b, of, used = (x[r] for x in pairs)
            used = used & (ids[a] != ids[b])
            for p in np.flatnonzero(used):
                others = [
                    q for q in np.flatnonzero(used)
                    if of[q] != of[p] and ids[b[q]] not in (ids[a[p]], ids[b[p]])
                ]  # fmt: skip
                scores = table[ids[b[[p, *others]]]] @ table[ids[a[p]]] / LOSS.temperature
                total += np.log(np.exp(scores - scores[0]).mean())
    assert found == pytest.approx(total / len(names) / (3 * LOSS.pairs_per_row), rel=1e-4)
    assert total != 0


def test_events_that_are_asked_for_and_padding_do_not_matter():
    batch, key = labelled_batch(), jax.random.key(3)
    _, expected = value(batch, key)
    outside = ~batch.history_unlabelled | (USERS == 0)
    changed = {
        name: np.where(outside, np.zeros_like(ids), ids) for name, ids in batch.history.items()
    }
    assert any((changed[name] != batch.history[name]).any() for name in changed)
    _, found = value(batch.replace(history=changed), key)
    assert found == expected
    _, counted = value(batch.replace(history_unlabelled=np.ones_like(outside)), key)
    assert counted != expected


def test_training_learns_it_also_from_divided_tables():
    """Two users with ids of their own: those of one become alike."""
    batch = make_batch(SHARED_LAYOUT[:1] * 2, shared=True)
    own = np.where(np.arange(24) < 17, np.arange(24) % 4, 4 + np.arange(24) % 4)
    history = {n: np.tile(own, (2, 1)).astype(x.dtype) for n, x in batch.history.items()}
    batch = batch.replace(history=history, history_unlabelled=np.ones((2, 24), bool))
    steps = program(batch, divided=True)
    state, losses = steps.initialize(), []
    on_device = device_batch(batch, steps.batch_shardings)
    for _ in range(30):
        state, metrics = steps.train_step(state, on_device)
        losses.append(float(metrics.losses["contrastive"]))
    assert np.mean(losses[-5:]) < -0.2 < -0.05 < np.mean(losses[:3])
    without = device_batch(batch.replace(history_unlabelled=None), steps.prediction_shardings)
    assert jnp.isfinite(steps.predict(state, without).logit).all()


@pytest.mark.parametrize(
    ("name", "wrong"), [("temperature", 0.0), ("pairs_per_row", 0), ("reach", 0)]
)
def test_values_outside_their_range_are_refused(name, wrong):
    with pytest.raises(ValueError, match=f"{name} is {wrong}"):
        ContrastiveLoss(**{name: wrong})
