import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stca_jax.training.optimizer import OptimizerConfig, adagrad_rows, dense_optimizer, schedule


def test_adagrad_on_touched_rows_is_the_dense_update():
    rng = np.random.default_rng(0)
    table, sums = rng.normal(size=(6, 3)), rng.uniform(0.1, 1, size=6)
    ids = np.array([1, 4, 6, 6])  # two unused places
    gradient = np.vstack([rng.normal(size=(2, 3)), np.zeros((2, 3))])

    dense = np.zeros_like(table)
    np.add.at(dense, ids[:2], gradient[:2])
    expected_sums = sums + (dense**2).mean(1)
    expected = table - 0.1 * dense / np.sqrt(expected_sums)[:, None]

    found, found_sums = adagrad_rows(
        jnp.asarray(table), jnp.asarray(sums), jnp.asarray(ids), jnp.asarray(gradient), 0.1
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(found_sums, expected_sums, rtol=1e-5)


def test_row_without_gradient_stays():
    table, sums = jnp.ones((3, 2)), jnp.full(3, 1e-8)
    found, found_sums = adagrad_rows(table, sums, jnp.array([0, 2]), jnp.zeros((2, 2)), 0.1)
    np.testing.assert_array_equal(found, table)
    np.testing.assert_array_equal(found_sums, sums)


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
