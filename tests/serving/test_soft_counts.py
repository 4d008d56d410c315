"""Soft counts from a user's ids against a pass over the events in float64."""

import numpy as np
import pytest

from stca_jax.serving.matches import MatchIndex
from stca_jax.serving.soft_counts import SoftCounts

FIELDS, DECAYS = ("item", "brand", "shop"), (3_600.0,)
SHARPNESS = {"brand": 5.0, "shop": 0.5}


def tables():
    rng = np.random.default_rng(0)
    return {f: rng.normal(size=(30, 4)).astype(np.float32) for f in SHARPNESS}


def direct(events, targets):
    """log(1 + sum of exp(-a (1 - cos))) by looking at every event."""
    found = np.zeros((len(targets["brand"]), 2))
    for k, (field, sharpness) in enumerate(SHARPNESS.items()):
        rows = tables()[field].astype(np.float64)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        for m, target in enumerate(targets[field]):
            likeness = [rows[target] @ rows[event[FIELDS.index(field)]] for event in events]
            found[m, k] = np.log1p(np.sum(np.exp(sharpness * (np.array(likeness) - 1))))
    return found


@pytest.mark.parametrize("num_targets", [1, 600])  # more than are computed at once
def test_sum_over_ids_is_that_over_events(num_targets):
    rng = np.random.default_rng(1)
    soft = SoftCounts(tables(), np.array(list(SHARPNESS.values()), np.float32))
    index, events = MatchIndex(FIELDS, DECAYS), []
    targets = {f: rng.integers(0, 30, num_targets) for f in FIELDS}
    np.testing.assert_array_equal(soft.look_up(index, targets), np.zeros((num_targets, 2)))
    for time in range(150):
        events.append(tuple(int(x) for x in rng.geometric(0.15, 3).clip(max=29)))
        index.add(events[-1], time)
        if len(events) > 100:  # as a full window does
            soft.look_up(index, targets)  # what it keeps must not outlive the change
            index.remove_oldest(events.pop(0), time - 100)
            if num_targets == 1:
                left = soft.look_up(index, targets)
                np.testing.assert_allclose(left, direct(events, targets), rtol=2e-6)
    found = soft.look_up(index, targets)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, direct(events, targets), rtol=2e-6)
    again = MatchIndex(FIELDS, DECAYS)
    again.rebuild(
        {f: np.array(column) for f, column in zip(FIELDS, zip(*events, strict=True), strict=True)},
        np.arange(len(events)),
    )
    np.testing.assert_allclose(soft.look_up(again, targets), found, rtol=1e-6)
