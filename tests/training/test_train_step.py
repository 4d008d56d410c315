"""Options of the train step: micro-batches, divergence, the parameter average, recomputation."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.layout import Layout
from jax.sharding import Mesh
from strategies import SCHEMA, RequestLayout, UserLayout, make_batch
from tiny_ranker import CONFIGS, TinyRanker, tiny_ranker

from stca_jax.batch import empty_batch
from stca_jax.config import apply_overrides
from stca_jax.errors import UserError
from stca_jax.experiments.configs import tiny
from stca_jax.input.pipeline import make_input
from stca_jax.models.ranker import Ranker
from stca_jax.training import state as state_module
from stca_jax.training.checkpointing import CheckpointConfig, Checkpointer
from stca_jax.training.optimizer import OptimizerConfig
from stca_jax.training.sharding import MESH_AXES, device_batch
from stca_jax.training.train_step import Program, TrainingConfig

# Divides the table of items over devices, and keeps the others whole.
CONFIG = apply_overrides(
    tiny.get_config(),
    {
        "model.embedding.replicated_rows": 64,
        "model.sequence.num_layers": 1,
        "model.sequence.initialization": "independent",
        "model.sequence.count_channel": False,
        "model.match_channel": False,
        "model.backbone.num_blocks": 1,
        "input.row_length": 128,
        "input.targets_per_row": 64,
    },
)
DECAY = 0.5
MESH = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), MESH_AXES)


@pytest.fixture(scope="module", autouse=True)
def _compile_fast():
    """Halves the compile time; the little that is run here is slower."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def build_program(schema, model=CONFIG.model, **options):
    shapes = empty_batch(
        schema, CONFIG.input.rows_per_batch, CONFIG.input.row_length, CONFIG.input.targets_per_row,
        shared_history=True,
    )  # fmt: skip
    return Program(
        model, schema, OptimizerConfig(warmup_steps=0), TrainingConfig(**options), MESH, shapes,
        num_steps=20, seed=0,
    )  # fmt: skip


def run(program, batches):
    """The states before and after each batch, and the metrics of each step, on the host."""
    state, metrics = program.initialize(), []
    states = [jax.device_get(state)]
    for batch in batches:
        state, found = program.train_step(state, device_batch(batch, program.batch_shardings))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(found))
    return states, metrics


@pytest.fixture(scope="module")
def batches(tiny_dataset):
    elements = make_input(tiny_dataset, CONFIG.input)
    found = [next(elements).batch for _ in range(3)]
    elements.close()
    return found


@pytest.fixture(scope="module")
def plain(tiny_dataset):
    return build_program(tiny_dataset.schema)


@pytest.fixture(scope="module")
def plain_run(plain, batches):
    return run(plain, batches)


@pytest.fixture(scope="module")
def guarded(tiny_dataset, plain_run):
    """Skips, averages, and takes a little more than the first two gradients for a spike."""
    norms = [float(m.gradient_norm) for m in plain_run[1]]
    options = {"on_divergence": "skip", "max_gradient_norm": 1.01 * max(norms[:2])}
    return build_program(tiny_dataset.schema, ema_decay=DECAY, **options)


@pytest.fixture(scope="module")
def guarded_run(guarded, batches):
    return run(guarded, batches[:2])


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@pytest.mark.slow
def test_micro_batches_add_up_to_the_batch(tiny_dataset, batches, plain_run):
    """Rows hold different numbers of targets, so a mean of means would differ."""
    cut = build_program(tiny_dataset.schema, accumulate_steps=4)
    targets = [b.target_mask.reshape(2, 4, -1).sum((0, 2)) for b in batches]
    assert all(len(set(t.tolist())) > 1 for t in targets)
    (_, first, *_, last), metrics = run(cut, batches)
    (_, expected_first, *_, expected_last), expected = plain_run
    for name in ("loss", "gradient_norm", "table_gradient_norm"):
        np.testing.assert_allclose(
            [getattr(m, name) for m in metrics], [getattr(m, name) for m in expected], rtol=1e-4
        )
    # Adam's first update is the sign of the gradient: compare what it remembers of it instead.
    assert_close(first.optimizer, expected_first.optimizer, rtol=1e-3)
    assert_close(first.table_optimizer, expected_first.table_optimizer, rtol=1e-3, atol=1e-9)
    assert last.step == expected_last.step == len(batches)


def test_rows_that_cannot_be_cut_are_refused(tiny_dataset):
    with pytest.raises(
        UserError, match=r"8 rows cannot be divided .*rows_per_batch=9 .* multiple of 3"
    ):
        build_program(tiny_dataset.schema, accumulate_steps=3)


def test_tables_that_are_not_read_are_neither_stored_nor_touched(tiny_dataset, batches):
    embedding = dataclasses.replace(CONFIG.model.embedding, replicated_rows=1)  # divides all
    model = dataclasses.replace(CONFIG.model, embedding=embedding, features=())
    program = build_program(tiny_dataset.schema, model)
    assert set(program.abstract_state.tables) == {"item"} < set(tiny_dataset.schema.vocabularies)
    with jax.set_mesh(MESH):
        step = program.train_step.__wrapped__
        state, _ = jax.eval_shape(step, program.abstract_state, batches[0])
    assert set(state.tables) == {"item"}


