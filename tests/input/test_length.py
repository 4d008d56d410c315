"""Length samplers against NumPy's own generators, and the windows they cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stca_jax.input.hashing import uniform
from stca_jax.input.length import BetaLength, FixedLength, UniformLength, window_start

N = 200_000


def draws(sampler, epoch=0.0):
    return sampler.lengths(uniform(3, 0, np.arange(N)), epoch)


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.25, 1.0])
@pytest.mark.parametrize(("minimum", "maximum", "average"), [(8, 10_000, 2_000), (64, 1024, 256)])
def test_beta_has_the_distribution_of_rounded_beta_samples(alpha, minimum, maximum, average):
    lengths = draws(BetaLength(minimum, maximum, average, alpha))
    beta = alpha * (maximum - average) / (average - minimum)
    s = np.random.default_rng(0).beta(alpha, beta, N)
    expected = minimum + 8 * np.round((maximum - minimum) * s / 8)
    grid = np.arange(minimum, maximum + 1, 8)
    ours, theirs = (np.searchsorted(np.sort(x), grid, "right") / N for x in (lengths, expected))
    # Two samples of N differ by more than 2.2 / sqrt(N) in one case of 10,000.
    assert np.abs(ours - theirs).max() < 2.2 * np.sqrt(1 / N)
    assert lengths.mean() == pytest.approx(average, abs=5 * lengths.std() / np.sqrt(N) + 4)
    assert lengths.min() == minimum
    assert lengths.max() <= maximum
    assert not (lengths % 8).any()


def test_a_small_alpha_is_u_shaped():
    maximum = 10_000
    short, long = (
        np.mean((x := draws(BetaLength(8, maximum, 2_000, alpha))) < maximum / 4)
        and (np.mean(x > 0.9 * maximum), np.mean((x > 4_000) & (x < 6_000)))
        for alpha in (0.02, 1.0)
    )
    assert short[0] > 10 * short[1], "full lengths are commoner than middling ones"
    assert long[0] < long[1]


def test_uniform_draws_every_multiple_of_eight_alike():
    values, counts = np.unique(draws(UniformLength(16, 96)), return_counts=True)
    np.testing.assert_array_equal(values, np.arange(16, 97, 8))
    assert np.abs(counts / (N / 11) - 1).max() < 0.05


def test_fixed():
    assert set(draws(FixedLength(50))) == {50}


def test_curriculum_moves_the_average():
    sampler = BetaLength(8, 4096, 512, 0.25, curriculum=((0.0, 256.0), (2.0, 2048.0)))
    for epoch, average in ((0.0, 256), (0.5, 704), (1.0, 1152), (2.0, 2048), (7.0, 2048)):
        lengths = draws(sampler, np.full(N, epoch))
        assert lengths.mean() == pytest.approx(average, abs=5 * lengths.std() / np.sqrt(N) + 4)


def test_draws_depend_on_the_request_not_on_the_order():
    sampler = BetaLength(8, 1024, 256, 0.25)
    ids = np.random.default_rng(0).permutation(1000)
    shuffled = sampler.lengths(uniform(0, 5, ids))
    np.testing.assert_array_equal(shuffled, sampler.lengths(uniform(0, 5, np.arange(1000)))[ids])
    for other in (uniform(1, 5, ids), uniform(0, 6, ids), uniform(0, 5, ids + 1)):
        assert (sampler.lengths(other) != shuffled).mean() > 0.3


def test_uniform_numbers_are_uniform_and_streams_independent():
    a, b = uniform(0, 1, np.arange(N)), uniform(0, 2, np.arange(N))
    for x in (a, b):
        assert x.min() >= 0
        assert x.max() < 1
        assert np.abs(np.sort(x) - (np.arange(N) + 0.5) / N).max() < 2.2 / np.sqrt(N)
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(N)
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 5 / np.sqrt(N)


@given(st.integers(0, 300), st.integers(1, 200), st.floats(0, 1, exclude_max=True))
def test_windows_lie_in_the_history(end, length, u):
    history = np.arange(end)
    args = np.array([end]), np.array([length])
    for window, expected in (("suffix", history[-length:]), ("prefix", history[:length])):
        start = int(window_start(*args, window, np.array([u]))[0])
        np.testing.assert_array_equal(history[start : start + min(length, end)], expected)
    start = int(window_start(*args, "random", np.array([u]))[0])
    assert 0 <= start <= end - min(length, end)


def test_random_windows_reach_both_ends():
    start = window_start(np.full(1000, 20), np.full(1000, 8), "random", uniform(0, np.arange(1000)))
    assert set(start) == set(range(13))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedLength(0), "at least 1 event, got 0"),
        (lambda: UniformLength(0, 64), "minimum length must be a positive multiple of 8, got 0"),
        (lambda: UniformLength(8, 100), "maximum length must be a positive multiple of 8, got 100"),
        (lambda: UniformLength(64, 8), "minimum length 64 exceeds maximum length 8"),
        (lambda: BetaLength(8, 64, 64, 0.1), "strictly between minimum 8 and maximum 64"),
        (lambda: BetaLength(8, 64, 32, 0.0), "alpha must be positive and finite, got 0.0"),
        (lambda: FixedLength(np.nan), "at least 1 event, got nan"),
        (lambda: BetaLength(8, 64, np.nan, 0.1), "strictly between"),
        (lambda: BetaLength(8, 64, 32, np.nan), "alpha must be positive and finite, got nan"),
        (lambda: BetaLength(8, 64, 32, np.inf), "alpha must be positive and finite, got inf"),
        (lambda: BetaLength(8, 64, 32, 0.1, ((np.nan, 16.0), (1.0, 32.0))), "must be finite and"),
        (lambda: BetaLength(8, 64, 32, 0.1, ((0.0, 100.0),)), "average length 100.0 must lie"),
        (lambda: BetaLength(8, 64, 32, 0.1, ((1.0, 16.0), (1.0, 32.0))), "and increase"),
    ],
)
def test_bad_settings_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
