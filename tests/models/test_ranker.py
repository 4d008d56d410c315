"""The whole model against the float64 oracle, and what its logits must not depend on."""

import copy
import dataclasses

import jax
import numpy as np
import oracle
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    EXCLUSIVE_LAYOUT,
    SCHEMA,
    SHARED_LAYOUT,
    make_batch,
    request_batches,
    spoil_padding,
)
from tiny_ranker import CONFIGS, tiny_ranker, with_params

from stca_jax.batch import RequestBatch, empty_batch, validate_batch
from stca_jax.errors import UserError
from stca_jax.models.din import DinConfig
from stca_jax.models.ranker import Ranker, RankerConfig, paper_config
from stca_jax.models.stca import StcaConfig
from stca_jax.models.transformer import TransformerConfig
from stca_jax.ops.attention import cheaper_order
from stca_jax.ranges import Ranges

few_examples = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 2**32 - 1)


def assert_matches_oracle(name, batch, evaluation):
    ranker = tiny_ranker(name)
    expected = oracle.logits(ranker.params64, ranker.config, SCHEMA, batch)
    logits, used = np.asarray(evaluation.logits), batch.target_mask
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[used], expected[used], rtol=1e-5, atol=1e-5)
    loss = oracle.loss(ranker.params64, ranker.config, SCHEMA, batch)
    np.testing.assert_allclose(evaluation.loss, loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["paper", "exclusive"])
@few_examples
@given(batch=request_batches(shared=False), seed=seeds)
def test_matches_oracle_on_exclusive_rows(name, batch, seed):
    batch = spoil_padding(batch, seed)
    validate_batch(batch, SCHEMA)
    assert_matches_oracle(name, batch, tiny_ranker(name).forward(batch))


@few_examples
@given(batch=request_batches(shared=True), seed=seeds)
def test_matches_oracle_on_shared_rows(batch, seed):
    batch = spoil_padding(batch, seed)
    validate_batch(batch, SCHEMA)
    assert_matches_oracle("shared", batch, tiny_ranker("shared").backward(batch))


def test_features_that_are_not_read_may_hold_anything():
    ranker = tiny_ranker("few_features")
    batch = make_batch(SHARED_LAYOUT, shared=True)
    read = ranker.config.read_schema(SCHEMA)
    expected = oracle.logits(ranker.params64, ranker.config, read, batch)
    for level in ("history", "target", "request"):
        for name in set(getattr(SCHEMA, level)) - set(getattr(read, level)):
            getattr(batch, level)[name][:] = -1
    logits, used = np.asarray(ranker.forward(batch).logits), batch.target_mask
    np.testing.assert_allclose(logits[used], expected[used], rtol=1e-5, atol=1e-5)
    unknown = dataclasses.replace(ranker.config, features=("colour",))
    with pytest.raises(UserError, match=r"model\.features is colour: there is no feature 'colour'"):
        unknown.read_schema(SCHEMA)


@few_examples
@given(batch=request_batches(shared=True), seed=seeds)
def test_padding_reaches_no_value_and_no_gradient(batch, seed):
    clean = tiny_ranker("shared").backward(batch)
    spoiled = tiny_ranker("shared").backward(spoil_padding(batch, seed))
    jax.tree.map(np.testing.assert_array_equal, clean, spoiled)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(clean.grads))


@pytest.mark.parametrize(
    "name",
    ["shared", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("paper", "exclusive"))],
)
def test_gradients_match_finite_differences_of_the_oracle(name):
    """Every parameter array on its own, along a random direction."""
    ranker = tiny_ranker(name)
    layout = SHARED_LAYOUT if name == "shared" else EXCLUSIVE_LAYOUT
    batch = spoil_padding(make_batch(layout, shared=name == "shared"))
    grads = ranker.backward(batch).grads
    rng = np.random.default_rng(0)
    step = 1e-5
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(ranker.params)]
    for path in paths:

        def loss(distance, path=path):
            params = ranker.params64
            leaf = _leaf(params, path)
            leaf += distance * direction  # noqa: B023
            return oracle.loss(params, ranker.config, SCHEMA, batch)

        direction = rng.normal(size=_leaf(ranker.params, path).shape)
        expected = (loss(step) - loss(-step)) / (2 * step)
        gradient = np.asarray(_leaf(grads, path), np.float64)
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        name = jax.tree_util.keystr(path)
        assert abs((gradient * direction).sum() - expected) <= 1e-4 * size + 1e-7, name


