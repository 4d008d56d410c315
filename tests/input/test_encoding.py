"""Ids and numbers of raw values, against dictionaries, zoneinfo and formulas in float64."""

from __future__ import annotations

import datetime
import zoneinfo

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stca_jax.errors import UserError
from stca_jax.input.encoding import Buckets, Clock, Ids, Scale, Vocabulary


@given(
    st.lists(st.integers(-(2**40), 2**40) | st.integers(0, 9), max_size=50),
    st.lists(st.integers(-(2**40), 2**40) | st.integers(0, 9), min_size=1, max_size=50),
    st.integers(1, 3),
    st.integers(1, 7),
    st.booleans(),
)
def test_vocabulary_matches_a_dictionary(train, later, min_count, num_oov, strings):
    as_array = (lambda v: np.array(v, str)) if strings else (lambda v: np.array(v, np.int64))
    vocabulary = Vocabulary.fit(as_array(train), min_count=min_count, num_oov=num_oov)
    frequent = [v for v in set(train) if train.count(v) >= min_count]
    frequent.sort(key=str if strings else int)
    ids = {v: i for i, v in enumerate(frequent)}
    assert vocabulary.size == len(frequent) + num_oov
    encoded = vocabulary.encode(as_array(later))
    assert encoded.dtype == np.int32
    for value, found in zip(later, encoded, strict=True):
        if value in ids:
            assert found == ids[value]
        else:
            assert len(frequent) <= found < vocabulary.size
            assert found == vocabulary.encode(as_array([value]))[0]


def test_vocabulary_counts_stand_for_repetitions():
    values, counts = np.array([7, 3, 9, 3]), np.array([2, 1, 0, 1])
    fitted = Vocabulary.fit(values, counts, min_count=2)
    assert fitted.known.tolist() == [3, 7]
    repeated = Vocabulary.fit(np.repeat(values, counts), min_count=2)
    assert repeated.known.tolist() == fitted.known.tolist()


def test_vocabulary_spreads_unseen_values():
    vocabulary = Vocabulary.fit(np.arange(10), num_oov=64)
    rows = vocabulary.encode(np.arange(100, 64_100)) - 10
    assert np.bincount(rows, minlength=64).min() > 800


@pytest.mark.parametrize(("min_count", "num_oov"), [(0, 1), (1, 0)])
def test_vocabulary_refuses_zero(min_count, num_oov):
    with pytest.raises(ValueError, match=f"num_oov={num_oov} and min_count={min_count}"):
        Vocabulary.fit(np.arange(3), min_count=min_count, num_oov=num_oov)


def test_vocabulary_reads_values_as_a_client_writes_them():
    numbers = Vocabulary(np.array([3, 7]), num_oov=5)
    expected = numbers.encode(np.array([7, 99, 3]))
    for written in ([7, 99, 3], ["7", "99", "3"], [7.0, 99.0, 3.0], np.array([7.0, 99.0, 3.0])):
        np.testing.assert_array_equal(numbers.encode(written), expected)
    assert numbers.encode([None, float("nan"), "", 7]).tolist() == [2, 2, 2, 1]
    words = Vocabulary(np.array(["3", "x"]), num_oov=5)
    assert words.encode(["x", 3, None, ""]).tolist() == [1, 0, 2, 2]
    unknown = Vocabulary(np.array(["unknown", "x"]), num_oov=5, missing="unknown")
    assert unknown.encode([None, "x"]).tolist() == [0, 1]
    closed = Vocabulary(np.array(["0", "A"]), num_oov=0, missing="0")
    assert closed.encode(["A", "Q", None]).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("encoder", "values", "message"),
    [
        (Vocabulary(np.array([3]), 1), ["word"], "'word' is no integer"),
        (Vocabulary(np.array([3]), 1), [2**70], "is no integer of 64 bits"),
        (Vocabulary(np.array([3]), 1), [7.5], "7.5 is no integer"),
        (Vocabulary(np.array(["a"]), 1), [["a"]], "is a list; give a text"),
        (Vocabulary(np.array(["a"]), 1), [1.5], "1.5 is a float; give a text"),
        (Ids(5), [5], "5 is no id; give an integer from 0 to 4"),
        (Scale(), ["many"], "'many' is no number"),
        (Buckets((1.0,)), [{}], "is no number"),
    ],
)
def test_values_of_another_kind_are_refused(encoder, values, message):
    with pytest.raises(UserError, match=message):
        encoder.encode(values)


def test_buckets_of_powers_of_two():
    found = Buckets((2, 4, 8)).encode([0, 1, 2, 3, 4, 7, 8, 9_000, None])
    assert found.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0]


@pytest.mark.parametrize("transform", ["linear", "log"])
def test_scale_is_its_formula(transform):
    scale = Scale(mean=0.5, deviation=2.0, transform=transform, unit=10.0)
    values = np.array([-300.0, 0.0, 4.0, 1e9])
    moved = values if transform == "linear" else np.sign(values) * np.log(1 + abs(values) / 10)
    np.testing.assert_allclose(scale.encode(values), ((moved - 0.5) / 2).clip(-1e6, 1e6), rtol=1e-6)
    assert scale.encode([None, float("nan"), "", float("inf"), 1e300]).tolist() == [0] * 5
    np.testing.assert_array_equal(scale.encode(["4", "-300"]), scale.encode([4, -300]))


@pytest.mark.parametrize(
    "zone", ["UTC", "Europe/Paris", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe"]
)
def test_clock_is_that_of_zoneinfo(zone):
    rng = np.random.default_rng(0)
    unix = np.concatenate([rng.integers(10**9, 18 * 10**8, 300), 1_711_846_800 + np.arange(-3, 3)])
    found = Clock(zone).encode(unix)
    for k, second in enumerate(unix.tolist()):
        local = datetime.datetime.fromtimestamp(second, zoneinfo.ZoneInfo(zone))
        assert (found["hour"][k], found["weekday"][k]) == (local.hour, local.weekday())


def test_a_zone_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="time_zone is 'Mars/Olympus'; give a name such as UTC"):
        Clock("Mars/Olympus")
