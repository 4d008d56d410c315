"""Losses of one's own beside the label loss: what they see, and how they add up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from strategies import SCHEMA, SHARED_LAYOUT, make_batch
from tiny_ranker import CONFIGS

from stca_jax.errors import UserError
from stca_jax.training.loss import LabelLoss, Loss
from stca_jax.training.optimizer import OptimizerConfig
from stca_jax.training.sharding import MESH_AXES, device_batch
from stca_jax.training.train_step import Program, TrainingConfig

MESH = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), MESH_AXES)


@dataclasses.dataclass(frozen=True)
class TokenSize(Loss):
    """Mean square of the history tokens that some range covers."""

    name = "token_size"

    def total_weight(self, batch):
        return _covered(batch).sum()

    def __call__(self, inputs, total_weight):
        assert inputs.ranker.config.sequence.width == inputs.output.tokens.shape[-1]
        assert set(inputs.embedded) == {"history", "target", "request"}
        square = jnp.square(inputs.output.tokens).mean(-1)
        return jnp.where(_covered(inputs.batch), square, 0).sum() / total_weight


@dataclasses.dataclass(frozen=True)
class Noise(Loss):
    """A random number for each micro-batch; nothing is learned from it."""

    name = "noise"

    def total_weight(self, batch):
        del batch
        return jnp.ones(())

    def __call__(self, inputs, total_weight):
        return jax.random.uniform(inputs.key) / total_weight


def _covered(batch):
    start, end = (jnp.where(batch.target_mask, x, 0) for x in batch.ranges)
    return batch.ranges._replace(start=start, end=end).covered(batch.row_length)


def make_program(losses, **training):
    model = dataclasses.replace(
        CONFIGS["shared"],
        embedding=dataclasses.replace(CONFIGS["shared"].embedding, replicated_rows=0),
    )
    return Program(
        model, SCHEMA, OptimizerConfig(warmup_steps=0),
        TrainingConfig(auxiliary_losses=losses, **training), MESH, batch(), num_steps=10, seed=0,
    )  # fmt: skip


def batch():
    found = make_batch(SHARED_LAYOUT, shared=True)
    rows = [0, 1, 1, 0]  # an even number of them
    return jax.tree.map(lambda x: x[np.array(rows)], found)


@pytest.mark.slow
def test_losses_are_weighted_named_and_independent_of_the_cut():
    on_device = {}
    for parts in (1, 2):
        program = make_program((TokenSize(weight=0.25), Noise(weight=0.0)), accumulate_steps=parts)
        on_mesh = device_batch(batch(), program.batch_shardings)
        state, steps = program.initialize(), []
        for _ in range(2):
            state, metrics = program.train_step(state, on_mesh)
            steps.append(jax.device_get(metrics))
        on_device[parts] = steps
    first, second = on_device[1]
    names = {"loss/label", "loss/token_size", "loss/noise", "loss", "learning_rate"}
    assert names < set(first.scalars())
    for step in (first, second):
        losses = step.losses
        assert step.loss == pytest.approx(losses["label"] + 0.25 * losses["token_size"])
    assert first.losses["noise"] != second.losses["noise"]  # a key of each step
    assert second.losses["token_size"] < first.losses["token_size"]  # it is minimised
    for whole, cut in zip(*on_device.values(), strict=True):
        for name in ("label", "token_size"):
            np.testing.assert_allclose(cut.losses[name], whole.losses[name], rtol=1e-3)
    a = on_device[2][0].losses["noise"]  # of two keys
    assert not np.isclose(a / 2, on_device[1][0].losses["noise"])


def test_the_label_loss_comes_first_and_alone_by_default():
    program = make_program(())
    assert program.losses == (LabelLoss("target"),)
    assert make_program((TokenSize(),), loss_weighting="request").losses == (
        LabelLoss("request"), TokenSize(),
    )  # fmt: skip


def test_names_must_differ():
    with pytest.raises(UserError, match="losses are called label, noise, noise: give each"):
        make_program((Noise(), Noise()))