def _leaf(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def test_request_level_loss_and_gradients_equal_one_target_per_row():
    ranker = tiny_ranker("shared")
    batch = make_batch(SHARED_LAYOUT, shared=True)
    together = ranker.backward(batch)
    num_targets = batch.target_mask.sum()
    loss, grads = 0.0, jax.tree.map(np.zeros_like, ranker.params)
    for slot in range(batch.targets_per_row):
        alone = np.zeros_like(batch.target_mask)
        alone[:, slot] = batch.target_mask[:, slot]
        if not alone.any():
            continue
        part = ranker.backward(batch.replace(target_mask=alone))
        weight = alone.sum() / num_targets
        loss += weight * float(part.loss)
        grads = jax.tree.map(
            lambda total, g, w=weight: total + w * np.asarray(g), grads, part.grads
        )
        # A target's logit is the same, bit for bit or nearly, whoever its row-mates are.
        np.testing.assert_allclose(part.logits[alone], together.logits[alone], atol=1e-6)
    np.testing.assert_allclose(together.loss, loss, rtol=1e-6)
    for expected, found in zip(
        jax.tree.leaves(grads), jax.tree.leaves(together.grads), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def repack(batch: RequestBatch, rng: np.random.Generator) -> tuple[RequestBatch, list]:
    """Every target with a copy of its own history, in other rows, slots and offsets.

    Returns the batch, of longer rows and more slots, and pairs of old and new (row, slot).
    """
    num_rows, row_length, targets_per_row = 5, 80, 16
    packed = empty_batch(SCHEMA, num_rows, row_length, targets_per_row, shared_history=True)
    tokens_used, slots_used = np.zeros(num_rows, int), np.zeros(num_rows, int)
    moves = []
    for old_row, old_slot in rng.permutation(np.argwhere(batch.target_mask)):
        old = old_row, old_slot
        window = np.s_[batch.history_start[old] : batch.history_end[old]]
        n = window.stop - window.start
        row = rng.choice(np.flatnonzero(tokens_used + n + 3 <= row_length))
        start = tokens_used[row] + rng.integers(0, 4)
        tokens_used[row] = start + n
        new = row, slots_used[row] + rng.integers(0, 2)
        slots_used[row] = new[1] + 1
        packed.history_time[row, start : start + n] = batch.history_time[old_row, window]
        for name, column in packed.history.items():
            column[row, start : start + n] = batch.history[name][old_row, window]
        for level in ("target", "request"):
            for name, column in getattr(packed, level).items():
                column[new] = getattr(batch, level)[name][old]
        packed.history_start[new], packed.history_end[new] = start, start + n
        packed.request_time[new] = batch.request_time[old]
        packed.target_mask[new] = True
        moves.append((old, new))
    return packed, moves


def test_logits_do_not_depend_on_packing():
    """Row-mates, row order, slots, offsets and padding; nor on the order of the algebra."""
    ranker = tiny_ranker("shared")
    d, num_heads = ranker.config.sequence.width, ranker.config.sequence.num_heads
    assert cheaper_order(8, num_heads, d) == "absorbed"
    assert cheaper_order(16, num_heads, d) == "projected"
    for seed in range(3):
        batch = make_batch(SHARED_LAYOUT, seed, shared=True)
        packed, moves = repack(batch, np.random.default_rng(seed))
        validate_batch(packed, SCHEMA)
        logits = ranker.backward(batch).logits
        packed_logits = ranker.forward(packed).logits
        for old, new in moves:
            np.testing.assert_allclose(packed_logits[new], logits[old], atol=2e-6)


def test_targets_of_a_request_do_not_see_each_other():
    """Mistake 6: other candidates of the request, or their labels, change nothing."""
    batch = make_batch(SHARED_LAYOUT, shared=True)
    other = copy.deepcopy(batch)
    for row in (0, 1):  # keep the first target of the row
        for name, column in other.target.items():
            column[row, 1:] = (column[row, 1:] + 1) % SCHEMA.vocabularies.get(name, np.inf)
    other.label[...] = 1 - other.label
    logits, changed = (tiny_ranker("shared").backward(b).logits for b in (batch, other))
    np.testing.assert_array_equal(changed[:, 0], logits[:, 0])
    assert np.abs(changed - logits)[:, 1][:2].min() > 1e-3


def test_bfloat16_is_close_and_returns_float32():
    batch = make_batch(SHARED_LAYOUT, shared=True)
    low = tiny_ranker("bfloat16").forward(batch)
    full = tiny_ranker("shared").backward(batch)
    assert low.logits.dtype == low.loss.dtype == np.float32
    used = batch.target_mask
    error = np.abs(low.logits - full.logits)[used]
    assert 1e-5 < error.max() < 0.1  # some rounding, so bfloat16 it was, and not more


def test_time_tokens_refuse_shared_history():
    batch = make_batch(SHARED_LAYOUT, shared=True)
    with pytest.raises(UserError, match=r"depend on the request.*set input\.rows=request"):
        tiny_ranker("paper").forward(batch)


def test_batch_without_targets_has_no_loss_and_no_gradient():
    batch = spoil_padding(make_batch([[], [], []], shared=True))
    result = tiny_ranker("shared").backward(batch)
    assert result.loss == 0
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(result.grads))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_float32_and_names_its_axes(name):
    for path, param in nnx.to_flat_state(nnx.state(tiny_ranker(name).module, nnx.Param)):
        assert len(param.logical_axes) == param.ndim, path
        assert param.dtype == np.float32, path


def test_paper_preset_has_none_of_the_additions():
    sequence = StcaConfig(
        width=16,
        count_channel=True,
        temperature_length=64,
        attention_sink=True,
        recency_score=True,
    )
    config = paper_config(sequence)
    assert config.sequence == dataclasses.replace(
        sequence,
        initialization="independent",
        count_channel=False,
        temperature_length=None,
        attention_sink=False,
        recency_score=False,
    )
    assert not config.match_channel
    assert config.embedding.time_delta
    assert config.embedding.recency_index


def test_config_rejects_a_decay_that_is_not_positive():
    with pytest.raises(ValueError, match="match_decay_days is 0; it must be positive"):
        RankerConfig(match_decay_days=0)


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_config_rejects_any_decay_that_is_not_positive(value):
    with pytest.raises(ValueError, match="it must be positive"):
        RankerConfig(match_decay_days=value)
    with pytest.raises(ValueError, match="match_time_scales_days"):
        RankerConfig(match_time_scales_days=(1.0, value))


@pytest.mark.parametrize(("row_length", "targets_per_row"), [(0, 3), (5, 0)])
@pytest.mark.parametrize("sequence", [StcaConfig, DinConfig, TransformerConfig])
def test_rows_without_tokens_or_targets_are_scored(sequence, row_length, targets_per_row):
    config = RankerConfig(sequence=sequence(width=8))
    batch = empty_batch(SCHEMA, 2, row_length, targets_per_row, shared_history=False)
    ranker = nnx.eval_shape(lambda: Ranker(config, SCHEMA, rngs=nnx.Rngs(0)))
    logits = nnx.eval_shape(lambda ranker: ranker(batch), ranker)
    assert logits.shape == (2, targets_per_row, len(SCHEMA.tasks))


@pytest.mark.parametrize("name", ["shared", "exclusive"])
def test_tokens_are_zero_where_no_range_covers_them(name):
    """Whatever padding holds: the row of id 0 is not zero, nor are embeddings of time."""
    layout = SHARED_LAYOUT if name == "shared" else EXCLUSIVE_LAYOUT
    batch = spoil_padding(make_batch(layout, shared=name == "shared"))
    ranker = tiny_ranker(name)
    module = with_params(ranker.module, ranker.params)
    tokens = np.asarray(module.forward(batch).tokens)
    ranges = Ranges(*(np.where(batch.target_mask, x, 0) for x in batch.ranges))
    covered = np.asarray(ranges.covered(batch.row_length))
    assert not covered.all()
    assert (tokens[~covered] == 0).all()
    assert (np.abs(tokens[covered]).max(-1) > 0).all()
