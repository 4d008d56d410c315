import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from strategies import SCHEMA

from stca_jax.models.embedding import EmbeddingConfig
from stca_jax.models.ranker import Ranker, RankerConfig
from stca_jax.models.stca import StcaConfig
from stca_jax.training.optimizer import (
    OptimizerConfig,
    RowStep,
    dense_optimizer,
    row_optimizer,
    schedule,
)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["adagrad", "adam"])
def test_row_without_gradient_stays_and_so_do_its_slots(name, decay):
    transform = row_optimizer(OptimizerConfig(tables=name, table_decay=decay))
    rows, gradient = jnp.ones((3, 2)), jnp.array([[1.0, 2], [0, 0], [0, 1]])
    slots = transform.init(3, 2)
    for step in range(2):
        new_rows, new_slots = transform.update(rows, slots, gradient, RowStep(0.1, step))
        for old, new in zip(
            jax.tree.leaves((rows, slots)), jax.tree.leaves((new_rows, new_slots)), strict=True
        ):
            np.testing.assert_array_equal(new[1], old[1])
            assert (new[0] != old[0]).any()
        rows, slots = new_rows, new_slots


def test_first_adam_step_of_a_row_is_its_learning_rate_however_late():
    transform = row_optimizer(OptimizerConfig(tables="adam"))
    rows, slots = jnp.zeros((2, 1)), transform.init(2, 1)
    for step in range(50):
        gradient = jnp.array([[1.0], [7.0 if step == 49 else 0.0]])
        rows, slots = transform.update(rows, slots, gradient, RowStep(0.1, step))
    np.testing.assert_allclose(rows[1], -0.1, rtol=1e-5)


@pytest.mark.parametrize("name", ["adagrad", "adam"])
def test_rows_decay_by_the_steps_since_their_last_gradient(name):
    """Beside what the optimizer does, which a twin without decay shows, from the same row."""
    config = OptimizerConfig(tables=name, table_decay=0.1)
    decaying = row_optimizer(config)
    twin = row_optimizer(dataclasses.replace(config, table_decay=0))
    rng = np.random.default_rng(0)
    row = rng.normal(size=(1, 3)).astype(np.float32)
    slots, twin_slots = decaying.init(1, 3), twin.init(1, 3)
    for step, share in ((5, 0), (6, 0.1), (9, 0.3), (30, 1)):  # never before; 1, 3, 21 steps
        gradient = rng.normal(size=(1, 3)).astype(np.float32)
        moved, twin_slots = twin.update(row, twin_slots, gradient, RowStep(0.1, step))
        found, slots = decaying.update(row, slots, gradient, RowStep(0.1, step))
        np.testing.assert_allclose(found, moved - share * row, rtol=1e-6, atol=1e-7)
        row = np.asarray(found)


def test_schedule_warms_up_and_falls():
    fraction = schedule(OptimizerConfig(warmup_steps=10, final_fraction=0.02), 100)
    values = np.array([fraction(step) for step in range(101)])
    assert values[0] == 0
    assert values.argmax() == 10
    assert values[10] == pytest.approx(1)
    assert values[100] == pytest.approx(0.02, rel=1e-4)
    assert (np.diff(values[10:]) <= 0).all()


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_dense_optimizer_descends_and_clips(name):
    config = OptimizerConfig(dense=name, learning_rate=0.05, warmup_steps=1, clip_norm=1.0)
    transform = dense_optimizer(config, 200)
    weight = {"w": jnp.array([3.0, -2.0])}
    state = transform.init(weight)

    @jax.jit
    def step(weight, state):
        gradient = jax.grad(lambda p: 1e6 * jnp.square(p["w"]).sum())(weight)
        updates, state = transform.update(gradient, state, weight)
        return optax.apply_updates(weight, updates), state

    for _ in range(200):
        weight, state = step(weight, state)
    assert np.abs(weight["w"]).max() < 0.5


@pytest.mark.parametrize("field", ["learning_rate", "clip_norm", "table_learning_rate"])
def test_values_that_cannot_work_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} is 0; it must be positive"):
        OptimizerConfig(**{field: 0})


@functools.partial(jax.jit, static_argnums=(0, 3))  # else every operation is compiled by itself
def one_step(config, parameters, gradients, num_steps=100):
    """Parameters after the first step whose learning rate is the peak."""
    transform = dense_optimizer(config, num_steps)
    updates, _ = transform.update(gradients, transform.init(parameters), parameters)
    return optax.apply_updates(parameters, updates)


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_weight_decay_is_of_matrices_only(name):
    """By kind of parameter, of a real model: every layer has its own kinds."""
    sequence = StcaConfig(width=8, num_heads=2, recency_score=True, attention_sink=True)
    config = RankerConfig(
        sequence=sequence, embedding=EmbeddingConfig(time_delta=True, feature_width=4)
    )
    ranker = nnx.eval_shape(lambda: Ranker(config, SCHEMA, rngs=nnx.Rngs(0)))
    parameters = nnx.to_pure_dict(nnx.state(ranker, nnx.Param))
    parameters = jax.tree.map(lambda p: np.full(p.shape, 2.0, np.float32), parameters)
    optimizer = OptimizerConfig(dense=name, weight_decay=0.5, learning_rate=0.1, warmup_steps=0)
    after = one_step(optimizer, parameters, jax.tree.map(np.zeros_like, parameters))
    shrunk = {}
    for path, value in jax.tree_util.tree_leaves_with_path(after):
        kind = str(path[-1].key)
        assert float(value.min()) == float(value.max())
        shrunk.setdefault(kind, set()).add(float(value.min()) < 2)
    kept = {"bias", "up_bias", "down_bias", "scale", "sink", "recency_rate", "rows"}
    assert kept < set(shrunk)
    assert {kind for kind, values in shrunk.items() if values == {False}} == kept
    assert {kind for kind, values in shrunk.items() if values == {True}} == set(shrunk) - kept
    np.testing.assert_allclose(after["head"]["weight"], 2 - 0.1 * 0.5 * 2, rtol=1e-6)


def test_state_is_that_of_optax_so_that_checkpoints_of_before_are_restored():
    weight = {"w": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    found = dense_optimizer(OptimizerConfig(), 10).init(weight)
    expected = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda _: 0.1)).init(weight)
    assert jax.tree.structure(found) == jax.tree.structure(expected)


def test_gradients_beyond_the_norm_are_scaled_down():
    """RMSProp of the first step would hide it; the second gradient's share of the mean does not."""
    config = OptimizerConfig(dense="rmsprop", clip_norm=1.0)
    weight = {"w": jnp.zeros((1, 2))}
    transform = dense_optimizer(config, 100)
    _, small = transform.update({"w": jnp.array([[0.6, 0.8]])}, transform.init(weight), weight)
    _, large = transform.update({"w": jnp.array([[600.0, 800]])}, transform.init(weight), weight)
    for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(large), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 150])
def test_warm_up_takes_at_most_half_of_a_short_run(num_steps):
    fraction = schedule(OptimizerConfig(warmup_steps=100), num_steps)
    peak = max(num_steps // 2, 1)
    values = [float(fraction(step)) for step in range(num_steps + 1)]
    assert values[peak] == pytest.approx(1)
    assert int(np.argmax(values)) == peak


NUMBERS = ("learning_rate", "clip_norm", "table_learning_rate", "table_accumulator",
           "weight_decay", "table_decay", "final_fraction")  # fmt: skip


@pytest.mark.parametrize("field", NUMBERS)
def test_nan_is_refused(field):
    with pytest.raises(ValueError, match=f"{field} is nan; it must"):
        OptimizerConfig(**{field: float("nan")})
