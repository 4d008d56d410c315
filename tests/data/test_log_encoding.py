"""Vocabularies and scales of logs, against the vocabulary of training and NumPy in float64."""

import functools
import operator

import numpy as np
import pyarrow as pa
import pytest

from stca_jax.data.interaction_log.encoders import encode_column, fit_scale, fit_vocabulary
from stca_jax.data.interaction_log.moments import Moments


@pytest.mark.parametrize(
    ("values", "new"),
    [(["b", "a", "d", "rare"], ["x", "longer than all others", "a"]), ([3, -7, 2**60], [5, 3, 9])],
)
def test_values_that_the_log_lacks_get_what_the_vocabulary_gives_them(values, new):
    counts = np.array([9, 9, 9, 1])[: len(values)]
    vocabulary = fit_vocabulary(pa.array(values), counts, min_count=2, num_oov=5)
    column = pa.array([*new, None, *values, None, *new], pa.array(values).type)
    expected = vocabulary.encode(column.to_pylist())
    np.testing.assert_array_equal(encode_column(vocabulary, column), expected)
    np.testing.assert_array_equal(
        encode_column(vocabulary, pa.chunked_array([column[:4], column[4:]])), expected
    )
    first = len(vocabulary.known)
    assert expected[len(new)] == first
    many = [f"new {k}" for k in range(99)] if isinstance(new[0], str) else [*range(10, 109)]
    assert set(encode_column(vocabulary, pa.array(many))) == set(range(first, first + 5))


@pytest.mark.parametrize(
    ("mean", "deviation"), [(0.0, 1.0), (1.7e12, 1e6), (-1e15, 3.0), (1e30, 1e25), (1.0, 1e-7)]
)
def test_moments_of_shards_are_those_of_all_values(mean, deviation):
    values = mean + deviation * np.random.default_rng(0).standard_normal(5_000)
    parts = [Moments.of(pa.array(part)) for part in np.split(values, [1, 1, 700, 4_000])]
    total = functools.reduce(operator.add, parts)
    exact = values.astype(np.longdouble)
    assert total.count == 5_000
    assert total.mean == pytest.approx(float(exact.mean()), rel=1e-14, abs=1e-14)
    # float64 holds the mean itself to 2^-53 only.
    rounding = abs(mean) / deviation * 2.0**-53
    assert total.deviation == pytest.approx(float(exact.std()), rel=1e-9 + rounding)
    assert (total.least, total.most) == (values.min(), values.max())
    assert abs((values < total.quantile(0.5)).mean() - 0.5) < 0.02
    scaled = encode_column(fit_scale(total), pa.array(values))
    assert abs(scaled).max() < 6


def test_moments_of_a_constant_of_nothing_and_of_what_is_no_number():
    constant = Moments.of(pa.array([0.1] * 1_000)) + Moments.of(pa.array([0.1] * 7))
    assert constant.deviation == 0
    np.testing.assert_allclose(
        encode_column(fit_scale(constant), pa.array([0.1, None])), 0, atol=1e-12
    )
    nothing = Moments.of(pa.array([None, float("nan"), None], pa.float64()))
    assert (nothing.count, nothing.missing, nothing.unreadable) == (0, 2, 1)
    assert (constant + nothing).mean == constant.mean
    np.testing.assert_array_equal(
        encode_column(fit_scale(nothing), pa.array([None, float("nan")], pa.float64())), 0
    )


def test_a_number_far_beyond_those_of_training_stays_finite():
    scale = fit_scale(Moments.of(pa.array([1.0, 1.0 + 1e-9])))
    encoded = encode_column(scale, pa.array([3e38, -3e38, 1.0]))
    assert np.isfinite(encoded).all()
    assert encoded[0] == -encoded[1] == 1e6
