import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stca_jax.training.optimizer import OptimizerConfig, dense_optimizer, row_optimizer, schedule


@pytest.mark.parametrize("name", ["adagrad", "adam"])
def test_row_without_gradient_stays_and_so_do_its_slots(name):
    transform = row_optimizer(OptimizerConfig(tables=name))
    rows, gradient = jnp.ones((3, 2)), jnp.array([[1.0, 2], [0, 0], [0, 1]])
    slots = transform.init(3, 2)
    for _ in range(2):
        new_rows, new_slots = transform.update(rows, slots, gradient, 0.1)
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
        rows, slots = transform.update(rows, slots, gradient, 0.1)
    np.testing.assert_allclose(rows[1], -0.1, rtol=1e-5)


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
