"""Attention over pages against a softmax over the slots in float64, as each platform lowers it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stca_jax.ops import paged
from stca_jax.ops.paged import PAGE, EncodedTokens, KeysAndValues, Pages, Recency

U, H, K, D, NUM_PAGES, PAGES_OF_USER = 3, 2, 4, 8, 16, 5
NUM_EVENTS = np.array([0, PAGE + 7, 5 * PAGE], np.int32)


def direct(query, keys, values, where, recency):
    """Of one user, head and target after the other; keys and values are [P, S, H, K]."""
    output = np.zeros((U, query.shape[1], H, values.shape[-1]))
    log_sum_exp = np.full((U, query.shape[1], H), -np.inf)
    for u in range(U):
        n = where.num_events[u]
        if not n:
            continue
        k = np.concatenate([keys[p] for p in where.pages[u]])[:n].astype(np.float64)
        v = np.concatenate([values[p] for p in where.pages[u]])[:n].astype(np.float64)
        score = np.einsum("mhk,nhk->mhn", query[u], k)
        if recency is not None:
            days = recency.days[u].reshape(-1)[:n]
            score = score + np.einsum("hm,n->mhn", recency.rate, days)
        peak = score.max(-1, keepdims=True)
        weight = np.exp(score - peak)
        total = weight.sum(-1)
        output[u] = np.einsum("mhn,nhk->mhk", weight / total[..., None], v)
        log_sum_exp[u] = peak[..., 0] + np.log(total)
    return output, log_sum_exp


def draw(num_targets, with_recency):
    rng = np.random.default_rng(num_targets)
    pages = np.stack([rng.permutation(NUM_PAGES)[:PAGES_OF_USER] for _ in range(U)])
    where = Pages(pages.astype(np.int32), NUM_EVENTS)
    recency = None
    if with_recency:
        days = -rng.uniform(0, 50, (U, PAGES_OF_USER, PAGE)).astype(np.float32)
        recency = Recency(days, rng.uniform(0, 0.1, (H, num_targets)).astype(np.float32))
    return rng, where, recency


@pytest.mark.parametrize("lowered", [paged.paged_attention, paged._by_pages])
@pytest.mark.parametrize("num_targets", [5, 2 * paged.TARGET_TILE])
@pytest.mark.parametrize("with_recency", [False, True])
def test_keys_and_values(lowered, num_targets, with_recency):
    rng, where, recency = draw(num_targets, with_recency)
    keys, values = rng.normal(size=(2, NUM_PAGES, PAGE, H, K)).astype(np.float32)
    query = rng.normal(size=(U, num_targets, H, K)).astype(np.float32)
    cache = KeysAndValues(
        jnp.asarray(keys.transpose(0, 2, 3, 1)), jnp.asarray(values.transpose(0, 2, 1, 3))
    )
    found = jax.jit(lowered)(query, cache, where, recency)
    for x, expected in zip(found, direct(query, keys, values, where, recency), strict=True):
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_int8", [False, True])
def test_tokens_in_both_orders(is_int8):
    rng, where, _ = draw(5, False)
    where = Pages(*map(jnp.asarray, where))
    tokens = rng.normal(size=(NUM_PAGES, PAGE, D)).astype(np.float32)
    w_key, w_value = rng.normal(size=(2, D, H, K)).astype(np.float32) / 3
    query = rng.normal(size=(U, 5, H, K)).astype(np.float32)
    cache = EncodedTokens(jnp.asarray(tokens))
    if is_int8:
        scale = np.abs(tokens).max(-1) / 127
        rounded = np.round(tokens / scale[..., None]).astype(np.int8)
        cache = EncodedTokens(jnp.asarray(rounded), jnp.asarray(scale))
        tokens = rounded * scale[..., None]
    keys, values = (np.einsum("psd,dhk->pshk", tokens, w) for w in (w_key, w_value))
    expected = direct(query, keys, values, where, None)

    @jax.jit
    def projected(query):
        return paged.paged_attention(query, *paged.project_pages(cache, where, w_key, w_value))

    @jax.jit
    def absorbed(query):
        paired = jnp.einsum("umhk,dhk->umhd", query, w_key).reshape(U, 5 * H, 1, D)
        output, log_sum_exp = paged.paged_attention(paired, cache, where)
        output = jnp.einsum("umhd,dhk->umhk", output.reshape(U, 5, H, D), w_value)
        return output, log_sum_exp.reshape(U, 5, H)

    for lowered in (projected, absorbed):
        for x, y in zip(lowered(query), expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_slots_beyond_the_last_event_may_hold_anything():
    rng, where, _ = draw(5, False)
    keys, values = rng.normal(size=(2, NUM_PAGES, PAGE, H, K)).astype(np.float32)
    query = rng.normal(size=(U, 5, H, K)).astype(np.float32)

    def attend(keys, values):
        keys, values = jnp.array(keys), jnp.array(values)
        cache = KeysAndValues(keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3))
        return paged.paged_attention(query, cache, jax.tree.map(jnp.asarray, where))

    clean = attend(keys, values)
    page = where.pages[1, 1]
    keys[page, 7:], values[page, 7:] = 1e6, 1e6  # the second user has 7 events in it
    spoiled = attend(keys, values)
    for x, y in zip(clean, spoiled, strict=True):
        np.testing.assert_array_equal(x[:2], y[:2])