def with_infinite_label(batch):
    """Makes the loss and all gradients no numbers; a label that is NaN is missing."""
    label = batch.label.copy()
    label[tuple(np.argwhere(batch.target_mask)[0])] = np.inf
    return batch.replace(label=label)


def with_unanimous_labels(batch):
    """Every label is 1: a gradient far larger than that of mixed labels."""
    return batch.replace(label=np.ones_like(batch.label))


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [with_infinite_label, with_unanimous_labels])
def test_skipped_step_changes_nothing(guarded, batches, spoil):
    states, metrics = run(guarded, [batches[0], spoil(batches[1]), batches[1]])
    assert [bool(m.diverged) for m in metrics] == [False, True, False]
    before, after = states[1:3]
    assert after.step == before.step  # nor the learning rates, which follow it
    for name in ("dense", "tables", "optimizer", "table_optimizer"):
        for a, b in zip(
            jax.tree.leaves(getattr(after, name)), jax.tree.leaves(getattr(before, name)),
            strict=True,
        ):  # fmt: skip
            assert a.tobytes() == b.tobytes()


@pytest.mark.slow
def test_options_change_no_step_that_is_usable(guarded_run, plain_run):
    (_, _, found), (_, _, expected, _) = guarded_run[0], plain_run[0]
    assert_close((found.dense, found.tables), (expected.dense, expected.tables), rtol=1e-4)
    assert_close(found.optimizer.inner, expected.optimizer, rtol=1e-4)


@pytest.mark.slow
def test_predictions_are_of_the_average(guarded, guarded_run, plain, batches):
    """The average of the definition, in NumPy, put in the place of the parameters."""
    initial, *updated = guarded_run[0]
    average = jax.tree.map(np.float64, initial.dense)
    for t, state in enumerate(updated):
        weight = min(DECAY, (1 + t) / (10 + t))
        average = jax.tree.map(
            lambda a, p, w=weight: w * a + (1 - w) * p.astype(float), average, state.dense
        )
    last = updated[-1]
    assert_close(last.optimizer.average, average)

    batch = device_batch(batches[2], plain.batch_shardings)

    def logits(program, state):
        return program.predict(state, batch).logit[batches[2].target_mask]

    without_average = dataclasses.replace(last, optimizer=last.optimizer.inner)
    averaged = dataclasses.replace(without_average, dense=jax.tree.map(np.float32, average))
    found, expected = logits(guarded, last), logits(plain, averaged)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(logits(plain, without_average) - expected).max() > 1e-3


def test_options_that_are_off_add_nothing_to_the_state(tiny_dataset, plain, guarded):
    """So that checkpoints of runs without them are restored as ever."""
    structure = jax.tree.structure(plain.abstract_state)
    options = {"accumulate_steps": 2, "on_divergence": "skip", "max_gradient_norm": 1.0}
    off = build_program(tiny_dataset.schema, **options)
    assert jax.tree.structure(off.abstract_state) == structure
    assert jax.tree.structure(guarded.abstract_state) != structure


@pytest.mark.slow
def test_layout_of_tables_survives_a_checkpoint(tiny_dataset, batches, tmp_path, monkeypatch):
    """On TPUs tables do not lie as arrays lie by default; here, with the other order, neither."""
    column_by_column = Layout((1, 0))
    monkeypatch.setattr(state_module, "_ROW_BY_ROW", column_by_column)
    program = build_program(tiny_dataset.schema)
    batch = device_batch(batches[0], program.batch_shardings)
    state, _ = program.train_step(program.initialize(), batch)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    checkpointer.save(state, 1, {})
    checkpointer.wait()
    _, restored, _ = checkpointer.restore_latest(program.abstract_state)
    checkpointer.close()
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    after, _ = program.train_step(restored, batch)
    for table in after.tables.values():
        assert table.format.layout.major_to_minor == column_by_column.major_to_minor


def small_batch():
    return make_batch([[UserLayout(0, 9, [RequestLayout(2, 9, 3)])]], shared=True)


def test_recomputing_keeps_less_for_the_backward_pass():
    """What `jax.vjp` returns holds what the backward pass keeps."""
    batch = empty_batch(SCHEMA, 2, 64, 3, shared_history=True)

    def kept_bytes(remat):
        config = dataclasses.replace(CONFIGS["shared"], remat=remat)
        ranker = nnx.eval_shape(lambda: Ranker(config, SCHEMA, rngs=nnx.Rngs(0)))
        graph, parameters = nnx.split(ranker)
        backward = jax.eval_shape(
            lambda p: jax.vjp(lambda p: nnx.merge(graph, p)(batch), p)[1], parameters
        )
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))

    everything, history, least = map(kept_bytes, ("none", "history", "all"))
    hidden = 4 * 2 * 64 * CONFIGS["shared"].sequence.ffn_ratio * CONFIGS["shared"].sequence.width
    assert history <= everything - 2 * hidden  # up and gate of the fusion
    assert least < history


@pytest.mark.exhaustive
def test_recomputing_does_not_change_gradients():
    batch = small_batch()
    found = TinyRanker(dataclasses.replace(CONFIGS["shared"], remat="all")).backward(batch)
    assert_close(found, tiny_ranker("shared").backward(batch))
