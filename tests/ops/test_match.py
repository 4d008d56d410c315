"""Match statistics against plain Python counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import random_ranges

from stca_jax.ops.match import match_statistics
from stca_jax.ranges import Ranges

DECAYS = (10.0, 1000.0)


def oracle(target_ids, history_ids, history_time, request_time, start, end):
    R, M = start.shape
    F = len(target_ids)
    matches, last_age = np.zeros((R, M, F)), np.full((R, M, F), np.inf)
    decayed = np.zeros((R, M, F, len(DECAYS)))
    for r, m in np.ndindex(R, M):
        window = slice(start[r, m], end[r, m])
        for f, name in enumerate(target_ids):
            hit = history_ids[name][r, window] == target_ids[name][r, m]
            matches[r, m, f] = hit.sum()
            age = (request_time[r, m] - history_time[r, window])[hit].astype(np.float64)
            decayed[r, m, f] = [np.exp(-age / decay).sum() for decay in DECAYS]
            last_age[r, m, f] = age.min(initial=np.inf)
    return matches, decayed, last_age


def assert_matches(arguments, start, end):
    expected = oracle(*arguments, start, end)
    options = {"decay_seconds": DECAYS}
    found = jax.jit(lambda: match_statistics(*arguments, Ranges(start, end), **options))()
    np.testing.assert_array_equal(found.matches, expected[0])
    # A decayed count is what is left of a running one, which float32 rounds.
    np.testing.assert_allclose(found.decayed_matches, expected[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.last_age, expected[2])


@pytest.mark.parametrize(("R", "M", "L"), [(2, 5, 30), (1, 70, 1100), (3, 1, 513), (1, 4, 1)])
def test_matches_counting(R, M, L):
    rng = np.random.default_rng(L)
    start, end = random_ranges(rng, R, M, L)
    names = ("item", "type", "shop")
    history = {n: rng.integers(0, 7, (R, L)) for n in names}
    target = {n: rng.integers(0, 7, (R, M)) for n in names}
    time = np.sort(rng.integers(0, 5000, (R, L)), 1)
    assert_matches((target, history, time, np.full((R, M), 6000)), start, end)


def test_users_share_a_row():
    """Where the next user's tokens begin, time falls by years, or goes on within a decay."""
    time = np.array([[100, 200, 10**9, 0, 0, 5, 6, 7, 7, 7]])
    start, end = np.array([[0, 1, 3, 5, 6, 3]]), np.array([[3, 3, 5, 8, 10, 10]])
    now = np.array([[10**9 + 1, 10**9 + 50, 1, 8, 2000, 8]])
    history, target = {"item": np.ones((1, 10), int)}, {"item": np.ones((1, 6), int)}
    assert_matches((target, history, time, now), start, end)


def test_padding_never_matches():
    """Tokens outside every range hold extreme values; an empty range has no statistics."""
    start, end = np.array([[0, 2, 3]]), np.array([[2, 2, 4]])
    ids = {"item": np.array([[5, 5, -1, 5, -5]])}
    time = np.array([[10, 20, np.iinfo(np.int32).min, 30, np.iinfo(np.int32).max]])
    targets = {"item": np.array([[5, 5, 6]])}
    found = match_statistics(
        targets, ids, time, np.full((1, 3), 40), Ranges(start, end), decay_seconds=(10,)
    )
    np.testing.assert_array_equal(found.matches[..., 0], [[2, 0, 0]])
    np.testing.assert_allclose(
        found.decayed_matches[..., 0, 0], [[np.exp(-3) + np.exp(-2), 0, 0]], rtol=1e-6
    )
    np.testing.assert_array_equal(found.last_age[..., 0], [[20, np.inf, np.inf]])


def test_inside_a_differentiated_function():
    """Nothing flows through it, and differentiating around it works."""
    ids = {"item": np.array([[1, 2, 1]])}
    arguments = ({"item": np.array([[1]])}, ids, np.array([[0, 1, 2]]), np.array([[9]]),
                 Ranges(np.array([[0]]), np.array([[3]])))  # fmt: skip
    gradient = jax.grad(
        lambda w: (w * match_statistics(*arguments, decay_seconds=(5,)).matches).sum()
    )
    assert gradient(jnp.float32(3)) == 2


@pytest.mark.parametrize("sizes", [(2, 0, 5), (2, 3, 0), (0, 3, 5)])
def test_nothing_to_match(sizes):
    R, M, L = sizes
    targets, ids = {"item": np.zeros((R, M), int)}, {"item": np.zeros((R, L), int)}
    zeros = np.zeros((R, M), int)
    found = match_statistics(
        targets, ids, np.zeros((R, L), int), zeros, Ranges(zeros, zeros), decay_seconds=(5.0, 9.0)
    )
    assert found.matches.shape == (R, M, 1)
    assert np.all(found.matches == 0)
    assert found.decayed_matches.shape == (R, M, 1, 2)
    assert np.all(found.decayed_matches == 0)
    assert np.all(found.last_age == np.inf)
