import jax.numpy as jnp
import numpy as np
import pytest

from stca_jax.batch import Request, from_requests
from stca_jax.schema import Schema
from stca_jax.training.table_rows import gather, touch

SCHEMA = Schema(
    history=("item", "kind"),
    target=("item", "kind"),
    request=("user",),
    vocabularies={"item": 1_000, "kind": 3, "user": 50},
    tasks=("click",),
)


@pytest.fixture
def batch():
    request = Request(
        history={"item": [812, 7, 812, 999], "kind": [0, 1, 2, 0]},
        history_time=[1, 2, 3, 4],
        time=9,
        targets={"item": [7, 55], "kind": [1, 2]},
        labels=[1, 0],
        features={"user": 49},
    )
    return from_requests(SCHEMA, [request])


def test_touched_rows_are_distinct_and_padded_with_the_table_size(batch):
    _, touched = touch(batch, SCHEMA.vocabularies)
    assert touched["item"].tolist() == [7, 55, 812, 999, 1_000, 1_000]
    assert touched["user"].tolist() == [49, 50]


def test_a_table_smaller_than_the_batch_is_touched_whole(batch):
    local, touched = touch(batch, SCHEMA.vocabularies)
    assert touched["kind"].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(local.history["kind"], batch.history["kind"])


def test_local_ids_read_the_same_rows_from_the_gathered_table(batch):
    rng = np.random.default_rng(0)
    tables = {
        name: rng.normal(size=(size, 4)).astype(np.float32)
        for name, size in SCHEMA.vocabularies.items()
    }
    local, touched = touch(batch, SCHEMA.vocabularies)
    rows = gather({name: jnp.asarray(table) for name, table in tables.items()}, touched)
    for level in ("history", "target", "request"):
        for name, ids in getattr(batch, level).items():
            found = rows[name][getattr(local, level)[name]]
            np.testing.assert_array_equal(found, tables[name][ids])


def test_equality_of_ids_between_levels_is_kept(batch):
    local, _ = touch(batch, SCHEMA.vocabularies)
    before = batch.target["item"][0][:, None] == batch.history["item"][0][None]
    after = local.target["item"][0][:, None] == local.history["item"][0][None]
    np.testing.assert_array_equal(after, before)
