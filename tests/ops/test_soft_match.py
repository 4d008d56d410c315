"""Soft counts against a pass over every range in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import random_ranges

from stca_jax.ops import soft_match
from stca_jax.ops.match import match_statistics
from stca_jax.ops.soft_match import soft_counts
from stca_jax.ranges import Ranges


def oracle(target, history, sharpness, start, end):
    target, history = target.astype(np.float64), history.astype(np.float64)
    R, M, F, _ = target.shape
    found = np.zeros((R, M, F))
    for r, m, f in np.ndindex(R, M, F):
        rows = history[r, start[r, m] : end[r, m], f]
        norm = np.linalg.norm(rows, axis=1) * np.linalg.norm(target[r, m, f])
        cosine = rows @ target[r, m, f] / norm
        found[r, m, f] = np.log1p(np.exp(-sharpness[f] * (1 - cosine)).sum())
    return found


def example(R, M, L, F=2, W=5):
    rng = np.random.default_rng(L)
    start, end = random_ranges(rng, R, M, L)
    target, history = (rng.normal(size=(R, n, F, W)).astype(np.float32) for n in (M, L))
    return target, history, np.array([5.0, 1.5][:F], np.float32), start, end


@pytest.fixture(params=["xla", "triton"], autouse=True)
def implementation(request, monkeypatch):
    """As a sum over tiles, and as where the attention has kernels: its log-sum-exp."""
    monkeypatch.setattr(soft_match, "best_implementation", lambda: request.param)


@pytest.mark.parametrize(("R", "M", "L"), [(2, 5, 30), (1, 70, 1100), (3, 1, 513), (1, 4, 1)])
def test_matches_a_pass_over_the_range(R, M, L):
    *arguments, start, end = example(R, M, L)
    found = jax.jit(soft_counts)(*arguments, Ranges(start, end))
    np.testing.assert_allclose(found, oracle(*arguments, start, end), rtol=1e-5, atol=1e-6)


def test_gradients_are_slopes():
    """Of rows on both sides and of the sharpness, against differences in float64."""
    *arguments, start, end = example(1, 3, 6)
    weight = np.random.default_rng(0).normal(size=(1, 3, 2))

    def loss(*arguments):
        return (soft_counts(*arguments, Ranges(start, end)) * weight).sum()

    gradients = jax.grad(loss, (0, 1, 2))(*map(jnp.asarray, arguments))
    step = 1e-5
    for k, gradient in enumerate(gradients):
        for place in np.ndindex(gradient.shape):
            sides = []
            for sign in (1, -1):
                moved = [a.astype(np.float64) for a in arguments]
                moved[k][place] += sign * step
                sides.append((oracle(*moved, start, end) * weight).sum())
            slope = (sides[0] - sides[1]) / (2 * step)
            np.testing.assert_allclose(gradient[place], slope, rtol=1e-3, atol=1e-5)


def test_becomes_the_exact_count_as_it_sharpens():
    rng = np.random.default_rng(1)
    start, end = random_ranges(rng, 2, 7, 40)
    table = rng.normal(size=(6, 5)).astype(np.float32)
    target, history = rng.integers(0, 6, (2, 7)), rng.integers(0, 6, (2, 40))
    exact = match_statistics(
        {"shop": target}, {"shop": history}, np.zeros((2, 40), int), np.ones((2, 7), int),
        Ranges(start, end), decay_seconds=(1.0,),
    ).matches  # fmt: skip
    rows = table[target][:, :, None], table[history][:, :, None]
    found = soft_counts(*rows, jnp.array([1e4]), Ranges(start, end))
    np.testing.assert_allclose(np.expm1(found), exact, rtol=1e-2, atol=1e-2)


def test_an_empty_range_counts_nothing_and_has_no_gradient():
    target, history, sharpness, *_ = example(1, 2, 3)
    ranges = Ranges(np.array([[0, 2]]), np.array([[0, 2]]))

    def total(*arguments):
        return soft_counts(*arguments, ranges).sum()

    value, gradients = jax.value_and_grad(total, (0, 1, 2))(target, history, sharpness)
    assert value == 0
    assert all(not np.asarray(g).any() for g in gradients)


def test_a_row_of_zeros_is_like_nothing():
    _, history, sharpness, *_ = example(1, 1, 4)
    zeros, ranges = np.zeros((1, 1, 2, 5), np.float32), Ranges(np.array([[0]]), np.array([[4]]))
    found, gradient = jax.value_and_grad(
        lambda x: soft_counts(x, history, sharpness, ranges).sum()
    )(zeros)
    np.testing.assert_allclose(found, np.log1p(4 * np.exp(-sharpness)).sum(), rtol=1e-5)
    assert np.isfinite(gradient).all()
