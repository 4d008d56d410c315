"""Buckets of time, who owns a token, and which tables exist."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from hypothesis import given, settings
from strategies import SCHEMA, request_batches, spoil_padding
from tiny_ranker import compile_fast, random_params, with_params

from stca_jax.models.embedding import (
    EmbeddingConfig,
    FeatureEmbedding,
    TimeFeatures,
    clear_padding,
    log_bucket,
)


def test_log_bucket_is_exact_for_every_boundary():
    """Floating-point logarithms miss powers of two by one bucket on some devices."""
    near = np.ceil(2.0 ** (np.arange(62) / 2)).astype(np.int64)
    values = np.unique([near - 1, near, near + 1, np.full(62, 2**31 - 1)]).astype(np.int32)
    expected = [oracle.log_bucket(v) for v in values]
    np.testing.assert_array_equal(jax.jit(log_bucket)(values), expected)
    assert (np.diff(expected) >= 0).all()


def test_log_bucket_of_negative_numbers_is_zero():
    np.testing.assert_array_equal(log_bucket(jnp.array([-1, -(2**31)], jnp.int32)), [0, 0])


TIME_CONFIG = EmbeddingConfig(feature_width=2, time_delta=True, recency_index=True)
TIME_FEATURES = nnx.eval_shape(lambda: TimeFeatures(TIME_CONFIG, rngs=nnx.Rngs(0)))
TIME_PARAMS = random_params(TIME_FEATURES)


@compile_fast
def embed_times(params, batch):
    return with_params(TIME_FEATURES, params)(batch)


@settings(deadline=None, max_examples=30)
@given(request_batches(shared=False))
def test_time_features_belong_to_the_request_that_reads_the_token(batch):
    time_delta, recency_index = embed_times(TIME_PARAMS, batch)
    for row, slot in np.argwhere(batch.target_mask):
        end = batch.history_end[row, slot]
        for t in range(batch.history_start[row, slot], end):
            age = batch.request_time[row, slot] - batch.history_time[row, t]
            for found, name, value in (
                (time_delta, "time_delta", age),
                (recency_index, "recency_index", end - 1 - t),
            ):
                expected = TIME_PARAMS[name]["rows"][oracle.log_bucket(value)]
                np.testing.assert_array_equal(found[row, t], expected)


@settings(deadline=None, max_examples=30)
@given(request_batches(shared=True))
def test_clear_padding_keeps_what_ranges_cover(batch):
    covered = np.asarray(batch.ranges.covered(batch.row_length))
    cleared = clear_padding(spoil_padding(batch).history, covered)
    for name, column in batch.history.items():
        np.testing.assert_array_equal(cleared[name], np.where(covered, column, 0))


def test_levels_share_a_table_and_the_item_has_its_own_width():
    def shapes(item_width):
        config = EmbeddingConfig(item_width=item_width, feature_width=3)
        module = nnx.eval_shape(lambda: FeatureEmbedding(config, SCHEMA, 8, rngs=nnx.Rngs(0)))
        return {name: table.rows.shape for name, table in module.tables.items()}, module

    found, module = shapes(None)
    assert found == {"item": (7, 8), "category": (3, 3), "segment": (4, 3)}
    assert sum(module.widths_of(SCHEMA.target).values()) == 1 + 8 + 3
    assert shapes(5)[0]["item"] == (7, 5)


@pytest.mark.parametrize("name", ["item_width", "feature_width"])
def test_config_rejects_empty_tables(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        EmbeddingConfig(**{name: 0})
