"""Trends by the formulas of the docs, however many targets are looked up in one go."""

import dataclasses
import math

import numpy as np
import pytest

from stca_jax.input import trends as trends_module
from stca_jax.input.feature_arrays import pack_trends, unpack_trends
from stca_jax.input.trends import Trends, ValueEvents, count_seconds, cumulative

DAY = 86_400
T0 = 1_700_000_000
WINDOWS = {"1d": DAY, "9d": 9 * DAY}
VALUES = 12


def make_trends(label_delay=0, size=2_000):
    """Events of twelve values, of which the last four have none, and of one task."""
    rng = np.random.default_rng(1)
    time = np.sort(T0 + rng.integers(0, 20 * DAY, size) // 600 * 600)
    value = rng.integers(0, VALUES - 4, size)
    label = rng.choice([0.0, 1.0, np.nan], size)
    seconds, events = count_seconds(time)
    counts = [cumulative(flags)[events] for flags in (label == 1, ~np.isnan(label))]
    field = ValueEvents.of(value, time, label[:, None])
    trends = Trends(
        WINDOWS, ("click",), label_delay, {"item": field}, seconds, events, *([c] for c in counts)
    )
    return trends, value, time, label


def make_targets(end, size=500):
    """Values, of which -1 is one that the log does not have, and times of requests of four."""
    rng = np.random.default_rng(2)
    time = np.repeat(rng.integers(T0 - DAY, end, size // 4), 4)
    return rng.integers(-1, VALUES, size), time


def expected(value, time, label, target, moment, delay):
    """Of one target."""
    past = time < moment
    own = past & (value == target)
    found = {}
    for name, span in WINDOWS.items():
        inside = past & (time >= moment - span)
        mean = inside.sum() / max(len(set(value[past])), 1)
        found[f"trend_{name}"] = (math.log1p((inside & own).sum()) - math.log1p(mean)) / 2
        known = (time < moment - delay) & (time >= moment - delay - span) & ~np.isnan(label)
        average = (label[known].sum() + 1) / (known.sum() + 2)
        own_known = known & (value == target)
        rate = (label[own_known].sum() + 20 * average) / (own_known.sum() + 20)
        found[f"rate_{name}_click"] = math.log(rate / average)
    found["age"] = math.log1p((moment - time[own].min()) / DAY) / 2 if own.any() else -1
    return found


@pytest.mark.parametrize("delay", [0, 3 * DAY])
@pytest.mark.parametrize("at_once", [7, 1 << 14])
def test_features_are_those_of_the_formulas(monkeypatch, delay, at_once):
    monkeypatch.setattr(trends_module, "_TARGETS", at_once)
    trends, value, time, label = make_trends(delay)
    targets, moments = make_targets(T0 + 21 * DAY)
    found = trends.encode({"item": targets}, moments)
    assert tuple(found) == trends.names
    for k in range(0, len(targets), 3):
        numbers = expected(value, time, label, targets[k], moments[k], delay)
        for name, number in numbers.items():
            assert found[f"item_{name}"][k] == pytest.approx(number, abs=1e-6)


def test_no_targets_have_no_features():
    trends, *_ = make_trends()
    found = trends.encode({"item": np.empty(0, np.int64)}, np.empty(0, np.int64))
    assert tuple(found) == trends.names
    assert all(column.shape == (0,) for column in found.values())


def test_without_events_nothing_is_seen():
    seconds, events = count_seconds(np.empty(0, np.int64))
    none = ValueEvents.of(np.empty(0, np.int64), np.empty(0, np.int64))
    trends = Trends(WINDOWS, (), 0, {"item": none}, seconds, events)
    found = trends.encode({"item": np.arange(-1, 3)}, np.full(4, T0))
    assert found["item_age"].tolist() == [-1] * 4
    assert found["item_trend_1d"].tolist() == [0] * 4


@pytest.mark.parametrize("delay", [0, 3 * DAY])
def test_the_tail_gives_the_same_after_the_end_of_the_log(delay):
    trends, _, time, _ = make_trends(delay)
    tail = trends.tail({"item": VALUES})
    assert len(tail.fields["item"].key) < len(time)
    assert tail.first is not None
    assert len(tail.first["item"]) == VALUES
    targets = np.arange(-1, VALUES)
    for moment in (time[-1] + 1, time[-1] + 5 * DAY):
        a, b = (t.encode({"item": targets}, np.full(len(targets), moment)) for t in (trends, tail))
        for name in trends.names:
            np.testing.assert_array_equal(a[name], b[name])


def test_files_of_before_with_a_number_for_each_event_are_read_as_well():
    trends, _, time, label = make_trends()
    tail = trends.tail({"item": VALUES})
    begin = np.searchsorted(time, tail.time[0])
    arrays = pack_trends(tail)
    described = {"windows": WINDOWS, "tasks": ["click"], "label_delay": 0, "fields": ["item"]}
    before = {n: a for n, a in arrays.items() if n != "events"}
    before |= {
        "time": time[begin:].astype(np.uint32),
        "positive_0:": cumulative(label[begin:] == 1),
        "known_0:": cumulative(~np.isnan(label[begin:])),
    }
    targets, moments = np.arange(-1, VALUES), np.full(VALUES + 1, time[-1] + 600)
    expected = tail.encode({"item": targets}, moments)
    for stored in (arrays, before):
        found = unpack_trends(described, stored).encode({"item": targets}, moments)
        for name in tail.names:
            np.testing.assert_array_equal(found[name], expected[name])


def test_first_times_are_by_value(monkeypatch):
    monkeypatch.setattr(trends_module, "_BLOCK", 100)
    trends, value, time, _ = make_trends()
    first = [time[value == v].min() if (value == v).any() else -1 for v in range(VALUES - 4)]
    np.testing.assert_array_equal(trends.fields["item"].first_times(), first)
    some = dataclasses.replace(trends.fields["item"], key=trends.fields["item"].key[-5:])
    assert some.first_times().tolist()[:-1] == [-1] * (VALUES - 5)
