"""Sizes that do not depend on the width: at the start, and how far the first steps move."""

import dataclasses

import jax
import numpy as np
import pytest

from stca_jax.config import apply_overrides
from stca_jax.errors import UserError
from stca_jax.experiment import experiment_program
from stca_jax.input.pipeline import make_input
from stca_jax.models.ranker import similarity_config
from stca_jax.models.stca import StcaConfig
from stca_jax.training.optimizer import width_rates
from stca_jax.training.sharding import device_batch


def moved_logits(config, dataset, width, **overrides):
    """Root mean square of the logits' change in two steps, over those of a batch."""
    sequence = StcaConfig(width=width, num_layers=2, num_heads=2, **overrides.pop("sequence", {}))
    model = dataclasses.replace(similarity_config(sequence), dtype="float32")
    config = dataclasses.replace(config, model=model)
    values = {"optimizer.warmup_steps": "0", "optimizer.learning_rate": "0.0003"} | overrides
    config = apply_overrides(config, values)
    program = experiment_program(config, dataset.schema, num_steps=1000)
    element = next(make_input(dataset, config.input, process_index=0, process_count=1))
    batch = device_batch(element.batch, program.batch_shardings)
    state = program.initialize()
    before = program.predict(state, batch)
    for _ in range(2):
        state, _ = program.train_step(state, batch)
    change = np.asarray(program.predict(state, batch).logit) - np.asarray(before.logit)
    return float(np.sqrt(np.mean(change[np.asarray(before.target_mask)] ** 2)))


def test_first_steps_move_logits_alike_at_every_width(tiny_config, tiny_dataset):
    """With the rules, the change does not grow from width 16 to 128; without, it grows fivefold."""
    tiny_config = apply_overrides(tiny_config, {"input.rows_per_batch": "2"})
    scaled = {"sequence": {"initialization": "scaled"}, "optimizer.base_width": "16"}
    with_rules = [moved_logits(tiny_config, tiny_dataset, w, **scaled) for w in (16, 128)]
    without = [moved_logits(tiny_config, tiny_dataset, w) for w in (16, 128)]
    growth, plain_growth = (b / a for a, b in (with_rules, without))
    assert growth < 2
    assert plain_growth > 2 * growth


def test_rates_follow_the_fan_in():
    def shapes(d):
        return {
            "w_query": jax.ShapeDtypeStruct((d, 2, d // 2), np.float32),
            "weight": jax.ShapeDtypeStruct((3 * d, d), np.float32),
            "side": jax.ShapeDtypeStruct((16, d), np.float32),
            "up": jax.ShapeDtypeStruct((4, d, 2 * d), np.float32),
            "up_bias": jax.ShapeDtypeStruct((4, 2 * d), np.float32),
            "scale": jax.ShapeDtypeStruct((d,), np.float32),
        }

    assert width_rates(shapes(128), shapes(32)) == {
        "w_query": 0.25, "weight": 0.25, "side": 1.0, "up": 0.25, "up_bias": 1.0, "scale": 1.0,
    }  # fmt: skip


def test_a_base_width_that_cannot_be(tiny_config, tiny_dataset):
    config = apply_overrides(tiny_config, {"optimizer.base_width": "15"})
    with pytest.raises(UserError, match=r"optimizer\.base_width=15"):
        experiment_program(config, tiny_dataset.schema, num_steps=10)
