"""Lookups and updates of divided tables against NumPy in float64, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import own_process
import pytest

from stca_jax.batch import empty_batch
from stca_jax.schema import Schema
from stca_jax.training import exchange, table_rows
from stca_jax.training.optimizer import OptimizerConfig, RowStep, row_optimizer
from stca_jax.training.sharding import MeshConfig, batch_shardings, device_batch, make_mesh
from stca_jax.training.table_rows import rows_by_id, stored_row, stored_schema

SIZE = 7_000
WIDTHS = {"item": 4, "user": 6}
SCHEMA = Schema(
    history=("item", "kind"),
    target=("item", "kind"),
    request=("user",),
    vocabularies={"item": SIZE, "kind": 3, "user": 5_000},
    tasks=("click",),
)
STORED = stored_schema(SCHEMA, replicated_rows=4_096)
DIVIDED = {"item": 9_216, "user": 6_144}


def test_stored_sizes_are_multiples_that_do_not_depend_on_the_mesh():
    assert STORED.vocabularies == {"item": 9_216, "kind": 3, "user": 6_144}
    assert stored_schema(SCHEMA, replicated_rows=10_000) == SCHEMA


def test_every_id_has_a_row_of_its_own_and_neighbours_lie_far_apart():
    rows = np.asarray(stored_row(jnp.arange(9_216), 9_216))
    assert sorted(rows) == list(range(9_216))
    block = 9_216 // 8
    owners = np.bincount(rows[:800] // block, minlength=8)  # the most frequent ids
    assert owners.max() <= 400  # 384 consecutive ids share a device


def test_rows_by_id_undoes_the_order_of_storage():
    ids = np.arange(SIZE)
    table = np.zeros((9_216, 1))
    table[np.asarray(stored_row(ids, 9_216))] = ids[:, None]
    np.testing.assert_array_equal(rows_by_id(jnp.asarray(table), SIZE)[:, 0], ids)


def random_batch(rng, kind: str):
    """Ids as they come: skewed, all different, all the same, or all owned by one device."""
    batch = empty_batch(SCHEMA, 8, 64, 6, shared_history=True)
    draw = {
        "skewed": lambda size, shape: (size * rng.random(shape) ** 4).astype(np.int32),
        "distinct": lambda size, shape: rng.permutation(size)[: np.prod(shape)].reshape(shape),
        "same": lambda size, shape: np.full(shape, size - 1),
        "one owner": lambda size, shape: rng.integers(0, 100, shape) + 3_072,
    }[kind]
    for level in ("history", "target", "request"):
        for name, ids in getattr(batch, level).items():
            ids[:] = draw(SCHEMA.vocabularies[name], ids.shape) if name in DIVIDED else 0
    return batch


class Float64Optimizer:
    """The update rules written down once more, for one row at a time."""

    def __init__(self, name: str, config: OptimizerConfig):
        self.name, self.slots = name, {}
        self.start, self.decay = config.table_accumulator, config.table_decay
        self.last = {}

    def update(self, key, row, gradient, learning_rate, step):
        idle = step - self.last.get(key, step)
        self.last[key] = step
        kept = (1 - min(1, self.decay * idle)) * row
        return self.moved(key, row, gradient, learning_rate) - row + kept

    def moved(self, key, row, gradient, learning_rate):
        if self.name == "adagrad":
            self.slots[key] = self.slots.get(key, self.start) + (gradient**2).mean()
            return row - learning_rate * gradient / np.sqrt(self.slots[key])
        m, v, t = self.slots.get(key, (0, 0, 0))
        m, v, t = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * (gradient**2).mean(), t + 1
        self.slots[key] = m, v, t
        return row - learning_rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


def check(mesh, optimizer: str, kinds, decay: float = 0.0) -> None:
    """Embeds and updates a few batches, and compares with NumPy after each."""
    rng = np.random.default_rng(0)
    config = OptimizerConfig(tables=optimizer, table_decay=decay)
    transform, oracle = row_optimizer(config), Float64Optimizer(optimizer, config)
    tables = {n: rng.normal(size=(s, WIDTHS[n])).astype(np.float32) for n, s in DIVIDED.items()}
    slots = {n: transform.init(s, WIDTHS[n]) for n, s in DIVIDED.items()}
    expected = {
        n: np.asarray(rows_by_id(jnp.asarray(t), SCHEMA.vocabularies[n]), np.float64)
        for n, t in tables.items()
    }
    shardings = batch_shardings(mesh, random_batch(rng, "same"))

    @jax.jit
    def step(tables, slots, batch, weights, number):
        touched = table_rows.touch(batch, DIVIDED, mesh)
        rows = table_rows.fetch(tables, touched, mesh)

        def loss(rows):
            embedded = table_rows.embed(rows, touched, batch, mesh)
            return sum(jax.tree.leaves(jax.tree.map(lambda e, w: (e * w).sum(), embedded, weights)))

        embedded = table_rows.embed(rows, touched, batch, mesh)
        gradient = jax.grad(loss)(rows)
        return embedded, *table_rows.update(
            tables,
            slots,
            touched,
            gradient,
            table_rows.TableStep(transform, RowStep(jnp.float32(0.1), number), mesh),
        )

    for number, kind in enumerate(kinds):
        batch = random_batch(rng, kind)
        weights = {
            level: {
                name: rng.normal(size=(*ids.shape, WIDTHS[name])).astype(np.float32)
                for name, ids in getattr(batch, level).items()
                if name in DIVIDED
            }
            for level in ("history", "target", "request")
        }
        with jax.set_mesh(mesh):
            on_mesh = device_batch(batch, shardings)
            embedded, tables, slots, square = step(tables, slots, on_mesh, weights, number)
        total = {n: {} for n in DIVIDED}
        for level, of_level in weights.items():
            for name, weight in of_level.items():
                ids = getattr(batch, level)[name]
                np.testing.assert_allclose(
                    embedded[level][name], expected[name][ids], rtol=2e-5, atol=2e-5
                )
                for i, w in zip(ids.ravel(), weight.reshape(-1, WIDTHS[name]), strict=True):
                    total[name][i] = total[name].get(i, 0) + w.astype(np.float64)
        squares = sum((g**2).sum() for t in total.values() for g in t.values())
        np.testing.assert_allclose(square, squares, rtol=1e-4)
        for name, gradients in total.items():
            for i, gradient in gradients.items():
                expected[name][i] = oracle.update(
                    (name, i), expected[name][i], gradient, 0.1, number
                )
            found = rows_by_id(tables[name], SCHEMA.vocabularies[name])
            np.testing.assert_allclose(found, expected[name], rtol=2e-5, atol=2e-5)


KINDS = ("skewed", "same", "distinct", "one owner", "skewed")


@pytest.mark.parametrize(("optimizer", "decay"), [("adagrad", 0), ("adam", 0), ("adagrad", 0.1)])
def test_one_device(optimizer, decay):
    check(make_mesh(MeshConfig(), jax.devices()[:1]), optimizer, KINDS, decay)


def check_on_eight_devices() -> None:
    check(make_mesh(MeshConfig(2, 2, 2)), "adam", KINDS, decay=0.1)
    check(make_mesh(MeshConfig(8, 1, 1)), "adagrad", KINDS)
    exchange._MOST_DEVICES_IN_ONE_HOP = 4  # as if they were many
    check(make_mesh(MeshConfig(1, 4, 2)), "adagrad", ("skewed", "one owner"))


@pytest.mark.slow
def test_eight_devices():
    own_process.call(
        "test_table_rows",
        "check_on_eight_devices",
        kind="table rows",  # it changes a constant
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
