"""References against plain loops over every pair of target and event."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stca_jax.evaluation.references.features import (
    DECAYS,
    count_features,
    match_features,
    repeat_counts,
)
from stca_jax.evaluation.references.history import HistoryView

DAY = 86_400
LENGTHS = (1, 3, 10, 1000)
FIELDS = ("item", "type", "category")


def random_view(seed=0, n=60, q=5, max_targets=4, num_ids=8, days=100, fields=FIELDS):
    rng = np.random.default_rng(seed)
    event_time = np.sort(rng.integers(0, days * DAY, n))
    # A third of the events share their time with the one before, as the lines of a basket do.
    shared = np.flatnonzero(rng.random(n) < 1 / 3)
    event_time[shared] = event_time[np.maximum(shared - 1, 0)]
    event_time.sort()
    request_time = np.sort(rng.choice(np.append(event_time, days * DAY), q))
    offset = np.append(0, np.cumsum(rng.integers(0, max_targets + 1, q)))

    def ids(size):
        return {field: rng.integers(-2, num_ids - 2, size).astype(np.int32) for field in fields}

    return HistoryView(
        event_ids=ids(n),
        event_time=event_time,
        history_end=np.searchsorted(event_time, request_time),
        request_time=request_time,
        target_offset=offset,
        target_ids=ids(offset[-1]),
        target_log_popularity=rng.random(offset[-1]).astype(np.float32),
    )


def targets_with_windows(view, length):
    """Yields each target with its request and the positions of its window."""
    for request, end in enumerate(view.history_end):
        for target in range(view.target_offset[request], view.target_offset[request + 1]):
            yield target, request, range(max(end - length, 0), end)


def brute_force_features(view, length):
    rows = []
    for target, request, window in targets_with_windows(view, length):
        matches = {
            field: [p for p in window if ids[p] == view.target_ids[field][target]]
            for field, ids in view.event_ids.items()
        }
        ages = [(view.request_time[request] - view.event_time[p]) / DAY for p in matches["item"]]
        counts = [np.log1p(len(found)) for found in matches.values()]
        log_n = np.log(max(len(window), 1))
        row = [
            *counts,
            float(len(ages) > 0),
            np.log1p(sum(np.exp(-age / 28) for age in ages)),
            np.log1p(min(ages)) if ages else 6.5,
            log_n,
        ]
        if view.target_log_popularity is None:
            row += [count * log_n for count in counts]
        else:
            popularity = view.target_log_popularity[target]
            row += [popularity, *(count * log_n for count in counts)]
            row += [*(count * popularity for count in counts), log_n * popularity]
        rows.append(row)
    return np.array(rows)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 40),
    st.integers(1, 6),
    st.sampled_from([1, 3, 20]),
    st.sampled_from([1, 100, 30 * 365]),
)
def test_features_are_those_of_a_loop_over_all_pairs(seed, n, q, num_ids, days):
    view = random_view(seed, n, q, num_ids=num_ids, days=days)
    features = count_features(view, LENGTHS)
    counts = repeat_counts(view, LENGTHS)
    assert list(features) == list(counts) == list(LENGTHS)
    for length in LENGTHS:
        expected = brute_force_features(view, length).reshape(-1, 15)
        assert features[length].dtype == counts[length].dtype == np.float32
        np.testing.assert_allclose(features[length], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.log1p(counts[length]), expected[:, 0], rtol=1e-6)


def brute_force_match_features(view, length):
    rows = []
    for target, request, window in targets_with_windows(view, length):
        row = []
        for field, ids in view.event_ids.items():
            ages = [
                (view.request_time[request] - view.event_time[p]) / DAY
                for p in window
                if ids[p] == view.target_ids[field][target]
            ]
            row += [np.log1p(len(ages)), len(ages) / max(len(window), 1)]
            row += [np.log1p(min([*ages, 3650]))]
            row += [np.log1p(sum(np.exp(-age / days) for age in ages)) for days in DECAYS]
        rows.append([*row, np.log(max(len(window), 1))])
    return np.array(rows)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(1, 6), st.sampled_from([1, 3]))
def test_match_features_are_those_of_a_loop_over_all_pairs(seed, n, q, num_ids):
    view = random_view(seed, n, q, num_ids=num_ids)
    features = match_features(view, LENGTHS)
    for length in LENGTHS:
        expected = brute_force_match_features(view, length).reshape(-1, 22)
        assert features[length].dtype == np.float32
        np.testing.assert_allclose(features[length], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "fields", [("item",), ("item", "brand"), ("brand", "item", "shop", "city")]
)
@pytest.mark.parametrize("popular", [True, False])
def test_any_fields_with_or_without_popularity(fields, popular):
    view = random_view(fields=fields)
    if not popular:
        view = dataclasses.replace(view, target_log_popularity=None)
    features = count_features(view, [10])[10]
    num_fields = len(fields)
    assert features.shape == (
        view.num_targets,
        3 * num_fields + 6 if popular else 2 * num_fields + 4,
    )
    np.testing.assert_allclose(features, brute_force_features(view, 10), rtol=1e-5, atol=1e-6)


def test_decay_is_exact_in_the_early_years_of_a_long_log():
    # Forty years of one item: weights relative to the end of the log would differ by e^521.
    days = np.sort(np.random.default_rng(0).integers(0, 40 * 365, 3000))
    ids = {"item": np.zeros(days.size, np.int32)}
    view = HistoryView(
        event_ids=ids,
        event_time=days * DAY,
        history_end=np.array([20, 1500, 3000]),
        request_time=days[[19, 1499, 2999]] * DAY + 3600,
        target_offset=np.arange(4),
        target_ids={"item": np.zeros(3, np.int32)},
    )
    for length in (10, 5000):
        decayed = np.expm1(count_features(view, [length])[length][:, 2])
        for target, request, window in targets_with_windows(view, length):
            ages = (view.request_time[request] - view.event_time[window]) / DAY
            assert decayed[target] == pytest.approx(np.exp(-ages / 28).sum(), rel=1e-5)


def test_target_features_do_not_depend_on_later_events():
    view = random_view(n=60)
    cut = int(view.history_end.max())
    shorter = dataclasses.replace(
        view,
        event_ids={field: ids[:cut] for field, ids in view.event_ids.items()},
        event_time=view.event_time[:cut],
    )
    np.testing.assert_array_equal(count_features(view, [20])[20], count_features(shorter, [20])[20])


def test_extreme_ids_do_not_collide():
    ids = np.array([-(2**31), 2**31 - 1, -1, 0, 2**31 - 1], np.int32)
    view = HistoryView(
        event_ids={"item": ids},
        event_time=np.arange(5),
        history_end=np.array([5]),
        request_time=np.array([5]),
        target_offset=np.array([0, 5]),
        target_ids={"item": ids},
    )
    np.testing.assert_array_equal(repeat_counts(view, [5])[5], [1, 2, 1, 1, 2])
    np.testing.assert_array_equal(repeat_counts(view, [3])[3], [0, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_field": "sku"}, "item_field is 'sku'"),
        ({"target_ids": {"item": np.zeros(9, np.int32)}}, "expected the same fields"),
        ({"request_time": np.zeros(2, np.int64)}, r"request_time has shape \[2\], expected \[5\]"),
        ({"target_offset": np.zeros(5, np.int64)}, r"target_offset has shape \[5\]"),
        ({"target_offset": np.arange(6)}, "expected to rise from 0"),
        ({"event_time": np.arange(60)[::-1]}, "event_time decreases"),
        ({"history_end": np.full(5, 61)}, r"history_end spans \[61, 61\]"),
        ({"history_end": np.full(5, 60)}, "the answer leaks"),
        ({"target_log_popularity": np.zeros(1, np.float32)}, "target_log_popularity has shape"),
    ],
)
def test_view_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(random_view(), **change)


def test_view_refuses_wide_ids():
    view = random_view()
    wide = {field: ids.astype(np.int64) for field, ids in view.event_ids.items()}
    with pytest.raises(ValueError, match=r"event_ids\['item'\] is int64, expected int32"):
        dataclasses.replace(view, event_ids=wide)


def test_refuses_lengths_below_one():
    with pytest.raises(ValueError, match="A length is 0"):
        count_features(random_view(), [10, 0])
